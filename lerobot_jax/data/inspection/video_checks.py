"""Check the videos of a dataset: format, frames, and the time that each episode has in them.

A video is read packet by packet, which tells each frame's time without decoding it.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import av.error
import numpy as np
from jaxtyping import Float

from lerobot_jax.data import video
from lerobot_jax.data.info import EPISODES_IN, INFO_PATH, image_shape
from lerobot_jax.data.inspection.problems import RESTORE, Problems, spans
from lerobot_jax.data.metadata import LeRobotDatasetMetadata
from lerobot_jax.errors import InputError


class VideoInspection:
    """Looks at the videos of one camera; reports to `problems`."""

    def __init__(
        self,
        meta: LeRobotDatasetMetadata,
        key: str,
        fps: float,
        tolerance_s: float,
        decode: bool,
        problems: Problems,
    ):
        self.meta, self.key, self.fps = meta, key, fps
        self.tolerance_s, self.decode, self.problems = tolerance_s, decode, problems
        self._where = EPISODES_IN[meta.info["codebase_version"]]
        self._starts = meta.episodes[f"videos/{key}/from_timestamp"]
        self._ends = meta.episodes[f"videos/{key}/to_timestamp"]
        self._formats: dict[str, dict[str, Any]] = {}

    def check(self, name: str, episodes: Sequence[int]) -> None:
        """Check a video's frames against the episodes that it holds."""
        path = self.meta.root / name
        if not path.is_file():
            return
        try:
            times, self._formats[name], broken = _read_packets(path)
        except InputError as error:
            self.problems.report(name, str(error).removeprefix(f"{path}: "), RESTORE)
            return
        if broken:
            self.problems.report(name, broken, RESTORE)
        if len(times) == 0:
            self.problems.report(name, "holds no frame", RESTORE)
            return
        self._check_spans(name, episodes)
        self._check_times(name, episodes, times)
        if self.decode:
            num_decoded, fault = _decode_all(path)
            if fault or num_decoded != len(times):
                what = fault or f"{num_decoded} of its {len(times)} frames can be decoded"
                self.problems.report(name, what, RESTORE)

    def _check_spans(self, name: str, episodes: Sequence[int]) -> None:
        """Check that the episodes in a video do not overlap, and are as long as their frames take."""
        starts, ends, lengths = self._starts, self._ends, self.meta.episodes["length"]
        findings, free = {}, 0.0
        for e in sorted(episodes, key=lambda e: starts[e]):
            seconds = lengths[e] / self.fps
            if not abs(ends[e] - starts[e] - seconds) <= 0.5 / self.fps:
                findings[e] = (
                    f"lies at {starts[e]:.4f} to {ends[e]:.4f} s in {name}, but its {lengths[e]} frames take "
                    f"{seconds:.4f} s"
                )
            elif not starts[e] >= free - 0.5 / self.fps:
                findings[e] = (
                    f"starts at {starts[e]:.4f} s in {name}, where the one before ends at {free:.4f} s"
                )
            free = ends[e]
        repair = f"correct videos/{self.key}/from_timestamp and to_timestamp"
        self.problems.report_episodes(self._where, findings, repair)

    def _check_times(self, name: str, episodes: Sequence[int], times: Float[np.ndarray, " n"]) -> None:
        """Check that there is a frame at every time at which an episode wants one."""
        starts, lengths = self._starts, self.meta.episodes["length"]
        findings, late, end = {}, [], 0.0
        for e in episodes:
            wanted = starts[e] + np.arange(lengths[e]) / self.fps
            right = np.searchsorted(times, wanted).clip(max=len(times) - 1)
            left = (right - 1).clip(min=0)
            distance = np.minimum(np.abs(times[left] - wanted), np.abs(times[right] - wanted))
            off = np.flatnonzero(~(distance < self.tolerance_s))
            if len(off) and wanted[off[0]] > times[-1]:
                late.append(e)
                end = max(end, float(wanted[-1]))
            elif len(off):
                nearest = times[left if abs(times[left] - wanted)[off[0]] == distance[off[0]] else right][
                    off[0]
                ]
                findings[e] = (
                    f"has no frame within {self.tolerance_s} s of {len(off)} of its {lengths[e]} times; the first "
                    f"is {wanted[off[0]]:.4f} s (frame {off[0]}), the nearest frame is at {nearest:.4f} s"
                )
        repair = f"correct videos/{self.key}/from_timestamp in {self._where}, or {RESTORE}"
        self.problems.report_episodes(name, findings, repair)
        if late:
            what = (
                f"ends at {times[-1]:.4f} s with {len(times)} frames; the episodes {spans(late)} want frames"
            )
            self.problems.report(name, f"{what} until {end:.4f} s", RESTORE)

    def check_formats(self) -> None:
        """Check the camera's videos against info.json, which is to blame when they all agree with each other."""
        feature = self.meta.features[self.key]
        declared = {"height, width": image_shape(feature)[:2], "frames a second": self.fps} | (
            feature.get("info") or {}
        )
        for what in dict.fromkeys(name for form in self._formats.values() for name in form):
            if what not in declared:
                continue
            found = {name: form[what] for name, form in self._formats.items() if what in form}
            wrong = {name: value for name, value in found.items() if not _equal(value, declared[what])}
            if len(wrong) == len(self._formats) and len(set(map(str, wrong.values()))) == 1:
                value = next(iter(wrong.values()))
                said = f"'{self.key}' has {what} = {declared[what]}, its videos ({len(wrong)}) have {value}"
                self.problems.report(INFO_PATH, said, f"set it to {value}")
                continue
            for name, value in wrong.items():
                said = f"has {what} = {value}, info.json says {declared[what]}"
                self.problems.report(name, said, "encode it like the others, or restore the file")


def _equal(value: Any, declared: Any) -> bool:
    """Compare what a video has with what info.json says; LeRobot rounds rates down, and some are not whole."""
    if isinstance(value, float) and isinstance(declared, (int, float)):
        return abs(value / declared - 1) < 0.01 or declared == int(value)
    return bool(value == declared)


def _read_packets(path: Path) -> tuple[Float[np.ndarray, " n"], dict[str, Any], str | None]:
    """Read a video without decoding it: its frames' times in order, its format, and what is broken."""
    with video.open_video(path) as container:
        stream = container.streams.video[0]
        times, broken = [], None
        try:
            for packet in container.demux(stream):
                if packet.is_corrupt:
                    broken = f"is cut off or damaged after frame {len(times)}"
                elif packet.pts is not None:
                    times.append(packet.pts)
        except av.error.FFmpegError as error:
            broken = f"cannot be read after frame {len(times)} ({error})"
        seconds = np.sort(np.array(times, np.float64)) * float(stream.time_base)
        form: dict[str, Any] = {
            "height, width": (stream.height, stream.width),
            "video.height": stream.height,
            "video.width": stream.width,
            "video.codec": stream.codec.canonical_name,
            "video.pix_fmt": stream.pix_fmt,
        }
        if len(seconds) > 1:
            form["frames a second"] = form["video.fps"] = round(
                (len(seconds) - 1) / float(np.ptp(seconds)), 2
            )
    return seconds, form, broken


def _decode_all(path: Path) -> tuple[int, str | None]:
    """Decode a whole video: how many frames it gives, and what is broken."""
    count, time = 0, 0.0
    with video.open_video(path) as container:
        stream = container.streams.video[0]
        stream.thread_type = "AUTO"
        stream.codec_context.options = {"err_detect": "explode"}
        try:
            for frame in container.decode(stream):
                if frame.is_corrupt:
                    return count, f"the frame at {time:.4f} s is damaged"
                count, time = count + 1, float(frame.time or 0)
        except av.error.FFmpegError as error:
            return count, f"cannot be decoded after {time:.4f} s, frame {count} ({error})"
    return count, None
