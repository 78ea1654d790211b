"""Environments side by side, for evaluations."""

import functools
from typing import Any

import gymnasium

from lerobot_jax.config import EnvConfig
from lerobot_jax.envs import pusht
from lerobot_jax.errors import InputError
from lerobot_jax.features import FeatureType, PolicyFeature


def make_vector_env(
    config: EnvConfig, obs_type: str, num_envs: int, use_async_envs: bool
) -> gymnasium.vector.VectorEnv:
    """Make environments that are reset one by one, with `options={"reset_mask": ...}`."""
    make = functools.partial(
        pusht.make_pusht, obs_type, config.episode_length, visualization_width=384, visualization_height=384
    )
    manual_reset = gymnasium.vector.AutoresetMode.DISABLED
    if use_async_envs and num_envs > 1:
        return gymnasium.vector.AsyncVectorEnv(
            [make] * num_envs, context="forkserver", autoreset_mode=manual_reset
        )
    return gymnasium.vector.SyncVectorEnv([make] * num_envs, autoreset_mode=manual_reset)


def task_texts(envs: Any) -> list[str]:
    """Give what is to be done in each environment: its `task_description`, or its `task`, as LeRobot asks for them.

    Args:
        envs: synchronous or asynchronous ones, as `make_vector_env` gives them.

    Raises:
        InputError: when an environment has neither, where LeRobot tells the policy an empty text.
    """
    for name in ("task_description", "task"):
        if all(envs.call("has_wrapper_attr", name)):
            return list(envs.call(name))
    raise InputError("the policy is told what to do, but the environment has no task_description and no task")


def observation_type(config: EnvConfig, inputs: dict[str, PolicyFeature]) -> str:
    """Choose what the environment shows: as configured, else what the policy's inputs ask for."""
    if config.obs_type is not None:
        return config.obs_type
    kinds = {feature.type for feature in inputs.values()}
    if {FeatureType.VISUAL, FeatureType.ENV} <= kinds:
        raise InputError(f"env.type={config.type} shows images or environment_state, not both")
    if FeatureType.ENV in kinds:
        return "environment_state_agent_pos"
    if FeatureType.VISUAL in kinds:
        return "pixels_agent_pos" if FeatureType.STATE in kinds else "pixels"
    return "state"
