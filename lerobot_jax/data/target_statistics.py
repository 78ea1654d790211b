"""The statistics of what is normalized, exactly, from a dataset's columns: of action targets, and missing ones.

stats.json knows the absolute actions only. For relative actions, LeRobot's users must run `lerobot-edit-dataset`
with `recompute_stats` and the policy's chunk size; here they are computed whenever training begins. Mirrors
`lerobot.datasets.compute_stats.compute_relative_action_stats`: every chunk that lies within one episode counts, so
padded steps never do. The chunks at an episode's end, which training pads, do not count either, as in LeRobot.

Three differences, on purpose: quantiles are exact, where LeRobot reads them off histograms with 5000 bins and, in
stats.json, averages those of the episodes; moments are summed up in float64; and the joints of a dataset that lists
its names by group, {"motors": [...]}, can be excluded, where LeRobot finds none of them.
"""

import dataclasses
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
from absl import logging
from jaxtyping import Float, Int

from lerobot_jax.data.statistics import QUANTILES, exact_statistics
from lerobot_jax.errors import InputError
from lerobot_jax.features import ACTION, OBS_PREFIX, OBS_STATE
from lerobot_jax.processors.actions import ActionTarget, Representation, to_target
from lerobot_jax.progress import progress_bar

Columns = Mapping[str, np.ndarray]
Stats = dict[str, dict[str, np.ndarray]]
BLOCK = 1 << 22  # numbers that are transformed at once
WORKERS = 4  # dimensions at once; each holds one float32 for every step of every chunk


def target_statistics(
    columns: Columns, target: ActionTarget, deltas: Sequence[int] | None
) -> dict[str, np.ndarray]:
    """Compute min, max, mean, std, quantiles and count of what a policy predicts.

    Args:
        columns: the dataset's `action`, `observation.state`, `episode_index` and `frame_index`, one row a frame.
        target: what is predicted; its joints have names.
        deltas: the policy's `action_delta_indices`.

    Returns:
        Arrays of shape (act,), or (chunk, act) with `statistics_per_step`; `count` is (1,) or (chunk,).

    Raises:
        InputError: when there is no state, no episode is as long as a chunk, or the chunk does not begin at the
            observation although the target needs that.
    """
    steps = np.zeros(1, np.int64) if deltas is None else np.asarray(deltas, np.int64)
    counted_from_0 = np.array_equal(steps, np.arange(len(steps)))
    if (target.representation == "delta" or target.statistics_per_step) and not counted_from_0:
        raise InputError(
            "action_target: deltas and statistics_per_step need a policy whose chunk begins at the observation; "
            f"this one predicts the steps {steps[0]} to {steps[-1]}"
        )
    starts = _whole_chunks(columns["episode_index"], columns["frame_index"], steps)
    actions = columns[ACTION].reshape(len(columns[ACTION]), -1)
    width = actions.shape[1]
    state = _state(columns, target, width)
    moving = target.moving(width)

    def summarize_dimension(i: int) -> dict[str, np.ndarray]:
        representation = target.representation if moving[i] else "absolute"
        values = _targets(actions[:, i], state[:, i], representation, starts, steps)
        return _summarize(values if target.statistics_per_step else values.reshape(-1, 1))

    with (
        ThreadPoolExecutor(WORKERS) as pool,
        progress_bar("action statistics", width, "dimension", delay=2) as bar,
    ):
        parts = []
        for part in pool.map(summarize_dimension, range(width)):
            parts.append(part)
            bar.update()
    joined = {name: np.stack([part[name] for part in parts], axis=-1) for name in parts[0]}
    if target.statistics_per_step:
        return joined | {"count": np.full(len(steps), len(starts))}
    return {name: value[0] for name, value in joined.items()} | {
        "count": np.array([starts.size * steps.size])
    }


def complete_statistics(stats: Mapping[str, Mapping[str, np.ndarray]], columns: Columns) -> Stats:
    """Give a dataset's statistics with those of observations and actions that it lacks, quantiles above all."""
    completed = {key: dict(values) for key, values in stats.items()}
    for key, column in columns.items():
        known = completed.get(key, {})
        missing = {"min", "max", "mean", "std", *QUANTILES} - known.keys()
        if key.startswith((OBS_PREFIX, ACTION)) and column.dtype != object and missing:
            logging.info("computing %s of '%s', which stats.json lacks", ", ".join(sorted(missing)), key)
            completed[key] = exact_statistics(column) | known
    return completed


def name_joints(
    target: ActionTarget, features: Mapping[str, Mapping[str, Any]], *, also_absolute: bool = False
) -> ActionTarget:
    """Give the target with the names of a dataset's action dimensions, if it is not absolute.

    Args:
        target: what is predicted.
        features: what info.json says of the features.
        also_absolute: name them for absolute actions too, of which no joint is excluded.

    Raises:
        InputError: naming an excluded joint that the dataset does not have.
    """
    is_absolute = target.representation == "absolute"
    if ACTION not in features or (is_absolute and not also_absolute):
        return target
    names = features[ACTION].get("names")
    if isinstance(names, Mapping):  # {"motors": [...]}, or {name: place}
        grouped = [name for group in names.values() if isinstance(group, list | tuple) for name in group]
        names = grouped or list(names)
    known = target.action_names
    if names is not None and len(names) == features[ACTION]["shape"][0]:
        known = tuple(map(str, names))
    for joint in () if is_absolute else filter(None, target.exclude_joints):
        if not any(joint.lower() in name.lower() for name in known or ()):
            has = f"names {', '.join(known)}" if known else "does not name its action's dimensions"
            raise InputError(
                f"action_target.exclude_joints (LeRobot's relative_exclude_joints): no joint is called '{joint}'; "
                f"the dataset {has}"
            )
    return dataclasses.replace(target, action_names=known)


def _whole_chunks(
    episode: Int[np.ndarray, " n"], frame: Int[np.ndarray, " n"], steps: Int[np.ndarray, " chunk"]
) -> Int[np.ndarray, " starts"]:
    """List the rows whose chunk lies within one episode."""
    is_new = np.ones(len(episode), bool)
    is_new[1:] = (np.diff(episode) != 0) | (np.diff(frame) != 1)
    run = np.cumsum(is_new)
    first, last = min(0, int(steps.min())), max(0, int(steps.max()))
    rows = np.arange(-first, len(run) - last)
    starts = rows[run[rows + first] == run[rows + last]]
    lengths, span = np.bincount(run)[1:], last - first + 1
    if len(starts) == 0:
        raise InputError(
            f"action statistics: no episode has the {span} frames of a chunk, the longest has {lengths.max()}; "
            "lower policy.chunk_size"
        )
    short = int((lengths < span).sum())
    logging.info("statistics of actions: %d chunks of %d steps", len(starts), len(steps))
    if short:
        logging.warning("%d of %d episodes are shorter than a chunk and do not count", short, len(lengths))
    return starts


def _state(columns: Columns, target: ActionTarget, width: int) -> np.ndarray:
    """Give the state's first `width` dimensions; zeros if nothing is relative to it."""
    if target.representation == "absolute":
        return np.zeros((len(columns[ACTION]), width), np.float32)
    if OBS_STATE not in columns:
        raise InputError(
            f"{target.representation} actions need '{OBS_STATE}', the dataset has {sorted(columns)}"
        )
    state = columns[OBS_STATE].reshape(len(columns[OBS_STATE]), -1)
    if state.shape[1] < width:
        raise InputError(
            f"{target.representation} actions need the {width} dimensions of '{ACTION}' in '{OBS_STATE}', "
            f"which has {state.shape[1]}"
        )
    return state


def _targets(
    action: Float[np.ndarray, " n"],
    state: Float[np.ndarray, " n"],
    representation: Representation,
    starts: Int[np.ndarray, " starts"],
    steps: Int[np.ndarray, " chunk"],
) -> Float[np.ndarray, "starts chunk"]:
    """Compute one dimension of what is predicted in each chunk."""
    target = ActionTarget(representation)
    values = np.empty((len(starts), len(steps)), np.float32)
    rows = max(1, BLOCK // len(steps))
    for i in range(0, len(starts), rows):
        some = starts[i : i + rows]
        chunks = action[some[:, None] + steps, None]
        values[i : i + rows] = to_target(chunks, state[some, None], target)[..., 0]
    return values


def _summarize(values: Float[np.ndarray, "n m"]) -> dict[str, Float[np.ndarray, " m"]]:
    """Compute min, max, mean, std and exact quantiles of each column; reorders the values."""
    rows = max(1, BLOCK // values.shape[1])
    blocks = [values[i : i + rows] for i in range(0, len(values), rows)]
    summary = {"min": values.min(axis=0), "max": values.max(axis=0)}
    mean = sum(block.sum(axis=0, dtype=np.float64) for block in blocks) / len(values)
    variance = sum(np.square(block - mean).sum(axis=0) for block in blocks) / len(values)
    summary |= {"mean": mean, "std": np.sqrt(variance)}
    quantiles = np.quantile(values, list(QUANTILES.values()), axis=0, overwrite_input=True)
    return summary | dict(zip(QUANTILES, quantiles, strict=True))
