"""A run's folder: the checkpoints with the train state (Orbax) and the policy (LeRobot's format).

    outputs/<job>/
      train_config.json  metrics.jsonl  curves.png  eval/
      checkpoints/005000/pretrained_model/   what stock LeRobot loads
      checkpoints/005000/training_state/     what a resumed run continues from
      checkpoints/005000/adapter/            with LoRA: the adapters alone, for PEFT
      checkpoints/last -> 005000, checkpoints/best -> 004000

With several seeds, each has such a folder, outputs/<job>/seed_<seed>/, beside the train_config.json of them all.

A checkpoint is written beside its place and appears there by one rename, so it is complete or absent.
"""

import dataclasses
import json
import math
import shutil
import socket
import time
import uuid
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
import orbax.checkpoint as ocp
from absl import logging
from flax.traverse_util import flatten_dict, unflatten_dict

from lerobot_jax import distributed, lora, optim
from lerobot_jax.config import TrainConfig
from lerobot_jax.errors import InputError
from lerobot_jax.files import read_json, write_json
from lerobot_jax.optim_config import EMAConfig, SWAConfig
from lerobot_jax.policies.base import FunctionalPolicy
from lerobot_jax.policies.config import CONFIG_NAME
from lerobot_jax.processors import PREPROCESSOR_NAME, load_pipelines
from lerobot_jax.trainable import combine

Tree = dict[str, Any]

CHECKPOINTS, PRETRAINED_MODEL, TRAINING_STATE = "checkpoints", "pretrained_model", "training_state"
ADAPTER = (
    "adapter"  # beside pretrained_model of a run with LoRA: PEFT's adapters, as stock LeRobot writes them
)
DATASETS = "datasets"  # in pretrained_model of a run on a mixture: the processors for each dataset
TRAIN_CONFIG_NAME = "train_config.json"
# What may differ between a run and its continuation without changing what is computed up to the same step.
FREE_ON_RESUME = (
    "resume",
    "dataset.root",
    "dataset.frame_mode",
    "dataset.frame_cache_gb",
    "output_dir",
    "job_name",
    "distributed",
    "steps",
    "env",
    "eval",
    "wandb",
    "mesh",
    "remat",
    "num_workers",
    "prefetch_factor",
    "log_freq",
    "eval_steps",
    "max_eval_samples",
    "env_eval_freq",
    "save_checkpoint",
    "save_freq",
    "keep_last",
    "best_metric",
    "policy.push_to_hub",
    "policy.repo_id",
    "policy.private",
    "policy.tags",
    "policy.license",
)
# What each process of a run may have its own of.
FREE_FOR_EACH_PROCESS = ("distributed", "root", "num_workers", "prefetch_factor")
VISIBLE_WITHIN = 30.0  # seconds in which a shared file system shows a new file on all machines
# What runs had that began before there was such a setting.
_NEW_SETTINGS = {"num_seeds": 1, "freeze": [], "peft": None, "sample_weighting": None}
_NEW_SETTINGS |= {"ema": dataclasses.asdict(EMAConfig()), "swa": dataclasses.asdict(SWAConfig())}


class Checkpoint(NamedTuple):
    """A policy's folder, and where it comes from if that is known."""

    folder: Path
    run: Path | None = None
    step: int | None = None


def open_run(config: TrainConfig) -> TrainConfig:
    """Check that the run's folder is free, or holds a run that can be continued; process 0 does it for all.

    Returns:
        The config; a resumed run keeps to the dataset's commit that it began with.

    Raises:
        InputError: if the folder is in use and `resume` is off; if there is no run to resume, or a setting that
            changes what is computed differs from the run's.
    """
    opened = _open_run(config) if distributed.is_first() else config
    revisions = distributed.from_first([source.revision for source in opened.dataset.sources])
    return dataclasses.replace(config, dataset=config.dataset.pinned(revisions))


def _open_run(config: TrainConfig) -> TrainConfig:
    folder = config.run_dir
    if config.resume:
        if not (folder / TRAIN_CONFIG_NAME).exists():
            raise InputError(f"{folder}: no run to resume; leave out --config.resume")
        before = _NEW_SETTINGS | read_json(folder / TRAIN_CONFIG_NAME)
        config = _keep_revisions(config, before["dataset"])
        _check_same(before, json.loads(json.dumps(config.to_dict())), folder / TRAIN_CONFIG_NAME)
        _warn_of_another_schedule(config, before["steps"])
        _tell_of_later_checkpoints(config)
        for rest in (rest for run in config.runs for rest in (run.run_dir / CHECKPOINTS).glob(".*")):
            remove(rest)
    elif folder.exists() and any(folder.iterdir()):
        steps = common_steps(config.runs)
        last = f" (last checkpoint: step {steps[-1]})" if steps else ""
        raise InputError(
            f"{folder} already holds a run{last}: continue it with --config.resume=True, or choose another "
            "folder with --config.output_dir=..."
        )
    return config


def _tell_of_later_checkpoints(config: TrainConfig) -> None:
    """Say from where several seeds go on when some of them have later checkpoints."""
    last = (common_steps(config.runs) or [0])[-1]
    ahead = [str(run.seed) for run in config.runs if saved_steps(run.run_dir)[-1:] > [last]]
    if ahead:
        logging.warning(
            "going on at step %d, the last that all seeds have; later are %s", last, ", ".join(ahead)
        )


def _keep_revisions(config: TrainConfig, before: Mapping[str, Any]) -> TrainConfig:
    """Put the commits of the datasets that a run began with where the config names none."""
    recorded = [source["revision"] for source in before.get("mixture", ())] or [before["revision"]]
    given = [source.revision for source in config.dataset.sources]
    if len(recorded) != len(given):
        return config  # another mixture: `_check_same` says so
    revisions = [new or old for new, old in zip(given, recorded, strict=True)]
    return dataclasses.replace(config, dataset=config.dataset.pinned(revisions))


def write_train_config(config: TrainConfig) -> None:
    """Write the run's train_config.json; with several seeds also that of each.

    Raises:
        InputError: when the processes of the run do not see the same folder.
    """
    if distributed.is_first():
        _write_train_config(config)
    if distributed.group is not None:
        _check_shared(config.run_dir, distributed.group)


def _check_shared(folder: Path, group: distributed.Group) -> None:
    """Look for a file that process 0 makes in the run's folder."""
    made = folder / f".process-0-{distributed.from_first(uuid.uuid4().hex)}"
    if group.index == 0:
        made.touch()
    distributed.from_first(None)
    deadline = time.monotonic() + VISIBLE_WITHIN
    while not made.exists() and time.monotonic() < deadline:
        time.sleep(0.1)
    found = group.agreed.gather((made.exists(), socket.gethostname()))
    if group.index == 0:
        made.unlink()
    blind = [f"process {i} on {host}" for i, (sees_it, host) in enumerate(found) if not sees_it]
    if blind:
        raise InputError(
            f"{folder}: {', '.join(blind)} cannot see the folder that process 0 on {found[0][1]} has made; "
            "output_dir must be on a file system that all machines share"
        )


def _write_train_config(config: TrainConfig) -> None:
    write_json(config.to_dict(), config.run_dir / TRAIN_CONFIG_NAME)
    for run in config.runs:
        if run is not config:
            write_json(run.to_dict(), run.run_dir / TRAIN_CONFIG_NAME)
        (run.run_dir / CHECKPOINTS).mkdir(exist_ok=True)


def saved_steps(run_dir: Path) -> list[int]:
    """List the steps of a run's checkpoints, in order."""
    folder = run_dir / CHECKPOINTS
    names = [path.name for path in folder.iterdir() if path.name.isdigit()] if folder.exists() else []
    return sorted(int(name) for name in names)


def common_steps(runs: Iterable[TrainConfig]) -> list[int]:
    """List the steps of which all runs have a checkpoint, in order."""
    return sorted(set.intersection(*(set(saved_steps(run.run_dir)) for run in runs)))


def how_to_go_on(config: TrainConfig) -> str:
    """Say where a run that lost a process can be continued."""
    steps = common_steps(config.runs)
    if not steps:
        return "there is no checkpoint yet; start all processes again"
    return (
        f"the last good checkpoint is step {steps[-1]}; start all processes again with --config.resume=True"
    )


def find_pretrained_model(folder: Path, step: int | None = None) -> Path:
    """Find the policy's folder in a run's folder, a checkpoint's (or its training_state), or in its own.

    Args:
        folder: where to look.
        step: which checkpoint of a run, by default the last.

    Raises:
        InputError: saying what the folder lacks, or which steps there are.
    """
    if not folder.is_dir():
        raise InputError(f"{folder}: no such folder")
    if (folder / CHECKPOINTS).is_dir():
        steps = saved_steps(folder)
        if not steps or (step is not None and step not in steps):
            wanted = "checkpoint" if step is None else f"checkpoint of step {step}"
            there = f"there are those of the steps {', '.join(map(str, steps))}" if steps else "there is none"
            raise InputError(f"{folder / CHECKPOINTS}: no {wanted}; {there}")
        folder = folder / CHECKPOINTS / f"{steps[-1] if step is None else step:06d}"
    elif step is not None:
        raise InputError(f"{folder}: step chooses among a run's checkpoints, and this is no run's folder")
    if folder.name == TRAINING_STATE:
        folder = folder.parent
    if (folder / PRETRAINED_MODEL).is_dir():
        folder = folder / PRETRAINED_MODEL
    if not (folder / CONFIG_NAME).exists():
        seeds = sorted(path.name for path in folder.glob("seed_*") if (path / CHECKPOINTS).is_dir())
        if seeds:
            raise InputError(
                f"{folder} is a run of several seeds; give the folder of one: {', '.join(seeds)}"
            )
        raise InputError(
            f"{folder} has no {CONFIG_NAME}; give a run's folder, a checkpoint's, or a {PRETRAINED_MODEL} folder"
        )
    return folder


def find_checkpoint(folder: Path, step: int | None = None) -> Checkpoint:
    """Find the policy in a run's folder, a checkpoint's folder or a policy's own folder, and what belongs to it.

    Raises:
        InputError: saying what the folder lacks, or which steps there are.
    """
    folder = find_pretrained_model(folder, step)
    place = folder.resolve()
    is_of_run = place.name == PRETRAINED_MODEL and place.parent.name.isdigit()
    if not is_of_run or place.parents[1].name != CHECKPOINTS:
        return Checkpoint(folder)
    return Checkpoint(folder, place.parents[2], int(place.parent.name))


def load_variant(policy: FunctionalPolicy, folder: Path, dataset: str) -> FunctionalPolicy:
    """Give a policy the processors for one dataset of the mixture that it was trained on.

    Raises:
        InputError: listing the datasets that the policy's folder has processors for.
    """
    known = sorted(
        str(path.parent.relative_to(folder / DATASETS))
        for path in (folder / DATASETS).rglob(f"{PREPROCESSOR_NAME}.json")
    )
    if dataset not in known:
        there = f"it has {', '.join(known)}" if known else "it was not trained on a mixture"
        raise InputError(f"{folder}: no processors for dataset '{dataset}'; {there}")
    pre, post = load_pipelines(folder / DATASETS / dataset)
    return policy.replace(preprocessor=pre, postprocessor=post)


def restore(run_dir: Path, step: int, target: Tree) -> Tree:
    """Read the train state of a checkpoint into arrays of the target's shapes and shardings.

    Raises:
        InputError: naming the folder if it is damaged or does not fit.
    """
    path = run_dir.resolve() / CHECKPOINTS / f"{step:06d}" / TRAINING_STATE
    try:
        with ocp.Checkpointer(
            ocp.StandardCheckpointHandler(restore_concurrent_gb=_read_limit(target))
        ) as checkpointer:
            return checkpointer.restore(path, args=ocp.args.StandardRestore(target))
    except Exception as error:  # Orbax and TensorStore raise many kinds
        raise InputError(
            f"{path}: the checkpoint is damaged or incomplete ({_shortened(error)}); remove "
            f"{path.parent} to resume from the one before"
        ) from None


def restore_weights(policy: FunctionalPolicy, folder: Path, which: str | None) -> FunctionalPolicy:
    """Read the weights from a checkpoint's training_state, without the optimizer's state.

    Args:
        policy: the policy without arrays.
        folder: the training_state folder.
        which: "ema", "raw", or None for the averaged weights if there are any.

    Raises:
        InputError: naming the folder if it is damaged, does not fit, or has no averaged weights.
    """
    if not folder.is_dir():
        raise InputError(
            f"{folder}: no such folder; the weights of the last step are in a run's checkpoints only"
        )
    params, buffers = jax.eval_shape(policy.init, jax.random.key(0))
    target: Tree = {"params": params, "buffers": buffers}
    try:
        with ocp.Checkpointer(
            ocp.PyTreeCheckpointHandler(restore_concurrent_gb=_read_limit(target))
        ) as checkpointer:
            stored = checkpointer.metadata(folder.resolve()).item_metadata.tree
            has_ema = "ema" in stored
            if which == "ema" and not has_ema:
                raise InputError(
                    f"{folder} has no averaged weights: the run had neither ema_decay nor swa.start; "
                    "use --weights=raw"
                )
            is_averaged = has_ema and which != "raw"
            if "frozen" in stored:  # what is trained is a part of the policy, or adapters
                target["params"] = _stored_shapes(stored["params"], params)
            target = {"ema": target} if is_averaged else target
            if "frozen" in stored:
                target["frozen"] = _stored_shapes(stored["frozen"], params)
            as_numpy = jax.tree.map(lambda _: ocp.RestoreArgs(restore_type=np.ndarray), target)
            restored = checkpointer.restore(
                folder.resolve(),
                args=ocp.args.PyTreeRestore(item=target, restore_args=as_numpy, partial_restore=True),
            )
    except InputError:
        raise
    except Exception as error:  # Orbax and TensorStore raise many kinds
        raise InputError(f"{folder}: damaged, or not of this policy ({_shortened(error)})") from None
    weights = restored.pop("ema") if is_averaged else restored
    weights["params"] = lora.merged(combine(weights.pop("params"), restored.pop("frozen", {})))
    if jax.tree.map(np.shape, weights["params"]) != jax.tree.map(lambda x: x.shape, params):
        raise InputError(f"{folder}: not of this policy")
    return policy.replace(**weights)


def _read_limit(target: Tree) -> int:
    """Tell how many GB may be in the host's memory on the way to the devices: those of the largest array, twice."""
    largest = max(math.prod(x.shape) * x.dtype.itemsize for x in jax.tree.leaves(target))
    return 1 + math.ceil(2 * largest / 1e9)


def _stored_shapes(stored: Tree, params: Tree) -> Tree:
    """Give the shapes of stored arrays under the policy's paths; Orbax keeps positions in lists as texts."""
    paths = {tuple(map(str, path)): path for path in flatten_dict(params)}
    found = {}
    arrays: dict[Any, Any] = {**flatten_dict(stored)}
    for path, x in arrays.items():
        place = paths.get(path) or (*paths[path[:-1]], path[-1])  # or a part of a `LoraWeight`
        found[place] = jax.ShapeDtypeStruct(x.shape, x.dtype)
    return unflatten_dict(found)


def _shortened(error: Exception) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"


def _check_same(old: dict[str, Any], new: dict[str, Any], where: Path) -> None:
    for name in sorted(set(old) | set(new)):
        if name in FREE_ON_RESUME:
            continue
        before, now = old.get(name), new.get(name)
        if isinstance(before, dict) and isinstance(now, dict):
            for key in sorted(set(before) | set(now)):
                if f"{name}.{key}" not in FREE_ON_RESUME:
                    was, is_now = (_without_roots(x.get(key)) for x in (before, now))
                    _check_equal(f"{name}.{key}", was, is_now, where)
        else:
            _check_equal(name, before, now, where)


def _without_roots(value: Any) -> Any:
    """Give a setting without the folders of a mixture's datasets: they may have moved."""
    if isinstance(value, list):
        return [part | {"root": None} if isinstance(part, dict) else part for part in value]
    return value


def _check_equal(name: str, before: Any, now: Any, where: Path) -> None:
    if before != now:
        raise InputError(f"{name} is {now}, but the run to resume had {before} ({where})")


def _warn_of_another_schedule(config: TrainConfig, steps_before: int) -> None:
    step = min(config.steps, steps_before)
    now, before = (
        float(optim.make_schedule(dataclasses.replace(config, steps=steps))(step))
        for steps in (config.steps, steps_before)
    )
    if now != before:
        logging.warning(
            "steps is %d, but was %d when the run began: its learning-rate schedule changes from here on, so the "
            "result is not that of a run with %d steps from the start",
            config.steps,
            steps_before,
            config.steps,
        )


def remove(path: Path) -> None:
    """Remove a file, a link or a folder, if it is there."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)
