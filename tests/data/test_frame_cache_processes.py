"""Several processes that use one cache of frames."""

import subprocess
import sys
import threading
from pathlib import Path

import numpy as np
import pytest

from lerobot_jax.data import cache_folder, video
from lerobot_jax.data.frame_cache import cached_frames
from tests.data.cameras import film, video_camera

FRAME_BYTES = 32 * 48 * 3
ENTRY_GB = 40 * (FRAME_BYTES + 8) / 1e9


@pytest.fixture
def cache(tmp_path: Path) -> Path:
    return tmp_path / "cache"


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return film(tmp_path / "a.mp4", seed=1)


def whole(path: Path) -> np.ndarray:
    return np.stack([frame for _, frame in video.decode_video(path)])


BUILDER = """
import sys, threading, time
from pathlib import Path
import numpy as np
from absl import logging
from lerobot_jax.data import frame_cache, frame_entry
from tests.data.cameras import video_camera
_, path, cache, holds = sys.argv
logging.set_verbosity(logging.INFO)
frame_entry.SEGMENT_BYTES = 8 * 32 * 48 * 3
told_to_go_on, decoded = threading.Event(), []
def decode(self, segment, original=frame_cache._Builder.decode):
    if holds == "True" and segment > 1:
        told_to_go_on.wait()
    return original(self, segment)
def keep(self, segments, original=frame_cache._Builder.keep):
    decoded.extend(segments)
    kept = original(self, segments)
    print("kept", flush=True)
    return kept
frame_cache._Builder.decode, frame_cache._Builder.keep = decode, keep
threading.Thread(target=lambda: sys.stdin.readline() and told_to_go_on.set(), daemon=True).start()
camera = video_camera(Path(path))
fits = frame_cache.cached_frames([camera], Path(cache), 1.0)
print("ready", fits, len(decoded), int(camera.read(np.arange(40)).astype(int).sum()), flush=True)
time.sleep(600)
"""


class Process:
    """Another process that caches a video: prints a line when some of it is kept and when it is ready.

    With `holds`, it decodes no more than two of the five segments until `go_on`.
    """

    def __init__(self, path: Path, cache: Path, *, holds: bool = False):
        arguments = [sys.executable, "-c", BUILDER, str(path), str(cache), str(holds)]
        self.process = subprocess.Popen(
            arguments, text=True, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE
        )
        self._limit = threading.Timer(120, self.process.kill)  # whoever waits for a line then fails
        self._limit.start()

    def line(self, start: str, stream: str = "stdout") -> str:
        """Read on to a line that has `start` in it."""
        seen = []
        for line in getattr(self.process, stream):
            seen.append(line)
            if start in line:
                return line
        pytest.fail(f"ended without '{start}': {seen} {self.process.communicate()}")

    def go_on(self) -> None:
        assert self.process.stdin is not None
        self.process.stdin.write("\n")
        self.process.stdin.flush()

    def __enter__(self) -> "Process":
        return self

    def __exit__(self, *_: object) -> None:
        self._limit.cancel()
        self.process.kill()
        self.process.communicate()


def test_two_processes_share_the_work_of_one(path: Path, cache: Path):
    with Process(path, cache, holds=True) as first:
        first.line("kept")
        with Process(path, cache) as second:
            waiting = second.line("waiting for process", "stderr")
            assert f"{first.process.pid}, which decodes {path}" in waiting
            first.go_on()
            total = int(whole(path).astype(int).sum())
            assert first.line("ready") == f"ready True 5 {total}\n"
            assert second.line("ready") == f"ready True 0 {total}\n"


def test_a_killed_builder_leaves_its_work_to_who_waits(path: Path, cache: Path):
    with Process(path, cache, holds=True) as first:
        first.line("kept")
        with Process(path, cache) as second:
            second.line("waiting for process", "stderr")
            done = next(cache.glob("entries/*.partial/done")).read_bytes().count(1)
            assert 1 <= done <= 2
            first.process.kill()
            total = int(whole(path).astype(int).sum())
            assert second.line("ready") == f"ready True {5 - done} {total}\n"
    (entry,) = cache_folder.list_entries(cache)
    assert (entry.is_whole, entry.in_use) == (True, False)


def test_what_another_process_uses_is_not_removed(path: Path, cache: Path, tmp_path: Path):
    others = [film(tmp_path / f"{i}.mp4", seed=i) for i in (2, 3)]
    with Process(path, cache) as user:
        user.line("ready")
        assert [entry.in_use for entry in cache_folder.list_entries(cache)] == [True]
        assert not cached_frames([video_camera(others[0])], cache, 1.5 * ENTRY_GB)
        for other in others:
            assert cached_frames([video_camera(other)], cache, 2.5 * ENTRY_GB)
        found = {entry.source: entry.in_use for entry in cache_folder.list_entries(cache)}
        assert found == {str(path): True, str(others[1]): False}
        assert [entry.source for entry in cache_folder.remove_entries(cache)] == [str(others[1])]
    assert cached_frames([video_camera(others[0])], cache, 1.5 * ENTRY_GB)
    assert [entry.source for entry in cache_folder.list_entries(cache)] == [str(others[0])]
