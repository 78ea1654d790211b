"""The policies to compare: where they are, what they are called, how they were trained."""

import collections
import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax

from lerobot_jax.checkpoint import (
    CHECKPOINTS,
    PRETRAINED_MODEL,
    TRAIN_CONFIG_NAME,
    Checkpoint,
    find_checkpoint,
)
from lerobot_jax.config import EnvConfig
from lerobot_jax.errors import InputError
from lerobot_jax.eval import check_environment
from lerobot_jax.files import read_json
from lerobot_jax.metrics import METRICS_NAME, read_metrics
from lerobot_jax.policies.base import FunctionalPolicy, find_policy, load_config, load_policy
from lerobot_jax.rtc_queue import check_delay


@dataclasses.dataclass(frozen=True)
class Contestant:
    """A policy that takes part."""

    name: str
    source: str
    """As given: a folder, or a name on the Hub."""
    checkpoint: Checkpoint
    settings: Mapping[str, Any]
    """Of its training, as its train_config.json says; empty without one."""

    def load(self) -> FunctionalPolicy:
        """Load the policy onto the device."""
        policy = load_policy(self.checkpoint.folder)
        params, buffers = jax.tree.map(jax.numpy.asarray, (policy.params, policy.buffers))
        return policy.replace(params=params, buffers=buffers)

    def describe(self, policy: FunctionalPolicy) -> dict[str, Any]:
        """Tell what the loaded policy is, where it comes from and how it was trained; None: not known."""
        dataset = self.settings.get("dataset") or {}
        sources = dataset.get("mixture") or [dataset]
        names = [source["repo_id"] for source in sources if source.get("repo_id")]
        batch_size, accumulation = (
            self.settings.get(name) for name in ("batch_size", "gradient_accumulation_steps")
        )
        return {
            "name": self.name,
            "source": self.source,
            "type": policy.config.type,
            "num_parameters": sum(leaf.size for leaf in jax.tree.leaves(policy.params)),
            "n_action_steps": getattr(policy.config, "n_action_steps", 1),
            "step": self.checkpoint.step,
            "datasets": names or None,
            "batch_size": batch_size and batch_size * (accumulation or 1),
            "seed": self.settings.get("seed"),
            "training_s": training_seconds(self.checkpoint),
        }


def find_contestants(runs: Sequence[str], names: Sequence[str]) -> list[Contestant]:
    """Find the policies and name them.

    Args:
        runs: run folders, checkpoints, pretrained_model folders, names on the Hub.
        names: theirs; without any, they are made from the folders.

    Raises:
        InputError: when there are fewer than two, one is given twice, or a name cannot be.
    """
    if len(runs) < 2:
        raise InputError("give two or more: python -m lerobot_jax.compare RUN RUN ..., see --help")
    checkpoints = [find_checkpoint(Path(run) if Path(run).is_dir() else find_policy(run)) for run in runs]
    places: dict[Path, str] = {}
    for run, checkpoint in zip(runs, checkpoints, strict=True):
        place = checkpoint.folder.resolve()
        if place in places:
            raise InputError(f"{places[place]} and {run} are the same policy, {checkpoint.folder}")
        places[place] = run
    if names and len(names) != len(runs):
        raise InputError(f"--names: {len(runs)} policies need as many names, not {len(names)}")
    if len(set(names)) != len(names) or any(not n or "/" in n or n.startswith(".") for n in names):
        raise InputError(f"--names must differ, and folders are called by them, so not: {' '.join(names)}")
    names = names or make_names(runs, checkpoints)
    if len(set(names)) != len(names):
        raise InputError(
            f"the folders' names do not tell the policies apart ({' '.join(names)}); give --names"
        )
    return [
        Contestant(name, run, checkpoint, _settings(checkpoint.folder))
        for name, run, checkpoint in zip(names, runs, checkpoints, strict=True)
    ]


def make_names(runs: Sequence[str], checkpoints: Sequence[Checkpoint]) -> list[str]:
    """Name policies by their runs' folders, with as many parents or steps as it takes to tell them apart."""
    paths, steps = [], []
    for run, checkpoint in zip(runs, checkpoints, strict=True):
        place = checkpoint.run or checkpoint.folder.resolve()
        if not Path(run).is_dir():  # on the Hub
            place = Path(run)
        parts = [part for part in place.parts if part not in (PRETRAINED_MODEL, CHECKPOINTS, "/")]
        paths.append(parts)
        steps.append(checkpoint.step)
    num_of_run = collections.Counter(map(tuple, paths))
    depth = 1
    while len({tuple(parts[-depth:]) for parts in paths}) < len(num_of_run):
        depth += 1
    return [
        "_".join(parts[-depth:]) + (f"@{step}" if num_of_run[tuple(parts)] > 1 and step is not None else "")
        for parts, step in zip(paths, steps, strict=True)
    ]


def check_contestants(contestants: Sequence[Contestant], env: EnvConfig, inference_delay: int = 0) -> None:
    """Raise `InputError` unless all policies act alike, suit the environment and can act with the delay."""
    configs = [load_config(contestant.checkpoint.folder) for contestant in contestants]
    first, shape = contestants[0], configs[0].action_feature.shape
    for contestant, config in zip(contestants, configs, strict=True):
        other = config.action_feature.shape
        if other != shape:
            raise InputError(
                f"{first.name} and {contestant.name} act in different spaces: their actions have shapes "
                f"{shape} and {other}"
            )
        trained_in = (contestant.settings.get("env") or {}).get("type")
        if trained_in not in (None, env.type):
            raise InputError(f"{contestant.name} was made for env.type={trained_in}, not for {env.type}")
        try:
            check_environment(config, env)
            check_delay(config, inference_delay)
        except InputError as error:
            raise InputError(f"{contestant.name}: {error}") from None


def training_seconds(checkpoint: Checkpoint) -> float | None:
    """Add up the time that a run spent in training steps up to a checkpoint, from its metrics.jsonl.

    Waiting for data is part of it; compilation, evaluations, saving and steps that were lost to a crash are not.
    None: the policy's run is not known, or its log does not reach the checkpoint.
    """
    if checkpoint.run is None or checkpoint.step is None:
        return None
    seconds, done = 0.0, 0
    for record in read_metrics(checkpoint.run / METRICS_NAME):
        if "steps_per_s" not in record or done >= checkpoint.step:
            continue
        steps = min(record["step"], checkpoint.step) - done
        seconds += steps / record["steps_per_s"]
        done += steps
    return seconds if done == checkpoint.step else None


def _settings(folder: Path) -> Mapping[str, Any]:
    path = folder / TRAIN_CONFIG_NAME
    return read_json(path) if path.exists() else {}
