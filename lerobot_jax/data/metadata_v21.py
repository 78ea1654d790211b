"""The `meta/` folder of a LeRobotDataset v2.1: tasks, episodes and their statistics, one JSON object a line.

The functions give what those of `metadata.py` give; their `info` is info.json, checked. A v2.1 dataset has one
parquet file an episode, and one video file for each camera, both of which begin at time 0.

Mirrors `lerobot.scripts.convert_dataset_v21_to_v30`, and `lerobot.datasets.utils` of LeRobot 0.3.3, which wrote
v2.1.
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from lerobot_jax.data import statistics, statistics_checks
from lerobot_jax.data.info import EPISODES_IN, TASKS_IN, V21, Stats, shown
from lerobot_jax.errors import InputError

STATS_PATH = "meta/episodes_stats.jsonl"
NEEDED = ("min", "max", "mean", "std", "count")  # quantiles came with v3.0


def load_episode_statistics(root: Path, info: Mapping[str, Any]) -> list[Stats]:
    """Read and check the statistics of every episode."""
    path = root / STATS_PATH
    lines = _read_lines(path, "episode_index")
    if len(lines) != info["total_episodes"]:
        raise InputError(f"{path}: has {len(lines)} episodes, info.json declares {info['total_episodes']}")
    parts = []
    for line in lines:
        where = f"{path}: episode {line['episode_index']}"
        parts.append(statistics_checks.to_arrays(where, line.get("stats")))
        if set(parts[-1]) != set(parts[0]):
            raise InputError(
                f"{where}: has statistics of {sorted(parts[-1])}, episode 0 of {sorted(parts[0])}; they must agree"
            )
        for key, values in parts[-1].items():
            missing = [name for name in NEEDED if name not in values]
            if missing:
                raise InputError(f"{where}: statistics of '{key}' lack {', '.join(missing)}")
    statistics_checks.check_statistics(path, info["features"], parts)
    return parts


def combine(root: Path, parts: list[Stats]) -> Stats:
    """Combine the statistics of the episodes into those of the dataset, as LeRobot's `aggregate_stats` does."""
    with np.errstate(all="ignore"):  # what overflows is reported
        stats = statistics.combine_statistics(parts)
    for key, values in stats.items():
        statistics_checks.check_values(f"{root / STATS_PATH}: combined statistics of '{key}'", values)
    return stats


def load_tasks(root: Path) -> list[str]:
    """Read the task descriptions, ordered by task_index."""
    path = root / TASKS_IN[V21]
    lines = _read_lines(path, "task_index")
    for line in lines:
        if not isinstance(line.get("task"), str):
            raise InputError(
                f"{path}: task of task_index {line['task_index']} must be a text, it is "
                f"{shown(line.get('task'))}"
            )
    return [line["task"] for line in lines]


def load_episodes(root: Path, info: Mapping[str, Any]) -> dict[str, Any]:
    """Read the episodes, and add the columns that a v3.0 dataset has: in which rows and files an episode is."""
    path = root / EPISODES_IN[V21]
    lines = _read_lines(path, "episode_index")
    for line in lines:
        length = line.get("length")
        if type(length) is not int or not 0 < length <= info["total_frames"]:
            raise InputError(
                f"{path}: length of episode {line['episode_index']} must be a whole number from 1 to total_frames "
                f"of info.json, it is {shown(length)}"
            )
    names = dict.fromkeys(("tasks", *(name for line in lines for name in line)))
    columns: dict[str, Any] = {name: [line.get(name) for line in lines] for name in names}
    episode = np.arange(len(lines))
    columns["episode_index"] = episode
    columns["length"] = lengths = np.array([line["length"] for line in lines], np.int64)
    columns["dataset_to_index"] = np.cumsum(lengths)
    columns["dataset_from_index"] = columns["dataset_to_index"] - lengths
    parts = [f"videos/{key}" for key, feature in info["features"].items() if feature["dtype"] == "video"]
    for part in ("data", *parts):
        columns[f"{part}/chunk_index"] = episode // info["chunks_size"]
        columns[f"{part}/file_index"] = episode
    for part in parts:
        columns[f"{part}/from_timestamp"] = np.zeros(len(lines))
        columns[f"{part}/to_timestamp"] = lengths / info["fps"]
    return columns


def _read_lines(path: Path, key: str) -> list[dict[str, Any]]:
    """Read a file of JSON objects, one a line, whose `key` counts from 0; give them in that order."""
    lines: dict[int, dict[str, Any]] = {}
    try:
        with path.open(encoding="utf-8") as file:
            for number, text in enumerate(file, 1):
                if text.strip():
                    line = _parse_line(f"{path}: line {number}", text, key)
                    if line[key] in lines:
                        raise InputError(f"{path}: line {number} repeats {key} {line[key]}")
                    lines[line[key]] = line
    except FileNotFoundError:
        raise InputError(f"{path}: no such file") from None
    except (UnicodeDecodeError, OSError) as error:
        raise InputError(f"{path}: cannot be read ({error})") from None
    missing = next((i for i in range(len(lines)) if i not in lines), None)
    if missing is not None:
        raise InputError(f"{path}: {key} must count 0, 1, 2, ... without gaps, {missing} is missing")
    return [lines[i] for i in range(len(lines))]


def _parse_line(where: str, text: str, key: str) -> dict[str, Any]:
    try:
        line = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise InputError(f"{where} is not valid JSON ({error})") from None
    if not isinstance(line, dict) or type(line.get(key)) is not int:
        raise InputError(f"{where} must be a JSON object with a whole number {key}, it is {shown(line)}")
    return line
