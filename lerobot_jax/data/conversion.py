"""Convert a dataset of format v2.1, which has a file an episode, to v3.0, which joins them into few large ones.

Mirrors `lerobot.scripts.convert_dataset_v21_to_v30`: the same files hold the same episodes at the same times, and
statistics are equal. Differences: data files have a row group for each episode, as recorded v3.0 datasets have; a
fps that is no whole number is kept, where LeRobot cuts it; so are fields of info.json that LeRobot does not know;
times of frames do not drift, however many episodes a video file holds; an episode whose video cannot go on in the
file of those before it, for example because it has another codec, begins a new file.
"""

import contextlib
import copy
import itertools
import math
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import tqdm

from lerobot_jax.data import dataset_files, metadata, metadata_v21, video
from lerobot_jax.data.info import EPISODES_IN, PATH_FIELDS, V21, V30, Stats
from lerobot_jax.data.metadata import LeRobotDatasetMetadata
from lerobot_jax.data.remux import SourceVideo, VideoFiles
from lerobot_jax.errors import InputError
from lerobot_jax.files import write_json
from lerobot_jax.progress import progress_bar

FILES_PER_FOLDER = 1000
GONE_FIELDS = ("total_chunks", "total_videos")
FIELDS = (  # of info.json, in LeRobot's order
    *("codebase_version", "fps", "features", "total_episodes", "total_frames", "total_tasks", "chunks_size"),
    *("data_files_size_in_mb", "video_files_size_in_mb", "data_path", "video_path", "robot_type", "splits"),
)


def convert_to_v30(
    meta: LeRobotDatasetMetadata,
    output: Path,
    data_files_size_in_mb: float = 100,
    video_files_size_in_mb: float = 200,
) -> LeRobotDatasetMetadata:
    """Convert a v2.1 dataset into the new folder `output`, which appears when everything is in it.

    Args:
        meta: the dataset; what it lacks is downloaded.
        output: the folder, which must not exist.
        data_files_size_in_mb: a parquet file holds no more than this before compression, but at least one episode.
        video_files_size_in_mb: likewise for a video file.

    Raises:
        InputError: naming the file that is missing, damaged or not as `meta/` says.
    """
    if meta.info["codebase_version"] != V21:
        raise InputError(f"{meta.root}: only {V21} is converted, this is {meta.info['codebase_version']}")
    if meta.total_episodes == 0:
        raise InputError(f"{meta.root}: has no episodes")
    dataset_files.check_outside(meta.root, output)
    with dataset_files.appearing_at_once(output) as partial:
        if meta.revision is not None:
            metadata.fetch_dataset(meta.repo_id, meta.revision, meta.episode_files(None))
        num_files = meta.total_episodes * (1 + len(meta.video_keys))
        with progress_bar("converting to v3.0", num_files, "file", delay=1) as bar:
            columns = _join_tables(meta, partial, data_files_size_in_mb, bar)
            for key in meta.video_keys:
                columns |= _join_videos(meta, key, partial, video_files_size_in_mb, bar)
        _write_meta(meta, partial, columns, (data_files_size_in_mb, video_files_size_in_mb))
        LeRobotDatasetMetadata.load(meta.repo_id, partial)  # raises if something is wrong
    return LeRobotDatasetMetadata.load(meta.repo_id, output)


def _join_tables(meta: LeRobotDatasetMetadata, output: Path, max_mb: float, bar: tqdm.tqdm) -> dict[str, Any]:
    """Write the parquet files; give the columns of `meta/episodes` that say where an episode is."""
    paths = [meta.root / meta.data_file(episode) for episode in range(meta.total_episodes)]
    file_of_episode = _file_numbers([_uncompressed_size(path) for path in paths], max_mb)
    schema = dataset_files.arrow_schema(meta.features)
    for number, episodes in _files(file_of_episode):
        path = output / metadata.DATA_PATH.format(**_place(number))
        path.parent.mkdir(parents=True, exist_ok=True)
        with pq.ParquetWriter(path, schema, compression="snappy") as file:
            for episode in episodes:
                file.write_table(_read_episode(meta, paths[episode], episode, schema))
                bar.update()
    places = [_place(number) for number in file_of_episode]
    return {f"data/{field}": [place[field] for place in places] for field in PATH_FIELDS[V30]}


def _uncompressed_size(path: Path) -> int:
    about = metadata.read_parquet_metadata(path)
    groups = [about.row_group(i) for i in range(about.num_row_groups)]
    return sum(group.column(i).total_uncompressed_size for group in groups for i in range(group.num_columns))


def _read_episode(meta: LeRobotDatasetMetadata, path: Path, episode: int, schema: pa.Schema) -> pa.Table:
    names = metadata.read_parquet_names(path)
    if set(names) != set(schema.names):
        missing, extra = sorted(set(schema.names) - set(names)), sorted(set(names) - set(schema.names))
        raise InputError(
            f"{path}: lacks the columns {missing}, and has {extra} that info.json does not declare"
        )
    try:
        table = metadata.read_parquet(path).select(schema.names).cast(schema)
    except pa.ArrowException as error:
        raise InputError(f"{path}: does not hold what info.json declares ({error})") from None
    start, end = (meta.episodes[f"dataset_{name}_index"][episode] for name in ("from", "to"))
    expected = {"episode_index": np.full(end - start, episode), "index": np.arange(start, end)}
    for name, values in expected.items():
        if not np.array_equal(table[name].to_numpy(), values):
            raise InputError(
                f"{path}: {name} must be {values[0]} to {values[-1]} in {len(values)} rows, as episodes.jsonl says"
            )
    return table


def _join_videos(
    meta: LeRobotDatasetMetadata, key: str, output: Path, max_mb: float, bar: tqdm.tqdm
) -> dict[str, Any]:
    """Write a camera's video files; give the columns of `meta/episodes` that say where an episode is."""
    paths = [meta.root / meta.video_file(episode, key) for episode in range(meta.total_episodes)]
    rows = []
    # It is decided here when a file is full: by the sizes of whole files, as LeRobot does it.
    with contextlib.closing(VideoFiles(output, key, meta.fps, FILES_PER_FOLDER, math.inf)) as files:
        for _, episodes in _files(_file_numbers([_file_size(path) for path in paths], max_mb)):
            for episode in episodes:
                timestamps = np.arange(meta.episodes["length"][episode]) / meta.fps
                rows.append(files.add(SourceVideo(paths[episode]), 0.0, timestamps))
                bar.update()
            files.close()
    return {name: [row[name] for row in rows] for name in rows[0]}


def _file_size(path: Path) -> int:
    with video.open_video(path) as container:
        return container.size


def _write_meta(
    meta: LeRobotDatasetMetadata, output: Path, columns: dict[str, Any], sizes_in_mb: tuple[float, float]
) -> None:
    about = {name: value for name, value in meta.info.items() if name not in GONE_FIELDS}
    about |= {"codebase_version": V30, "features": copy.deepcopy(meta.features)}
    about |= dict(zip(("data_files_size_in_mb", "video_files_size_in_mb"), sizes_in_mb, strict=True))
    about |= {"data_path": metadata.DATA_PATH}
    about |= {"video_path": None if meta.info.get("video_path") is None else metadata.VIDEO_PATH}
    for feature in about["features"].values():
        if feature["dtype"] != "video":  # a video has its own
            feature["fps"] = meta.fps
    known = {name: about[name] for name in FIELDS if name in about}
    write_json(known | about, output / metadata.INFO_PATH)
    stats = {key: {name: v.tolist() for name, v in values.items()} for key, values in meta.stats.items()}
    write_json(stats, output / metadata.STATS_PATH)
    dataset_files.write_tasks(meta.tasks, output / metadata.TASKS_PATH)
    rows = {name: values for name, values in meta.episodes.items() if name not in columns} | columns
    rows |= _statistics_columns(metadata_v21.load_episode_statistics(meta.root, meta.info))
    rows |= {f"meta/episodes/{field}": np.zeros(meta.total_episodes, np.int64) for field in PATH_FIELDS[V30]}
    path = output / metadata.EPISODES_PATH.format(**_place(0))
    path.parent.mkdir(parents=True)
    pq.write_table(pa.table({name: _to_arrow(meta, name, values) for name, values in rows.items()}), path)


def _to_arrow(meta: LeRobotDatasetMetadata, name: str, values: Any) -> pa.Array:
    try:
        return pa.array(values)
    except (pa.ArrowException, OverflowError) as error:
        where = meta.root / EPISODES_IN[V21]
        raise InputError(f"{where}: '{name}' holds values that do not fit in one column ({error})") from None


def _statistics_columns(parts: list[Stats]) -> dict[str, Any]:
    """Give the columns `stats/<feature>/<statistic>` of `meta/episodes`."""
    columns = {}
    names = dict.fromkeys((key, name) for part in parts for key, values in part.items() for name in values)
    for key, name in names:
        values = [part.get(key, {}).get(name) for part in parts]
        dtype = np.result_type(*(value for value in values if value is not None))
        columns[f"stats/{key}/{name}"] = [None if v is None else v.astype(dtype).tolist() for v in values]
    return columns


def _file_numbers(sizes: Sequence[int], max_mb: float) -> list[int]:
    """Distribute episodes over files: a new one begins before `max_mb` is reached."""
    numbers, number, total = [], 0, 0
    for i, size in enumerate(sizes):
        if i > 0 and total + size >= max_mb * dataset_files.MEBIBYTE:
            number, total = number + 1, 0
        numbers.append(number)
        total += size
    return numbers


def _files(file_of_episode: Sequence[int]) -> Iterator[tuple[int, list[int]]]:
    for number, episodes in itertools.groupby(range(len(file_of_episode)), key=file_of_episode.__getitem__):
        yield number, list(episodes)


def _place(number: int) -> dict[str, int]:
    return dict(zip(PATH_FIELDS[V30], divmod(number, FILES_PER_FOLDER), strict=True))
