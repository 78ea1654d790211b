"""How long a policy thinks: the time of `select_action` when it has to predict a chunk, for one robot.

That is all between an observation on the host and actions on the host: preprocessing, the network with all its
denoising steps, postprocessing. Policies take turns, so that what else the machine does slows all of them alike.
"""

import os
import time
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
from absl import logging

from lerobot_jax.config import EnvConfig
from lerobot_jax.features import TASK
from lerobot_jax.policies.base import FunctionalPolicy
from lerobot_jax.progress import progress_bar
from lerobot_jax.rollout import Runner

_NUM_WARM_UPS = 2  # the first compiles


class Variant(NamedTuple):
    """A policy with a number of denoising steps; None: it has none."""

    name: str
    denoising_steps: int | None
    is_configured: bool
    runner: Runner
    observation: Mapping[str, Any]


def make_variants(
    name: str, policy: FunctionalPolicy, env: EnvConfig, seed: int, denoising_steps: Sequence[int]
) -> list[Variant]:
    """Make what is to be measured of a policy: as it is configured, and with other numbers of denoising steps."""
    observation = _first_observation(policy, env, seed)
    setting = policy.config.denoising_steps
    if setting is None:
        return [Variant(name, None, True, policy.make_runner(1, seed), observation)]
    field, configured = setting
    variants = []
    for steps in sorted({configured, *denoising_steps}):
        try:
            other = policy if steps == configured else policy.with_settings(**{field: steps})
        except ValueError as error:
            logging.info("%s cannot act in %d denoising steps: %s", name, steps, error)
            continue
        variants.append(Variant(name, steps, steps == configured, other.make_runner(1, seed), observation))
    return variants


def measure(variants: Sequence[Variant], rounds: int) -> list[dict[str, Any]]:
    """Measure each variant once a round; give milliseconds: the median and the 99th percentile of all rounds."""
    times = np.zeros((rounds, len(variants)))
    with progress_bar("measuring latency", (rounds + _NUM_WARM_UPS) * len(variants), "chunk") as bar:
        for turn in range(-_NUM_WARM_UPS, rounds):
            for place in range(len(variants)):
                i = (place + turn) % len(variants)  # nobody always comes after the same
                seconds = _time_of_chunk(variants[i], turn + _NUM_WARM_UPS)
                if turn >= 0:
                    times[turn, i] = seconds
                bar.update()
    p50, p99 = np.percentile(1000 * times, [50, 99], axis=0)
    return [
        {
            "name": variant.name,
            "denoising_steps": variant.denoising_steps,
            "is_configured": variant.is_configured,
            "p50_ms": float(p50[i]),
            "p99_ms": float(p99[i]),
        }
        for i, variant in enumerate(variants)
    ]


def describe_machine() -> str:
    """Say on what the latencies were measured."""
    device = jax.devices()[0]
    if device.platform == "cpu":
        return f"{os.cpu_count()} CPU cores"
    return f"one {device.device_kind}"


def _time_of_chunk(variant: Variant, episode: int) -> float:
    variant.runner.reset(0, episode)  # so that the next action needs a chunk
    start = time.perf_counter()
    variant.runner.select_action(variant.observation)
    return time.perf_counter() - start


def _first_observation(policy: FunctionalPolicy, env: EnvConfig, seed: int) -> Mapping[str, Any]:
    from lerobot_jax.envs.vector import make_vector_env, observation_type, task_texts

    envs = make_vector_env(env, observation_type(env, policy.config.input_features), 1, use_async_envs=False)
    observation, _ = envs.reset(seed=seed)
    if policy.preprocessor.has_text:
        observation = {**observation, TASK: task_texts(envs)}
    envs.close()
    return observation
