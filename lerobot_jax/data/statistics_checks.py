"""Whether the statistics of a dataset, as read from JSON, are statistics of its features."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from lerobot_jax.data.info import CAMERA_DTYPES, MAX_COUNT, Stats, image_shape, shown
from lerobot_jax.errors import InputError

EXTREMES = (
    "min",
    "max",
    "count",
)  # keep JSON's type; the others are real numbers, also where JSON has 0 for 0.0


def to_arrays(where: str, data: Any) -> Stats:
    """Turn the statistics of a dataset or an episode, as read from JSON, into arrays of at least one axis.

    Raises:
        InputError: naming the entry that is no array of numbers.
    """
    if not isinstance(data, dict) or not all(isinstance(values, dict) for values in data.values()):
        raise InputError(f"{where}: statistics must map features to {{'min': ..., ...}}, found {shown(data)}")
    return {
        key: {name: _to_array(f"{where}: {name} of '{key}'", name, value) for name, value in values.items()}
        for key, values in data.items()
    }


def _to_array(where: str, name: str, value: Any) -> np.ndarray:
    try:
        array = np.atleast_1d(np.asarray(value))
    except ValueError:  # rows of different length
        array = np.array([None])
    if array.dtype.kind not in "biuf":
        raise InputError(f"{where} must be an array of numbers, it is {shown(value)}")
    return array if name in EXTREMES else array.astype(np.float64)


def check_statistics(where: Path, features: Mapping[str, Mapping[str, Any]], parts: Sequence[Stats]) -> None:
    """Check the statistics of a dataset, or of several parts of it at once.

    Args:
        where: the file that they are from, for the messages.
        features: of info.json.
        parts: what `to_arrays` gave.

    Raises:
        InputError: naming the feature and statistic that is wrong.
    """
    for key in dict.fromkeys(key for part in parts for key in part):
        having = [part[key] for part in parts if key in part]
        if key not in features or features[key]["dtype"] == "string":
            raise InputError(
                f"{where}: has statistics of '{key}', which info.json does not declare as numbers or images"
            )
        shapes = {v.shape for values in having for name, v in values.items() if name != "count"}
        allowed = _statistics_shapes(features[key])
        if len(shapes) > 1 or not shapes <= allowed:
            raise InputError(
                f"{where}: statistics of '{key}' have the shapes {sorted(shapes)}; by its shape in info.json, they "
                f"must all have {' or all '.join(map(str, sorted(allowed)))}"
            )
        names = dict.fromkeys(name for values in having for name in values)
        stacked = {name: [values[name] for values in having if name in values] for name in names}
        if any(count.shape != (1,) for count in stacked.get("count", ())):
            raise InputError(f"{where}: count of '{key}' must be one number")
        check_values(f"{where}: statistics of '{key}'", {name: np.stack(v) for name, v in stacked.items()})


def check_values(where: str, values: Mapping[str, np.ndarray]) -> None:
    """Check that the statistics of one feature can be such, whatever their shapes."""
    for name, value in values.items():
        if not np.isfinite(value).all():
            raise InputError(f"{where}: {name} is NaN or infinite")
        if name == "std" and (value < 0).any():
            raise InputError(f"{where}: std is negative")
        if name == "count" and not ((value > 0) & (value <= MAX_COUNT)).all():
            raise InputError(f"{where}: count must be positive")
    for low, high in (("min", "max"), ("min", "mean"), ("mean", "max"), ("q01", "q99"), ("q10", "q90")):
        if low in values and high in values and len(values[low]) == len(values[high]):
            # Means and quantiles are computed in float32, with rounding.
            slack = 1e-4 * np.maximum(np.abs(values[low]), np.abs(values[high]))
            if (values[low] > values[high] + slack).any():
                raise InputError(f"{where}: {low} is greater than {high}")


def _statistics_shapes(feature: Mapping[str, Any]) -> set[tuple[int, ...]]:
    """Give the shapes that a feature's statistics may have: v2.1 keeps all axes, v3.0 the last."""
    if feature["dtype"] in CAMERA_DTYPES:
        return {(image_shape(feature)[2], 1, 1)}
    return {feature["shape"][-1:], feature["shape"]}
