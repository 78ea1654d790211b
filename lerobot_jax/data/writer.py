"""Write a LeRobotDataset v3.0 with LeRobot's verbs: add_frame, save_episode, finalize.

Mirrors `lerobot.datasets.dataset_writer.DatasetWriter`. Two differences, both invisible in the files: frames are
encoded as they come instead of through PNG files, and the episodes of a video file are joined once, when the
file is full, instead of being copied again for every episode.
"""

import copy
import io
import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import PIL.Image
import pyarrow as pa
import pyarrow.parquet as pq

from lerobot_jax.data import metadata, statistics, video
from lerobot_jax.errors import InputError
from lerobot_jax.files import write_json

MEBIBYTE = 1024**2
EPISODES_PER_ROW_GROUP = 10


class DatasetWriter:
    """Records episodes into a new folder. Call `finalize` at the end, or the files stay unreadable."""

    def __init__(
        self,
        repo_id: str,
        root: Path,
        fps: int,
        features: Mapping[str, Mapping[str, Any]],
        robot_type: str | None = None,
        encoding: video.VideoEncoding | None = None,
        chunks_size: int = 1000,
        data_files_size_in_mb: int = 100,
        video_files_size_in_mb: int = 200,
    ):
        """Create the folder `root`, which must not exist yet.

        Args:
            repo_id: the dataset's name, `user/dataset`.
            root: the folder to create.
            fps: frames a second.
            features: name -> {"dtype", "shape", "names"}; dtype is a numpy dtype, "string", "image" or "video".
            robot_type: a free description of the robot.
            encoding: how "video" features are encoded; stock LeRobot's AV1 settings by default.
            chunks_size: files a folder.
            data_files_size_in_mb: a parquet file is closed when it would grow beyond this.
            video_files_size_in_mb: likewise for a video file.
        """
        if root.exists():
            raise InputError(f"{root}: already exists; datasets are created in a new folder")
        self.repo_id = repo_id
        self.root = root
        self.encoding = encoding or video.VideoEncoding()
        self.features = {
            **copy.deepcopy({k: dict(f) for k, f in features.items()}),
            **metadata.DEFAULT_FEATURES,
        }
        _check_features(self.features)
        root.mkdir(parents=True)
        has_videos = any(feature["dtype"] == "video" for feature in self.features.values())
        self.info: dict[str, Any] = {
            "codebase_version": metadata.CODEBASE_VERSION,
            "fps": fps,
            "features": self.features,
            "total_episodes": 0,
            "total_frames": 0,
            "total_tasks": 0,
            "chunks_size": chunks_size,
            "data_files_size_in_mb": data_files_size_in_mb,
            "video_files_size_in_mb": video_files_size_in_mb,
            "data_path": metadata.DATA_PATH,
            "video_path": metadata.VIDEO_PATH if has_videos else None,
            "robot_type": robot_type,
            "splits": {},
        }
        self.stats: metadata.Stats = {}
        self.tasks: list[str] = []
        self._schema = _arrow_schema(self.features)
        self._data = _ParquetFiles(root, metadata.DATA_PATH, chunks_size, data_files_size_in_mb * MEBIBYTE)
        self._episode_rows: list[dict[str, Any]] = []
        self._episodes_writer: pq.ParquetWriter | None = None
        self._video_files = {
            key: _VideoFiles(root, key, chunks_size, video_files_size_in_mb * MEBIBYTE)
            for key, feature in self.features.items()
            if feature["dtype"] == "video"
        }
        self._start_episode()
        write_json(self.info, root / metadata.INFO_PATH)

    def _start_episode(self) -> None:
        self._length = 0
        self._frames: dict[str, list[Any]] = {
            k: [] for k in self.features if k not in metadata.DEFAULT_FEATURES
        }
        self._frame_tasks: list[str] = []
        self._video_writers: dict[str, video.VideoWriter] = {}

    def add_frame(self, frame: Mapping[str, Any]) -> None:
        """Add one frame: every feature as a numpy array of its dtype and shape, and "task" as a string.

        Images are (h, w, 3) or (3, h, w), uint8 or float in 0..1, or PIL images.
        """
        _check_names(set(frame), {*self._frames, "task"})
        self._frame_tasks.append(str(frame["task"]))
        for key, values in self._frames.items():
            feature = self.features[key]
            if feature["dtype"] in ("image", "video"):
                image = _rgb_image(key, frame[key], feature["shape"])
                if feature["dtype"] == "video":
                    if self._length == 0:
                        path = self._video_files[key].new_episode(self.info["total_episodes"])
                        self._video_writers[key] = video.VideoWriter(path, self.info["fps"], self.encoding)
                    self._video_writers[key].write(image)
                    # Only what the statistics may look at is kept; the frame itself is encoded by now.
                    values.append(statistics.shrink_for_statistics(image).copy())
                else:
                    values.append(image.copy())
            else:
                values.append(_checked_value(key, frame[key], feature))
        self._length += 1

    def save_episode(self) -> None:
        """Write the frames added since the last call as one episode."""
        if self._length == 0:
            raise InputError("save_episode: add at least one frame with add_frame before")
        length, episode = self._length, self.info["total_episodes"]
        for task in self._frame_tasks:
            if task not in self.tasks:
                self.tasks.append(task)
        start = self.info["total_frames"]
        columns: dict[str, Any] = {
            "timestamp": np.arange(length) / self.info["fps"],  # float64 in the statistics, as in LeRobot
            "frame_index": np.arange(length),
            "episode_index": np.full(length, episode),
            "index": np.arange(start, start + length),
            "task_index": np.array([self.tasks.index(task) for task in self._frame_tasks]),
        }
        for key, values in self._frames.items():
            dtype = self.features[key]["dtype"]
            columns[key] = values if dtype in ("image", "video", "string") else np.stack(values)
        stats = self._episode_statistics(columns)
        row: dict[str, Any] = {
            "episode_index": episode,
            "tasks": list(dict.fromkeys(self._frame_tasks)),
            "length": length,
        }
        chunk_index, file_index = self._data.write(_arrow_table(columns, self.features, self._schema))
        row |= {"data/chunk_index": chunk_index, "data/file_index": file_index}
        row |= {"dataset_from_index": start, "dataset_to_index": start + length}
        for key, writer in self._video_writers.items():
            writer.close()
            if episode == 0:
                self.features[key]["info"] = video.video_info(writer.path, self.encoding)
            row |= self._video_files[key].add(writer.path)
        for key, values in stats.items():
            row |= {f"stats/{key}/{name}": value.tolist() for name, value in values.items()}
        row |= {"meta/episodes/chunk_index": 0, "meta/episodes/file_index": 0}
        self._episode_rows.append(row)
        if len(self._episode_rows) == EPISODES_PER_ROW_GROUP:
            self._write_episode_rows()
        self.info["total_episodes"] += 1
        self.info["total_frames"] += length
        self.info["total_tasks"] = len(self.tasks)
        self.info["splits"] = {"train": f"0:{self.info['total_episodes']}"}
        self.stats = metadata_stats = (
            statistics.combine_statistics([self.stats, stats]) if self.stats else stats
        )
        write_json(self.info, self.root / metadata.INFO_PATH)
        write_json(
            {key: {name: v.tolist() for name, v in values.items()} for key, values in metadata_stats.items()},
            self.root / metadata.STATS_PATH,
        )
        self._start_episode()

    def clear_episode_buffer(self) -> None:
        """Drop the frames added since the last `save_episode`."""
        for writer in self._video_writers.values():
            writer.close()
            writer.path.unlink()
        self._start_episode()

    def finalize(self) -> None:
        """Complete all files. Frames of an unsaved episode are dropped."""
        self.clear_episode_buffer()
        self._data.close()
        for files in self._video_files.values():
            files.close()
        self._write_episode_rows()
        if self._episodes_writer is not None:
            self._episodes_writer.close()
            self._episodes_writer = None
        _write_tasks(self.tasks, self.root / metadata.TASKS_PATH)

    def _episode_statistics(self, columns: Mapping[str, Any]) -> metadata.Stats:
        stats: metadata.Stats = {}
        for key, feature in self.features.items():
            if feature["dtype"] == "string":
                continue
            if feature["dtype"] in ("image", "video"):
                chosen = [columns[key][i] for i in statistics.sampled_frames(self._length)]
                images = np.stack([statistics.shrink_for_statistics(image) for image in chosen])
                stats[key] = statistics.image_statistics(images)
            else:
                values = columns[key]
                if np.issubdtype(values.dtype, np.floating) and not np.isfinite(values).all():
                    frame = int(np.argwhere(~np.isfinite(values))[0][0])
                    episode = self.info["total_episodes"]
                    raise InputError(f"'{key}' is NaN or infinite in frame {frame} of episode {episode}")
                if feature["shape"] == (1,):
                    values = values.reshape(-1)
                stats[key] = statistics.vector_statistics(values)
        return stats

    def _write_episode_rows(self) -> None:
        if not self._episode_rows:
            return
        table = pa.Table.from_pylist(self._episode_rows)
        if self._episodes_writer is None:
            path = self.root / metadata.EPISODES_PATH.format(chunk_index=0, file_index=0)
            path.parent.mkdir(parents=True, exist_ok=True)
            self._episodes_writer = pq.ParquetWriter(path, table.schema, compression="snappy")
        self._episodes_writer.write_table(table)
        self._episode_rows.clear()


class _FileCounter:
    """Counts files: file 0 of folder 0, file 1, ..., then file 0 of folder 1."""

    def __init__(self, chunks_size: int):
        self.chunks_size = chunks_size
        self.index = 0

    @property
    def position(self) -> dict[str, int]:
        return {"chunk_index": self.index // self.chunks_size, "file_index": self.index % self.chunks_size}


class _ParquetFiles:
    """Writes one row group an episode, into files of bounded size."""

    def __init__(self, root: Path, template: str, chunks_size: int, max_bytes: float):
        self._root, self._template, self._max_bytes = root, template, max_bytes
        self._counter = _FileCounter(chunks_size)
        self._writer: pq.ParquetWriter | None = None
        self._rows = 0

    def write(self, table: pa.Table) -> tuple[int, int]:
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
        position = self._counter.position
        return position["chunk_index"], position["file_index"]

    def close(self) -> None:
        if self._writer is not None:
            self._writer.close()
            self._writer = None

    def _path(self) -> Path:
        return self._root / self._template.format(**self._counter.position)


class _VideoFiles:
    """Collects one camera's episode videos and joins them into files of bounded size."""

    def __init__(self, root: Path, key: str, chunks_size: int, max_bytes: float):
        self._root, self._key, self._max_bytes = root, key, max_bytes
        self._counter = _FileCounter(chunks_size)
        self._folder = root / "videos" / key / "recording"
        self._pending: list[Path] = []
        self._bytes = 0
        self._duration = 0.0

    def new_episode(self, episode: int) -> Path:
        """Give the path at which the next episode's video is to be written."""
        self._folder.mkdir(parents=True, exist_ok=True)
        return self._folder / f"episode-{episode:06d}.mp4"

    def add(self, path: Path) -> dict[str, Any]:
        """Take an episode's finished video; return its columns in `meta/episodes`."""
        size = path.stat().st_size
        if self._pending and self._bytes + size >= self._max_bytes:
            self._join()
            self._counter.index += 1
        start = self._duration
        self._pending.append(path)
        self._bytes += size
        self._duration += video.video_duration(path)
        columns = {**self._counter.position, "from_timestamp": start, "to_timestamp": self._duration}
        return {f"videos/{self._key}/{name}": value for name, value in columns.items()}

    def close(self) -> None:
        if self._pending:
            self._join()
        if self._folder.exists():
            shutil.rmtree(self._folder)

    def _join(self) -> None:
        name = metadata.VIDEO_PATH.format(video_key=self._key, **self._counter.position)
        video.concatenate_videos(self._pending, self._root / name)
        for path in self._pending:
            path.unlink()
        self._pending, self._bytes, self._duration = [], 0, 0.0


def _check_features(features: Mapping[str, dict[str, Any]]) -> None:
    for key, feature in features.items():
        if "/" in key:
            raise InputError(f"feature '{key}': names must not contain '/'")
        if "dtype" not in feature or "shape" not in feature:
            raise InputError(f"feature '{key}': needs 'dtype' and 'shape'")
        feature["shape"] = tuple(feature["shape"])
        feature.setdefault("names", None)
        if feature["dtype"] in ("image", "video") and len(feature["shape"]) != 3:
            raise InputError(f"feature '{key}': images are (height, width, channels), not {feature['shape']}")


def _check_names(given: set[str], expected: set[str]) -> None:
    if given != expected:
        missing, extra = sorted(expected - given), sorted(given - expected)
        parts = [f"missing {missing}"] * bool(missing) + [f"unknown {extra}"] * bool(extra)
        raise InputError(f"add_frame: {', '.join(parts)}")


def _checked_value(key: str, value: Any, feature: Mapping[str, Any]) -> Any:
    if feature["dtype"] == "string":
        if not isinstance(value, str):
            raise InputError(f"add_frame: '{key}' must be a string, not {type(value).__name__}")
        return value
    if not isinstance(value, np.ndarray):
        raise InputError(f"add_frame: '{key}' must be a numpy array, not {type(value).__name__}")
    if value.dtype != np.dtype(feature["dtype"]) or value.shape != feature["shape"]:
        raise InputError(
            f"add_frame: '{key}' must be {feature['dtype']} of shape {feature['shape']}, "
            f"not {value.dtype} of shape {value.shape}"
        )
    return value.copy()


def _rgb_image(key: str, value: Any, shape: tuple[int, ...]) -> np.ndarray:
    image = np.asarray(value.convert("RGB")) if isinstance(value, PIL.Image.Image) else np.asarray(value)
    if image.ndim == 3 and image.shape[0] == 3 and image.shape[-1] != 3:
        image = np.moveaxis(image, 0, -1)
    if image.shape != shape and (image.shape[2:] + image.shape[:2]) != shape:
        raise InputError(f"add_frame: '{key}' must have shape {shape}, it has {image.shape}")
    if image.dtype != np.uint8:
        if image.min() < 0 or image.max() > 1:
            raise InputError(f"add_frame: '{key}' is {image.dtype}, so it must lie in 0..1 (or be uint8)")
        image = (image * 255).astype(np.uint8)
    return image


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


def _arrow_schema(features: Mapping[str, Mapping[str, Any]]) -> pa.Schema:
    fields = [(key, _arrow_type(feature)) for key, feature in features.items() if feature["dtype"] != "video"]
    return pa.schema(fields)


def _arrow_table(
    columns: Mapping[str, Any], features: Mapping[str, Mapping[str, Any]], schema: pa.Schema
) -> pa.Table:
    arrays = []
    for field in schema:
        values = columns[field.name]
        shape = features[field.name]["shape"]
        if features[field.name]["dtype"] == "image":
            values = [{"bytes": _png(image), "path": f"frame-{i:06d}.png"} for i, image in enumerate(values)]
            arrays.append(pa.array(values, field.type))
        elif isinstance(values, list) or len(shape) > 1:
            arrays.append(pa.array(values if isinstance(values, list) else values.tolist(), field.type))
        elif shape == (1,):
            arrays.append(pa.array(values.reshape(-1).astype(features[field.name]["dtype"])))
        else:
            arrays.append(pa.FixedSizeListArray.from_arrays(pa.array(values.reshape(-1)), shape[0]))
    return pa.Table.from_arrays(arrays, schema=schema)


def _png(image: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    PIL.Image.fromarray(image).save(buffer, format="PNG", compress_level=6)
    return buffer.getvalue()


def _write_tasks(tasks: list[str], path: Path) -> None:
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
