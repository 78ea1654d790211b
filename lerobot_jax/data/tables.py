"""The numbers of a LeRobotDataset: its parquet files as one numpy array a column.

Only the arrays stay in memory: `bytes_per_frame` and 20 bytes of bookkeeping for every frame. Files are read a few
at a time.
"""

import dataclasses
import math
import os
from collections.abc import Collection, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from jaxtyping import Int

from lerobot_jax.data import info, metadata
from lerobot_jax.errors import InputError
from lerobot_jax.progress import progress_bar

# As LeRobot hands numbers to torch.
KINDS = {"f": np.float32, "i": np.int64, "u": np.int64, "b": np.bool_}
FILES_AT_ONCE = 64


@dataclasses.dataclass(frozen=True)
class Table:
    """The rows of some episodes, in the order of the files.

    Attributes:
        columns: feature -> (n, ...) float32, int64, bool or str; videos and images are left out.
        files: the parquet files.
        file_of_row: which of them a row is from.
        place_of_row: where in that file.
    """

    columns: dict[str, np.ndarray]
    files: list[Path]
    file_of_row: Int[np.ndarray, " n"]
    place_of_row: Int[np.ndarray, " n"]

    @property
    def num_bytes(self) -> int:
        """The host memory that it takes."""
        arrays = (*self.columns.values(), self.file_of_row, self.place_of_row)
        return sum(array.nbytes for array in arrays)


def bytes_per_frame(features: Mapping[str, Mapping[str, Any]]) -> int:
    """Tell how many bytes of host memory the numbers of a frame take."""
    return sum(
        math.prod(feature["shape"]) * np.dtype(row_dtype(feature)).itemsize
        for feature in _numeric(features).values()
    )


def read_table(
    meta: metadata.LeRobotDatasetMetadata,
    episodes: Sequence[int] | None,
    keys: Collection[str] | None = None,
    *,
    as_stored: bool = False,
) -> Table:
    """Read the rows of some episodes (None: all): some features (None: all) besides those of every dataset.

    Args:
        meta: the dataset.
        episodes: which of them.
        keys: the features.
        as_stored: keep the types that info.json declares, instead of those that LeRobot hands to torch.

    Raises:
        InputError: naming the file and column that is missing, damaged or not as `meta/` says.
    """
    chosen = range(meta.total_episodes) if episodes is None else episodes
    features = _numeric(meta.features)
    if keys is not None:
        features = {key: f for key, f in features.items() if key in keys or key in info.DEFAULT_FEATURES}
    expected: dict[Path, list[int]] = {}
    for episode in chosen:
        expected.setdefault(meta.root / meta.data_file(episode), []).append(episode)
    files = sorted(expected)
    total = int(np.sum(meta.episodes["length"][np.asarray(chosen)]))
    types = {
        key: _stored_dtype(feature) if as_stored else row_dtype(feature) for key, feature in features.items()
    }
    columns = {key: np.empty((total, *row_shape(features[key])), types[key]) for key in features}
    file_of_row, place_of_row = np.empty(total, np.int32), np.empty(total, np.int64)
    end = 0
    with (
        ThreadPoolExecutor(os.cpu_count()) as pool,
        progress_bar("reading tables", len(files), "file", delay=2) as bar,
    ):
        for first in range(0, len(files), FILES_AT_ONCE):
            some = files[first : first + FILES_AT_ONCE]
            parts = pool.map(lambda path: _read_file(path, meta, features, expected[path]), some)
            for i, (part, places) in enumerate(parts, first):
                start, end = end, end + len(places)
                for key, values in part.items():
                    columns[key][start:end] = values  # in the wanted type
                file_of_row[start:end], place_of_row[start:end] = i, places
                bar.update()
    pa.default_memory_pool().release_unused()
    table = Table(columns, files, file_of_row, place_of_row)
    _check_indices(meta, table)
    return table


def _numeric(features: Mapping[str, Mapping[str, Any]]) -> dict[str, Mapping[str, Any]]:
    return {key: feature for key, feature in features.items() if feature["dtype"] not in ("image", "video")}


def _stored_dtype(feature: Mapping[str, Any]) -> np.dtype:
    return np.dtype(object if feature["dtype"] == "string" else feature["dtype"])


def row_dtype(feature: Mapping[str, Any]) -> np.dtype:
    stored = _stored_dtype(feature)
    return np.dtype(KINDS.get(stored.kind, object))


def row_shape(feature: Mapping[str, Any]) -> tuple[int, ...]:
    return () if tuple(feature["shape"]) == (1,) else tuple(feature["shape"])


def _read_file(
    path: Path,
    meta: metadata.LeRobotDatasetMetadata,
    features: Mapping[str, Mapping[str, Any]],
    episodes: Sequence[int],
) -> tuple[dict[str, np.ndarray], np.ndarray]:
    """Read the rows of some episodes from one file: the columns, and each row's place in the file."""
    names = metadata.read_parquet_names(path)
    missing = [k for k, feature in meta.features.items() if feature["dtype"] != "video" and k not in names]
    if missing:
        raise InputError(f"{path}: lacks the columns {missing} that info.json declares")
    if len(set(names)) < len(names):
        raise InputError(f"{path}: has two columns of the same name")
    groups, places = _row_groups(path, episodes)
    table = metadata.read_parquet(path, list(features), groups)
    episode = _to_numpy(path, "episode_index", features["episode_index"], table["episode_index"])
    rows = np.flatnonzero(np.isin(episode, episodes))
    lengths = meta.episodes["length"]
    counts = np.bincount(episode[rows].clip(min=0), minlength=len(lengths))
    bad = [e for e in episodes if counts[e] != lengths[e]]
    if bad:
        raise InputError(
            f"{path}: episodes {bad[:5]} have another length: {counts[bad[0]]} rows, "
            f"meta/episodes declares {lengths[bad[0]]}"
        )
    if len(rows) < len(table):
        table = table.take(pa.array(rows))
    columns = {key: _to_numpy(path, key, feature, table[key]) for key, feature in features.items()}
    return columns, places[rows]


def _row_groups(path: Path, episodes: Sequence[int]) -> tuple[list[int], Int[np.ndarray, " n"]]:
    """List the row groups that may hold some episodes, and the places of their rows in the file."""
    footer = metadata.read_parquet_metadata(path)
    names = [footer.schema.column(i).path for i in range(footer.num_columns)]
    column = names.index("episode_index") if "episode_index" in names else None
    wanted = np.asarray(episodes)
    groups, places, end = [], [np.empty(0, np.int64)], 0
    for number in range(footer.num_row_groups):
        group = footer.row_group(number)
        start, end = end, end + group.num_rows
        known = None if column is None else group.column(column).statistics
        if known is not None and known.has_min_max and isinstance(known.min, int):
            may_hold = ((wanted >= known.min) & (wanted <= known.max)).any()
        else:
            may_hold = True
        if may_hold:
            groups.append(number)
            places.append(np.arange(start, end))
    return groups, np.concatenate(places)


def _check_indices(meta: metadata.LeRobotDatasetMetadata, table: Table) -> None:
    """Check that every row is the frame of its episode that `meta/episodes` says."""
    columns, where = table.columns, meta.root / "data"
    index, episode = columns["index"], columns["episode_index"]
    start = meta.episodes["dataset_from_index"][episode]
    inside = (index >= start) & (index < meta.episodes["dataset_to_index"][episode])
    if not inside.all():
        row = int(np.flatnonzero(~inside)[0])
        raise InputError(
            f"{where}: frame {index[row]} says episode {episode[row]}, which meta/episodes denies"
        )
    seen = np.zeros(meta.total_frames, bool)
    seen[index] = True
    if int(seen.sum()) != len(index):
        raise InputError(f"{where}: some frames appear twice")
    unknown = (columns["task_index"] < 0) | (columns["task_index"] >= len(meta.tasks))
    if unknown.any():
        row = int(np.flatnonzero(unknown)[0])
        raise InputError(
            f"{where}: frame {index[row]} has task_index {columns['task_index'][row]}; meta/ has the tasks 0 to "
            f"{len(meta.tasks) - 1}"
        )
    wrong = columns["frame_index"] != index - start
    if wrong.any():
        row = int(np.flatnonzero(wrong)[0])
        raise InputError(
            f"{where}: frame {index[row]} says frame_index {columns['frame_index'][row]}, but it is "
            f"number {index[row] - start[row]} of episode {episode[row]}"
        )


def check_timestamps(meta: metadata.LeRobotDatasetMetadata, table: Table, tolerance_s: float) -> None:
    """Raise `InputError` unless every timestamp is frame_index / fps within `tolerance_s` seconds."""
    timestamp = table.columns["timestamp"]
    expected = table.columns["frame_index"] / meta.fps
    off = np.abs(timestamp - expected) > tolerance_s + np.spacing(timestamp)
    if off.any():
        row = int(np.flatnonzero(off)[0])
        raise InputError(
            f"{table.files[table.file_of_row[row]]}: frame {table.columns['frame_index'][row]} of episode "
            f"{table.columns['episode_index'][row]} is at {timestamp[row]:.4f} s, at {meta.fps} frames a second it "
            f"should be at {expected[row]:.4f} s; {int(off.sum())} of {len(off)} timestamps are off: fps in "
            "info.json or the timestamps are wrong (if they are meant so, raise tolerance_s)"
        )


def _to_numpy(path: Path, key: str, feature: Mapping[str, Any], column: pa.ChunkedArray) -> np.ndarray:
    """Turn a table column into an array of shape (n, ...)."""
    if column.null_count:
        raise InputError(f"{path}: '{key}' has empty cells")
    if feature["dtype"] == "string":
        return np.array(column.to_pylist(), dtype=object)
    shape = row_shape(feature)
    flat = _flat_numbers(column.combine_chunks(), shape)
    if flat is None or KINDS.get(flat.dtype.kind) != row_dtype(feature):
        raise InputError(
            f"{path}: '{key}' does not hold {feature['shape']} {feature['dtype']} values a row, as info.json says"
        )
    declared = flat.astype(np.dtype(feature["dtype"]))
    if declared.dtype.kind in "iu" and not np.array_equal(declared, flat):
        raise InputError(f"{path}: '{key}' has values that are no {feature['dtype']}, as info.json says")
    array = declared.reshape(len(column), *shape)
    if array.dtype.kind == "f":
        with np.errstate(over="ignore"):
            is_finite = np.isfinite(array.astype(np.float32, copy=False))
        if not is_finite.all():
            raise InputError(f"{path}: '{key}' is NaN or infinite in row {np.argwhere(~is_finite)[0][0]}")
    return array


def _flat_numbers(values: pa.Array, shape: Sequence[int]) -> np.ndarray | None:
    """Give the numbers of all rows one after another; None if a row does not have this shape."""
    for size in shape:
        if pa.types.is_fixed_size_list(values.type):
            sizes = np.array([values.type.list_size])
        elif pa.types.is_list(values.type) or pa.types.is_large_list(values.type):
            sizes = np.diff(values.offsets.to_numpy())
        else:
            return None
        if values.null_count or (sizes != size).any():
            return None
        values = values.flatten()
    if values.null_count or pa.types.is_nested(values.type):
        return None
    return values.to_numpy(zero_copy_only=False)
