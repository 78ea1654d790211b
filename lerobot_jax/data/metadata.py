"""The `meta/` folder of a LeRobotDataset: info.json, statistics, tasks and episodes, of format v3.0 or v2.1.

Mirrors `lerobot.datasets.dataset_metadata.LeRobotDatasetMetadata`.
"""

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import huggingface_hub
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from lerobot_jax import hub
from lerobot_jax.data import metadata_v21
from lerobot_jax.data.info import (
    CODEBASE_VERSION,
    DATA_PATH,
    DEFAULT_FEATURES,
    EPISODES_IN,
    EPISODES_PATH,
    INFO_PATH,
    PATH_FIELDS,
    STATS_PATH,
    TASKS_PATH,
    V21,
    V30,
    VIDEO_PATH,
    Stats,
    load_info,
    read_json_object,
)
from lerobot_jax.data.metadata_checks import check_episodes
from lerobot_jax.data.statistics_checks import check_statistics, to_arrays
from lerobot_jax.errors import InputError

__all__ = [
    "CODEBASE_VERSION",
    "DATA_PATH",
    "DEFAULT_FEATURES",
    "EPISODES_PATH",
    "INFO_PATH",
    "STATS_PATH",
    "TASKS_PATH",
    "VIDEO_PATH",
    "LeRobotDatasetMetadata",
    "Stats",
    "fetch_dataset",
    "read_parquet",
    "read_parquet_metadata",
    "read_parquet_names",
]

# What pyarrow raises for files that are damaged; for want of memory where a damaged number is a size.
_DAMAGE = (pa.ArrowException, OSError, ValueError, OverflowError, MemoryError)
T = TypeVar("T")


@dataclasses.dataclass
class LeRobotDatasetMetadata:
    """What a dataset says of itself, the same for every format but for `info`, which is info.json as it is.

    `revision` is the Hub commit that it comes from, if any. `episodes` holds one array (or list) per column of
    `meta/episodes/**`, statistics left out, row i for episode i. v2.1 has no such columns; they are made up for it.
    """

    repo_id: str
    root: Path
    revision: str | None
    info: dict[str, Any]
    stats: Stats
    tasks: list[str]
    episodes: dict[str, Any]

    @classmethod
    def find(cls, repo_id: str, root: str | Path | None, revision: str | None) -> "LeRobotDatasetMetadata":
        """Find a dataset in a folder, in LeRobot's cache or on the Hub, and read its `meta/` files.

        Looks at `root` when it is given, else at `$HF_LEROBOT_HOME/<repo_id>` and at the Hub (with its cache
        `$HF_LEROBOT_HOME/hub`), where `revision` defaults to the tag of the newest format, "v3.0" or "v2.1".

        Raises:
            InputError: saying what was looked for and where.
        """
        folder = Path(root) if root is not None else hub.lerobot_home() / repo_id
        if (folder / INFO_PATH).exists():
            return cls.load(repo_id, folder)
        if root is not None:
            raise InputError(f"{folder / INFO_PATH}: no such file, so dataset.root is not a LeRobotDataset")
        snapshot = fetch_dataset(repo_id, revision or newest_tag(repo_id), [INFO_PATH, "meta/*"])
        return cls.load(repo_id, snapshot, snapshot.name)

    @classmethod
    def load(cls, repo_id: str, root: Path, revision: str | None = None) -> "LeRobotDatasetMetadata":
        """Read `root/meta`.

        Raises:
            InputError: naming the file that is missing, damaged or inconsistent.
        """
        info = load_info(root)
        if info["codebase_version"] == V21:
            tasks, episodes = metadata_v21.load_tasks(root), metadata_v21.load_episodes(root, info)
            stats = metadata_v21.combine(root, metadata_v21.load_episode_statistics(root, info))
        else:
            tasks, episodes = load_tasks(root), load_episodes(root, info)
            stats = load_stats(root, info)
        check_episodes(root, info, tasks, episodes)
        return cls(repo_id, root, revision, info, stats, tasks, episodes)

    @property
    def fps(self) -> int | float:
        return self.info["fps"]

    @property
    def features(self) -> dict[str, dict[str, Any]]:
        return self.info["features"]

    @property
    def video_keys(self) -> list[str]:
        return [key for key, feature in self.features.items() if feature["dtype"] == "video"]

    @property
    def image_keys(self) -> list[str]:
        return [key for key, feature in self.features.items() if feature["dtype"] == "image"]

    @property
    def camera_keys(self) -> list[str]:
        """All visual features, in the order of info.json."""
        return [key for key, feature in self.features.items() if feature["dtype"] in ("image", "video")]

    @property
    def total_episodes(self) -> int:
        return self.info["total_episodes"]

    @property
    def total_frames(self) -> int:
        return self.info["total_frames"]

    def data_file(self, episode: int) -> str:
        """Give the parquet file of an episode, relative to the root."""
        return self.info["data_path"].format(**self._place("data", episode))

    def video_file(self, episode: int, key: str) -> str:
        """Give the video file that holds an episode of one camera, relative to the root."""
        return self.info["video_path"].format(video_key=key, **self._place(f"videos/{key}", episode))

    def _place(self, part: str, episode: int) -> dict[str, int]:
        names = ("chunk_index", "file_index")
        numbers = (int(self.episodes[f"{part}/{name}"][episode]) for name in names)
        return dict(zip(PATH_FIELDS[self.info["codebase_version"]], numbers, strict=True))

    def episode_files(self, episodes: list[int] | None) -> list[str]:
        """List the data and video files that hold these episodes (None: all), without repeats."""
        chosen = range(self.total_episodes) if episodes is None else episodes
        files = [self.data_file(e) for e in chosen]
        files += [self.video_file(e, key) for key in self.video_keys for e in chosen]
        return list(dict.fromkeys(files))


def fetch_dataset(repo_id: str, revision: str, files: list[str]) -> Path:
    """Download files of a dataset from the Hub into LeRobot's cache; return the snapshot's folder."""
    return hub.fetch(
        repo_id,
        "dataset",
        files,
        revision=revision,
        cache=hub.lerobot_home() / "hub",
        looked_at=hub.lerobot_home() / repo_id,
        advice="check the name, go online once, or give its folder with dataset.root",
    )


def newest_tag(repo_id: str) -> str:
    """Choose the tag of the newest format that a dataset on the Hub has; without the Hub, that its cache has."""
    tags = (V30, V21)
    try:
        refs = huggingface_hub.HfApi().list_repo_refs(repo_id, repo_type="dataset")
    except hub.CALL_ERRORS:
        cache = hub.lerobot_home() / "hub"
        for tag in tags:
            if isinstance(
                huggingface_hub.try_to_load_from_cache(repo_id, INFO_PATH, cache, tag, repo_type="dataset"),
                str,
            ):
                return tag
        return V30  # `fetch_dataset` will say what is wrong
    names = [ref.name for ref in (*refs.tags, *refs.branches)]
    for tag in tags:
        if tag in names:
            return tag
    raise InputError(
        f"dataset '{repo_id}' on the Hub has neither the tag {V30} nor {V21}, only {', '.join(names)}; give one of "
        f"these with dataset.revision, or tag it: `hf repo tag create {repo_id} {V30} --repo-type dataset`, where "
        f"{V30} is the codebase_version in its {INFO_PATH}"
    )


def read_parquet(
    path: Path, columns: list[str] | None = None, row_groups: list[int] | None = None
) -> pa.Table:
    """Read a parquet file, or some of its row groups; raise `InputError` naming it if missing or damaged."""

    def read() -> pa.Table:
        file = pq.ParquetFile(path)
        groups = range(file.num_row_groups) if row_groups is None else row_groups
        return file.read_row_groups(groups, columns=columns)

    return _undamaged(path, read)


def read_parquet_metadata(path: Path) -> pq.FileMetaData:
    """Read the footer of a parquet file; raise `InputError` naming it when it is missing or damaged."""
    return _undamaged(path, lambda: pq.read_metadata(path))


def read_parquet_names(path: Path) -> list[str]:
    """Read the names of a parquet file's columns; raise `InputError` naming it when it is missing or damaged."""
    return _undamaged(path, lambda: pq.read_schema(path).names)


def _undamaged(path: Path, read: Callable[[], T]) -> T:
    try:
        return read()
    except FileNotFoundError:
        raise InputError(f"{path}: no such file") from None
    except _DAMAGE as error:
        first_line = (str(error) or type(error).__name__).splitlines()[0]
        raise InputError(f"{path}: damaged or incomplete parquet file ({first_line})") from None


def load_stats(root: Path, info: dict[str, Any]) -> Stats:
    """Read and check the statistics of the dataset, none if it has none."""
    path = root / STATS_PATH
    if not path.exists():
        return {}
    stats = to_arrays(str(path), read_json_object(path))
    check_statistics(path, info["features"], [stats])
    return stats


def load_tasks(root: Path) -> list[str]:
    """Read the task descriptions, ordered by task_index."""
    path = root / TASKS_PATH
    table = read_parquet(path)
    names = [name for name in table.column_names if name != "task_index"]
    if len(table.column_names) != 2 or len(names) != 1:
        raise InputError(f"{path}: expected the columns 'task' and 'task_index', found {table.column_names}")
    indices = _numbers(path, "task_index", table["task_index"], pa.types.is_integer, pa.int64())
    tasks = _undamaged(path, table[names[0]].to_pylist)
    if not np.array_equal(np.sort(indices), np.arange(len(tasks))):
        raise InputError(f"{path}: task_index must count 0, 1, 2, ... without gaps or repeats")
    if not all(isinstance(task, str) for task in tasks):
        raise InputError(f"{path}: column '{names[0]}' must hold texts, without empty cells")
    return [tasks[i] for i in np.argsort(indices)]


def load_episodes(root: Path, info: dict[str, Any]) -> dict[str, Any]:
    """Read `meta/episodes/**` without the statistics: one array (or list) per column."""
    folder = root / EPISODES_IN[V30]
    paths = sorted(folder.glob("*/*.parquet"))
    if not paths:
        raise InputError(f"{folder}: no parquet file found")
    tables = []
    for path in paths:
        names = [name for name in read_parquet_names(path) if not name.startswith("stats/")]
        tables.append(read_parquet(path, names))
    try:
        table = pa.concat_tables(tables, promote_options="default")
    except pa.ArrowException as error:
        raise InputError(f"{folder}: the files differ in their columns ({error})") from None
    integers, times = _needed_columns(info)
    missing = [name for name in (*integers, *times, "tasks") if name not in table.column_names]
    if missing:
        raise InputError(f"{folder}: missing columns {', '.join(missing)}; info.json asks for them")
    columns: dict[str, Any] = {}
    for name in table.column_names:
        if name in integers:
            columns[name] = _numbers(folder, name, table[name], pa.types.is_integer, pa.int64())
        elif name in times:
            columns[name] = _numbers(folder, name, table[name], pa.types.is_floating, pa.float64())
        else:
            columns[name] = _undamaged(folder, table[name].to_pylist)
    return columns


def _needed_columns(info: dict[str, Any]) -> tuple[list[str], list[str]]:
    """List the columns of whole numbers and of times that every `meta/episodes/**` has."""
    videos = [f"videos/{key}" for key, feature in info["features"].items() if feature["dtype"] == "video"]
    integers = ["episode_index", "length", "dataset_from_index", "dataset_to_index"]
    integers += [f"{part}/{name}" for part in ("data", *videos) for name in ("chunk_index", "file_index")]
    return integers, [f"{part}/{name}" for part in videos for name in ("from_timestamp", "to_timestamp")]


def _numbers(
    path: Path, name: str, column: pa.ChunkedArray, is_right: Callable[[pa.DataType], bool], kind: pa.DataType
) -> np.ndarray:
    if not is_right(column.type) or column.null_count:
        found = f"it holds {column.type}, with {column.null_count} empty cells"
        raise InputError(f"{path}: column '{name}' must hold {kind} in every cell, {found}")
    return _undamaged(path, lambda: column.cast(kind).to_numpy())
