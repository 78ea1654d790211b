"""What openpi normalizes states and actions with.

It normalizes as LeRobot does, but adds 1e-6 to standard deviations and to the range of quantiles, both ways, where
LeRobot adds 1e-8 or nothing. Statistics as they are given here have it added already, so that both do the same.
"""

from pathlib import Path
from typing import Any

import numpy as np

from lerobot_jax.errors import InputError
from lerobot_jax.features import ACTION, OBS_STATE
from lerobot_jax.files import read_json

ASSETS, STATS_NAME = "assets", "norm_stats.json"
EPSILON = 1e-6
NEEDED = {"pi0": ("mean", "std"), "pi05": ("q01", "q99")}
FEATURES = {"state": OBS_STATE, "actions": ACTION}


def find_statistics(folder: Path) -> Path:
    """Find the only norm_stats.json of a checkpoint.

    Raises:
        InputError: when there is none, or listing those that there are.
    """
    paths = sorted((folder / ASSETS).rglob(STATS_NAME))
    if len(paths) == 1:
        return paths[0]
    there = f"there are {', '.join(map(str, paths))}" if paths else f"there is none in {folder / ASSETS}"
    raise InputError(f"{folder}: choose the robot's {STATS_NAME} with --norm_stats; {there}")


def read_statistics(path: Path, policy_type: str) -> dict[str, dict[str, np.ndarray]]:
    """Read the statistics of `observation.state` and `action`, for LeRobot's formulas.

    Args:
        path: an openpi norm_stats.json.
        policy_type: pi0, which uses means and standard deviations, or pi05, which uses quantiles.

    Raises:
        InputError: naming the file and what is wrong with it.
    """
    content = read_json(path)
    stored = content.get("norm_stats") if isinstance(content, dict) else None
    if not isinstance(stored, dict) or set(stored) != set(FEATURES):
        has = sorted(stored) if isinstance(stored, dict) else "nothing"
        raise InputError(f"{path}: 'norm_stats' must have {' and '.join(FEATURES)}; it has {has}")
    first, second = NEEDED[policy_type]
    stats = {}
    for name, feature in FEATURES.items():
        where = f"{path}: {name}"
        low, high = (_numbers(stored[name], statistic, where) for statistic in (first, second))
        if low.shape != high.shape:
            raise InputError(f"{where}: {first} and {second} must be as long as each other")
        stats[feature] = {first: low, second: high + EPSILON}
    return stats


def _numbers(statistics: Any, name: str, where: str) -> np.ndarray:
    values = statistics.get(name) if isinstance(statistics, dict) else None
    try:
        numbers = np.asarray(values, np.float64)
    except (TypeError, ValueError):
        numbers = np.zeros(())
    if values is None or numbers.ndim != 1 or not numbers.size or not np.isfinite(numbers).all():
        raise InputError(f"{where}: '{name}' must be a list of numbers, it is {values!r}")
    return numbers
