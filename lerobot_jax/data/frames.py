"""Camera frames of a dataset, addressed by table row: decoded on demand, or read from the frame cache.

Counterpart of LeRobot's `DatasetReader._query_videos` and of the decoding of its image columns. Frames are uint8,
channel-last; `size` has them resized bilinearly, with antialiasing.
"""

import threading
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import numpy as np
from jaxtyping import Float, Int, UInt8

from lerobot_jax import hub
from lerobot_jax.data import image_column, video
from lerobot_jax.data.image_column import EncodedImages, ImageColumn
from lerobot_jax.data.video_decoder import NUM_THREADS, VideoFile, decoding_threads
from lerobot_jax.errors import InputError


@runtime_checkable
@runtime_checkable
class RowReader(Protocol):
    """Gives the frames of table rows: what the frame cache puts in place of decoding."""

    def read(self, rows: Int[np.ndarray, " b"]) -> UInt8[np.ndarray, "b h w c"]: ...


@runtime_checkable
class FileOfFrames(Protocol):
    """A file's frames: how many, and of a video also when (seconds)."""

    @property
    def num_frames(self) -> int: ...

    @property
    def times(self) -> np.ndarray | None: ...


class VideoFrames:
    """One camera whose frames are in video files."""

    def __init__(
        self,
        paths: Sequence[Path],
        file_of_row: Int[np.ndarray, " n"],
        time_of_row: Float[np.ndarray, " n"],
        shape: tuple[int, ...],
        tolerance_s: float,
        size: tuple[int, int] | None = None,
    ):
        """Open nothing yet.

        Args:
            paths: the video files.
            file_of_row: for each table row, which file holds its frame.
            time_of_row: for each table row, its time in that file in seconds.
            shape: of a frame, (h, w, 3).
            tolerance_s: how far a frame's timestamp may be from the wanted one, in seconds.
            size: (h, w) to resize frames to.
        """
        self.files = [VideoFile(path, shape, size) for path in paths]
        self.shape = shape if size is None else (*size, 3)
        self.file_of_row = file_of_row
        self._time_of_row, self._tolerance_s = time_of_row, tolerance_s
        self._cached: RowReader | None = None

    @property
    def num_bytes(self) -> int:
        """How much the decoded frames take."""
        return len(self.file_of_row) * int(np.prod(self.shape))

    def read(self, rows: Int[np.ndarray, " b"]) -> UInt8[np.ndarray, "b h w c"]:
        """Give the frames of some rows."""
        if self._cached is not None:
            return self._cached.read(rows)
        frames = np.empty((len(rows), *self.shape), np.uint8)
        wanted = [(self.files[file], where) for file, where in rows_by_file(self.file_of_row[rows])]
        _run(lambda job: job[0].index, wanted)  # files that were not looked at yet, side by side
        jobs = []
        for file, where in wanted:
            places = self._nearest(file, file.times, rows[where])
            order = np.argsort(places, kind="stable")
            cuts = _cuts(file.index.group(places[order]), -(-len(rows) // NUM_THREADS))
            jobs += [(file, where[part], places[part]) for part in np.split(order, cuts)]

        def decode(job: tuple[VideoFile, np.ndarray, np.ndarray]) -> None:
            file, where, places = job
            for i, picture in zip(where, file.decode(places.tolist()), strict=True):
                frames[i] = picture

        _run(decode, jobs)
        return frames

    def places(self, files: Sequence[FileOfFrames]) -> Int[np.ndarray, " n"]:
        """Give the frame within its file of each row, from what the cache knows of each file.

        Raises:
            InputError: when a row's frame is further away than the tolerance.
        """
        places = np.zeros(len(self.file_of_row), np.int64)
        for file, rows in rows_by_file(self.file_of_row):
            places[rows] = self._nearest(self.files[file], files[file].times, rows)
        return places

    def read_from(self, cached: RowReader) -> None:
        """Decode no more."""
        self._cached = cached

    def _nearest(self, file: VideoFile, times: Any, rows: np.ndarray) -> np.ndarray:
        return video.nearest_frames(file.path, times, self._time_of_row[rows], self._tolerance_s)


class ImageFrames:
    """One camera whose frames are PNG or JPEG files inside the parquet tables."""

    def __init__(
        self,
        paths: Sequence[Path],
        file_of_row: Int[np.ndarray, " n"],
        place_of_row: Int[np.ndarray, " n"],
        key: str,
        shape: tuple[int, ...],
        size: tuple[int, int] | None = None,
    ):
        """Open nothing yet.

        Args:
            paths: the parquet files.
            file_of_row: for each row of the dataset, which file holds it.
            place_of_row: for each row of the dataset, its row in that file.
            key: the column of {"bytes", "path"}.
            shape: of a frame, (h, w, 3).
            size: (h, w) to resize frames to.
        """
        self.files = [ImageColumn(path, key, shape, size) for path in paths]
        self.shape = shape if size is None else (*size, 3)
        self.file_of_row, self._place_of_row = file_of_row, place_of_row
        self._cached: RowReader | None = None
        self._copies: list[EncodedImages] | None = None
        self._lock = threading.Lock()

    @property
    def num_bytes(self) -> int:
        """How much the decoded frames take."""
        return len(self.file_of_row) * int(np.prod(self.shape))

    def read(self, rows: Int[np.ndarray, " b"]) -> UInt8[np.ndarray, "b h w c"]:
        """Give the frames of some rows; the first time, copy the images to where each can be had alone."""
        if self._cached is not None:
            return self._cached.read(rows)
        with self._lock:
            if self._copies is None:
                self._copies = image_column.copy_columns(self.files, hub.cache_home() / "frames")
            copies = self._copies
        frames = np.empty((len(rows), *self.shape), np.uint8)

        def decode(part: np.ndarray) -> None:
            for i in part:
                frames[i] = copies[self.file_of_row[rows[i]]].decode(int(self._place_of_row[rows[i]]))

        _run(decode, np.array_split(np.arange(len(rows)), max(1, min(len(rows), NUM_THREADS))))
        return frames

    def places(self, files: Sequence[FileOfFrames]) -> Int[np.ndarray, " n"]:
        """Give the row within its file of each row of the dataset; raise `InputError` when a file is too short."""
        num_frames = np.array([file.num_frames for file in files])
        if (outside := self._place_of_row >= num_frames[self.file_of_row]).any():
            row = int(np.argmax(outside))
            file = self.file_of_row[row]
            raise InputError(
                f"{self.files[file].path}: has {num_frames[file]} rows, row {self._place_of_row[row]} is wanted"
            )
        return self._place_of_row

    def read_from(self, cached: RowReader) -> None:
        """Decode no more."""
        self._cached = cached


def rows_by_file(file_of_row: Int[np.ndarray, " b"]) -> list[tuple[int, np.ndarray]]:
    """Give each file that occurs, and where."""
    order = np.argsort(file_of_row, kind="stable")
    cuts = np.flatnonzero(np.diff(file_of_row[order])) + 1
    return [(int(file_of_row[where[0]]), where) for where in np.split(order, cuts) if len(where)]


def _cuts(groups: np.ndarray, at_least: int) -> list[int]:
    """Find where to cut ascending `groups` so that none is divided and no part is shorter than `at_least`."""
    cuts = [0]
    for cut in np.flatnonzero(np.diff(groups)) + 1:
        if cut - cuts[-1] >= at_least:
            cuts.append(int(cut))
    return cuts[1:]


def _run(function: Callable[[Any], Any], jobs: Sequence[Any]) -> None:
    if len(jobs) == 1:
        function(jobs[0])
    else:
        list(decoding_threads().map(function, jobs))
