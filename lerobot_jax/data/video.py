"""Encode and decode LeRobot's camera videos with PyAV.

The defaults are stock LeRobot's (`lerobot.configs.video.VideoEncoderConfig`): AV1 by SVT-AV1, a keyframe every
second frame, constant quality 30, preset 12.
"""

import dataclasses
import logging
import os
import tempfile
from collections.abc import Iterator, Sequence
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
            options["svtav1-params"] = f"fast-decode={self.fast_decode}"
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


def write_video(path: Path, frames: Sequence[np.ndarray], fps: int) -> None:
    """Write frames (h, w, 3) uint8 as an H.264 video that browsers play; odd sides lose one pixel."""
    path.parent.mkdir(parents=True, exist_ok=True)
    writer = VideoWriter(path, fps, VideoEncoding(vcodec="libx264", crf=23, g=12, preset=None))
    for frame in frames:
        writer.write(frame[: frame.shape[0] // 2 * 2, : frame.shape[1] // 2 * 2])
    writer.close()


def concatenate_videos(paths: Sequence[Path], output: Path) -> None:
    """Join videos of equal codec and size into one file without encoding anew."""
    output.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.NamedTemporaryFile("w", suffix=".ffconcat") as listing:
        listing.write("ffconcat version 1.0\n")
        listing.writelines(f"file '{path.resolve()}'\n" for path in paths)
        listing.flush()
        with (
            av.open(listing.name, format="concat", options={"safe": "0"}) as source,
            av.open(str(output), "w", options={"movflags": "faststart"}) as target,
        ):
            source_stream = source.streams.video[0]
            target_stream = target.add_stream_from_template(source_stream, opaque=True)
            target_stream.time_base = source_stream.time_base
            for packet in source.demux(source_stream):
                if packet.dts is not None:  # the demuxer ends with an empty packet
                    packet.stream = target_stream
                    target.mux(packet)


def video_duration(path: Path) -> float:
    """Give the duration of a video in seconds."""
    with open_video(path) as container:
        stream = container.streams.video[0]
        if stream.duration is not None and stream.time_base is not None:
            return float(stream.duration * stream.time_base)
        return float((container.duration or 0) / av.time_base)


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


def decode_video(path: Path, start: float | None = None) -> Iterator[tuple[float, np.ndarray]]:
    """Yield (timestamp in seconds, RGB frame (h, w, 3) uint8) in order, from the keyframe at or before `start`."""
    with open_video(path) as container:
        stream = container.streams.video[0]
        stream.thread_type = "AUTO"
        try:
            if start is not None:
                container.seek(max(0, round(start / stream.time_base) - 1), backward=True, stream=stream)
            for frame in container.decode(stream):
                if frame.pts is not None:
                    yield float(frame.pts * stream.time_base), frame.to_ndarray(format="rgb24")
        except av.error.FFmpegError as error:
            raise InputError(f"{path}: damaged or incomplete video file ({error})") from None


def decode_frames(path: Path, timestamps: Sequence[float], tolerance_s: float) -> np.ndarray:
    """Decode the frames nearest to `timestamps` (seconds): (n, h, w, 3) uint8.

    Raises:
        InputError: when the nearest frame is further away than `tolerance_s`, or the video cannot be read.
    """
    last = max(timestamps)
    times, frames = [], []
    for time, frame in decode_video(path, start=min(timestamps)):
        times.append(time)
        frames.append(frame)
        if time >= last:
            break
    nearest = nearest_frames(path, np.array(times), np.asarray(timestamps, np.float64), tolerance_s)
    return np.stack([frames[i] for i in nearest])


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
