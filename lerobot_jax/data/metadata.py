"""The `meta/` folder of a LeRobotDataset v3.0: info.json, stats.json, tasks.parquet and episodes/**.

Mirrors `lerobot.datasets.dataset_metadata.LeRobotDatasetMetadata`.
"""

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from lerobot_jax import hub
from lerobot_jax.errors import InputError
from lerobot_jax.files import read_json

CODEBASE_VERSION = "v3.0"
INFO_PATH = "meta/info.json"
STATS_PATH = "meta/stats.json"
TASKS_PATH = "meta/tasks.parquet"
EPISODES_PATH = "meta/episodes/chunk-{chunk_index:03d}/file-{file_index:03d}.parquet"
DATA_PATH = "data/chunk-{chunk_index:03d}/file-{file_index:03d}.parquet"
VIDEO_PATH = "videos/{video_key}/chunk-{chunk_index:03d}/file-{file_index:03d}.mp4"

# The columns that every dataset has and that the writer fills in by itself.
DEFAULT_FEATURES: dict[str, dict[str, Any]] = {
    "timestamp": {"dtype": "float32", "shape": (1,), "names": None},
    "frame_index": {"dtype": "int64", "shape": (1,), "names": None},
    "episode_index": {"dtype": "int64", "shape": (1,), "names": None},
    "index": {"dtype": "int64", "shape": (1,), "names": None},
    "task_index": {"dtype": "int64", "shape": (1,), "names": None},
}

Stats = dict[str, dict[str, np.ndarray]]


@dataclasses.dataclass
class LeRobotDatasetMetadata:
    """What a dataset says of itself.

    `revision` is the Hub commit that it comes from, if any. `episodes` holds one array per column of
    `meta/episodes/**` (statistics left out), row i for episode i.
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
        `$HF_LEROBOT_HOME/hub`), where `revision` defaults to the tag of the format, "v3.0".

        Raises:
            InputError: saying what was looked for and where.
        """
        folder = Path(root) if root is not None else hub.lerobot_home() / repo_id
        if (folder / INFO_PATH).exists():
            return cls.load(repo_id, folder)
        if root is not None:
            raise InputError(f"{folder / INFO_PATH}: no such file, so dataset.root is not a LeRobotDataset")
        snapshot = fetch_dataset(repo_id, revision or CODEBASE_VERSION, [INFO_PATH, "meta/*"])
        return cls.load(repo_id, snapshot, snapshot.name)

    @classmethod
    def load(cls, repo_id: str, root: Path, revision: str | None = None) -> "LeRobotDatasetMetadata":
        """Read `root/meta`.

        Raises:
            InputError: naming the file that is missing, damaged or inconsistent.
        """
        info = load_info(root)
        stats_path = root / STATS_PATH
        stats = _arrays(read_json(stats_path)) if stats_path.exists() else {}
        tasks = load_tasks(root)
        episodes = load_episodes(root)
        metadata = cls(repo_id, root, revision, info, stats, tasks, episodes)
        metadata._check()
        return metadata

    def _check(self) -> None:
        lengths = self.episodes["length"]
        starts, ends = self.episodes["dataset_from_index"], self.episodes["dataset_to_index"]
        where = self.root / "meta/episodes"
        if not np.array_equal(self.episodes["episode_index"], np.arange(len(lengths))):
            raise InputError(f"{where}: episode_index must count 0, 1, 2, ... without gaps or repeats")
        if np.any(lengths <= 0) or not np.array_equal(ends - starts, lengths):
            bad = int(np.flatnonzero((lengths <= 0) | (ends - starts != lengths))[0])
            raise InputError(
                f"{where}: episode {bad} has length {lengths[bad]} "
                f"but spans frames {starts[bad]} to {ends[bad]}"
            )
        for name, found in (("total_episodes", len(lengths)), ("total_frames", int(lengths.sum()))):
            if self.info[name] != found:
                raise InputError(f"{self.root / INFO_PATH}: {name} is {self.info[name]}, {where} has {found}")

    @property
    def fps(self) -> int:
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
        return self.info["data_path"].format(
            chunk_index=self.episodes["data/chunk_index"][episode],
            file_index=self.episodes["data/file_index"][episode],
        )

    def video_file(self, episode: int, key: str) -> str:
        """Give the video file that holds an episode of one camera, relative to the root."""
        return self.info["video_path"].format(
            video_key=key,
            chunk_index=self.episodes[f"videos/{key}/chunk_index"][episode],
            file_index=self.episodes[f"videos/{key}/file_index"][episode],
        )

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


def read_parquet(path: Path, columns: list[str] | None = None) -> pa.Table:
    """Read a parquet file; raise `InputError` naming it when it is missing or damaged."""
    try:
        return pq.ParquetFile(path).read(columns=columns)
    except FileNotFoundError:
        raise InputError(f"{path}: no such file") from None
    except (pa.ArrowInvalid, pa.ArrowNotImplementedError, OSError) as error:
        first_line = str(error).splitlines()[0]
        raise InputError(f"{path}: damaged or incomplete parquet file ({first_line})") from None


def load_info(root: Path) -> dict[str, Any]:
    """Read and check info.json; shapes become tuples."""
    path = root / INFO_PATH
    info = read_json(path)
    required = ("codebase_version", "fps", "features", "total_episodes", "total_frames", "data_path")
    missing = [name for name in required if name not in info]
    if missing:
        raise InputError(f"{path}: missing {', '.join(missing)}")
    if not str(info["codebase_version"]).startswith("v3."):
        raise InputError(
            f"{path}: the dataset is in format {info['codebase_version']}, this version reads v3.0; convert it "
            "with LeRobot's `python -m lerobot.scripts.convert_dataset_v21_to_v30`"
        )
    if not info["fps"] > 0:
        raise InputError(f"{path}: fps must be positive, it is {info['fps']}")
    for key, feature in info["features"].items():
        if "dtype" not in feature or "shape" not in feature:
            raise InputError(f"{path}: feature '{key}' needs dtype and shape")
        details = feature.get("info") or {}
        if details.get("is_depth_map") or details.get("video.is_depth_map"):
            raise InputError(f"{path}: feature '{key}' is a depth map, which is not supported")
        feature["shape"] = tuple(feature["shape"])
    return info


def load_tasks(root: Path) -> list[str]:
    """Read the task descriptions, ordered by task_index."""
    path = root / TASKS_PATH
    table = read_parquet(path)
    names = [name for name in table.column_names if name != "task_index"]
    if "task_index" not in table.column_names or len(names) != 1:
        raise InputError(f"{path}: expected the columns 'task' and 'task_index', found {table.column_names}")
    task_of = dict(zip(table["task_index"].to_pylist(), table[names[0]].to_pylist(), strict=True))
    return [task_of[i] for i in sorted(task_of)]


def load_episodes(root: Path) -> dict[str, Any]:
    """Read `meta/episodes/**` without the statistics: one array (or list) per column."""
    paths = sorted((root / "meta/episodes").glob("*/*.parquet"))
    if not paths:
        raise InputError(f"{root / 'meta/episodes'}: no parquet file found")
    tables = []
    for path in paths:
        names = read_parquet_names(path)
        tables.append(read_parquet(path, [name for name in names if not name.startswith("stats/")]))
    table = pa.concat_tables(tables, promote_options="default")
    columns: dict[str, Any] = {}
    for name in table.column_names:
        is_list = pa.types.is_list(table[name].type) or pa.types.is_string(table[name].type)
        columns[name] = table[name].to_pylist() if is_list else table[name].to_numpy()
    needed = ("episode_index", "length", "dataset_from_index", "dataset_to_index")
    missing = [name for name in (*needed, "data/chunk_index", "data/file_index") if name not in columns]
    if missing:
        raise InputError(f"{paths[0]}: missing columns {', '.join(missing)}")
    return columns


def read_parquet_names(path: Path) -> list[str]:
    try:
        return pq.read_schema(path).names
    except (pa.ArrowInvalid, OSError) as error:
        first_line = str(error).splitlines()[0]
        raise InputError(f"{path}: damaged or incomplete parquet file ({first_line})") from None


def _arrays(stats: dict[str, Any]) -> Stats:
    return {
        key: {name: np.atleast_1d(np.asarray(value)) for name, value in values.items()}
        for key, values in stats.items()
    }
