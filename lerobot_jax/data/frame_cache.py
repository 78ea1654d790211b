"""The frame cache: every frame of a dataset decoded once, at its final size, into memory-mapped uint8.

An entry holds all frames of one video, or of one image column of one parquet file. Threads of this process decode
it in segments that begin with keyframes; who finds a half-built one decodes only what is missing. `cache_folder`
keeps apart who builds, uses and removes an entry.
"""

import contextlib
import itertools
import math
import os
import threading
from collections.abc import Collection, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, CancelledError, Future, wait
from pathlib import Path

import numpy as np
from absl import logging
from jaxtyping import Int, UInt8

from lerobot_jax.data import cache_folder
from lerobot_jax.data.frame_entry import CachedFile, FrameLayout, checksum, open_frames
from lerobot_jax.data.frames import ImageFrames, VideoFrames, rows_by_file
from lerobot_jax.data.image_column import ImageColumn
from lerobot_jax.data.video_decoder import NUM_THREADS, VideoFile, decoding_threads
from lerobot_jax.errors import InputError
from lerobot_jax.progress import progress_bar

MAX_OPEN = 64  # entries that are built at once; each holds four files


def cached_frames(cameras: Sequence[VideoFrames | ImageFrames], cache: Path, budget_gb: float) -> bool:
    """Decode all files of the cameras into the cache, unless they are there, and have the cameras read from it.

    What was not used for longest is removed to make room.

    Args:
        cameras: to switch over.
        cache: the folder.
        budget_gb: what the whole folder may take, in 1e9 bytes.

    Returns:
        False, after a line in the log, when that is too little; then nothing is changed.

    Raises:
        InputError: when the disk is full, a file is damaged, or a frame is not where the table says.
    """
    needed = sum(camera.num_bytes for camera in cameras)
    if needed > budget_gb * 1e9:
        _log_too_large(needed, budget_gb)
        return False
    cache_folder.create_cache(cache)
    identities = [cache_folder.identity(file.path) for camera in cameras for file in camera.files]
    digests = iter(cache_folder.digest_sources(identities, cache, decoding_threads()))
    names = [[_entry_name(file, next(digests)) for file in camera.files] for camera in cameras]
    pairs = [zip(its, camera.files, strict=True) for its, camera in zip(names, cameras, strict=True)]
    sources = dict(itertools.chain.from_iterable(pairs))
    with cache_folder.folder_lock(cache):
        lease = cache_folder.Lease(cache, sources)
        files = {name: open_frames(cache, name, source) for name, source in sources.items()}
    missing = [name for name in sorted(files) if files[name] is None]
    identity_of = dict(zip(itertools.chain.from_iterable(names), identities, strict=True))
    laid_out = decoding_threads().map(lambda name: FrameLayout(sources[name], identity_of[name]), missing)
    layouts = dict(zip(missing, laid_out, strict=True))
    known = {name: file or layouts[name] for name, file in files.items()}
    places = [
        camera.places([known[name] for name in its_names])
        for camera, its_names in zip(cameras, names, strict=True)
    ]
    if not _claim_room(layouts, cache, budget_gb, sources):
        return False
    _Build(layouts, cache).run()
    with cache_folder.folder_lock(cache):
        files |= {name: open_frames(cache, name, sources[name]) for name in missing}
    opened = {name: file for name, file in files.items() if file is not None}
    if len(opened) < len(files):
        raise InputError(f"{cache}: decoded frames were removed while others were decoded; start again")
    for camera, its_names, place_of_row in zip(cameras, names, places, strict=True):
        its_files = [opened[name] for name in its_names]
        camera.read_from(_CachedCamera(its_files, camera.shape, camera.file_of_row, place_of_row, lease))
    return True


class _CachedCamera:
    """Reads a camera's frames by table row."""

    def __init__(
        self,
        files: Sequence[CachedFile],
        shape: tuple[int, ...],
        file_of_row: np.ndarray,
        place_of_row: np.ndarray,
        lease: cache_folder.Lease,
    ):
        self._files, self._shape, self._lease = files, shape, lease
        self._file_of_row, self._place_of_row = file_of_row, place_of_row

    def read(self, rows: Int[np.ndarray, " b"]) -> UInt8[np.ndarray, "b h w c"]:
        file_of_row, places = self._file_of_row[rows], self._place_of_row[rows]
        groups = rows_by_file(file_of_row)
        if len(groups) == 1:
            return self._files[groups[0][0]].read(places).reshape(len(rows), *self._shape)
        frames = np.empty((len(rows), math.prod(self._shape)), np.uint8)
        for file, where in groups:
            frames[where] = self._files[file].read(places[where])
        return frames.reshape(len(rows), *self._shape)


class _Builder:
    """Decodes one entry; nobody else does as long as it is open."""

    def __init__(self, layout: FrameLayout, cache: Path, name: str, lock: int, stop: threading.Event):
        self._layout, self._cache, self._name, self._stop = layout, cache, name, stop
        self._folder = cache_folder.partial_path(cache, name)
        self._open = contextlib.ExitStack()
        self._open.callback(os.close, lock)
        try:
            if not layout.is_begun(self._folder):
                if self._folder.exists():
                    logging.warning("%s: damaged; decoding begins again", self._folder)
                with cache_folder.folder_lock(cache):
                    layout.create(self._folder)
            self._pixels, self._checksums, self._done = map(self._open_file, ("pixels", "checksums", "done"))
            self.missing = np.flatnonzero(np.fromfile(self._folder / "done", np.uint8) != 1).tolist()
        except BaseException:
            self._open.close()
            raise

    def decode(self, segment: int) -> int:
        """Decode one segment into the files; return which."""
        layout = self._layout
        first, end = layout.bounds[segment : segment + 2]
        checksums = np.empty(end - first, np.uint64)
        pictures = layout.source.decode(range(first, end))
        for i, picture in enumerate(pictures):
            if self._stop.is_set():
                raise CancelledError
            frame = np.ascontiguousarray(picture).reshape(1, -1)
            checksums[i : i + 1] = checksum(frame)
            _write(self._pixels, frame, (first + i) * layout.frame_bytes)
        _write(self._checksums, checksums, first * 8)
        return segment

    def keep(self, segments: Sequence[int]) -> int:
        """See segments onto the disk before they count as done; return how many frames they have."""
        cache_folder.check_unchanged(self._layout.source.path, self._layout.identity, "decoded")
        os.fsync(self._pixels)
        os.fsync(self._checksums)
        for segment in segments:
            os.pwrite(self._done, b"\1", segment)
        return sum(self._layout.bounds[i + 1] - self._layout.bounds[i] for i in segments)

    def finish(self) -> None:
        """Let the entry appear."""
        with cache_folder.folder_lock(self._cache):
            self._layout.finish(self._folder)
            self._folder.rename(cache_folder.whole_path(self._cache, self._name))
        self.close()

    def close(self) -> None:
        self._open.close()

    def _open_file(self, name: str) -> int:
        file = os.open(self._folder / name, os.O_WRONLY | os.O_CLOEXEC)
        self._open.callback(os.close, file)
        return file


class _Build:
    """Builds entries: segments side by side, of several entries if need be."""

    def __init__(self, layouts: Mapping[str, FrameLayout], cache: Path):
        self._layouts, self._cache = layouts, cache
        self._running: dict[Future[int], _Builder] = {}
        self._missing: dict[_Builder, int] = {}
        self._stop = threading.Event()
        total = sum(layout.num_frames for layout in layouts.values())
        self._bar = progress_bar("decoding frames (once)", total, "frame", delay=1)

    def run(self) -> None:
        """Return when all entries are there."""
        with self._bar:
            try:
                for name in sorted(self._layouts):
                    self._begin(name)
                while self._running:
                    self._settle()
            except OSError as error:
                self._give_up(keep_begun=error.errno not in cache_folder.DISK_IS_FULL)
                needed = sum(layout.num_bytes for layout in self._layouts.values())
                raise cache_folder.cannot_write(self._cache, error, needed) from None
            except BaseException:
                self._give_up(keep_begun=True)
                raise

    def _begin(self, name: str) -> None:
        """Hand an entry's segments to the threads, unless another process makes the entry."""
        layout, lock_path = self._layouts[name], self._cache / "locks" / name
        while self._running and (len(self._missing) >= MAX_OPEN or cache_folder.is_locked(lock_path)):
            self._settle()
        lock = cache_folder.wait_for_lock(lock_path, f"decodes {layout.source.path}")
        if cache_folder.whole_path(self._cache, name).exists():
            os.close(lock)
            self._bar.update(layout.num_frames)
            return
        builder = _Builder(layout, self._cache, name, lock, self._stop)
        self._missing[builder] = len(builder.missing)
        self._bar.update(
            layout.num_frames - sum(layout.bounds[i + 1] - layout.bounds[i] for i in builder.missing)
        )
        for segment in builder.missing:
            while len(self._running) >= 4 * NUM_THREADS:
                self._settle()
            self._running[decoding_threads().submit(builder.decode, segment)] = builder
        if not builder.missing:
            self._finish(builder)

    def _settle(self) -> None:
        """Wait until some segments are decoded and keep them, while others are being decoded; finish entries."""
        decoded: dict[_Builder, list[int]] = {}
        for future in wait(self._running, return_when=FIRST_COMPLETED).done:
            decoded.setdefault(self._running.pop(future), []).append(future.result())
        for builder, segments in decoded.items():
            self._bar.update(builder.keep(segments))
            self._missing[builder] -= len(segments)
            if self._missing[builder] == 0:
                self._finish(builder)

    def _finish(self, builder: _Builder) -> None:
        builder.finish()
        del self._missing[builder]

    def _give_up(self, keep_begun: bool) -> None:
        """Stop decoding, and remove entries that are not whole: all, or those of which nothing was decoded."""
        self._stop.set()
        for future in self._running:
            future.cancel()
        wait(self._running)
        for builder in self._missing:
            builder.close()
        with cache_folder.folder_lock(self._cache):
            for name in self._layouts:
                folder = cache_folder.partial_path(self._cache, name)
                is_begun = (folder / "done").exists() and any((folder / "done").read_bytes())
                if folder.exists() and not (is_begun and keep_begun):
                    lock = cache_folder.try_lock(self._cache / "locks" / name)
                    if lock is not None:
                        cache_folder.remove_entry(self._cache, name)
                        os.close(lock)


def _claim_room(
    layouts: Mapping[str, FrameLayout], cache: Path, budget_gb: float, keep: Collection[str]
) -> bool:
    """Make room for entries and begin them; tell whether the budget allows for it."""
    with cache_folder.folder_lock(cache):
        there = {entry.name for entry in cache_folder.read_entries(cache)}
        new = {name: cache_folder.partial_path(cache, name) for name in layouts if name not in there}
        needed = sum(layouts[name].num_bytes for name in new)
        if not cache_folder.make_room(cache, needed, budget_gb * 1e9, keep):
            _log_too_large(needed, budget_gb)
            return False
        try:
            for name, folder in new.items():
                layouts[name].create(folder)
        except OSError as error:
            for name in new:
                cache_folder.remove_entry(cache, name)
            raise cache_folder.cannot_write(cache, error, needed) from None
    return True


def _log_too_large(needed: int, budget_gb: float) -> None:
    logging.info(
        "frames take %.2f GB decoded, more than the cache may hold beside what is in use "
        "(dataset.frame_cache_gb is %g): decoding on demand",
        needed / 1e9,
        budget_gb,
    )


def _entry_name(file: VideoFile | ImageColumn, digest: str) -> str:
    return cache_folder.entry_name(digest, file.key, f"{file.shape[0]}x{file.shape[1]}")


def _write(file: int, data: np.ndarray, offset: int) -> None:
    """Write all of it, which one call need not."""
    left = data.data.cast("B")
    while left:
        written = os.pwrite(file, left, offset)
        left, offset = left[written:], offset + written
