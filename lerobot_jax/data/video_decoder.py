"""Decode chosen frames of videos: found through an index, by decoders that stay open.

Counterpart of `decode_video_frames_pyav` in `lerobot.datasets.video_utils`, with the same pixels. A frame costs the
decoding of what lies between it and the keyframe before it, and nothing else: files are opened once, frames on
the way are not converted to RGB, and the keyframe is known beforehand.
"""

import contextlib
import dataclasses
import functools
import itertools
import os
import threading
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from fractions import Fraction
from pathlib import Path
from typing import Any

import av
import av.error
import numpy as np
import PIL.Image
from av.video.reformatter import VideoReformatter
from jaxtyping import Float, Int, UInt8

from lerobot_jax.data import video
from lerobot_jax.errors import InputError

NUM_THREADS = os.cpu_count() or 1
# Stock LeRobot 0.6.1 wants PyAV 15, which converts to RGB in one thread anyway.
ONE_THREAD: Any = {"threads": 1} if int(av.__version__.partition(".")[0]) >= 17 else {}
MAX_OPEN = 64  # decoders that wait for their next use; each holds a file and some pictures


@functools.cache
def decoding_threads() -> ThreadPoolExecutor:
    """Give the threads of this process that decode, one a core."""
    return ThreadPoolExecutor(NUM_THREADS, thread_name_prefix="decode")


@dataclasses.dataclass(frozen=True)
class VideoIndex:
    """The frames of a video in the order in which they are shown.

    Attributes:
        time_base: seconds a tick.
        pts: when each frame is shown, in ticks.
        starts: the frames with which decoding can begin. A frame needs what was decoded since the last of them.
        key_pts: when the keyframe of each of `starts` is shown, in ticks.
        key_dts: when it is decoded.
    """

    time_base: Fraction
    pts: Int[np.ndarray, " n"]
    starts: Int[np.ndarray, " k"]
    key_pts: Int[np.ndarray, " k"]
    key_dts: Int[np.ndarray, " k"]

    @functools.cached_property
    def times(self) -> Float[np.ndarray, " n"]:
        """Give the frames' times in seconds."""
        return self.pts * self.time_base.numerator / self.time_base.denominator

    def group(self, frames: Any) -> Any:
        """Tell which of `starts` the decoding of each frame begins with."""
        return np.maximum(np.searchsorted(self.starts, frames, side="right") - 1, 0)


def index_video(path: Path) -> VideoIndex:
    """List the frames of a video without decoding any; raise `InputError` when it is damaged or has none."""
    with video.open_video(path) as container:
        stream = container.streams.video[0]
        entries = getattr(stream, "index_entries", ())  # PyAV 15 has none
        try:
            # A frame of AV1 is shown when it is decoded, so mp4's own table tells all, without reading the file.
            if stream.codec.canonical_name == "av1" and len(entries) == stream.frames:
                rows = [(e.timestamp, e.timestamp, e.is_keyframe, e.is_discard) for e in entries]
            else:
                packets = (p for p in container.demux(stream) if p.pts is not None)
                rows = [
                    (p.pts, p.pts if p.dts is None else p.dts, p.is_keyframe, p.is_discard) for p in packets
                ]
        except av.error.FFmpegError as error:
            raise InputError(f"{path}: damaged or incomplete video file ({error})") from None
        time_base = stream.time_base
    pts, dts, is_key, is_discard = np.array(rows, np.int64).reshape(-1, 4).T
    shown = np.sort(pts[is_discard == 0])
    if len(shown) == 0 or not is_key.any():
        raise InputError(f"{path}: no frame could be found; the video is damaged or incomplete")
    keys = np.flatnonzero(is_key)
    return VideoIndex(time_base, shown, np.searchsorted(shown, pts[keys]), pts[keys], dts[keys])


class VideoFile:
    """One video, whose frames are numbered in the order in which they are shown."""

    key = ""

    def __init__(self, path: Path, shape: tuple[int, ...], size: tuple[int, int] | None = None):
        """Open nothing yet.

        Args:
            path: the file.
            shape: that its frames must have, (h, w, 3).
            size: (h, w) to resize them to.
        """
        self.path, self.size = path, size
        self.decoded_shape = shape
        self.shape = shape if size is None else (*size, 3)
        self._lock = threading.Lock()
        self._index: VideoIndex | None = None
        self._indexed: tuple[int, ...] = ()  # the identity of the file that `_index` is of

    @property
    def index(self) -> VideoIndex:
        """List the frames; the file is looked at once."""
        with self._lock:
            if self._index is None:
                self._indexed = _identity(self.path)
                self._index = index_video(self.path)
            return self._index

    def check_unchanged(self) -> None:
        """Raise `InputError` when the file is not the one whose frames were listed."""
        if _identity(self.path) != self._indexed:
            raise InputError(f"{self.path}: changed while it was read; start again")

    @property
    def num_frames(self) -> int:
        return len(self.index.pts)

    @property
    def times(self) -> Float[np.ndarray, " n"]:
        """Give the frames' times in seconds."""
        return self.index.times

    @property
    def starts(self) -> Int[np.ndarray, " k"]:
        """Give the frames with which decoding can begin."""
        return self.index.starts

    def decode(self, frames: Sequence[int]) -> Iterator[UInt8[np.ndarray, "h w 3"]]:
        """Yield frames in RGB; ascending ones are cheapest. Nothing but the last one is kept.

        Raises:
            InputError: when the file is damaged there, or its frames have another size.
        """
        with _borrowed_decoder(self) as decoder:
            for i in frames:
                picture = decoder.read(i)
                if picture.shape != self.decoded_shape:
                    raise InputError(
                        f"{self.path}: frames are {picture.shape}, info.json says {self.decoded_shape}"
                    )
                yield picture if self.size is None else resize(picture, self.size)


def _identity(path: Path) -> tuple[int, ...]:
    """Give what tells whether a file was replaced or written to."""
    try:
        stat = os.stat(path)
    except FileNotFoundError:
        raise InputError(f"{path}: no such file") from None
    return stat.st_dev, stat.st_ino, stat.st_size, stat.st_mtime_ns


def resize(picture: UInt8[np.ndarray, "h w 3"], size: tuple[int, int]) -> UInt8[np.ndarray, "H W 3"]:
    """Resize to (h, w) bilinearly, antialiased; torchvision's `resize` differs by 1 in at most 1 % of bytes."""
    image = PIL.Image.fromarray(picture).resize((size[1], size[0]), PIL.Image.Resampling.BILINEAR)
    return np.asarray(image)


class _Decoder:
    """An open video, which remembers where it is."""

    def __init__(self, source: VideoFile):
        self.source = source
        self._index = source.index
        self._container = video.open_video(source.path)
        try:
            source.check_unchanged()
        except InputError:
            self._container.close()
            raise
        self._stream = self._container.streams.video[0]
        # libdav1d fills a pipeline before it gives the first frame: files and groups run in parallel instead.
        self._stream.thread_type = "NONE"
        self._stream.codec_context.thread_count = 1
        self._reformatter = VideoReformatter()
        self._decoded: Iterator[Any] = iter(())
        self._last: int | None = None  # the frame that was decoded last, and
        self._picture: np.ndarray | None = None  # this frame in RGB, if that was wanted

    def read(self, i: int) -> UInt8[np.ndarray, "h w 3"]:
        """Decode frame `i`, from where the decoder is or from the keyframe before."""
        if i != self._last or self._picture is None:
            try:
                frame = self._decode_to(i)
            except av.error.FFmpegError as error:
                raise InputError(f"{self.source.path}: damaged or incomplete video file ({error})") from None
            rgb: Any = self._reformatter.reformat(frame, format="rgb24", **ONE_THREAD)
            strides = (rgb.planes[0].line_size, 3, 1)
            self._picture = np.ndarray((rgb.height, rgb.width, 3), np.uint8, rgb.planes[0], 0, strides)
        return self._picture

    def close(self) -> None:
        self._container.close()

    def _decode_to(self, i: int) -> Any:
        group = int(self._index.group(i))
        start = int(self._index.starts[group])
        if self._last is None or i <= self._last or start > self._last + 1:
            self._seek(group)
            self._last = start - 1
        self._picture = None
        expected = self._index.pts
        for frame in self._decoded:
            # Frames from before the keyframe may come first: they refer to what was not decoded.
            if frame.pts is None or frame.pts < expected[self._last + 1]:
                continue
            if frame.pts > expected[self._last + 1] or frame.is_corrupt:
                break
            self._last += 1
            if self._last == i:
                return frame
        raise self._damaged(self._last + 1)

    def _seek(self, group: int) -> None:
        start = int(self._index.starts[group])
        # The demuxer takes a time of showing, subtracts the usual delay and searches among the times of decoding.
        # With an unusual delay it goes too far; with the time of decoding it never does.
        for ticks in (self._index.key_pts[group], self._index.key_dts[group]):
            self._container.seek(int(ticks), stream=self._stream)
            decoded = self._container.decode(self._stream)
            first = next(decoded, None)
            if first is not None and (first.pts is None or first.pts <= self._index.pts[start]):
                self._decoded = itertools.chain([first], decoded)
                return
        raise self._damaged(start)

    def _damaged(self, i: int) -> InputError:
        return InputError(
            f"{self.source.path}: the frame at {self._index.times[i]:.4f} s cannot be decoded; the video is "
            "damaged or incomplete"
        )


_idle: list[_Decoder] = []  # the one used longest ago first
_idle_lock = threading.Lock()


def close_decoders(sources: Sequence[VideoFile]) -> None:
    """Close the decoders that wait for their next use; a removed file takes room until then."""
    with _idle_lock:
        closed = [decoder for decoder in _idle if decoder.source in sources]
        _idle[:] = [decoder for decoder in _idle if decoder.source not in sources]
    for decoder in closed:
        decoder.close()


@contextlib.contextmanager
def _borrowed_decoder(source: VideoFile) -> Iterator[_Decoder]:
    """Take an open decoder of the file that nobody uses, or open one; keep it open for later unless it failed."""
    with _idle_lock:
        decoder = next((d for d in reversed(_idle) if d.source is source), None)
        if decoder is not None:
            _idle.remove(decoder)
    decoder = decoder or _Decoder(source)
    try:
        yield decoder
    except BaseException:
        decoder.close()
        raise
    with _idle_lock:
        _idle.append(decoder)
        too_many = _idle[:-MAX_OPEN]
        del _idle[:-MAX_OPEN]
    for old in too_many:
        old.close()
