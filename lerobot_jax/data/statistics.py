"""The statistics that a LeRobotDataset carries: per episode, combined over episodes, and the exact ones.

Mirrors `lerobot.datasets.compute_stats`, in the same arithmetic, so that both sides write the same numbers:
moments in the data's own precision (at least float32), quantiles read off a 5000-bin histogram of one episode,
dataset quantiles as the average of the episodes' ones weighted by their counts. `exact_statistics` are those of
all frames at once, in float64 and with quantiles by selection.
"""

from collections.abc import Mapping, Sequence

import numpy as np
from jaxtyping import Int

from lerobot_jax.data.info import Stats

QUANTILES = {"q01": 0.01, "q10": 0.10, "q50": 0.50, "q90": 0.90, "q99": 0.99}
NUM_BINS = 5000


def vector_statistics(values: np.ndarray) -> dict[str, np.ndarray]:
    """Summarize `values` of shape (n, ...) over all axes but the last; 1-D input counts as (n, 1)."""
    count = np.array([len(values)])
    rows = values.reshape(-1, 1) if values.ndim == 1 else values.reshape(-1, values.shape[-1])
    return _summarize(rows) | {"count": count}


def image_statistics(images: np.ndarray) -> dict[str, np.ndarray]:
    """Summarize uint8 images (n, h, w, c) per channel, in 0..1; every entry but the count is (c, 1, 1)."""
    summary = _summarize(images.reshape(-1, images.shape[-1]))
    scaled = {name: value.reshape(-1, 1, 1) / 255.0 for name, value in summary.items()}
    return scaled | {"count": np.array([len(images)])}


def _summarize(rows: np.ndarray) -> dict[str, np.ndarray]:
    if len(rows) < 2:  # too few for a histogram
        mean = np.mean(rows, axis=0)
        basic = {
            "min": np.min(rows, axis=0),
            "max": np.max(rows, axis=0),
            "mean": mean,
            "std": np.std(rows, axis=0),
        }
        return basic | {name: mean.copy() for name in QUANTILES}
    rows = rows.astype(np.result_type(rows.dtype, np.float32), copy=False)
    mean = np.mean(rows, axis=0)
    variance = np.mean(rows**2, axis=0) - mean**2
    low, high = np.min(rows, axis=0), np.max(rows, axis=0)
    summary = {"min": low, "max": high, "mean": mean, "std": np.sqrt(np.maximum(0, variance))}
    columns = [_histogram_quantiles(rows[:, i], low[i], high[i]) for i in range(rows.shape[1])]
    return summary | {name: np.array([column[name] for column in columns]) for name in QUANTILES}


def _histogram_quantiles(values: np.ndarray, low: np.floating, high: np.floating) -> dict[str, np.floating]:
    edges = np.linspace(low - 1e-10, high + 1e-10, NUM_BINS + 1)
    counts, _ = np.histogram(values, bins=edges)
    cumulative = np.cumsum(counts.astype(np.float64))
    quantiles: dict[str, np.floating] = {}
    for name, fraction in QUANTILES.items():
        target = fraction * len(values)
        i = int(np.searchsorted(cumulative, target))
        if i == 0:
            quantiles[name] = edges[0]
        elif i >= len(cumulative):
            quantiles[name] = edges[-1]
        else:
            inside = cumulative[i] - cumulative[i - 1]
            part = (target - cumulative[i - 1]) / inside
            quantiles[name] = edges[i] + part * (edges[i + 1] - edges[i])
    return quantiles


def sampled_frames(num_frames: int) -> np.ndarray:
    """Choose the frames of an episode that its image statistics look at: all of up to 100, then n ** 0.75."""
    num_samples = max(min(100, num_frames), min(int(num_frames**0.75), 10_000))
    return np.round(np.linspace(0, num_frames - 1, num_samples)).astype(int)


def shrink_for_statistics(image: np.ndarray) -> np.ndarray:
    """Subsample a large image (h, w, c) to about 150 pixels on its longer side; small ones are unchanged."""
    height, width = image.shape[:2]
    if max(width, height) < 300:
        return image
    step = max(height, width) // 150
    return image[::step, ::step]


def combine_statistics(parts: Sequence[Stats]) -> Stats:
    """Combine the statistics of several parts of a dataset (episodes, or all before and one more)."""
    keys = dict.fromkeys(key for part in parts for key in part)
    return {key: _combine_feature([part[key] for part in parts if key in part]) for key in keys}


def _combine_feature(parts: Sequence[Mapping[str, np.ndarray]]) -> dict[str, np.ndarray]:
    means = np.stack([part["mean"] for part in parts])
    variances = np.stack([part["std"] ** 2 for part in parts])
    counts = np.stack([part["count"] for part in parts])
    total = counts.sum(axis=0)
    weights = counts.reshape(len(parts), *(1,) * (means.ndim - 1))
    mean = (means * weights).sum(axis=0) / total
    variance = ((variances + (means - mean) ** 2) * weights).sum(axis=0) / total
    combined = {
        "min": np.min(np.stack([part["min"] for part in parts]), axis=0),
        "max": np.max(np.stack([part["max"] for part in parts]), axis=0),
        "mean": mean,
        "std": np.sqrt(variance),
        "count": total,
    }
    for name in QUANTILES:
        if all(name in part for part in parts):
            combined[name] = (np.stack([part[name] for part in parts]) * weights).sum(axis=0) / total
    return combined


def exact_statistics(values: np.ndarray) -> dict[str, np.ndarray]:
    """Summarize `values` of shape (n, ...) over all axes but the last, in float64; 1-D input counts as (n, 1).

    Quantiles are found by selection, and interpolated linearly between the two nearest values, as numpy does.
    """
    rows = values.reshape(-1, 1) if values.ndim == 1 else values.reshape(-1, values.shape[-1])
    columns = [_exact_column(rows[:, i].astype(np.float64)) for i in range(rows.shape[1])]
    summary = {name: np.array([column[name] for column in columns]) for name in columns[0]}
    return summary | {"count": np.array([len(values)])}


def _exact_column(values: np.ndarray) -> dict[str, float]:
    moments = {"mean": values.mean(), "std": values.std()}
    quantiles = np.quantile(values, [0.0, 1.0, *QUANTILES.values()], overwrite_input=True)
    return dict(zip(("min", "max", *QUANTILES), quantiles, strict=True)) | moments


def averaged_statistics(values: np.ndarray, episode_index: Int[np.ndarray, " n"]) -> dict[str, np.ndarray]:
    """Summarize `values` (n, ...) as LeRobot does: each episode, then their combination."""
    starts = np.flatnonzero(np.diff(episode_index, prepend=-1))
    parts = [{"": vector_statistics(part)} for part in np.split(values, starts[1:])]
    return combine_statistics(parts)[""]


def explained(
    name: str, stored: np.ndarray, exact: Mapping[str, np.ndarray], averaged: Mapping[str, np.ndarray]
) -> np.ndarray:
    """Tell, dimension by dimension, whether a stored statistic is the exact one or the one that LeRobot computes.

    Allowed are float32's rounding, which in LeRobot's variance, a difference of squares, is that of the largest
    square, and for quantiles two bins of the histogram.

    Args:
        name: which statistic.
        stored: its stored value.
        exact: what `exact_statistics` gives.
        averaged: what `averaged_statistics` gives.
    """
    if name == "count":
        return stored == exact["count"]
    size = np.maximum(np.abs(exact["min"]), np.abs(exact["max"]))
    power = 2 if name == "std" else 1
    allowed = 1e-6 * size**power
    if name in ("mean", "std"):
        allowed = allowed + 1e-4 * exact["std"] ** power
    elif name in QUANTILES:
        allowed = allowed + 2 * (exact["max"] - exact["min"]) / NUM_BINS + 1e-9
    is_near = [np.abs(stored**power - known[name] ** power) <= allowed for known in (exact, averaged)]
    return is_near[0] | is_near[1]
