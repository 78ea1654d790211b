"""The files of a new LeRobotDataset v3.0, written episode by episode: by the recorder and when datasets are edited.

Mirrors the writing side of `lerobot.datasets.dataset_metadata.LeRobotDatasetMetadata` and `dataset_writer`.
"""

import contextlib
import json
import os
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from lerobot_jax.data import info as dataset_info
from lerobot_jax.data import statistics
from lerobot_jax.data.info import Stats
from lerobot_jax.data.remux import FileCounter, SourceVideo, VideoFiles
from lerobot_jax.errors import InputError, writing
from lerobot_jax.files import write_json

MEBIBYTE = 1024**2
EPISODES_PER_ROW_GROUP = 10
CHUNKS_SIZE, DATA_FILES_SIZE_IN_MB, VIDEO_FILES_SIZE_IN_MB = 1000, 100, 200


@contextlib.contextmanager
def appearing_at_once(output: Path) -> Iterator[Path]:
    """Give a folder to write in that becomes `output` at the end; nothing is left of it after an error.

    Raises:
        InputError: when `output` exists already, before or at the end, or cannot be written.
    """
    _check_absent(output)
    with writing(output):
        output.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=f".{output.name}.", dir=output.parent) as folder:
            partial = Path(folder) / output.name
            partial.mkdir()  # with the permissions of any new folder, unlike the one around it
            yield partial
            _check_absent(output)
            partial.rename(output)


def check_outside(root: Path, output: Path) -> None:
    """Raise `InputError` when `output` lies inside the dataset at `root`."""
    if root.resolve() in output.resolve().parents:
        raise InputError(f"{output}: lies inside {root}, which is not to be changed")


def _check_absent(output: Path) -> None:
    if os.path.lexists(output):
        raise InputError(f"{output}: already exists; datasets are written into a new folder")


def new_info(
    fps: float,
    features: Mapping[str, Mapping[str, Any]],
    robot_type: str | None,
    chunks_size: int = CHUNKS_SIZE,
    data_files_size_in_mb: float = DATA_FILES_SIZE_IN_MB,
    video_files_size_in_mb: float = VIDEO_FILES_SIZE_IN_MB,
) -> dict[str, Any]:
    """Make the info.json of a dataset without episodes."""
    has_videos = any(feature["dtype"] == "video" for feature in features.values())
    return {
        "codebase_version": dataset_info.CODEBASE_VERSION,
        "fps": fps,
        "features": features,
        "total_episodes": 0,
        "total_frames": 0,
        "total_tasks": 0,
        "chunks_size": chunks_size,
        "data_files_size_in_mb": data_files_size_in_mb,
        "video_files_size_in_mb": video_files_size_in_mb,
        "data_path": dataset_info.DATA_PATH,
        "video_path": dataset_info.VIDEO_PATH if has_videos else None,
        "robot_type": robot_type,
        "splits": {},
    }


class DatasetFiles:
    """The files of a dataset to which episodes are appended. Call `close` at the end."""

    def __init__(
        self, root: Path, info: dict[str, Any], extra_types: Mapping[str, pa.DataType] | None = None
    ):
        """Start the files in the folder `root`.

        Args:
            root: where they go.
            info: info.json without episodes; kept up to date here.
            extra_types: further columns of `meta/episodes`.
        """
        self.root, self.info = root, info
        self.stats: Stats = {}
        self._task_index: dict[str, int] = {}
        chunks_size = info["chunks_size"]
        self._data = _ParquetFiles(root, chunks_size, info["data_files_size_in_mb"] * MEBIBYTE)
        self._rows = _EpisodeRows(root, extra_types or {})
        self._videos = {
            key: VideoFiles(root, key, info["fps"], chunks_size, info["video_files_size_in_mb"] * MEBIBYTE)
            for key, feature in info["features"].items()
            if feature["dtype"] == "video"
        }

    @property
    def tasks(self) -> list[str]:
        """The task descriptions, by task_index."""
        return list(self._task_index)

    def add_tasks(self, tasks: Sequence[str]) -> None:
        """Give numbers to those tasks that have none yet."""
        for task in tasks:
            self._task_index.setdefault(task, len(self._task_index))
        self.info["total_tasks"] = len(self._task_index)

    def number(self, tasks: Sequence[str]) -> dict[str, np.ndarray]:
        """Give the columns that count over the whole dataset, for the next episode, from its frames' tasks."""
        self.add_tasks(tasks)
        start, length = self.info["total_frames"], len(tasks)
        return {
            "episode_index": np.full(length, self.info["total_episodes"]),
            "index": np.arange(start, start + length),
            "task_index": np.array([self._task_index[task] for task in tasks]),
        }

    def add_episode(
        self,
        table: pa.Table,
        tasks: Sequence[str],
        stats: Stats,
        videos: Mapping[str, tuple[SourceVideo, float]],
        extra: Mapping[str, Any] | None = None,
    ) -> None:
        """Append an episode.

        Args:
            table: its frames, numbered by `number`.
            tasks: its task descriptions.
            stats: its statistics.
            videos: camera -> (the video that it is in, its start there in seconds).
            extra: its further columns in `meta/episodes`.
        """
        start, length = self.info["total_frames"], len(table)
        row: dict[str, Any] = {"episode_index": self.info["total_episodes"], "tasks": tasks, "length": length}
        row |= {f"data/{name}": value for name, value in self._data.write(table).items()}
        row |= {"dataset_from_index": start, "dataset_to_index": start + length}
        timestamps = table["timestamp"].to_numpy().astype(np.float64)
        for key, (source, start_s) in videos.items():
            row |= self._videos[key].add(source, start_s, timestamps)
        for key, values in stats.items():
            for name, value in values.items():
                kind = np.int64 if name == "count" else np.float64
                row[f"stats/{key}/{name}"] = np.asarray(value).astype(kind).tolist()
        row |= {"meta/episodes/chunk_index": 0, "meta/episodes/file_index": 0}
        self._rows.add(row | dict(extra or {}))
        self.info["total_episodes"] += 1
        self.info["total_frames"] += length
        self.info["splits"] = {"train": f"0:{self.info['total_episodes']}"}

    def combine(self, stats: Stats) -> None:
        """Let the dataset's statistics of some features cover another part of it."""
        before = {key: self.stats[key] for key in stats if key in self.stats}
        both = statistics.combine_statistics([before, {key: stats[key] for key in before}])
        self.stats |= dict(stats) | both

    def write_info(self) -> None:
        """Write info.json and, when there are any, the statistics."""
        write_json(self.info, self.root / dataset_info.INFO_PATH)
        if self.stats:
            stats = {key: {name: v.tolist() for name, v in f.items()} for key, f in self.stats.items()}
            write_json(stats, self.root / dataset_info.STATS_PATH)

    def close(self) -> None:
        """Complete all files."""
        self._data.close()
        for files in self._videos.values():
            files.close()
        self._rows.close()
        write_tasks(self.tasks, self.root / dataset_info.TASKS_PATH)

    def abandon(self) -> None:
        """Close the open videos after an error, while their folder is there; the files are not whole."""
        for files in self._videos.values():
            with contextlib.suppress(Exception):  # what went wrong before is the error
                files.close()


class _ParquetFiles:
    """Writes one row group an episode, into files of bounded size."""

    def __init__(self, root: Path, chunks_size: int, max_bytes: float):
        self._root, self._max_bytes = root, max_bytes
        self._counter = FileCounter(chunks_size)
        self._writer: pq.ParquetWriter | None = None
        self._rows = 0

    def write(self, table: pa.Table) -> dict[str, int]:
        """Write a table; return the chunk and file index of where it went."""
        if self._writer is not None:
            size = self._path().stat().st_size
            if size + size / self._rows * len(table) >= self._max_bytes:
                self.close()
                self._counter.index += 1
        if self._writer is None:
            self._path().parent.mkdir(parents=True, exist_ok=True)
            self._writer = pq.ParquetWriter(self._path(), table.schema, compression="snappy")
            self._rows = 0
        self._writer.write_table(table)
        self._rows += len(table)
        return self._counter.position

    def close(self) -> None:
        if self._writer is not None:
            self._writer.close()
            self._writer = None

    def _path(self) -> Path:
        return self._root / dataset_info.DATA_PATH.format(**self._counter.position)


class _EpisodeRows:
    """Writes `meta/episodes/**`, a row an episode, in one file."""

    def __init__(self, root: Path, extra_types: Mapping[str, pa.DataType]):
        self._path = root / dataset_info.EPISODES_PATH.format(chunk_index=0, file_index=0)
        self._extra_types = extra_types
        self._pending: list[dict[str, Any]] = []
        self._writer: pq.ParquetWriter | None = None

    def add(self, row: dict[str, Any]) -> None:
        self._pending.append(row)
        if len(self._pending) == EPISODES_PER_ROW_GROUP:
            self._write()

    def close(self) -> None:
        if self._pending:
            self._write()
        if self._writer is not None:
            self._writer.close()
            self._writer = None

    def _write(self) -> None:
        if self._writer is None:
            found = pa.Table.from_pylist(self._pending).schema
            schema = pa.schema(
                [(field.name, self._extra_types.get(field.name, field.type)) for field in found]
            )
            self._path.parent.mkdir(parents=True, exist_ok=True)
            self._writer = pq.ParquetWriter(self._path, schema, compression="snappy")
        self._writer.write_table(pa.Table.from_pylist(self._pending, schema=self._writer.schema))
        self._pending.clear()


def arrow_schema(features: Mapping[str, Mapping[str, Any]]) -> pa.Schema:
    """Give the columns of `data/**`: all features but videos."""
    fields = [(key, _arrow_type(feature)) for key, feature in features.items() if feature["dtype"] != "video"]
    return pa.schema(fields)


def _arrow_type(feature: Mapping[str, Any]) -> pa.DataType:
    if feature["dtype"] == "image":
        return pa.struct({"bytes": pa.binary(), "path": pa.string()})
    if feature["dtype"] == "string":
        return pa.string()
    arrow_type = pa.from_numpy_dtype(np.dtype(feature["dtype"]))
    shape = feature["shape"]
    if shape == (1,):
        return arrow_type
    if len(shape) == 1:
        return pa.list_(arrow_type, shape[0])
    for _ in shape:
        arrow_type = pa.list_(arrow_type)
    return arrow_type


def write_tasks(tasks: Sequence[str], path: Path) -> None:
    """Write the table as pandas writes a frame with index "task", which is how stock LeRobot reads it."""
    columns = [
        {"name": "task_index", "field_name": "task_index", "pandas_type": "int64", "numpy_type": "int64"},
        {"name": "task", "field_name": "task", "pandas_type": "unicode", "numpy_type": "object"},
    ]
    described = {"index_columns": ["task"], "columns": [c | {"metadata": None} for c in columns]}
    described["column_indexes"] = [
        {"name": None, "field_name": None, "pandas_type": "unicode", "numpy_type": "object", "metadata": None}
    ]
    table = pa.table({"task_index": np.arange(len(tasks)), "task": pa.array(tasks, pa.string())})
    pq.write_table(table.replace_schema_metadata({"pandas": json.dumps(described)}), path)
