"""Read a LeRobotDataset v3.0: tables in memory, frames from videos or image columns.

Mirrors `lerobot.datasets.lerobot_dataset.LeRobotDataset` and `dataset_reader.DatasetReader`, item by item and index
by index, with two differences: values are numpy arrays, and images are uint8 channel-last.
"""

import math
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from lerobot_jax import hub
from lerobot_jax.data import frames, metadata, video, windows, writer
from lerobot_jax.errors import InputError
from lerobot_jax.features import TASK


class LeRobotDataset:
    """A dataset on disk, in LeRobot's cache or on the Hub.

    `dataset[i]` is frame i of the chosen episodes as a dict; `dataset.read([i, j, ...])` is a batch of them.
    """

    def __init__(
        self,
        repo_id: str,
        root: str | Path | None = None,
        episodes: Sequence[int] | None = None,
        delta_timestamps: Mapping[str, Sequence[float]] | None = None,
        tolerance_s: float = 1e-4,
        revision: str | None = None,
        frame_cache_gb: float = 0.0,
        cameras: Sequence[str] | None = None,
    ):
        """Open a dataset; nothing but its tables is read yet.

        Args:
            repo_id: the dataset's name, `user/dataset`.
            root: its folder; without one, LeRobot's cache and the Hub are asked.
            episodes: the episodes to use, all by default. Their frames keep the order of the files.
            delta_timestamps: feature -> offsets in seconds; such a feature gets a time axis and `<key>_is_pad`.
            tolerance_s: how far a video frame may be from its timestamp, in seconds.
            revision: a branch, tag or commit on the Hub; "v3.0" by default.
            frame_cache_gb: keep decoded frames on disk if they take no more than this.
            cameras: the visual features to give, all by default.

        Raises:
            InputError: naming the file, column or episode that is missing, damaged or inconsistent.
        """
        self.meta = metadata.LeRobotDatasetMetadata.find(repo_id, root, revision)
        self.repo_id, self.root, self.revision = repo_id, self.meta.root, self.meta.revision
        self.episodes = _checked_episodes(episodes, self.meta)
        if self.revision is not None:
            metadata.fetch_dataset(repo_id, self.revision, self.meta.episode_files(self.episodes))
        self._deltas = windows.delta_indices(delta_timestamps or {}, self.meta.fps, tolerance_s)
        unknown = sorted(set(self._deltas) - set(self.meta.features))
        if unknown:
            raise InputError(f"delta_timestamps: {unknown} are no features of {repo_id}")
        self._tables = self._read_tables()
        self.columns = self._read_columns()
        self._row_of_index = np.full(self.meta.total_frames, -1)
        self._row_of_index[self.columns["index"]] = np.arange(len(self))
        self._check_rows()
        chosen = self.meta.camera_keys if cameras is None else cameras
        self.cameras = {key: self._open_camera(key, tolerance_s) for key in chosen}
        if frame_cache_gb > 0:
            frames.decode_into_cache(list(self.cameras.values()), hub.cache_home() / "frames", frame_cache_gb)

    @classmethod
    def create(
        cls,
        repo_id: str,
        fps: int,
        features: Mapping[str, Mapping[str, Any]],
        root: str | Path | None = None,
        robot_type: str | None = None,
        encoding: video.VideoEncoding | None = None,
        **sizes: int,
    ) -> writer.DatasetWriter:
        """Start a new dataset; see `DatasetWriter` for what comes next and for `sizes`."""
        folder = Path(root) if root is not None else hub.lerobot_home() / repo_id
        return writer.DatasetWriter(repo_id, folder, fps, features, robot_type, encoding, **sizes)

    @property
    def fps(self) -> int:
        return self.meta.fps

    @property
    def features(self) -> dict[str, dict[str, Any]]:
        return self.meta.features

    @property
    def num_frames(self) -> int:
        return len(self)

    @property
    def num_episodes(self) -> int:
        return self.meta.total_episodes if self.episodes is None else len(self.episodes)

    def __len__(self) -> int:
        return len(self.columns["index"])

    def __getitem__(self, i: int) -> dict[str, Any]:
        """Give frame `i` of the chosen episodes, negative indices from the end."""
        if not -len(self) <= i < len(self):
            raise IndexError(f"frame {i} of {len(self)}")
        batch = self.read(np.array([i % len(self)]))
        return {key: value[0] for key, value in batch.items()}

    def read(self, rows: np.ndarray, keys: Collection[str] | None = None) -> dict[str, Any]:
        """Give a batch of frames: every feature `b [t] ...`, `<key>_is_pad` `b t`, and "task" as a list.

        Args:
            rows: which frames, counted within the chosen episodes.
            keys: the entries to give, all by default.
        """
        index = self.columns["index"][rows]
        episode = self.columns["episode_index"][rows]
        start = self.meta.episodes["dataset_from_index"][episode]
        end = self.meta.episodes["dataset_to_index"][episode]
        batch: dict[str, Any] = {}
        rows_of = dict.fromkeys((*self.cameras, *self.columns), rows)
        for key, deltas in self._deltas.items():
            wanted, batch[f"{key}_is_pad"] = windows.window(index, start, end, deltas)
            rows_of[key] = self._row_of_index[wanted]
        for key, camera in self.cameras.items():
            if keys is None or key in keys:
                flat = camera.read(rows_of[key].reshape(-1))
                batch[key] = flat.reshape(*rows_of[key].shape, *flat.shape[1:])
        for key, column in self.columns.items():
            if keys is None or key in keys:
                batch[key] = column[rows_of[key]]
        batch[TASK] = [self.meta.tasks[i] for i in self.columns["task_index"][rows]]
        return batch if keys is None else {key: value for key, value in batch.items() if key in keys}

    def rows_of(self, episodes: Sequence[int], drop_n_last_frames: int = 0) -> np.ndarray:
        """List the rows of some episodes, without the last `drop_n_last_frames` of each."""
        episode = self.columns["episode_index"]
        last = self.meta.episodes["dataset_to_index"][episode] - drop_n_last_frames
        rows = np.flatnonzero(np.isin(episode, episodes) & (self.columns["index"] < last))
        if len(rows) == 0:
            raise InputError(
                f"{self.repo_id}: no episode is longer than drop_n_last_frames={drop_n_last_frames}"
            )
        return rows

    def first_rows(self, episodes: Sequence[int], max_samples: int) -> np.ndarray:
        """List the rows of some episodes, at most `max_samples` (0: all), as many of each task."""
        rows = np.flatnonzero(np.isin(self.columns["episode_index"], episodes))
        if max_samples == 0 or len(rows) == 0:
            return rows
        task = self.columns["task_index"][rows]
        per_task = max(1, max_samples // len(np.unique(task)))
        return np.concatenate([rows[task == t][:per_task] for t in np.unique(task)])

    def _read_tables(self) -> dict[Path, pa.Table]:
        chosen = range(self.meta.total_episodes) if self.episodes is None else self.episodes
        tables = {}
        for path in sorted({self.root / self.meta.data_file(episode) for episode in chosen}):
            table = metadata.read_parquet(path)
            wanted = [key for key, feature in self.features.items() if feature["dtype"] != "video"]
            missing = [key for key in wanted if key not in table.column_names]
            if missing:
                raise InputError(f"{path}: lacks the columns {missing} that info.json declares")
            if self.episodes is not None:
                keep = np.isin(table["episode_index"].to_numpy(), self.episodes)
                table = table.filter(pa.array(keep))
            tables[path] = table.select(wanted)
        return tables

    def _read_columns(self) -> dict[str, np.ndarray]:
        columns = {}
        for key, feature in self.features.items():
            if feature["dtype"] not in ("image", "video"):
                parts = [_to_numpy(path, key, feature, table[key]) for path, table in self._tables.items()]
                columns[key] = np.concatenate(parts)
        return columns

    def _check_rows(self) -> None:
        chosen = np.arange(self.meta.total_episodes) if self.episodes is None else np.array(self.episodes)
        expected = int(self.meta.episodes["length"][chosen].sum())
        index, episode = self.columns["index"], self.columns["episode_index"]
        if len(index) != expected or len(np.unique(index)) != expected:
            counts = np.bincount(episode, minlength=self.meta.total_episodes)
            bad = [int(e) for e in chosen if counts[e] != self.meta.episodes["length"][e]]
            detail = f"episodes {bad[:5]} have another length" if bad else "some frames appear twice"
            raise InputError(f"{self.root / 'data'}: {len(index)} rows, {expected} declared: {detail}")
        inside = (index >= self.meta.episodes["dataset_from_index"][episode]) & (
            index < self.meta.episodes["dataset_to_index"][episode]
        )
        if not inside.all():
            row = int(np.flatnonzero(~inside)[0])
            raise InputError(
                f"{self.root / 'data'}: frame {index[row]} says episode {episode[row]}, which meta/episodes denies"
            )

    def _open_camera(self, key: str, tolerance_s: float) -> frames.VideoFrames | frames.ImageFrames:
        if key not in self.meta.camera_keys:
            raise InputError(f"{self.repo_id}: no camera '{key}'; there are {self.meta.camera_keys}")
        shape = self.features[key]["shape"]
        if key in self.meta.image_keys:
            columns = [table[key] for table in self._tables.values()]
            return frames.ImageFrames(list(self._tables), columns, key, shape)
        episode = self.columns["episode_index"]
        names = [self.meta.video_file(e, key) for e in range(self.meta.total_episodes)]
        used = sorted({names[e] for e in np.unique(episode)})
        file_of_episode = np.array([used.index(name) if name in used else -1 for name in names])
        # Like stock: the offset is added in float64 to the float32 timestamp of the table.
        times = self.meta.episodes[f"videos/{key}/from_timestamp"][episode] + self.columns[
            "timestamp"
        ].astype(np.float64)
        return frames.VideoFrames(
            [self.root / name for name in used], file_of_episode[episode], times, shape, tolerance_s
        )


def split_episodes(
    meta: metadata.LeRobotDatasetMetadata, episodes: Sequence[int] | None, eval_split: float
) -> tuple[list[int], list[int]]:
    """Hold out the last `ceil(n * eval_split)` of the n episodes of every task, as LeRobot does.

    Returns:
        (training episodes, held-out episodes)
    """
    by_task: dict[str, list[int]] = {}
    for episode in range(meta.total_episodes) if episodes is None else episodes:
        tasks = meta.episodes["tasks"][episode] if "tasks" in meta.episodes else []
        by_task.setdefault(tasks[0] if len(tasks) else "", []).append(episode)
    train, held_out = [], []
    for chosen in by_task.values():
        num_held_out = math.ceil(len(chosen) * eval_split)
        train += chosen[: len(chosen) - num_held_out]
        held_out += chosen[len(chosen) - num_held_out :]
    if not train:
        raise InputError(f"dataset.eval_split={eval_split} leaves no episode to train on")
    return train, held_out


def _checked_episodes(
    episodes: Sequence[int] | None, meta: metadata.LeRobotDatasetMetadata
) -> list[int] | None:
    if episodes is None:
        return None
    outside = [e for e in episodes if not 0 <= e < meta.total_episodes]
    if outside or len(set(episodes)) != len(episodes) or len(episodes) == 0:
        what = f"{outside} are not among 0..{meta.total_episodes - 1}" if outside else "give some, each once"
        raise InputError(f"dataset.episodes: {what}")
    return list(episodes)


def _to_numpy(path: Path, key: str, feature: Mapping[str, Any], column: pa.ChunkedArray) -> np.ndarray:
    """Turn a table column into float32, int64, bool (as LeRobot hands them to torch) or str of shape (n, ...)."""
    if column.null_count:
        raise InputError(f"{path}: '{key}' has empty cells")
    if feature["dtype"] == "string":
        return np.array(column.to_pylist(), dtype=object)
    shape = () if feature["shape"] == (1,) else feature["shape"]
    values = column.combine_chunks()
    depth = 0
    while (
        pa.types.is_list(values.type)
        or pa.types.is_fixed_size_list(values.type)
        or pa.types.is_large_list(values.type)
    ):
        values = values.flatten()
        depth += 1
    flat = values.to_numpy(zero_copy_only=False)
    if flat.size != len(column) * math.prod(shape) or (depth > 0) != (len(shape) > 0):
        raise InputError(
            f"{path}: '{key}' does not hold {feature['shape']} values a row, as info.json declares"
        )
    kinds = {"f": np.float32, "i": np.int64, "u": np.int64, "b": np.bool_}
    dtype = np.dtype(feature["dtype"])
    array = flat.astype(dtype).astype(kinds[dtype.kind]).reshape(len(column), *shape)
    if array.dtype == np.float32 and not np.isfinite(array).all():
        row = int(np.argwhere(~np.isfinite(array))[0][0])
        raise InputError(f"{path}: '{key}' is NaN or infinite in row {row}")
    return array
