"""One video, or one image column of a parquet file, decoded into an entry of the cache folder.

pixels        (n, h, w, 3) uint8
checksums     (n,) uint64, see `checksum`
times.npy     (n,) float64 seconds; videos only
done          one byte a segment: 1 when its pixels and checksums are on disk
entry.json    what it is of; written last, with digests of the small files
"""

import functools
import hashlib
import io
import math
import os
import shutil
from pathlib import Path

import numpy as np
from absl import logging
from jaxtyping import Int, UInt8, UInt64

from lerobot_jax.data import cache_folder
from lerobot_jax.data.image_column import ImageColumn
from lerobot_jax.data.video_decoder import VideoFile
from lerobot_jax.errors import InputError
from lerobot_jax.files import read_json, write_json

VERSION = 1
SEGMENT_BYTES = 32_000_000  # at least; a segment is what is lost when a builder is killed


def checksum(frames: UInt8[np.ndarray, "b bytes"]) -> UInt64[np.ndarray, " b"]:
    """Sum each frame's bytes, as 8-byte words and a rest, weighted by their places, modulo 2^64.

    Any change within one word shows, and any other but by a chance of 2^-64. It costs a third of a CRC-32.
    """
    num_bytes = frames.shape[1]
    words = num_bytes // 8
    weights = _weights(words + num_bytes % 8)
    sums = frames[:, : words * 8].view(np.uint64) @ weights[:words] + np.uint64(1)
    if num_bytes % 8:
        sums += frames[:, words * 8 :].astype(np.uint64) @ weights[words:]
    return sums


@functools.cache
def _weights(n: int) -> np.ndarray:
    """Scatter 1 ... n over the odd 64-bit numbers (Steele et al., SplitMix, 2014)."""
    mixed = np.arange(1, n + 1, dtype=np.uint64) * np.uint64(0x9E3779B97F4A7C15)
    mixed = (mixed ^ (mixed >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    mixed = (mixed ^ (mixed >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return (mixed ^ (mixed >> np.uint64(31))) | np.uint64(1)


class FrameLayout:
    """What an entry will hold, as far as the source tells without being decoded.

    Attributes:
        bounds: the first frame of each segment, and the number of frames.
        description: what entry.json says while the entry is being built.
    """

    def __init__(self, source: VideoFile | ImageColumn, identity: cache_folder.Identity):
        self.source, self.identity = source, identity
        self.num_frames, self.times = source.num_frames, source.times
        if self.num_frames == 0:
            raise InputError(f"{source.path}: holds no frame")
        self.frame_bytes = math.prod(source.shape)
        self.bounds = [0]
        for start in (*source.starts.tolist(), self.num_frames):
            is_long = (start - self.bounds[-1]) * self.frame_bytes >= SEGMENT_BYTES
            if is_long or start == self.num_frames > self.bounds[-1]:
                self.bounds.append(start)
        self.num_bytes = self.num_frames * (self.frame_bytes + 8)
        self.description = {
            "version": VERSION,
            "source": str(source.path),
            "key": source.key,
            "shape": list(source.shape),
            "num_frames": self.num_frames,
            "bounds": self.bounds,
            "times_sha256": "" if self.times is None else _sha256(self.times.tobytes()),
        }

    def create(self, folder: Path) -> None:
        """Begin an entry, with all the room that it needs; raise `OSError` when there is none."""
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir()
        if self.times is not None:
            times = io.BytesIO()  # into a file, np.save does not say why it fails
            np.save(times, self.times)
            with open(folder / "times.npy", "wb") as file:
                file.write(times.getbuffer())
                file.flush()
                os.fsync(file.fileno())
        for name, size in self._sizes().items():
            with open(folder / name, "wb") as file:
                if hasattr(os, "posix_fallocate"):  # not on macOS
                    os.posix_fallocate(file.fileno(), 0, size)
                else:
                    file.truncate(size)
        write_json(self.description, folder / cache_folder.DESCRIPTION)

    def finish(self, folder: Path) -> None:
        """Seal an entry whose segments are all there."""
        digest = _sha256((folder / "checksums").read_bytes())
        write_json({**self.description, "checksums_sha256": digest}, folder / cache_folder.DESCRIPTION)

    def is_begun(self, folder: Path) -> bool:
        """Tell whether `folder` is such an entry, so that its building can go on."""
        try:
            found = read_json(folder / cache_folder.DESCRIPTION) | {"source": str(self.source.path)}
            sizes = {name: (folder / name).stat().st_size for name in self._sizes()}
            times = "" if self.times is None else _sha256(_read_times(folder, self.num_frames).tobytes())
        except (InputError, FileNotFoundError, ValueError, TypeError):
            return False
        return found == self.description and sizes == self._sizes() and times == found["times_sha256"]

    def _sizes(self) -> dict[str, int]:
        pixels = self.num_frames * self.frame_bytes
        return {"pixels": pixels, "checksums": self.num_frames * 8, "done": len(self.bounds) - 1}


class CachedFile:
    """A whole entry, memory-mapped."""

    def __init__(self, cache: Path, name: str, source: VideoFile | ImageColumn):
        """Check the small files; raise `ValueError` when the entry is damaged or does not hold these frames."""
        folder = cache_folder.whole_path(cache, name)
        self._cache, self._name, self._source = cache, name, source
        description = read_json(folder / cache_folder.DESCRIPTION)
        self.num_frames = n = description["num_frames"]
        frame_bytes = math.prod(source.shape)
        self._checksums = np.fromfile(folder / "checksums", np.uint64)
        self.times = _read_times(folder, n) if description["times_sha256"] else None
        found = [
            description["version"],
            tuple(description["shape"]),
            len(self._checksums),
            _sha256(self._checksums.tobytes()),
            (folder / "pixels").stat().st_size,
            "" if self.times is None else _sha256(self.times.tobytes()),
        ]
        expected = [
            VERSION,
            source.shape,
            n,
            description["checksums_sha256"],
            n * frame_bytes,
            description["times_sha256"],
        ]
        if found != expected:
            raise ValueError(f"{found} instead of {expected}")
        self._pixels = cache_folder.mapped(folder / "pixels").reshape(n, frame_bytes)
        self._verified = np.zeros(n, bool)

    def read(self, places: Int[np.ndarray, " b"]) -> UInt8[np.ndarray, "b bytes"]:
        """Copy some frames; the first time, see that they are what was written.

        Raises:
            InputError: when they are not; the entry is removed then.
        """
        frames = self._pixels[places]
        if not self._verified[places].all():
            fresh = np.flatnonzero(~self._verified[places])
            wrong = checksum(frames[fresh]) != self._checksums[places[fresh]]
            if wrong.any():
                with cache_folder.folder_lock(self._cache):
                    cache_folder.remove_entry(self._cache, self._name)
                folder = cache_folder.whole_path(self._cache, self._name)
                raise InputError(
                    f"{folder}: frame {places[fresh][wrong][0]} of {self._source.path} is damaged in the cache; "
                    "the entry is removed: start again to have it rebuilt"
                )
            self._verified[places] = True
        return frames


def open_frames(cache: Path, name: str, source: VideoFile | ImageColumn) -> CachedFile | None:
    """Open an entry if it is there; a damaged one is removed. Call it under `folder_lock`."""
    folder = cache_folder.whole_path(cache, name)
    if not folder.exists():
        return None
    try:
        return CachedFile(cache, name, source)
    except (InputError, FileNotFoundError, ValueError, KeyError, TypeError):
        logging.warning("%s: damaged frames of %s; they are decoded again", folder, source.path)
        cache_folder.remove_entry(cache, name)
        return None
    except OSError as error:  # it may be whole: the fault is elsewhere
        raise InputError(f"{folder}: cannot be read ({error})") from None


def _read_times(folder: Path, n: int) -> np.ndarray:
    """Read times.npy without its header, which could be damaged in many ways; a digest tells about the rest."""
    return np.frombuffer((folder / "times.npy").read_bytes()[-8 * n :], np.float64)


def _sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()
