"""Check all of a dataset: every file, offset and timestamp, also where `LeRobotDataset` refuses to open it.

The raw files are read, and what is wrong does not stop the search, so that all problems are found at once. Memory
is bounded by the largest row group.
"""

import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import pyarrow as pa

from lerobot_jax.data import metadata, metadata_v21
from lerobot_jax.data.info import EPISODES_IN, INFO_PATH, STATS_PATH, V21, Stats, load_info
from lerobot_jax.data.inspection.problems import RESTORE, Problems, spans
from lerobot_jax.data.inspection.table_checks import INDEX_COLUMNS, Summary, TableInspection
from lerobot_jax.data.inspection.video_checks import VideoInspection
from lerobot_jax.data.metadata import LeRobotDatasetMetadata
from lerobot_jax.data.statistics import QUANTILES
from lerobot_jax.errors import InputError
from lerobot_jax.progress import progress_bar

T = TypeVar("T")
TASKS = "meta/tasks"
REMAKE_STATS = "compute them anew: stats --write"


class Inspection:
    """Looks at a dataset's folder, and collects its `problems`."""

    def __init__(self, root: Path, decode: bool = False, tolerance_s: float = 1e-4):
        """Args:
        root: the folder.
        decode: decode every frame and image, not only look at its size and time.
        tolerance_s: how far a time may be from the one that follows from frame_index / fps, in seconds.
        """
        self.root, self.decode, self.tolerance_s = root, decode, tolerance_s
        self.problems = Problems()
        self.num_files = self.num_frames = 0

    def run(self) -> Problems:
        """Check everything, with a progress bar over the files."""
        info = self._attempt(lambda: load_info(self.root), RESTORE)
        if info is None:
            return self.problems
        reader = metadata_v21 if info["codebase_version"] == V21 else metadata
        episodes = self._attempt(lambda: reader.load_episodes(self.root, info), RESTORE)
        tasks = self._attempt(lambda: reader.load_tasks(self.root), RESTORE)
        stats = self._attempt(lambda: self._load_stats(info), REMAKE_STATS)
        if episodes is None:
            return self.problems
        self._where = EPISODES_IN[info["codebase_version"]]
        self.meta = LeRobotDatasetMetadata(
            "", self.root, None, info, stats or {}, tasks or [], self._in_order(episodes)
        )
        self._check_episodes(tasks)
        tables = _files(self.meta, self.meta.data_file)
        videos = {key: _files(self.meta, self._video_file_of(key)) for key in self.meta.video_keys}
        self._check_folder([tables, *videos.values()])
        self.num_files = len(tables) + sum(map(len, videos.values()))
        self.num_frames = int(self.meta.episodes["length"].sum())
        terms = (self._measured_fps(tables), self.tolerance_s, self.decode, self.problems)
        table_inspection = TableInspection(self.meta, *terms, tasks is not None)
        with progress_bar("checking", self.num_files, "file", delay=1) as bar:
            for name, held in tables.items():
                table_inspection.check(name, held)
                bar.update()
            for key, files in videos.items():
                video_inspection = VideoInspection(self.meta, key, *terms)
                for name, held in files.items():
                    video_inspection.check(name, held)
                    bar.update()
                video_inspection.check_formats()
        if stats is not None:
            self._check_statistics(table_inspection.summaries)
        return self.problems

    def _attempt(self, read: Callable[[], T], repair: str) -> T | None:
        """Read a file of `meta/`; report it and give None if it cannot be."""
        try:
            return read()
        except InputError as error:
            place, _, what = str(error).removeprefix(f"{self.root}/").partition(": ")
            self.problems.report(place, what, repair)
            return None

    # meta/

    def _load_stats(self, info: dict[str, Any]) -> Stats:
        if info["codebase_version"] == V21:
            return metadata_v21.combine(self.root, metadata_v21.load_episode_statistics(self.root, info))
        return metadata.load_stats(self.root, info)

    def _in_order(self, episodes: dict[str, Any]) -> dict[str, Any]:
        """Report where episode_index does not count 0, 1, 2, ...; sort the rows if that is all."""
        index = np.asarray(episodes["episode_index"])
        order = np.argsort(index, kind="stable")
        right = np.arange(len(index))
        if np.array_equal(index, right):
            return episodes
        row = int(np.flatnonzero(index != right)[0])
        if np.array_equal(index[order], right):
            what = f"row {row} is episode {index[row]}: the rows are not in the order of episode_index"
            self.problems.report(self._where, what, "sort the rows by episode_index")
            return {
                name: column[order] if isinstance(column, np.ndarray) else [column[i] for i in order]
                for name, column in episodes.items()
            }
        numbers, counts = np.unique(index, return_counts=True)
        twice = spans(numbers[counts > 1].tolist())
        what = f"row {row} has episode_index {index[row]}, not {row}" + (
            f"; twice there: {twice}" * bool(twice)
        )
        self.problems.report(self._where, what, "number the episodes 0, 1, 2, ... as data/ does")
        return episodes | {"episode_index": right}

    def _check_episodes(self, tasks: list[str] | None) -> None:
        info, episodes = self.meta.info, self.meta.episodes
        lengths = episodes["length"]
        start, end = episodes["dataset_from_index"], episodes["dataset_to_index"]
        findings = {}
        for e, first in enumerate(np.concatenate([[0], np.cumsum(lengths)[:-1]])):
            if (start[e], end[e]) != (first, first + lengths[e]) or lengths[e] <= 0:
                findings[e] = (
                    f"is said to be frames {start[e]} to {end[e]}; with {lengths[e]} frames after those of the "
                    f"episodes before, it would be {first} to {first + lengths[e]}"
                )
        self.problems.report_episodes(
            self._where, findings, "correct length, dataset_from_index, dataset_to_index"
        )
        counts = {"total_episodes": len(lengths), "total_frames": int(lengths.sum())}
        if tasks is not None:
            counts["total_tasks"] = len(tasks)
        for name, count in counts.items():
            if name in info and info[name] != count:
                self.problems.report(
                    INFO_PATH, f"{name} is {info[name]}, meta/ holds {count}", f"set it to {count}"
                )
        if len(set(self.meta.tasks)) < len(self.meta.tasks):
            self.problems.report(TASKS, "a task is listed twice", "give every task one task_index")

    # Files

    def _video_file_of(self, key: str) -> Callable[[int], str]:
        return lambda episode: self.meta.video_file(episode, key)

    def _check_folder(self, groups: Sequence[Mapping[str, Sequence[int]]]) -> None:
        """Report files that are missing, and files in data/, videos/ and images/ that belong to no episode."""
        wanted = {name: episodes for group in groups for name, episodes in group.items()}
        for name, episodes in wanted.items():
            if not (self.root / name).is_file():
                self.problems.report(name, f"is missing; the episodes {spans(episodes)} need it", RESTORE)
        extra: dict[str, list[str]] = {}
        for folder in ("data", "videos", "images"):
            for path in sorted((self.root / folder).rglob("*")):
                name = path.relative_to(self.root).as_posix()
                if path.is_file() and not path.name.startswith(".") and name not in wanted:
                    extra.setdefault(str(Path(name).parent), []).append(name)
        for names in extra.values():
            more = f", like {len(names) - 1} more in its folder" if len(names) > 1 else ""
            self.problems.report(
                names[0], f"belongs to no episode{more}", "delete it, or move it out of the dataset"
            )

    def _measured_fps(self, tables: Mapping[str, Sequence[int]]) -> float:
        """Tell at what rate the timestamps advance; report it if info.json says otherwise."""
        for name in tables:
            try:
                table = metadata.read_parquet(self.root / name, ["episode_index", "frame_index", "timestamp"])
                episode, frame, time = (
                    table[key].to_numpy().astype(np.float64) for key in table.column_names
                )
            except (InputError, KeyError, ValueError, pa.ArrowException):
                continue  # TableInspection will tell why
            starts = np.flatnonzero(np.diff(episode, prepend=-1))
            ends = np.append(starts[1:], len(episode)) - 1
            frames, seconds = frame[ends] - frame[starts], time[ends] - time[starts]
            usable = (frames > 0) & (seconds > 0)
            if usable.any():
                fps = float(np.median(frames[usable] / seconds[usable]))
                if abs(fps / self.meta.fps - 1) < 0.01:
                    break
                what = f"fps is {self.meta.fps}, but the timestamps in data/ advance at {fps:.4g} fps"
                self.problems.report(INFO_PATH, what, f"set fps to {fps:.4g}")
                return round(fps) if abs(fps - round(fps)) < 0.01 else fps
        return self.meta.fps

    # meta/stats.json

    def _check_statistics(self, summaries: Mapping[str, Summary]) -> None:
        place = metadata_v21.STATS_PATH if self.meta.info["codebase_version"] == V21 else STATS_PATH
        stats = self.meta.stats
        missing = [
            key
            for key, feature in self.meta.features.items()
            if key not in INDEX_COLUMNS and feature["dtype"] != "string" and key not in stats
        ]
        if missing:
            self.problems.report(place, f"there are none of {missing}", REMAKE_STATS)
        for key, feature in self.meta.features.items():
            if key in stats and feature["dtype"] != "string":
                found = [*self._statistics_findings(key, stats[key], summaries.get(key))]
                if found:
                    self.problems.report(place, f"'{key}': {'; '.join(found)}", REMAKE_STATS)

    def _statistics_findings(
        self, key: str, stats: Mapping[str, np.ndarray], summary: Summary | None
    ) -> Iterator[str]:
        """Tell what is impossible in a feature's statistics, or not as in the data (where all of it was read)."""
        missing = [name for name in ("min", "max", "mean", "std", "count") if name not in stats]
        if missing:
            yield f"{', '.join(missing)} missing"
            return
        rounding = 1e-6 * np.maximum(np.abs(stats["min"]), np.abs(stats["max"])) + 1e-9
        ordered = [name for name in ("min", *QUANTILES, "max") if name in stats]
        for low, high in itertools.pairwise(ordered):
            if (stats[low] > stats[high] + rounding).any():
                yield f"{low} is greater than {high}"
        if key in self.meta.camera_keys and ((stats["min"] < 0) | (stats["max"] > 1)).any():
            yield "min and max of an image must be in 0..1"
        if key in INDEX_COLUMNS or summary is None or summary.count != self.num_frames:
            return
        if int(stats["count"][0]) != summary.count:
            yield f"count is {stats['count'][0]}, the data's {summary.count}"
        for name, value in (("min", summary.low), ("max", summary.high), ("mean", summary.mean)):
            # v2.1 keeps all axes of a feature, v3.0 the last.
            stored = getattr(np, name)(stats[name].reshape(-1, stats[name].shape[-1]), axis=0)
            # LeRobot's means are sums of float32.
            relative = 1e-4 if name == "mean" else 1e-6
            allowed = relative * np.maximum(np.abs(summary.low), np.abs(summary.high)) + 1e-9
            if (np.abs(stored - value) > allowed).any():
                yield f"{name} is {_numbers(stored)}, the data's {_numbers(value)}"


def _files(meta: LeRobotDatasetMetadata, name_of_episode: Callable[[int], str]) -> dict[str, list[int]]:
    """Give the files, relative to the root, and the episodes that each of them holds."""
    files: dict[str, list[int]] = {}
    for episode in range(len(meta.episodes["length"])):
        files.setdefault(name_of_episode(episode), []).append(episode)
    return files


def _numbers(values: np.ndarray) -> str:
    return "[" + ", ".join(f"{value:.6g}" for value in np.ravel(values)) + "]"
