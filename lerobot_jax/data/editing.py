"""Make new datasets out of the episodes of others: merge, split, delete episodes.

Mirrors `lerobot.datasets.dataset_tools` and `lerobot.datasets.aggregate`. Differences: video packets are copied,
never encoded anew, so that every frame decodes to the pixels of its source; statistics of what is renumbered are
computed again; videos that cannot share a file get files of their own instead of an error; all of a new dataset
appears at once, when it is complete.
"""

import copy
import dataclasses
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import tqdm
from absl import logging

from lerobot_jax.data import metadata, statistics
from lerobot_jax.data.dataset_files import (
    DatasetFiles,
    appearing_at_once,
    arrow_schema,
    check_outside,
    new_info,
)
from lerobot_jax.data.episode_reading import EpisodeStatistics, EpisodeTables
from lerobot_jax.data.metadata import LeRobotDatasetMetadata
from lerobot_jax.data.remux import SourceVideo
from lerobot_jax.errors import InputError
from lerobot_jax.progress import progress_bar

# What counts over the dataset, and so changes with it.
COUNTING = ("episode_index", "index", "task_index")
NEEDED = {"min", "max", "mean", "std", "count"}
SIZES = ("chunks_size", "data_files_size_in_mb", "video_files_size_in_mb")
GONE_SINCE_V21 = ("total_chunks", "total_videos")
KNOWN_COLUMNS = ("episode_index", "tasks", "length", "dataset_from_index", "dataset_to_index")


def merge_datasets(sources: Sequence[LeRobotDatasetMetadata], output: Path) -> LeRobotDatasetMetadata:
    """Write all episodes of some datasets, one dataset after the other, into the new folder `output`.

    Raises:
        InputError: before anything is written, when they do not go together; naming a file that is damaged.
    """
    if not sources:
        raise InputError("merge: give at least one dataset")
    roots = [source.root.resolve() for source in sources]
    for root in roots:
        if roots.count(root) > 1:
            raise InputError(f"merge: {root} is given more than once")
    selections = [Selection(source, range(source.total_episodes)) for source in sources]
    return _write({"": EpisodeCopy(selections)}, output, "merging")[""]


def split_dataset(
    source: LeRobotDatasetMetadata, splits: Mapping[str, float | Sequence[int]], output: Path
) -> dict[str, LeRobotDatasetMetadata]:
    """Write parts of a dataset into the new folder `output`: each split into a folder of its name.

    Args:
        source: the dataset.
        splits: name -> its episodes; or fractions for all splits: episodes are dealt out in order, rounded down,
            and the last split gets what is left, as in LeRobot.
        output: the folder to create.

    Raises:
        InputError: before anything is written, when the splits are wrong; naming a file that is damaged.
    """
    episodes = _split_episodes(source, splits)
    copies = {name: EpisodeCopy([Selection(source, chosen)]) for name, chosen in episodes.items()}
    return _write(copies, output, "splitting")


def delete_episodes(
    source: LeRobotDatasetMetadata, episodes: Sequence[int], output: Path
) -> LeRobotDatasetMetadata:
    """Write a dataset without some of its episodes into the new folder `output`.

    Where an episode that is kept does not begin at a keyframe of its video, the frames from the keyframe before it
    stay in the video too, although no timestamp points at them.

    Raises:
        InputError: before anything is written, when the episodes are wrong; naming a file that is damaged.
    """
    _check_known(source, episodes, "delete-episodes")
    if not episodes:
        raise InputError("delete-episodes: give at least one episode")
    kept = sorted(set(range(source.total_episodes)) - set(episodes))
    if not kept:
        raise InputError(
            f"delete-episodes: these are all {source.total_episodes} episodes; keep at least one"
        )
    return _write({"": EpisodeCopy([Selection(source, kept)])}, output, "deleting")[""]


@dataclasses.dataclass(frozen=True)
class Selection:
    """Some episodes of a dataset, in ascending order."""

    source: LeRobotDatasetMetadata
    episodes: Sequence[int]

    @property
    def is_whole(self) -> bool:
        return len(self.episodes) == self.source.total_episodes


class EpisodeCopy:
    """A v3.0 dataset that consists of chosen episodes of one or several datasets, of any format."""

    def __init__(self, selections: Sequence[Selection]):
        """Check what can be checked before anything is written; what lies on the Hub is downloaded.

        Raises:
            InputError: when the datasets do not go together, or files or statistics are missing.
        """
        self._selections = selections
        sources = [selection.source for selection in selections]
        for other in sources[1:]:
            _check_compatible(sources[0], other)
        for selection in selections:
            _fetch(selection)
        self._statistics = [EpisodeStatistics(source) for source in sources]
        for selection, parts in zip(selections, self._statistics, strict=True):
            _check_statistics(selections[0], selection, parts)
            if len(selections) > 1:
                _check_combinable(selection.source)
        self._names = _shared_statistics(sources, self._statistics)
        counting = [
            parts.names | {(key, name) for key in COUNTING for name in source.stats.get(key, {})}
            for source, parts in zip(sources, self._statistics, strict=True)
        ]
        names = set.intersection(*counting)
        combinable = {key for key, _ in names if {(key, name) for name in NEEDED} <= names}
        self._counting_names = {(key, name) for key, name in names if key in combinable}
        self._info = _combined_info(sources)
        self._extra_types = _extra_types(sources)

    @property
    def sources(self) -> list[LeRobotDatasetMetadata]:
        return [selection.source for selection in self._selections]

    @property
    def num_episodes(self) -> int:
        return sum(len(selection.episodes) for selection in self._selections)

    def write(self, root: Path, bar: tqdm.tqdm) -> None:
        """Write the dataset into the folder `root`; the bar counts episodes."""
        files = DatasetFiles(root, self._info, self._extra_types)
        try:
            for selection, parts in zip(self._selections, self._statistics, strict=True):
                # The statistics of a whole dataset stay, also where they are not those of its episodes combined.
                if selection.is_whole:
                    files.add_tasks(selection.source.tasks)
                    files.combine({k: v for k, v in selection.source.stats.items() if k not in COUNTING})
                self._copy(selection, parts, files, bar)
            files.write_info()
            files.close()
        except BaseException:
            files.abandon()
            raise

    def _copy(
        self, selection: Selection, parts: EpisodeStatistics, files: DatasetFiles, bar: tqdm.tqdm
    ) -> None:
        source = selection.source
        tables = EpisodeTables(source, arrow_schema(self._info["features"]))
        videos: dict[str, SourceVideo] = {}
        for episode, stats in zip(selection.episodes, parts.read(selection.episodes), strict=True):
            table = tables.read(episode)
            columns = files.number([source.tasks[i] for i in table["task_index"].to_pylist()])
            for name, values in columns.items():
                i = table.column_names.index(name)
                table = table.set_column(i, table.schema.field(i), pa.array(values))
            counted = {name: statistics.vector_statistics(values) for name, values in columns.items()}
            tasks = list(source.episodes["tasks"][episode])
            files.add_tasks(tasks)
            for key in source.video_keys:
                path = source.root / source.video_file(episode, key)
                if key not in videos or videos[key].path != path:
                    videos[key] = SourceVideo(path)
            starts = {key: source.episodes[f"videos/{key}/from_timestamp"][episode] for key in videos}
            extra = {name: source.episodes[name][episode] for name in self._extra_types}
            try:
                files.add_episode(
                    table,
                    tasks,
                    _only(stats | counted, self._names),
                    {key: (videos[key], float(starts[key])) for key in videos},
                    extra,
                )
            except InputError as error:
                raise InputError(f"{source.root}: episode {episode}: {error}") from None
            if not selection.is_whole:
                files.combine({key: values for key, values in stats.items() if key not in COUNTING})
            files.combine(_only(counted, self._counting_names))
            bar.update()


def _write(
    copies: Mapping[str, EpisodeCopy], output: Path, description: str
) -> dict[str, LeRobotDatasetMetadata]:
    """Write datasets into folders of `output`, by name; the name "" is `output` itself."""
    for root in {source.root for each in copies.values() for source in each.sources}:
        check_outside(root, output)
    num_episodes = sum(each.num_episodes for each in copies.values())
    written = {}
    with (
        appearing_at_once(output) as folder,
        progress_bar(description, num_episodes, "episode", delay=1) as bar,
    ):
        for name, each in copies.items():
            each.write(folder / name, bar)
            loaded = LeRobotDatasetMetadata.load((output / name).name, folder / name)
            written[name] = dataclasses.replace(loaded, root=output / name)
    return written


def _check_known(source: LeRobotDatasetMetadata, episodes: Sequence[int], where: str) -> None:
    unknown = sorted({episode for episode in episodes if not 0 <= episode < source.total_episodes})
    if unknown:
        more = f" and {len(unknown) - 10} more" if len(unknown) > 10 else ""
        raise InputError(
            f"{where}: {unknown[:10]}{more} are no episodes of {source.root}, which has "
            f"0..{source.total_episodes - 1}"
        )
    repeated = sorted(episode for episode, times in Counter(episodes).items() if times > 1)
    if repeated:
        raise InputError(f"{where}: {repeated} are given more than once")


def _split_episodes(
    source: LeRobotDatasetMetadata, splits: Mapping[str, float | Sequence[int]]
) -> dict[str, list[int]]:
    """Give the episodes of each split."""
    if not splits:
        raise InputError("split: give at least one split")
    for name in splits:
        if name in ("", ".", "..") or "/" in name or "\\" in name:
            raise InputError(f"split: '{name}' cannot be the name of a folder")
    fractions = {name: float(value) for name, value in splits.items() if isinstance(value, int | float)}
    if len(fractions) == len(splits):
        return _deal(source, fractions)
    if fractions:
        raise InputError(
            f"split: give fractions for all splits or for none; of {list(splits)}, {fractions} are"
        )
    result: dict[str, list[int]] = {}
    taken: dict[int, str] = {}
    for name, value in splits.items():
        episodes = [] if isinstance(value, int | float) else sorted(value)
        _check_known(source, episodes, f"split: '{name}'")
        for episode in episodes:
            if episode in taken:
                raise InputError(f"split: episode {episode} is in '{taken[episode]}' and in '{name}'")
            taken[episode] = name
        result[name] = episodes
    _check_none_empty(result, source)
    return result


def _deal(source: LeRobotDatasetMetadata, fractions: Mapping[str, float]) -> dict[str, list[int]]:
    wrong = {name: value for name, value in fractions.items() if not 0 < value <= 1}
    if wrong or sum(fractions.values()) > 1 + 1e-9:
        what = (
            f"the fractions sum to {sum(fractions.values()):g}" if not wrong else f"the fractions are {wrong}"
        )
        raise InputError(f"split: {what}; each must lie in 0..1, and their sum be at most 1")
    result, start = {}, 0
    for name, fraction in fractions.items():
        end = start + int(source.total_episodes * fraction)
        result[name] = list(range(start, end))
        start = end
    _check_none_empty(result, source)
    last = list(fractions)[-1]
    result[last] = list(range(result[last][0], source.total_episodes))
    return result


def _check_none_empty(splits: Mapping[str, Sequence[int]], source: LeRobotDatasetMetadata) -> None:
    empty = [name for name, episodes in splits.items() if not episodes]
    if empty:
        raise InputError(
            f"split: {', '.join(map(repr, empty))} would have none of the {source.total_episodes} episodes of "
            f"{source.root}"
        )


def _check_compatible(one: LeRobotDatasetMetadata, other: LeRobotDatasetMetadata) -> None:
    for name in ("fps", "robot_type"):
        values = [source.info.get(name) for source in (one, other)]
        if values[0] != values[1]:
            raise InputError(
                f"merge: {name} is {values[0]!r} in {one.root} and {values[1]!r} in {other.root}; "
                "they must be equal"
            )
    for here, there in ((one, other), (other, one)):
        lacking = [key for key in here.features if key not in there.features]
        if lacking:
            raise InputError(f"merge: {there.root} lacks the features {lacking} that {here.root} has")
    for key, feature in one.features.items():
        for name in ("dtype", "shape", "names"):
            values = [found.get(name) for found in (feature, other.features[key])]
            if values[0] != values[1]:
                raise InputError(
                    f"merge: '{key}' has {name} {values[0]} in {one.root} and {values[1]} in {other.root}; "
                    "they must be equal"
                )


def _fetch(selection: Selection) -> None:
    source, files = selection.source, selection.source.episode_files(list(selection.episodes))
    if source.revision is not None:
        metadata.fetch_dataset(source.repo_id, source.revision, files)
    for name in files:
        if not (source.root / name).is_file():
            raise InputError(f"{source.root / name}: no such file")


def _check_statistics(first: Selection, selection: Selection, parts: EpisodeStatistics) -> None:
    """Check that a selection has the statistics that its dataset has, and the same as the first selection."""
    source = selection.source
    wanted = {key for key in source.stats if key in source.features and key not in COUNTING}
    if not selection.is_whole:
        lacking = sorted(key for key in wanted if not {(key, name) for name in NEEDED} <= parts.names)
        if lacking:
            raise InputError(
                f"{source.root / 'meta/episodes'}: not every episode has statistics of {lacking}"
            )
    differing = sorted(wanted ^ {key for key in first.source.stats if key in source.features} - set(COUNTING))
    if differing:
        raise InputError(
            f"{source.root} and {first.source.root}: only one has statistics of {differing}; compute them for both"
        )


def _check_combinable(source: LeRobotDatasetMetadata) -> None:
    """Check that a dataset's statistics can be combined with those of others."""
    found = {key: set(values) for key, values in source.stats.items() if key not in COUNTING}
    lacking = sorted(key for key, names in found.items() if NEEDED - names)
    if lacking:
        raise InputError(
            f"{source.root / 'meta'}: the statistics of {lacking} lack some of {sorted(NEEDED)}, so that they "
            f"cannot be combined; `python -m lerobot_jax.dataset stats {source.root} --write` completes them"
        )


def _shared_statistics(
    sources: Sequence[LeRobotDatasetMetadata], statistics_of: Sequence[EpisodeStatistics]
) -> set[tuple[str, str]]:
    """Give the (feature, statistic) that the episodes of all sources have."""
    names = [parts.names for parts in statistics_of]
    shared = set.intersection(*names)
    for source, found in zip(sources, names, strict=True):
        if found - shared:
            logging.warning(
                "%s: left out of the episodes' statistics, as not every dataset has them: %s",
                source.root,
                ", ".join(sorted(f"{key} {name}" for key, name in found - shared)),
            )
    return shared


def _only(stats: metadata.Stats, names: set[tuple[str, str]]) -> metadata.Stats:
    kept = {key: {n: v for n, v in values.items() if (key, n) in names} for key, values in stats.items()}
    return {key: values for key, values in kept.items() if values}


def _combined_info(sources: Sequence[LeRobotDatasetMetadata]) -> dict[str, Any]:
    """Make the info.json of the new dataset, still without episodes."""
    infos = [source.info for source in sources]
    features = copy.deepcopy(sources[0].features)
    for key, feature in features.items():
        _keep_agreeing(feature, [source.features[key] for source in sources])
    shared = copy.deepcopy(infos[0])
    _keep_agreeing(shared, infos)
    sizes = {name: shared[name] for name in SIZES if name in shared}
    info = new_info(sources[0].fps, features, infos[0].get("robot_type"), **sizes)
    return info | {k: v for k, v in shared.items() if k not in info and k not in GONE_SINCE_V21}


def _keep_agreeing(entry: dict[str, Any], entries: Sequence[Mapping[str, Any]]) -> None:
    """Drop from `entry` what is not equal in all entries; what describes videos becomes null, as in LeRobot."""
    for name in list(entry):
        values = [each.get(name) for each in entries]
        if all(value == values[0] for value in values):
            continue
        if name in ("info", "video_info") and all(isinstance(value, dict) for value in values):
            entry[name] = _agreeing_details([value for value in values if value is not None])
        else:
            del entry[name]


def _agreeing_details(entries: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    result = {}
    for name in dict.fromkeys(name for entry in entries for name in entry):
        values = [entry.get(name) for entry in entries]
        differing = {} if name == "video.extra_options" else None
        result[name] = values[0] if all(value == values[0] for value in values) else differing
    return result


def _extra_types(sources: Sequence[LeRobotDatasetMetadata]) -> dict[str, pa.DataType]:
    """Give the columns of `meta/episodes` that LeRobot does not know but all sources have, with their types."""
    types = [
        {
            name: _column_type(source, name)
            for name in source.episodes
            if name not in KNOWN_COLUMNS and not name.startswith(("data/", "videos/", "meta/"))
        }
        for source in sources
    ]
    shared = {name: kind for name, kind in types[0].items() if all(t.get(name) == kind for t in types)}
    dropped = sorted({name for each in types for name in each} - set(shared))
    if dropped:
        logging.warning(
            "columns of meta/episodes that are not the same in all datasets are left out: %s", dropped
        )
    return shared


def _column_type(source: LeRobotDatasetMetadata, name: str) -> pa.DataType:
    try:
        return pa.array(source.episodes[name]).type
    except (pa.ArrowException, OverflowError) as error:
        raise InputError(
            f"{source.root / 'meta'}: '{name}' of the episodes cannot be one column ({error})"
        ) from None
