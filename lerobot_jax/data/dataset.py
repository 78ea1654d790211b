"""Read a LeRobotDataset: numbers from memory, frames from videos or image columns.

Mirrors `lerobot.datasets.lerobot_dataset.LeRobotDataset` and `dataset_reader.DatasetReader`, item by item and index
by index, with two differences: values are numpy arrays, and images are uint8 channel-last.
"""

import math
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from lerobot_jax import hub
from lerobot_jax.data import frame_cache, frames, info, metadata, tables, video, windows, writer
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
        cameras: Sequence[str] | None = None,
        image_size: tuple[int, int] | None = None,
        meta: metadata.LeRobotDatasetMetadata | None = None,
        added_columns: Mapping[str, np.ndarray] | None = None,
    ):
        """Open a dataset: its numbers are read into memory, its frames are not decoded yet.

        Args:
            repo_id: the dataset's name, `user/dataset`.
            root: its folder; without one, LeRobot's cache and the Hub are asked.
            episodes: the episodes to use, all by default. Their frames keep the order of the files.
            delta_timestamps: feature -> offsets in seconds; such a feature gets a time axis and `<key>_is_pad`.
            tolerance_s: how far a timestamp may be from frame_index / fps, and a video frame from its timestamp, in
                seconds.
            revision: a branch, tag or commit on the Hub; by default the tag of the newest format.
            cameras: the visual features to give, all by default.
            image_size: (height, width) to which frames are resized; as they are by default.
            meta: what is known of the dataset already; then nothing is searched for or downloaded.
            added_columns: entries that frames get besides those of the files: name -> values of all frames of the
                dataset, by their index.

        Raises:
            InputError: naming the file, column or episode that is missing, damaged or inconsistent.
        """
        self.meta = meta or metadata.LeRobotDatasetMetadata.find(repo_id, root, revision)
        self.repo_id, self.root, self.revision = repo_id, self.meta.root, self.meta.revision
        self.episodes = _checked_episodes(episodes, self.meta)
        if meta is None and self.revision is not None:
            metadata.fetch_dataset(repo_id, self.revision, self.meta.episode_files(self.episodes))
        self.image_size = image_size
        self.deltas = windows.delta_indices(delta_timestamps or {}, self.meta.fps, tolerance_s)
        unknown = sorted(set(self.deltas) - set(self.meta.features))
        if unknown:
            raise InputError(f"delta_timestamps: {unknown} are no features of {repo_id}")
        self._table = tables.read_table(self.meta, self.episodes)
        tables.check_timestamps(self.meta, self._table, tolerance_s)
        index = self._table.columns["index"]
        added = {name: values[index] for name, values in (added_columns or {}).items()}
        self.columns = self._table.columns | added
        # The chosen episodes' frames have places 0, 1, ..., so that nothing here is as long as the whole dataset.
        episode = self.columns["episode_index"]
        chosen, lengths = np.unique(episode, return_counts=True)
        self.first_place = np.full(self.meta.total_episodes, -1)
        self.first_place[chosen] = np.cumsum(lengths) - lengths
        self.row_of_place = np.empty(len(self), np.int64)
        self.row_of_place[self.first_place[episode] + self.columns["frame_index"]] = np.arange(len(self))
        chosen = self.meta.camera_keys if cameras is None else cameras
        self.cameras = {key: self._open_camera(key, tolerance_s) for key in chosen}

    def cache_frames(self, budget_gb: float) -> bool:
        """Decode all frames into the cache on disk and read them from there, if it may hold as much."""
        cache = hub.cache_home() / "frames"
        return frame_cache.cached_frames(list(self.cameras.values()), cache, budget_gb)

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
    def fps(self) -> int | float:
        return self.meta.fps

    @property
    def features(self) -> dict[str, dict[str, Any]]:
        """What info.json says of the features; of resized frames, their new shape."""
        return resized_features(self.meta, self.image_size)

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
        episode = self.columns["episode_index"][rows]
        start = self.first_place[episode]
        end = start + self.meta.episodes["length"][episode]
        place = start + self.columns["frame_index"][rows]
        batch: dict[str, Any] = {}
        rows_of = dict.fromkeys((*self.cameras, *self.columns), rows)
        for key, deltas in self.deltas.items():
            wanted, batch[f"{key}_is_pad"] = windows.window(place, start, end, deltas)
            rows_of[key] = self.row_of_place[wanted]
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

    def _open_camera(self, key: str, tolerance_s: float) -> frames.VideoFrames | frames.ImageFrames:
        if key not in self.meta.camera_keys:
            raise InputError(f"{self.repo_id}: no camera '{key}'; there are {self.meta.camera_keys}")
        shape = info.image_shape(self.meta.features[key])
        if key in self.meta.image_keys:
            table = self._table
            return frames.ImageFrames(
                table.files, table.file_of_row, table.place_of_row, key, shape, self.image_size
            )
        episode = self.columns["episode_index"]
        names = {e: self.meta.video_file(e, key) for e in np.unique(episode).tolist()}
        used = sorted(set(names.values()))
        number = {name: i for i, name in enumerate(used)}
        file_of_episode = np.full(self.meta.total_episodes, -1)
        file_of_episode[list(names)] = [number[name] for name in names.values()]
        # Like stock: the offset is added in float64 to the float32 timestamp of the table.
        times = self.meta.episodes[f"videos/{key}/from_timestamp"][episode] + self.columns[
            "timestamp"
        ].astype(np.float64)
        paths = [self.root / name for name in used]
        return frames.VideoFrames(paths, file_of_episode[episode], times, shape, tolerance_s, self.image_size)


def split_episodes(
    meta: metadata.LeRobotDatasetMetadata, episodes: Sequence[int] | None, eval_split: float
) -> tuple[list[int], list[int]]:
    """Hold out the last `ceil(n * eval_split)` of the n episodes of every task, as LeRobot does.

    Returns:
        (training episodes, held-out episodes)
    """
    by_task: dict[str, list[int]] = {}
    for episode in _checked_episodes(episodes, meta) or range(meta.total_episodes):
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


def resized_features(
    meta: metadata.LeRobotDatasetMetadata, image_size: tuple[int, int] | None
) -> dict[str, dict[str, Any]]:
    """Give what info.json says of the features, with camera frames resized to (height, width)."""
    if image_size is None:
        return meta.features
    resized = {"shape": (*image_size, 3), "names": ["height", "width", "channels"]}
    return {key: f | resized if key in meta.camera_keys else f for key, f in meta.features.items()}
