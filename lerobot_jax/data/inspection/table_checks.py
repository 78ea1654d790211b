"""Check the parquet files of a dataset: columns, values, and the rows of each episode."""

import io
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import PIL.Image
import pyarrow as pa
import pyarrow.parquet as pq

from lerobot_jax.data.info import DEFAULT_FEATURES, EPISODES_IN, image_shape
from lerobot_jax.data.inspection.problems import RESTORE, Problems, spans
from lerobot_jax.data.metadata import LeRobotDatasetMetadata

INDEX_COLUMNS = tuple(DEFAULT_FEATURES)
MAX_EPISODE = 10**7  # frames


class Summary:
    """Smallest, largest and sum of each dimension (the last axis) of a feature, taken in part by part."""

    def __init__(self):
        self.count = 0
        self.low: Any = np.inf
        self.high: Any = -np.inf
        self._total: Any = 0.0

    def add(self, values: np.ndarray) -> None:
        rows = values.reshape(len(values), -1, values.shape[-1] if values.ndim > 1 else 1).astype(np.float64)
        self.count += len(values)
        self.low = np.minimum(self.low, rows.min((0, 1)))
        self.high = np.maximum(self.high, rows.max((0, 1)))
        self._total = self._total + rows.mean(1).sum(0)

    @property
    def mean(self) -> np.ndarray:
        return self._total / self.count


class TableInspection:
    """Looks at parquet files, one row group at a time; reports to `problems`, and adds up `summaries`."""

    def __init__(
        self,
        meta: LeRobotDatasetMetadata,
        fps: float,
        tolerance_s: float,
        decode: bool,
        problems: Problems,
        tasks_are_known: bool,
    ):
        self.meta, self.fps, self.tolerance_s, self.decode = meta, fps, tolerance_s, decode
        self.problems, self.tasks_are_known = problems, tasks_are_known
        self.summaries: dict[str, Summary] = {}
        self._episodes = EPISODES_IN[meta.info["codebase_version"]]

    def check(self, name: str, episodes: Sequence[int]) -> None:
        if not (self.meta.root / name).is_file():
            return
        try:
            file = pq.ParquetFile(self.meta.root / name)
        except (pa.ArrowException, OSError) as error:
            self.problems.report(name, f"damaged or incomplete parquet file ({_first_line(error)})", RESTORE)
            return
        with file:
            wanted = self._check_schema(name, file.schema_arrow)
            parts: dict[str, list[np.ndarray]] = {key: [] for key in INDEX_COLUMNS}
            faults: dict[str, list[int]] = {}
            first, is_damaged = 0, False
            for group in range(file.num_row_groups):
                end = first + file.metadata.row_group(group).num_rows
                try:
                    table = file.read_row_group(group, wanted)
                except (pa.ArrowException, OSError) as error:
                    what = (
                        f"rows {first} to {end - 1} (row group {group}) cannot be read ({_first_line(error)})"
                    )
                    self.problems.report(name, what, RESTORE)
                    is_damaged = True
                else:
                    for key in wanted:
                        values = self._check_column(key, table[key], first, faults)
                        if key in parts and values is not None:
                            parts[key].append(values)
                first = end
        columns = {key: np.concatenate([np.empty(0, np.int64), *some]) for key, some in parts.items()}
        is_complete = all(len(column) == first for column in columns.values())
        for what, rows in faults.items():
            where = self._row(columns, rows[0]) if is_complete else f"row {rows[0]}"
            some = where if len(rows) == 1 else f"{len(rows)} rows, first {where}"
            self.problems.report(
                name, f"{what} in {some}", "correct the values, or leave the episode out (delete-episodes)"
            )
        if is_complete and not is_damaged:
            self._check_rows(name, episodes, columns)

    def _check_schema(self, name: str, schema: pa.Schema) -> list[str]:
        """Report columns that are missing, unknown or of another type; give those that can be read."""
        good = []
        for key, feature in self.meta.features.items():
            if feature["dtype"] == "video":
                continue
            if key not in schema.names:
                what = f"lacks the column '{key}' that info.json declares"
                self.problems.report(name, what, "restore the file, or take the feature out of info.json")
                continue
            kind = schema.field(key).type
            if _fits(kind, feature):
                good.append(key)
            else:
                what = f"'{key}' is of type {kind}, info.json declares {feature['shape']} {feature['dtype']}"
                self.problems.report(
                    name, what, "correct dtype in info.json, or write the column in that type"
                )
        for key in schema.names:
            if key not in self.meta.features:
                what = f"has a column '{key}' that info.json does not declare"
                self.problems.report(name, what, "declare it in info.json, or remove the column")
        return good

    def _check_column(
        self, key: str, column: pa.ChunkedArray, first: int, faults: dict[str, list[int]]
    ) -> np.ndarray | None:
        """Note the rows (the first is number `first`) with faulty values; give the values if they are numbers."""
        feature = self.meta.features[key]
        shape = tuple(feature["shape"])

        def note(what: str, bad: np.ndarray) -> None:
            if bad.any():
                faults.setdefault(f"'{key}' {what}", []).extend((np.flatnonzero(bad) + first).tolist())

        if column.null_count:
            note("is empty", column.is_null().to_numpy())
            return None
        if feature["dtype"] == "string":
            return None
        if feature["dtype"] == "image":
            self._check_images(key, column, note)
            return None
        values = column.combine_chunks()
        if pa.types.is_list(values.type) and pa.types.is_primitive(values.type.value_type):
            lengths = np.diff(values.offsets.to_numpy())
            if (lengths != shape[0]).any():
                note(f"has another length than {shape[0]}", lengths != shape[0])
                return None
        while pa.types.is_nested(values.type):
            values = values.flatten()
        flat = values.to_numpy(zero_copy_only=False)
        if values.null_count or flat.size != len(column) * int(np.prod(shape)):
            note(f"holds other than {shape} values, or empty ones,", np.ones(len(column), bool))
            return None
        rows = flat.reshape(len(column), -1)
        is_good = np.isfinite(rows).all(1)
        note("is NaN or infinite", ~is_good)
        if is_good.any():
            last = rows.reshape(len(column), *shape)[is_good]
            self.summaries.setdefault(key, Summary()).add(last)
        return flat if key in INDEX_COLUMNS else None

    def _check_images(
        self, key: str, column: pa.ChunkedArray, note: Callable[[str, np.ndarray], None]
    ) -> None:
        feature = self.meta.features[key]
        shape = image_shape(feature)[:2]
        unreadable, other_size = np.zeros((2, len(column)), bool)
        for i, cell in enumerate(column):
            try:
                image = PIL.Image.open(io.BytesIO(cell["bytes"].as_py()))
                if self.decode:
                    image.load()
            except (OSError, SyntaxError, TypeError):
                unreadable[i] = True
            else:
                other_size[i] = (image.height, image.width) != shape
        note("is no image that can be decoded", unreadable)
        note(f"is not {shape[0]} x {shape[1]}, as info.json says,", other_size)

    def _check_rows(self, name: str, episodes: Sequence[int], columns: Mapping[str, np.ndarray]) -> None:
        """Check the rows of each episode: how many, in which order, at which time, of which task."""
        order = np.argsort(columns["episode_index"], kind="stable")
        numbers, starts = np.unique(columns["episode_index"][order], return_index=True)
        rows_of = dict(zip(numbers.tolist(), np.split(order, starts[1:]), strict=True))
        for number in sorted(set(rows_of) - set(episodes)):
            rows = rows_of[number]
            what = f"{len(rows)} rows, first row {rows[0]}, say episode {number}"
            self.problems.report(
                name,
                f"{what}, which {self._episodes} does not place here",
                f"correct episode_index there, or add the episode to {self._episodes}",
            )
        lengths = self.meta.episodes["length"]
        counts = {e: len(rows_of.get(e, ())) for e in episodes}
        wrong = {e: self._count_finding(e, columns, rows_of) for e in episodes if counts[e] != lengths[e]}
        self.problems.report_episodes(name, wrong, f"restore the file, or correct length in {self._episodes}")
        checks = (
            (self._frame_finding, "number the frames of the episode 0, 1, 2, ..."),
            (self._index_finding, f"make index dataset_from_index of {self._episodes} + frame_index"),
            (self._time_finding, "make timestamp frame_index / fps, and look at the video there"),
            (self._task_finding, f"correct task_index, or the tasks in meta/tasks and {self._episodes}"),
        )
        for find, repair in checks:
            findings = {}
            for episode in (e for e in episodes if counts[e] and e not in wrong):
                rows = rows_of[episode]
                # Rows that are all there in another order are one problem, reported below.
                what = find(episode, columns, rows[np.argsort(columns["frame_index"][rows], kind="stable")])
                if what is not None:
                    findings[episode] = what
            self.problems.report_episodes(name, findings, repair)
        if wrong:
            return
        start, index = self.meta.episodes["dataset_from_index"], columns["index"]
        expected = np.concatenate([start[e] + np.arange(lengths[e]) for e in episodes])
        back = np.flatnonzero(np.diff(index) < 0)
        if len(back) and np.array_equal(np.sort(index), np.sort(expected)):
            what = f"{self._row(columns, int(back[0]) + 1)} has a smaller index than the row before"
            self.problems.report(name, what, "sort the rows by index")

    def _row(self, columns: Mapping[str, np.ndarray], row: int) -> str:
        return f"row {row} (episode {columns['episode_index'][row]}, frame {columns['frame_index'][row]})"

    def _count_finding(
        self, episode: int, columns: Mapping[str, np.ndarray], rows_of: Mapping[int, np.ndarray]
    ) -> str:
        length = int(self.meta.episodes["length"][episode])
        frames = columns["frame_index"][rows_of.get(episode, np.empty(0, np.int64))]
        known = np.arange(min(length, MAX_EPISODE))  # a damaged length can be anything
        lacking = spans(np.setdiff1d(known, frames).tolist())
        what = f"has {len(frames)} rows, length in {self._episodes} is {length}"
        return what + f"; the frames {lacking} are missing" * bool(lacking)

    def _frame_finding(self, episode: int, columns: Mapping[str, np.ndarray], rows: np.ndarray) -> str | None:
        frames = columns["frame_index"][rows]
        bad = np.flatnonzero(frames != np.arange(len(rows)))
        return f"has frame_index {frames[bad[0]]} in row {rows[bad[0]]}, not {bad[0]}" if len(bad) else None

    def _index_finding(self, episode: int, columns: Mapping[str, np.ndarray], rows: np.ndarray) -> str | None:
        index = columns["index"][rows]
        expected = self.meta.episodes["dataset_from_index"][episode] + np.arange(len(rows))
        bad = np.flatnonzero(index != expected)
        if len(bad) == 0:
            return None
        return f"has index {index[bad[0]]} in row {rows[bad[0]]}, not {expected[bad[0]]}"

    def _time_finding(self, episode: int, columns: Mapping[str, np.ndarray], rows: np.ndarray) -> str | None:
        times = columns["timestamp"][rows]
        expected = np.arange(len(rows)) / self.fps
        rounding = np.spacing(expected.astype(np.float32))
        bad = np.flatnonzero(~(np.abs(times - expected) <= self.tolerance_s + rounding))
        if len(bad) == 0:
            return None
        where = f"{times[bad[0]]:.4f} s in row {rows[bad[0]]} (frame {bad[0]}), not {expected[bad[0]]:.4f} s"
        return f"has the timestamp {where}" + f"; {len(bad)} timestamps are off" * (len(bad) > 1)

    def _task_finding(self, episode: int, columns: Mapping[str, np.ndarray], rows: np.ndarray) -> str | None:
        if not self.tasks_are_known:
            return None
        found, tasks = columns["task_index"][rows], self.meta.tasks
        unknown = np.flatnonzero((found < 0) | (found >= len(tasks)))
        if len(unknown):
            row = rows[unknown[0]]
            return (
                f"has task_index {found[unknown[0]]} in row {row}; there are {len(tasks)} tasks (0, 1, ...)"
            )
        said = set(self.meta.episodes["tasks"][episode] or [])
        held = {tasks[i] for i in np.unique(found)}
        if said == held:
            return None
        return f"has the tasks {sorted(held)}, {self._episodes} says {sorted(said)}"


def _fits(kind: pa.DataType, feature: Mapping[str, Any]) -> bool:
    """Tell whether a column's type is that of a feature."""
    dtype, axes = feature["dtype"], 0 if feature["shape"] == (1,) else len(feature["shape"])
    if dtype == "image":
        return pa.types.is_struct(kind) and kind.get_field_index("bytes") >= 0
    if dtype == "string":
        return pa.types.is_string(kind) or pa.types.is_large_string(kind)
    while pa.types.is_list(kind) or pa.types.is_fixed_size_list(kind) or pa.types.is_large_list(kind):
        kind, axes = kind.value_type, axes - 1
    return kind == pa.from_numpy_dtype(np.dtype(dtype)) and axes == 0


def _first_line(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]
