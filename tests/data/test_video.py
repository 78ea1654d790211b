import os
from fractions import Fraction
from pathlib import Path
from typing import Any

import av
import numpy as np
import pytest

from lerobot_jax.data import video, video_decoder
from lerobot_jax.data.video_decoder import VideoFile
from lerobot_jax.errors import InputError

SHAPE = (48, 64, 3)
NUM_FRAMES = 40
CODECS = {
    "AV1, keyframe every second frame": ("libsvtav1", {"g": "2", "preset": "12"}),
    "AV1, few keyframes": ("libsvtav1", {"g": "16", "preset": "12"}),
    "H.264 as x264 has it, with B-frames": ("libx264", {}),
    "H.264, one keyframe": ("libx264", {"g": "250"}),
    "H.264, open groups": (
        "libx264",
        {"g": "8", "x264-params": "open-gop=1:bframes=3:keyint=8:min-keyint=8"},
    ),
    "H.264, keyframe every third frame": ("libx264", {"g": "3", "bf": "2"}),
    "HEVC, open groups": (
        "libx265",
        {"x265-params": "keyint=8:min-keyint=8:bframes=3:open-gop=1:log-level=0"},
    ),
}


def film(path: Path, codec: str = "libx264", times: list[int] | None = None, **options: str) -> Path:
    """Encode pictures that all differ, shown at `times` (in 1/10 s)."""
    noise = np.random.default_rng(0).integers(0, 60, (*SHAPE[:2], 3), np.uint8)
    with av.open(
        str(path), "w", options={"avoid_negative_ts": "disabled", "movflags": "faststart"}
    ) as container:
        stream: Any = container.add_stream(codec, 10, options=options)
        stream.pix_fmt, (stream.height, stream.width) = "yuv420p", SHAPE[:2]
        for i, time in enumerate(times or range(NUM_FRAMES)):
            picture = np.roll(noise, 3 * i, axis=1)
            picture[:, i : i + 8] += 150
            frame = av.VideoFrame.from_ndarray(picture, "rgb24")
            frame.pts, frame.time_base = time, Fraction(1, 10)
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
    return path


def whole(path: Path) -> tuple[np.ndarray, np.ndarray]:
    """Decode a video from end to end: times, frames."""
    times, frames = zip(*video.decode_video(path), strict=True)
    return np.array(times), np.stack(frames)


@pytest.mark.parametrize("codec", CODECS)
def test_any_frame_in_any_order_is_the_one_of_the_whole_video(tmp_path: Path, codec: str):
    name, options = CODECS[codec]
    path = film(tmp_path / "video.mp4", name, **options)
    times, frames = whole(path)
    source = VideoFile(path, SHAPE)
    np.testing.assert_array_equal(source.times, times)
    assert len(times) == NUM_FRAMES
    order = np.random.default_rng(1).integers(0, NUM_FRAMES, 60)
    for wanted in (order, np.arange(NUM_FRAMES), np.arange(NUM_FRAMES)[::-1], np.arange(3, NUM_FRAMES, 5)):
        for i, picture in zip(wanted, source.decode(wanted.tolist()), strict=True):
            np.testing.assert_array_equal(picture, frames[i])


@pytest.mark.parametrize("codec", ["libx264", "libsvtav1"])
def test_times_that_begin_late_and_vary_are_kept(tmp_path: Path, codec: str):
    shown = np.cumsum(np.random.default_rng(0).integers(1, 4, NUM_FRAMES)) + 7
    path = film(tmp_path / "video.mp4", codec, shown.tolist(), g="6")
    source = VideoFile(path, SHAPE)
    np.testing.assert_allclose(source.times, shown / 10)
    times, frames = whole(path)
    np.testing.assert_array_equal(source.times, times)
    for i, picture in zip((30, 8, 9, 39), source.decode((30, 8, 9, 39)), strict=True):
        np.testing.assert_array_equal(picture, frames[i])


@pytest.mark.parametrize("codec", ["libx264", "libsvtav1"])
def test_frames_that_an_edit_list_cuts_off_do_not_count(tmp_path: Path, codec: str):
    path = film(tmp_path / "video.mp4", codec, list(range(-5, 35)), g="12")
    times, frames = whole(path)
    assert len(times) == 35
    source = VideoFile(path, SHAPE)
    np.testing.assert_array_equal(source.times, times)
    for i, picture in zip((0, 20, 5), source.decode((0, 20, 5)), strict=True):
        np.testing.assert_array_equal(picture, frames[i])


class Counted:
    """A container that counts what is asked of it."""

    def __init__(self, container: Any):
        self.container, self.seeks, self.decoded, self.is_open = container, 0, 0, True

    def __enter__(self) -> "Counted":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def __getattr__(self, name: str) -> Any:
        return getattr(self.container, name)

    def seek(self, *args: Any, **settings: Any) -> None:
        self.seeks += 1
        self.container.seek(*args, **settings)

    def decode(self, stream: Any) -> Any:
        for frame in self.container.decode(stream):
            self.decoded += 1
            yield frame

    def close(self) -> None:
        self.is_open = False
        self.container.close()


@pytest.fixture
def opened(monkeypatch) -> list[Counted]:
    """The videos that decoders open from now on."""
    containers: list[Counted] = []
    original = video.open_video

    def counted(path: Path) -> Any:
        containers.append(Counted(original(path)))
        return containers[-1]

    monkeypatch.setattr(video_decoder, "_idle", [])
    monkeypatch.setattr(video, "open_video", counted)
    return containers


def test_decoding_jumps_only_over_keyframes(tmp_path: Path, opened: list[Counted]):
    source = VideoFile(film(tmp_path / "video.mp4", "libsvtav1", g="8", preset="12"), SHAPE)
    assert source.starts.tolist() == [0, 8, 16, 24, 32]
    opened.clear()
    list(source.decode([3, 5, 5]))
    list(source.decode([7, 8]))  # goes on where it was
    assert [(c.seeks, c.decoded) for c in opened] == [(1, 9)]
    list(source.decode([26]))  # 24 is the keyframe
    assert [(c.seeks, c.decoded) for c in opened] == [(2, 12)]
    list(source.decode([25]))
    assert [(c.seeks, c.decoded) for c in opened] == [(3, 14)]


@pytest.mark.parametrize("codec", CODECS)
def test_a_keyframe_is_found_at_once(tmp_path: Path, opened: list[Counted], codec: str):
    name, options = CODECS[codec]
    source = VideoFile(film(tmp_path / "video.mp4", name, **options), SHAPE)
    starts = source.starts[source.starts < NUM_FRAMES - 3].tolist()
    opened.clear()
    for start in starts[::-1]:
        list(source.decode([start]))
    ((seeks, decoded),) = [(c.seeks, c.decoded) for c in opened]
    assert seeks == len(starts)
    assert decoded <= len(starts) * (4 if "HEVC" in codec else 1)  # leading frames come first


def test_only_so_many_files_stay_open(tmp_path: Path, opened: list[Counted], monkeypatch):
    monkeypatch.setattr(video_decoder, "MAX_OPEN", 2)
    sources = [VideoFile(film(tmp_path / f"{i}.mp4"), SHAPE) for i in range(4)]
    for source in sources:
        assert source.num_frames == NUM_FRAMES
    opened.clear()
    for source in [*sources, sources[3]]:
        list(source.decode([0]))
    assert [container.is_open for container in opened] == [False, False, True, True]


def test_a_video_that_is_replaced_is_reported(tmp_path: Path, opened: list[Counted]):
    path, other = film(tmp_path / "video.mp4"), film(tmp_path / "other.mp4")
    source = VideoFile(path, SHAPE)
    list(source.decode([0]))
    os.replace(other, path)
    list(source.decode([1]))  # by the decoder that has the first one open
    video_decoder.close_decoders([source])
    with pytest.raises(InputError, match=r"video\.mp4: changed while it was read; start again"):
        list(source.decode([2]))
    assert not any(container.is_open for container in opened)


def damage(path: Path) -> None:
    """Overwrite the largest packet after some, but for its first bytes, which may be its length."""
    with av.open(str(path)) as container:
        packets = [p for p in container.demux(video=0) if p.pts is not None]
    chosen = max(packets[5:30], key=lambda packet: packet.size)
    content = bytearray(path.read_bytes())
    content[(chosen.pos or 0) + 4 : (chosen.pos or 0) + chosen.size] = bytes(chosen.size - 4)
    path.write_bytes(content)


@pytest.mark.parametrize("codec", ["libx264", "libsvtav1", "libx265"])
def test_a_damaged_frame_is_not_skipped(tmp_path: Path, codec: str):
    one_group = {"g": "40", "sc_threshold": "0"} if codec == "libx264" else {"g": "40"}
    path = film(tmp_path / "video.mp4", codec, None, **one_group)
    damage(path)
    source = VideoFile(path, SHAPE)
    with pytest.raises(InputError, match=r"video\.mp4.*damaged or incomplete"):
        list(source.decode(range(NUM_FRAMES)))
    with pytest.raises(InputError, match=r"video\.mp4.*damaged or incomplete"):
        list(source.decode([NUM_FRAMES - 1]))  # needs those before it
    list(source.decode([0]))


def test_a_video_that_ends_early_is_reported(tmp_path: Path):
    path = film(tmp_path / "video.mp4", "libsvtav1", g="2", preset="12")
    path.write_bytes(path.read_bytes()[:-3000])
    with pytest.raises(InputError, match=r"video\.mp4.*damaged or incomplete"):
        list(VideoFile(path, SHAPE).decode([NUM_FRAMES - 1]))


def test_what_is_no_video_is_reported(tmp_path: Path):
    (tmp_path / "text.mp4").write_text("no video at all")
    with pytest.raises(InputError, match=r"text\.mp4: damaged or incomplete"):
        list(VideoFile(tmp_path / "text.mp4", SHAPE).decode([0]))
    with pytest.raises(InputError, match=r"missing\.mp4: no such file"):
        list(VideoFile(tmp_path / "missing.mp4", SHAPE).decode([0]))


def test_frames_of_another_size_are_reported(tmp_path: Path):
    source = VideoFile(film(tmp_path / "video.mp4"), (64, 48, 3))
    with pytest.raises(
        InputError, match=r"video\.mp4: frames are \(48, 64, 3\), info.json says \(64, 48, 3\)"
    ):
        list(source.decode([0]))
