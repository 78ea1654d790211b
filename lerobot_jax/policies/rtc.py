"""Real-time chunking: a new chunk of actions agrees with what is left of the one before; for flow policies.

Papers: "Real-Time Execution of Action Chunking Flow Policies" (https://arxiv.org/abs/2506.07339) and, for
`guidance="trained"`, "Training-Time Action Conditioning for Efficient Real-Time Chunking"
(https://arxiv.org/abs/2512.05964). Mirrors `lerobot.policies.rtc` and `lerobot.policies.common.flow_matching`: flow
time goes from 1 (noise) to 0 (actions), the velocity is noise - actions.

Differences, on purpose: delay and horizon may be traced, so one compiled program serves all of them; LeRobot's
tracker of intermediate results is not here, `debug` changes nothing.
"""

import dataclasses
from collections.abc import Callable
from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from lerobot_jax.policies.action_prefix import times_of_actions, with_prefix

Schedule = Literal["ZEROS", "ONES", "LINEAR", "EXP"]
Guidance = Literal["lerobot", "vjp", "trained"]
Count = int | Int[Array, ""]
Denoise = Callable[[Float[Array, "b chunk act"]], Float[Array, "b chunk act"]]
DenoiseAt = Callable[[Float[Array, "b chunk act"], Float[Array, "b *chunk"]], Float[Array, "b chunk act"]]


@dataclasses.dataclass(frozen=True)
class RTCConfig:
    """How a new chunk is made to agree with the one that is being executed."""

    enabled: bool = True
    """Whether it is."""
    prefix_attention_schedule: Schedule = "LINEAR"
    """How the weight of the old actions falls from the delay's end to the horizon's: ZEROS at once, ONES not at
    all, LINEAR, EXP faster than that."""
    max_guidance_weight: float = 10.0
    """The most that the correction is multiplied by."""
    execution_horizon: int = 10
    """How many of the old actions count, those of the delay included."""
    debug: bool = False
    """LeRobot's: record each denoising step there; nothing here."""
    debug_maxlen: int = 100
    """LeRobot's: how many of them."""
    guidance: Guidance = dataclasses.field(default="lerobot", metadata={"in_lerobot": False})
    """The correction. lerobot: the error itself, as in stock LeRobot. vjp: the error pulled back through the
    policy, as in the paper, which costs a backward pass. trained: none; the policy is given the old actions of the
    delay, and must have been trained so (rtc_training_delay)."""

    def __post_init__(self):
        if self.max_guidance_weight <= 0:
            raise ValueError(
                f"rtc_config.max_guidance_weight must be positive, not {self.max_guidance_weight}"
            )
        if self.debug_maxlen <= 0:
            raise ValueError(f"rtc_config.debug_maxlen must be positive, not {self.debug_maxlen}")
        if self.execution_horizon < 0:
            raise ValueError(
                f"rtc_config.execution_horizon must not be negative, it is {self.execution_horizon}"
            )


def prefix_weights(
    schedule: Schedule,
    inference_delay: Count,
    execution_horizon: Count,
    total: int,
) -> Float[Array, " chunk"]:
    """Give the weight of each old action: 1 within the delay, 0 from the horizon on, falling between.

    Mirrors `RTCProcessor.get_prefix_weights`.
    """
    start = jnp.minimum(inference_delay, execution_horizon)
    index, end = jnp.arange(total), jnp.minimum(execution_horizon, total)
    # torch.linspace's steps from 1 to 0 without its ends, which counts from the nearer end
    count, position = jnp.maximum(end - start, 0) + 1, index - start + 1
    step = 1 / count.astype(jnp.float32)
    line = jnp.where(2 * position < count + 1, 1 - step * position, step * (count - position))
    between = {
        "ZEROS": jnp.zeros(total),
        "ONES": jnp.ones(total),
        "LINEAR": line,
        "EXP": line * (jnp.expm1(line) / np.float32(np.e - 1)),
    }[schedule]
    is_full = index < (execution_horizon if schedule == "ONES" else start)
    return jnp.where(is_full, 1.0, jnp.where(index < end, between, 0.0))


def guidance_weight(max_guidance_weight: float, time: float) -> np.float32:
    """Give what the correction is multiplied by at a flow time, computed as stock does, in float32."""
    tau, most = np.float32(1 - time), np.float32(max_guidance_weight)
    with np.errstate(divide="ignore", invalid="ignore"):
        squared = (1 - tau) ** 2
        inv_r2 = (squared + tau**2) / squared
        c = np.nan_to_num((1 - tau) / tau, posinf=float(most))
        return np.minimum(np.nan_to_num(c * inv_r2, posinf=float(most)), most)


def guided_velocity(
    config: RTCConfig,
    denoise: Denoise,
    x_t: Float[Array, "b chunk act"],
    time: float | Float[Array, ""],
    prev_chunk_left_over: Float[Array, "b left some"],
    inference_delay: Count,
    execution_horizon: Count,
    weight: np.float32 | Float[Array, ""] | None = None,
) -> Float[Array, "b chunk act"]:
    """Give the velocity that leads to actions near those left over from the chunk before.

    Mirrors `RTCProcessor.denoise_step`.

    Args:
        config: which guidance, lerobot or vjp, how strong, and the schedule.
        denoise: gives the velocity at x_t.
        x_t: the noisy actions.
        time: their flow time, 1 is noise.
        prev_chunk_left_over: the old chunk's actions that were not yet executed; missing steps and dimensions are
            0, and the horizon ends with the last step.
        inference_delay: how many of them will be executed before the new chunk is there.
        execution_horizon: how many of them count; 0: no guidance.
        weight: the `guidance_weight` of this time, needed if the time is traced.
    """
    old, horizon = _as_chunk(prev_chunk_left_over, x_t.shape, execution_horizon)
    weights = prefix_weights(config.prefix_attention_schedule, inference_delay, horizon, x_t.shape[1])
    if weight is None:
        weight = guidance_weight(config.max_guidance_weight, float(time))

    def clean_actions(x):
        velocity = denoise(x)
        return x - time * velocity, velocity

    if config.guidance == "vjp":
        actions, pull_back, velocity = jax.vjp(clean_actions, x_t, has_aux=True)
        (correction,) = pull_back((old - actions) * weights[None, :, None])
    else:
        actions, velocity = clean_actions(x_t)
        correction = (old - actions) * weights[None, :, None]
    return velocity - weight * correction


def euler(
    denoise: DenoiseAt,
    noise: Float[Array, "b chunk act"],
    num_steps: int,
    *,
    config: RTCConfig | None = None,
    prev_chunk_left_over: Float[Array, "b left some"] | None = None,
    inference_delay: Count | None = None,
    execution_horizon: Count | None = None,
) -> Float[Array, "b chunk act"]:
    """Follow the velocity from noise (time 1) to actions (time 0), with RTC along the old chunk if there is one.

    Mirrors `euler_integrate`.

    Args:
        denoise: gives the velocity for x_t and the time of each sample (b,), or, with `guidance="trained"` and an
            old chunk, of each action (b, chunk).
        noise: standard normal.
        num_steps: into how many steps the time is divided.
        config: RTC's settings; None: off.
        prev_chunk_left_over, inference_delay: see `guided_velocity`.
        execution_horizon: None: the config's.
    """
    dt = -1.0 / num_steps
    times = [1.0 + step * dt for step in range(num_steps)]
    inputs = jnp.asarray(times, jnp.float32)
    if config is None or not config.enabled or prev_chunk_left_over is None:

        def advance(x_t, time):
            return x_t + dt * denoise(x_t, jnp.broadcast_to(time, len(x_t))), None

        return jax.lax.scan(advance, noise, inputs)[0]

    if inference_delay is None:
        raise ValueError("prev_chunk_left_over needs inference_delay")
    old, delay = prev_chunk_left_over, inference_delay
    horizon = config.execution_horizon if execution_horizon is None else execution_horizon
    if config.guidance == "trained":
        old, horizon = _as_chunk(old, noise.shape, horizon)
        delays = jnp.broadcast_to(jnp.minimum(delay, horizon), len(noise))

        def advance_rest(x_t, time):
            times = times_of_actions(jnp.broadcast_to(time, len(x_t)), delays, x_t.shape[1])
            return with_prefix(old, x_t + dt * denoise(x_t, times), delays), None

        return jax.lax.scan(advance_rest, with_prefix(old, noise, delays), inputs)[0]

    weights = [guidance_weight(config.max_guidance_weight, time) for time in times]

    def advance_guided(x_t, inputs):
        time, weight = inputs
        of_samples = jnp.broadcast_to(time, len(x_t))
        velocity = guided_velocity(
            config, lambda x: denoise(x, of_samples), x_t, time, old, delay, horizon, weight
        )
        return x_t + dt * velocity, None

    return jax.lax.scan(advance_guided, noise, (inputs, jnp.asarray(weights, jnp.float32)))[0]


def _as_chunk(
    left_over: Float[Array, "b left some"], shape: tuple[int, ...], horizon: Count
) -> tuple[Float[Array, "b chunk act"], Int[Array, ""]]:
    """Fill what is left of a chunk up with zeros; give the horizon that leaves the added steps out."""
    steps, dims = left_over.shape[1:]
    if steps > shape[1] or dims > shape[2]:
        raise ValueError(
            f"prev_chunk_left_over has {steps} x {dims} actions, a chunk has {shape[1]} x {shape[2]}"
        )
    padding = (0, 0), (0, shape[1] - steps), (0, shape[2] - dims)
    return jnp.pad(left_over, padding), jnp.minimum(horizon, steps)
