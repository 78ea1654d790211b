"""Encode LeRobot's camera videos with PyAV, describe them and decode them from end to end.

The defaults are stock LeRobot's (`lerobot.configs.video.VideoEncoderConfig`): AV1 by SVT-AV1, a keyframe every
second frame, constant quality 30, preset 12. Chosen frames are decoded by `video_decoder`.
"""

import dataclasses
import logging
import os
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import av
import av.error
import numpy as np

from lerobot_jax.errors import InputError


@dataclasses.dataclass(frozen=True)
class VideoEncoding:
    """How camera frames are encoded; LeRobot's names. `vcodec` is `libsvtav1`, `h264` or `hevc`."""

    vcodec: str = "libsvtav1"
    pix_fmt: str = "yuv420p"
    g: int = 2
    crf: int = 30
    preset: int | str | None = 12
    fast_decode: int = 0

    def options(self) -> dict[str, str]:
        """Give the encoder's options as ffmpeg takes them."""
        options = {"g": str(self.g), "crf": str(self.crf)}
        if self.preset is not None:
            options["preset"] = str(self.preset)
        if self.vcodec == "libsvtav1":
            # With more threads, SVT-AV1 4.1 hangs once in some hundred files.
            options["svtav1-params"] = f"fast-decode={self.fast_decode}:lp=1"
        elif self.fast_decode:
            options["tune"] = "fastdecode"
        return options


H264 = VideoEncoding(vcodec="h264", preset=None)


class VideoWriter:
    """Encodes uint8 RGB frames (h, w, 3) into one mp4 file, frame by frame."""

    def __init__(self, path: Path, fps: int, encoding: VideoEncoding):
        # SVT-AV1 prints its whole configuration to the terminal unless it is told not to.
        os.environ.setdefault("SVT_LOG", "1")
        logging.getLogger("libav").setLevel(logging.WARNING)
        self.path = path
        self._container = av.open(str(path), "w")
        self._stream: Any = self._container.add_stream(encoding.vcodec, fps, options=encoding.options())
        self._stream.pix_fmt = encoding.pix_fmt
        self._is_open = False

    def write(self, frame: np.ndarray) -> None:
        if not self._is_open:
            self._stream.height, self._stream.width = frame.shape[:2]
            self._is_open = True
        for packet in self._stream.encode(av.VideoFrame.from_ndarray(np.ascontiguousarray(frame), "rgb24")):
            self._container.mux(packet)

    def close(self) -> None:
        if self._is_open:
            for packet in self._stream.encode():
                self._container.mux(packet)
        self._container.close()


def write_video(path: Path, frames: Iterable[np.ndarray], fps: int) -> None:
    """Write frames (h, w, 3) uint8 as an H.264 video that browsers play; odd sides lose one pixel."""
    path.parent.mkdir(parents=True, exist_ok=True)
    writer = VideoWriter(path, fps, VideoEncoding(vcodec="libx264", crf=23, g=12, preset=None))
    for frame in frames:
        writer.write(frame[: frame.shape[0] // 2 * 2, : frame.shape[1] // 2 * 2])
    writer.close()


def video_info(path: Path, encoding: VideoEncoding) -> dict[str, Any]:
    """Describe a video as info.json does."""
    with open_video(path) as container:
        stream = container.streams.video[0]
        return {
            "video.height": stream.height,
            "video.width": stream.width,
            "video.codec": stream.codec.canonical_name,
            "video.pix_fmt": stream.pix_fmt,
            "video.fps": int(stream.base_rate or 0),
            "video.channels": len(av.VideoFormat(stream.pix_fmt or "yuv420p").components),
            "has_audio": bool(container.streams.audio),
            "video.g": encoding.g,
            "video.crf": encoding.crf,
            "video.preset": encoding.preset,
            "video.fast_decode": encoding.fast_decode,
            "video.video_backend": "pyav",
            "video.extra_options": {},
            "is_depth_map": False,
        }


def open_video(path: Path) -> Any:
    """Open a video for reading; raise `InputError` naming it when it is missing or damaged."""
    try:
        container = av.open(str(path))
    except FileNotFoundError:
        raise InputError(f"{path}: no such file") from None
    except (av.error.FFmpegError, OSError) as error:
        raise InputError(f"{path}: damaged or incomplete video file ({error})") from None
    if not container.streams.video:
        container.close()
        raise InputError(f"{path}: holds no video stream")
    return container


def decode_video(path: Path) -> Iterator[tuple[float, np.ndarray]]:
    """Yield (timestamp in seconds, RGB frame (h, w, 3) uint8) of all frames, in order."""
    with open_video(path) as container:
        stream = container.streams.video[0]
        stream.thread_type = "AUTO"
        try:
            for frame in container.decode(stream):
                if frame.is_corrupt:
                    raise InputError(f"{path}: damaged video file (at {frame.time:.4f} s)")
                if frame.pts is not None:
                    yield float(frame.pts * stream.time_base), frame.to_ndarray(format="rgb24")
        except av.error.FFmpegError as error:
            raise InputError(f"{path}: damaged or incomplete video file ({error})") from None


def nearest_frames(path: Path, times: np.ndarray, wanted: np.ndarray, tolerance_s: float) -> np.ndarray:
    """Give the positions in `times` (ascending, seconds) that are nearest to `wanted`, each within tolerance."""
    if len(times) == 0:
        raise InputError(f"{path}: no frame could be decoded at {wanted[0]:.3f} s; the video is incomplete")
    right = np.clip(np.searchsorted(times, wanted), 1, max(1, len(times) - 1))
    left = right - 1
    right = np.minimum(right, len(times) - 1)
    nearest = np.where(np.abs(times[left] - wanted) <= np.abs(times[right] - wanted), left, right)
    distance = np.abs(times[nearest] - wanted)
    if np.any(distance >= tolerance_s):
        worst = int(np.argmax(distance))
        raise InputError(
            f"{path}: no frame within {tolerance_s} s of {wanted[worst]:.4f} s (nearest is at "
            f"{times[nearest[worst]]:.4f} s); the video is incomplete or its timestamps disagree with the table"
        )
    return nearest
