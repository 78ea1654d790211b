"""Read a dataset of any format episode by episode: what an edited dataset is written from.

In LeRobot, `lerobot.datasets.dataset_tools` and `lerobot.datasets.aggregate` read whole files.
"""

import contextlib
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from lerobot_jax.data import metadata, metadata_v21
from lerobot_jax.data.info import EPISODES_IN, V21, V30, Stats
from lerobot_jax.data.metadata import LeRobotDatasetMetadata
from lerobot_jax.errors import InputError

EPISODES_AT_ONCE = 64


class EpisodeTables:
    """Reads the frames of episodes, one row group at a time."""

    def __init__(self, source: LeRobotDatasetMetadata, schema: pa.Schema):
        self._source, self._schema = source, schema
        self._path: Path | None = None

    def read(self, episode: int) -> pa.Table:
        """Read an episode's frames, in the columns of the schema.

        Raises:
            InputError: naming the file that is missing, damaged or not as `meta/` says.
        """
        path = self._source.root / self._source.data_file(episode)
        with _damage_reported(path):
            if path != self._path:
                self._open(path)
            groups = np.unique(self._group_of_row[self._episode_of_row == episode]).tolist()
            if groups != self._groups:
                self._table = self._file.read_row_groups(groups, columns=self._schema.names)
                self._groups = groups
            rows = self._table["episode_index"].to_numpy() == episode
            table = self._table.filter(pa.array(rows)).select(self._schema.names).cast(self._schema)
        self._check(path, episode, table)
        return table.combine_chunks()

    def _open(self, path: Path) -> None:
        names = metadata.read_parquet_names(path)
        missing, extra = (
            sorted(set(self._schema.names) - set(names)),
            sorted(set(names) - set(self._schema.names)),
        )
        if missing or extra:
            raise InputError(
                f"{path}: lacks the columns {missing} that info.json declares, and has {extra} that it does not"
            )
        self._file = pq.ParquetFile(path)
        about = self._file.metadata
        lengths = [about.row_group(i).num_rows for i in range(about.num_row_groups)]
        self._group_of_row = np.repeat(np.arange(len(lengths)), lengths)
        self._episode_of_row = self._file.read(columns=["episode_index"])["episode_index"].to_numpy()
        self._path, self._groups = path, None

    def _check(self, path: Path, episode: int, table: pa.Table) -> None:
        length = int(self._source.episodes["length"][episode])
        if len(table) != length:
            raise InputError(f"{path}: has {len(table)} rows of episode {episode}, meta/ says {length}")
        for name in self._schema.names:
            is_image = name in self._source.image_keys
            values = table[name].flatten()[0] if is_image else table[name]  # an image's bytes
            if values.null_count:
                raise InputError(f"{path}: '{name}' has empty cells in episode {episode}")
        tasks = table["task_index"].to_numpy()
        if tasks.min() < 0 or tasks.max() >= len(self._source.tasks):
            raise InputError(
                f"{path}: task_index of episode {episode} goes from {tasks.min()} to {tasks.max()}, there are "
                f"{len(self._source.tasks)} tasks"
            )


class EpisodeStatistics:
    """The statistics of a dataset's episodes.

    Attributes:
        names: the (feature, statistic) that every episode has.
    """

    def __init__(self, source: LeRobotDatasetMetadata):
        self._v21_parts: list[Stats] = []
        if source.info["codebase_version"] == V21:
            self._v21_parts = metadata_v21.load_episode_statistics(source.root, source.info)
            parts = [{(key, name) for key in part for name in part[key]} for part in self._v21_parts]
            self.names = set.intersection(*parts)
            return
        self._paths = sorted((source.root / EPISODES_IN[V30]).glob("*/*.parquet"))
        columns = [set(metadata.read_parquet_names(path)) for path in self._paths]
        shared = [name for name in set.intersection(*columns) if name.startswith("stats/")]
        with_gaps = {
            name for batch in self._batches(shared) for name in shared if batch.column(name).null_count > 0
        }
        self.names = {_feature_and_statistic(name) for name in shared if name not in with_gaps}

    def read(self, episodes: Sequence[int]) -> Iterator[Stats]:
        """Yield the statistics of some episodes, given in ascending order."""
        if self._v21_parts:
            for episode in episodes:
                part = self._v21_parts[episode]
                yield {
                    key: {name: value for name, value in part[key].items() if (key, name) in self.names}
                    for key in part
                }
            return
        wanted = set(episodes)
        for batch in self._batches(["episode_index", *(f"stats/{key}/{name}" for key, name in self.names)]):
            for row, episode in enumerate(batch.column("episode_index").to_pylist()):
                if episode in wanted:
                    yield self._row(batch, row)

    def _batches(self, columns: Sequence[str]) -> Iterator[pa.RecordBatch]:
        for path in self._paths:
            with _damage_reported(path):
                yield from pq.ParquetFile(path).iter_batches(EPISODES_AT_ONCE, columns=columns)

    def _row(self, batch: pa.RecordBatch, row: int) -> Stats:
        stats: Stats = {}
        for key, name in sorted(self.names):
            value = batch.column(f"stats/{key}/{name}")[row].as_py()
            stats.setdefault(key, {})[name] = np.atleast_1d(
                np.asarray(value, np.int64 if name == "count" else np.float64)
            )
        return stats


def _feature_and_statistic(column: str) -> tuple[str, str]:
    _, key, name = column.split("/")
    return key, name


@contextlib.contextmanager
def _damage_reported(path: Path) -> Iterator[None]:
    try:
        yield
    except (pa.ArrowException, OSError) as error:
        first_line = str(error).splitlines()[0]
        raise InputError(f"{path}: damaged, or not what info.json declares ({first_line})") from None
