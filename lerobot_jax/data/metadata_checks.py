"""Whether what `meta/` says of a dataset's episodes is consistent, in any format."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from lerobot_jax.data import info as dataset_info
from lerobot_jax.errors import InputError


def check_episodes(
    root: Path, info: Mapping[str, Any], tasks: Sequence[str], episodes: Mapping[str, Any]
) -> None:
    """Check that episodes follow each other without gaps and add up to info.json, and lie apart in the videos.

    Args:
        root: the dataset's folder, for the messages.
        info: info.json, checked.
        tasks: the task descriptions.
        episodes: the columns, one entry an episode.

    Raises:
        InputError: naming the first episode that is wrong.
    """
    where = root / dataset_info.EPISODES_IN[info["codebase_version"]]
    info_path = root / dataset_info.INFO_PATH
    lengths = episodes["length"]
    if not np.array_equal(episodes["episode_index"], np.arange(len(lengths))):
        raise InputError(f"{where}: episode_index must count 0, 1, 2, ... without gaps or repeats")
    if info["total_episodes"] != len(lengths):
        raise InputError(
            f"{info_path}: total_episodes is {info['total_episodes']}, {where} has {len(lengths)}"
        )
    _check_each(where, "length", lengths, lengths > 0)
    _check_each(
        info_path, f"total_frames is {info['total_frames']}, length", lengths, lengths <= info["total_frames"]
    )
    if info["total_frames"] != int(lengths.sum()):
        raise InputError(
            f"{info_path}: total_frames is {info['total_frames']}, {where} has {int(lengths.sum())}"
        )
    starts, ends = episodes["dataset_from_index"], episodes["dataset_to_index"]
    wrong = (ends - starts != lengths) | (ends != np.cumsum(lengths))
    if wrong.any():
        bad = int(np.flatnonzero(wrong)[0])
        raise InputError(
            f"{where}: episode {bad} has length {lengths[bad]} but spans frames {starts[bad]} to {ends[bad]} "
            "(dataset_from_index, dataset_to_index); episodes must follow each other without gaps"
        )
    videos = [key for key, feature in info["features"].items() if feature["dtype"] == "video"]
    for part in ("data", *(f"videos/{key}" for key in videos)):
        for name in (f"{part}/chunk_index", f"{part}/file_index"):
            _check_each(where, name, episodes[name], episodes[name] >= 0)
    tasks_path = root / dataset_info.TASKS_IN[info["codebase_version"]]
    if info.get("total_tasks", len(tasks)) != len(tasks):
        raise InputError(f"{info_path}: total_tasks is {info['total_tasks']}, {tasks_path} has {len(tasks)}")
    _check_tasks(where, tasks_path, tasks, episodes["tasks"])
    for key in videos:
        _check_video_times(where, key, _frame_rate(info, info["features"][key]), episodes)


def _check_each(where: Path, name: str, values: np.ndarray, is_right: np.ndarray) -> None:
    if not is_right.all():
        bad = int(np.flatnonzero(~is_right)[0])
        raise InputError(f"{where}: {name} of episode {bad} is {values[bad]}")


def _check_tasks(where: Path, tasks_path: Path, tasks: Sequence[str], chosen: Sequence[Any]) -> None:
    known = set(tasks)
    for episode, names in enumerate(chosen):
        if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
            raise InputError(
                f"{where}: tasks of episode {episode} must be a list of texts, it is {dataset_info.shown(names)}"
            )
        unknown = [name for name in names if name not in known]
        if unknown:
            raise InputError(
                f"{where}: episode {episode} has the task {dataset_info.shown(unknown[0])}, which is not among the "
                f"{len(tasks)} in {tasks_path}"
            )


def _frame_rate(info: Mapping[str, Any], feature: Mapping[str, Any]) -> float:
    """Give the frames a second that a video has, at least: LeRobot's converter rounds info.json's fps down."""
    details = feature.get("info") or feature.get("video_info") or {}
    own = details.get("video.fps")
    is_rate = isinstance(own, (int, float)) and own <= dataset_info.MAX_FPS
    return max(info["fps"], own) if is_rate else info["fps"]


def _check_video_times(where: Path, key: str, rate: float, episodes: Mapping[str, Any]) -> None:
    start, end = (episodes[f"videos/{key}/{name}_timestamp"] for name in ("from", "to"))
    lengths = episodes["length"]
    _check_each(where, f"videos/{key}/from_timestamp", start, np.isfinite(start) & (start >= 0))
    _check_each(where, f"videos/{key}/to_timestamp", end, np.isfinite(end))
    slack = 0.5 / rate + 1e-6  # half a frame
    too_short = end - start < lengths / rate - slack
    if too_short.any():
        bad = int(np.flatnonzero(too_short)[0])
        raise InputError(
            f"{where}: videos/{key}: episode {bad} has {lengths[bad]} frames, too many for {start[bad]:.3f} s to "
            f"{end[bad]:.3f} s at {rate} frames a second"
        )
    chunk, file = (episodes[f"videos/{key}/{name}_index"] for name in ("chunk", "file"))
    order = np.lexsort((start, file, chunk))
    before, after = order[:-1], order[1:]
    same_file = (chunk[before] == chunk[after]) & (file[before] == file[after])
    overlap = same_file & (start[after] < end[before] - slack)
    if overlap.any():
        i = int(np.flatnonzero(overlap)[0])
        raise InputError(
            f"{where}: videos/{key}: episodes {before[i]} and {after[i]} overlap: the first ends at "
            f"{end[before[i]]:.3f} s, the second begins at {start[after[i]]:.3f} s of the same file"
        )
