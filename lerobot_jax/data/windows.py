"""`delta_timestamps`: the frames around a frame that a policy wants to see, and which of them lie outside.

Mirrors `lerobot.datasets.dataset_reader.DatasetReader._get_query_indices` and
`lerobot.datasets.feature_utils.{check_delta_timestamps, get_delta_indices}`.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from jaxtyping import Bool, Int

from lerobot_jax import features
from lerobot_jax.errors import InputError


def delta_indices(
    delta_timestamps: Mapping[str, Sequence[float]], fps: int | float, tolerance_s: float
) -> dict[str, np.ndarray]:
    """Turn offsets in seconds into offsets in frames; raise `InputError` unless they are multiples of 1/fps."""
    result = {}
    for key, seconds in delta_timestamps.items():
        frames = np.asarray(seconds, np.float64) * fps
        rounded = np.round(frames)
        off = np.abs(frames - rounded) / fps > tolerance_s
        if np.any(off):
            bad = np.asarray(seconds)[off].tolist()
            raise InputError(f"delta_timestamps['{key}']: {bad} are not multiples of 1/{fps} s")
        result[key] = rounded.astype(np.int64)
    return result


def policy_delta_timestamps(
    config: Any, dataset_features: Mapping[str, Any], fps: int | float
) -> dict[str, list[float]]:
    """Give the offsets that a policy asks for with its `*_delta_indices`, key by key, in seconds."""
    wanted = {}
    for key in dataset_features:
        if key == features.REWARD:
            indices = config.reward_delta_indices
        elif key == features.ACTION:
            indices = config.action_delta_indices
        elif key.startswith(features.OBS_PREFIX):
            indices = config.observation_delta_indices
        else:
            indices = None
        if indices is not None:
            wanted[key] = [i / fps for i in indices]
    return wanted


def window(
    index: Int[np.ndarray, " b"],
    start: Int[np.ndarray, " b"],
    end: Int[np.ndarray, " b"],
    deltas: Int[np.ndarray, " t"],
) -> tuple[Int[np.ndarray, "b t"], Bool[np.ndarray, "b t"]]:
    """Give the frames `index + deltas`, kept inside the episode [start, end), and which were outside of it."""
    wanted = index[:, None] + deltas[None]
    is_pad = (wanted < start[:, None]) | (wanted >= end[:, None])
    return np.clip(wanted, start[:, None], end[:, None] - 1), is_pad
