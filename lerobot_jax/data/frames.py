"""Camera frames of a dataset, addressed by table row: decoded once into memory-mapped uint8, or on demand.

A cache file holds all frames of one video (or image column of one parquet file) in order, next to their
timestamps. It is named by a digest of the source's path, size and modification time and appears by an atomic
rename, so it is either complete or not there, and a changed source is decoded anew.
"""

import hashlib
import io
import os
import shutil
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

import numpy as np
import PIL.Image
import pyarrow as pa
import tqdm
from absl import logging
from jaxtyping import Float, Int, UInt8

from lerobot_jax.data import video
from lerobot_jax.errors import InputError

TimedFrames = Iterable[tuple[float, np.ndarray]]  # (time in seconds, RGB frame (h, w, 3) uint8)


class VideoFrames:
    """One camera whose frames are in video files."""

    def __init__(
        self,
        paths: Sequence[Path],
        file_of_row: Int[np.ndarray, " n"],
        time_of_row: Float[np.ndarray, " n"],
        shape: tuple[int, ...],
        tolerance_s: float,
    ):
        """Args:
        paths: the video files.
        file_of_row: for each table row, which file holds its frame.
        time_of_row: for each table row, its time in that file in seconds.
        shape: of a frame, (h, w, 3).
        tolerance_s: how far a frame's timestamp may be from the wanted one, in seconds.
        """
        self.paths, self.shape = list(paths), shape
        self._file_of_row, self._time_of_row, self._tolerance_s = file_of_row, time_of_row, tolerance_s
        self._cached: list[np.ndarray] | None = None
        self._frame_of_row = np.zeros(len(file_of_row), np.int64)

    @property
    def num_bytes(self) -> int:
        """How much the decoded frames take."""
        return len(self._file_of_row) * int(np.prod(self.shape))

    def read(self, rows: Int[np.ndarray, " b"]) -> UInt8[np.ndarray, "b h w c"]:
        """Give the frames of some rows."""
        frames = np.empty((len(rows), *self.shape), np.uint8)
        for file in np.unique(self._file_of_row[rows]):
            chosen = self._file_of_row[rows] == file
            if self._cached is not None:
                frames[chosen] = self._cached[file][self._frame_of_row[rows[chosen]]]
            else:
                times = self._time_of_row[rows[chosen]].tolist()
                frames[chosen] = self._checked(
                    self.paths[file], video.decode_frames(self.paths[file], times, self._tolerance_s)
                )
        return frames

    def decode_all(self, cache: Path, progress: Callable[[int], object]) -> None:
        """Decode every file into `cache` unless it is there already, and read from there from now on."""
        cached = []
        for file, path in enumerate(self.paths):
            times, frames = _cached_frames(path, "", cache, video.decode_video(path), progress)
            rows = np.flatnonzero(self._file_of_row == file)
            self._frame_of_row[rows] = video.nearest_frames(
                path, times, self._time_of_row[rows], self._tolerance_s
            )
            cached.append(self._checked(path, frames))
        self._cached = cached

    def _checked(self, path: Path, frames: np.ndarray) -> np.ndarray:
        if frames.shape[1:] != self.shape:
            raise InputError(f"{path}: frames are {frames.shape[1:]}, info.json says {self.shape}")
        return frames


class ImageFrames:
    """One camera whose frames are PNG or JPEG files inside the parquet tables."""

    def __init__(
        self, paths: Sequence[Path], columns: Sequence[pa.ChunkedArray], key: str, shape: tuple[int, ...]
    ):
        """Args:
        paths: the parquet files.
        columns: each file's column of {"bytes", "path"}.
        key: the feature's name.
        shape: of a frame, (h, w, 3).
        """
        self.paths, self.shape = list(paths), shape
        self._columns, self._key = list(columns), key
        self._first_row = np.concatenate([[0], np.cumsum([len(column) for column in columns])])
        self._cached: list[np.ndarray] | None = None

    @property
    def num_bytes(self) -> int:
        """How much the decoded frames take."""
        return int(self._first_row[-1]) * int(np.prod(self.shape))

    def read(self, rows: Int[np.ndarray, " b"]) -> UInt8[np.ndarray, "b h w c"]:
        """Give the frames of some rows."""
        frames = np.empty((len(rows), *self.shape), np.uint8)
        files = np.searchsorted(self._first_row, rows, side="right") - 1
        for i, (file, row) in enumerate(zip(files, rows - self._first_row[files], strict=True)):
            if self._cached is not None:
                frames[i] = self._cached[file][row]
            else:
                frames[i] = self._decode(int(file), int(row))
        return frames

    def decode_all(self, cache: Path, progress: Callable[[int], object]) -> None:
        """Decode every file into `cache` unless it is there already, and read from there from now on."""
        cached = []
        for file, path in enumerate(self.paths):
            numbered = ((0.0, self._decode(file, i)) for i in range(len(self._columns[file])))
            cached.append(_cached_frames(path, self._key, cache, numbered, progress)[1])
        self._cached = cached

    def _decode(self, file: int, row: int) -> np.ndarray:
        where = f"{self.paths[file]}: '{self._key}' in row {row}"
        data = self._columns[file][row]["bytes"].as_py()
        if data is None:
            raise InputError(f"{where} holds a path instead of an image")
        try:
            image = np.asarray(PIL.Image.open(io.BytesIO(data)).convert("RGB"))
        except (OSError, SyntaxError) as error:
            raise InputError(f"{where} cannot be decoded ({error})") from None
        if image.shape != self.shape:
            raise InputError(f"{where} is {image.shape}, info.json says {self.shape}")
        return image


def decode_into_cache(cameras: Sequence[VideoFrames | ImageFrames], cache: Path, budget_gb: float) -> None:
    """Decode all cameras into `cache` with a progress bar, unless that would take more than `budget_gb`."""
    needed = sum(camera.num_bytes for camera in cameras)
    if not cameras:
        return
    if needed > budget_gb * 1e9:
        logging.info(
            "frames take %.1f GB decoded (dataset.frame_cache_gb is %g): decoding on demand",
            needed / 1e9,
            budget_gb,
        )
        return
    cache.mkdir(parents=True, exist_ok=True)
    total = sum(camera.num_bytes // int(np.prod(camera.shape)) for camera in cameras)
    with tqdm.tqdm(total=total, desc="decoding frames (once)", unit="frame", delay=1, smoothing=0.05) as bar:
        for camera in cameras:
            camera.decode_all(cache, bar.update)


def _cached_frames(
    source: Path,
    key: str,
    cache: Path,
    decoded: TimedFrames,
    progress: Callable[[int], object],
) -> tuple[np.ndarray, np.ndarray]:
    """Give the timestamps and the memory-mapped frames (n, h, w, 3) of one source file."""
    if not source.exists():
        raise InputError(f"{source}: no such file")
    stat = source.stat()
    identity = f"{source.resolve()}|{key}|{stat.st_size}|{stat.st_mtime_ns}"
    name = hashlib.sha256(identity.encode()).hexdigest()[:32]
    target = cache / name
    if not target.exists():
        partial = cache / f"{name}.{os.getpid()}.partial"
        try:
            _decode_to_folder(source, decoded, partial, progress)
            partial.rename(target)
        except OSError as error:
            if not target.exists():  # else another process was faster
                raise InputError(f"{partial}: could not keep decoded frames of {source} ({error})") from None
        finally:
            shutil.rmtree(partial, ignore_errors=True)
    times = np.load(target / "times.npy")
    shape = tuple(np.load(target / "shape.npy"))
    return times, np.memmap(target / "pixels", np.uint8, "r", shape=(len(times), *shape))


def _decode_to_folder(
    source: Path, decoded: TimedFrames, folder: Path, progress: Callable[[int], object]
) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    times = []
    shape: tuple[int, ...] = ()
    with open(folder / "pixels", "wb") as pixels:
        for time, frame in decoded:
            times.append(time)
            shape = frame.shape
            pixels.write(np.ascontiguousarray(frame).data)
            progress(1)
    if not times:
        raise InputError(f"{source}: no frame could be decoded; the file is damaged or incomplete")
    np.save(folder / "times.npy", np.array(times))
    np.save(folder / "shape.npy", np.array(shape))
