"""Simulated environments, scripted experts and the demonstrations that they gave. Needs the extra `sim`."""

from lerobot_jax.errors import InputError

try:
    import gym_pusht  # noqa: F401
except ImportError as error:
    raise InputError(
        f"simulation needs gym-pusht: pip install 'lerobot_jax[sim]', and libGL for its OpenCV ({error})"
    ) from None
