"""Copy episodes between video files without encoding anew: packets stay as they are, only their times change.

LeRobot joins whole files (`lerobot.datasets.video_utils.concatenate_video_files`) and encodes anew where some
episodes of a file are left out (`lerobot.datasets.dataset_tools`). Here both copy packets, and times are counted in
whole ticks, so that they do not drift however many episodes a file holds.
"""

import contextlib
import dataclasses
import itertools
from collections.abc import Iterator
from fractions import Fraction
from pathlib import Path
from typing import Any

import av
import av.error
import numpy as np
from av.bitstream import BitStreamFilterContext
from jaxtyping import Float

from lerobot_jax.data import video
from lerobot_jax.data.info import VIDEO_PATH
from lerobot_jax.errors import InputError


class FileCounter:
    """Counts files: file 0 of folder 0, file 1, ..., then file 0 of folder 1."""

    def __init__(self, chunks_size: int):
        self.chunks_size = chunks_size
        self.index = 0

    @property
    def position(self) -> dict[str, int]:
        return {"chunk_index": self.index // self.chunks_size, "file_index": self.index % self.chunks_size}


@dataclasses.dataclass(frozen=True)
class UnitCodec:
    """A codec whose packets are made of units (NAL), each behind its length.

    Attributes:
        to_packets: the filter that copies the parameters, which mp4 keeps once a file, into the packets.
        length_at: which byte of the parameters says how many bytes a length takes, less one.
        kind_shift, kind_mask: where a unit's first byte has its kind.
        resets: kinds of keyframes after which the decoder needs nothing from before.
    """

    to_packets: str
    length_at: int
    kind_shift: int
    kind_mask: int
    resets: frozenset[int]


UNIT_CODECS = {
    "h264": UnitCodec("h264_mp4toannexb", 4, 0, 31, frozenset({5})),
    "hevc": UnitCodec("hevc_mp4toannexb", 21, 1, 63, frozenset(range(16, 21))),
}


class SourceVideo:
    """A video file as a list of packets, in the order in which they are decoded.

    Attributes:
        parameters: what must be equal for packets of two files to share a file.
        time_base: seconds a tick.
        pts: when each packet's frame is shown, in ticks.
        is_key: whether decoding can start at it.
        resets: whether it may also follow packets of another video.
        sizes: bytes.
        delay: by how many ticks frames are decoded before they are shown, so that their order can change.
    """

    def __init__(self, path: Path):
        """Read through a video; raise `InputError` when it cannot be read at all."""
        self.path = path
        with video.open_video(path) as container:
            stream = container.streams.video[0]
            codec = stream.codec_context
            self.codec: str = stream.codec.canonical_name
            self.time_base: Fraction = stream.time_base
            self.extradata: bytes = codec.extradata or b""
            self.parameters = (
                self.codec,
                codec.width,
                codec.height,
                codec.pix_fmt,
                self.time_base,
                self.extradata,
            )
        rows = [(p.pts, p.dts, p.is_keyframe, self._resets(p), p.size) for p in self._demux()]
        if not rows or any(None in row for row in rows):
            raise InputError(f"{path}: damaged or incomplete video file (packets without times)")
        self.pts, dts, self.is_key, self.resets, self.sizes = map(np.array, zip(*rows, strict=True))
        self._packets, self._position = self._demux(), 0
        self.delay = int(max(np.max(np.sort(self.pts) - self.pts), self.pts[0] - dts[0]))

    def find(self, times: Float[np.ndarray, " n"], fps: float) -> tuple[int, int]:
        """Find the frames nearest to `times` (seconds); give the first's and the last's pts.

        Raises:
            InputError: when there is none within half a frame's time.
        """
        shown = np.sort(self.pts)
        nearest = video.nearest_frames(self.path, shown * float(self.time_base), times, 0.5 / fps)
        return int(shown[nearest.min()]), int(shown[nearest.max()])

    def span(self, first: int, last: int) -> tuple[int, int]:
        """Give the packets, as a range of whole groups, that decode the frames from pts `first` to `last`."""
        wanted = np.flatnonzero((self.pts >= first) & (self.pts <= last))
        keys = np.flatnonzero(self.is_key)
        starts = keys[(keys <= wanted[0]) & (self.pts[keys] <= first)]
        if len(starts) == 0:
            raise InputError(f"{self.path}: no keyframe at or before {float(first * self.time_base):.3f} s")
        ends = keys[keys > wanted[-1]]
        return int(starts[-1]), int(ends[0]) if len(ends) else len(self.pts)

    def read(self, start: int, end: int) -> Iterator[Any]:
        """Yield the packets of a range; ranges in ascending order are read in one pass over the file."""
        if start < self._position:
            self._packets, self._position = self._demux(), 0
        yield from itertools.islice(self._packets, start - self._position, end - self._position)
        self._position = end

    def _demux(self) -> Iterator[Any]:
        """Yield the packets, as far as the file is in order: what lies behind may not be wanted."""
        with video.open_video(self.path) as container, contextlib.suppress(av.error.FFmpegError):
            for packet in container.demux(container.streams.video[0]):
                if packet.is_corrupt:
                    return
                if packet.size:  # the demuxer ends with an empty packet
                    yield packet

    def _resets(self, packet: Any) -> bool:
        codec = UNIT_CODECS.get(self.codec)
        if codec is None or not packet.is_keyframe:
            return packet.is_keyframe
        data, start = bytes(packet), 0
        num_bytes = self.extradata[codec.length_at] % 4 + 1 if len(self.extradata) > codec.length_at else 4
        while start + num_bytes < len(data):
            unit = start + num_bytes
            if (data[unit] >> codec.kind_shift) & codec.kind_mask in codec.resets:
                return True
            start = unit + int.from_bytes(data[start:unit], "big")
        return False


class VideoFiles:
    """One camera's video files of bounded size, to which episodes of other files are appended.

    An episode that does not begin at a keyframe takes the frames from the keyframe before it along, and one that
    ends within a group of frames takes the rest of the group. No timestamp of the dataset points at those.
    """

    def __init__(self, root: Path, key: str, fps: float, chunks_size: int, max_bytes: float):
        self._root, self._key, self._fps, self._max_bytes = root, key, fps, max_bytes
        self._counter = FileCounter(chunks_size)
        self._container: Any = None

    def add(self, source: SourceVideo, start: float, timestamps: Float[np.ndarray, " n"]) -> dict[str, Any]:
        """Append an episode; give its columns in `meta/episodes`.

        Args:
            source: the video that it is in.
            start: its `from_timestamp` there, in seconds.
            timestamps: those of its frames, in seconds from `start`.

        Raises:
            InputError: when frames are missing in the source.
        """
        first, last = source.find(start + timestamps, self._fps)
        begin, end = source.span(first, last)
        continues = self._continues(source, begin)
        written = self._span.stop if continues else begin
        if not self._has_room(source, begin, int(source.sizes[written:end].sum()), continues):
            self._open_next_file(source)
            continues, written = False, begin
        if not continues:
            self._start_span(source, begin)
        self._copy(source, written, max(written, end))
        # Where its frames are now, and how far from them the table is, without the rounding of float sums.
        distance = round(start - float(first * source.time_base), 9)
        begins = (first + self._shift) * source.time_base
        ends = (last + self._shift) * source.time_base + 1 / Fraction(self._fps)
        columns = {
            **self._counter.position,
            "from_timestamp": float(begins) + distance,
            "to_timestamp": float(ends) + distance,
        }
        return {f"videos/{self._key}/{name}": value for name, value in columns.items()}

    def close(self) -> None:
        """Complete the last file; an episode that is added after that begins the next."""
        if self._container is not None:
            self._container.close()
            self._container = None
            self._counter.index += 1

    def _continues(self, source: SourceVideo, begin: int) -> bool:
        """Tell whether what was copied last goes on where an episode begins."""
        is_open = self._container is not None and self._source is source
        return is_open and self._span.start <= begin <= self._span.stop

    def _has_room(self, source: SourceVideo, begin: int, size: int, continues: bool) -> bool:
        return (
            self._container is not None
            and source.parameters == self._source.parameters
            and source.delay <= self._delay
            and self._bytes + size < self._max_bytes
            and (continues or bool(source.resets[begin]))
        )

    def _open_next_file(self, source: SourceVideo) -> None:
        self.close()
        path = self._root / VIDEO_PATH.format(video_key=self._key, **self._counter.position)
        path.parent.mkdir(parents=True, exist_ok=True)
        self._container = av.open(str(path), "w", options={"movflags": "faststart"})
        with video.open_video(source.path) as template:
            stream = template.streams.video[0]
            self._stream: Any = self._container.add_stream_from_template(stream, opaque=True)
            self._stream.time_base = stream.time_base
            _parameter_filter(stream, self._stream)
        self._bytes, self._delay = 0, source.delay
        self._last_pts: int | None = None
        self._last_dts: int | None = None

    def _start_span(self, source: SourceVideo, begin: int) -> None:
        self._source, self._span = source, range(begin, begin)
        frame = source.time_base * Fraction(self._fps)  # frames a tick
        # On the grid of frames, because LeRobot finds frames by their number when it decodes with torchcodec.
        place = 0 if self._last_pts is None else round((round(self._last_pts * frame) + 1) / frame)
        self._shift = place - int(source.pts[begin])
        with video.open_video(source.path) as template:
            self._filter = _parameter_filter(template.streams.video[0], None)

    def _copy(self, source: SourceVideo, start: int, end: int) -> None:
        # At the start of a span, what is shown before its keyframe would need frames that are not copied.
        earliest = source.pts[start] if start == self._span.start else source.pts.min()
        kept = source.pts[start:end] >= earliest
        # Decoding times in the order of the frames and without gaps: players take the frame rate from them.
        times = np.sort(source.pts[start:end][kept]) + self._shift - self._delay
        packets = (packet for packet, is_kept in zip(source.read(start, end), kept, strict=True) if is_kept)
        for packet, time in zip(packets, times.tolist(), strict=True):
            packet.pts += self._shift
            packet.dts = time if self._last_dts is None else max(time, self._last_dts + 1)
            self._last_dts = packet.dts
            self._last_pts = packet.pts if self._last_pts is None else max(self._last_pts, packet.pts)
            self._bytes += packet.size
            for filtered in [packet] if self._filter is None else self._filter.filter(packet):
                filtered.stream = self._stream
                self._container.mux(filtered)
        self._span = range(self._span.start, end)


def _parameter_filter(source: Any, target: Any) -> BitStreamFilterContext | None:
    """Make the filter that a stream's packets need to share a file with others; set up the target stream for it."""
    codec = UNIT_CODECS.get(source.codec.canonical_name)
    return BitStreamFilterContext(codec.to_packets, source, target) if codec else None
