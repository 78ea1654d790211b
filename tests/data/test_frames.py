import os
from pathlib import Path

import numpy as np
import pytest

from lerobot_jax.data import frames, video
from lerobot_jax.data.dataset import LeRobotDataset
from lerobot_jax.errors import InputError
from tests.data.recordings import record

IMAGE = "observation.images.top"


@pytest.fixture
def root(tmp_path: Path) -> Path:
    return record(tmp_path / "dataset").root


@pytest.fixture
def cache(tmp_path: Path, monkeypatch) -> Path:
    monkeypatch.setenv("LEROBOT_JAX_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache" / "frames"


def open_cached(root: Path) -> LeRobotDataset:
    return LeRobotDataset("test/recorded", root, frame_cache_gb=1)


def test_frames_are_decoded_once(root: Path, cache: Path, monkeypatch):
    plain = LeRobotDataset("test/recorded", root).read(np.arange(17))[IMAGE]
    first = open_cached(root)

    def decode_again(path):
        pytest.fail("decoded again")
        yield

    monkeypatch.setattr(video, "decode_video", decode_again)
    again = open_cached(root)
    for dataset in (first, again):
        np.testing.assert_array_equal(dataset.read(np.arange(17))[IMAGE], plain)
    assert len(list(cache.iterdir())) == 1


def test_a_changed_video_is_decoded_anew(root: Path, cache: Path):
    open_cached(root)
    os.utime(next(root.glob("videos/*/*/*.mp4")))
    open_cached(root)
    assert len(list(cache.iterdir())) == 2


def test_an_interrupted_build_is_never_used(root: Path, cache: Path, monkeypatch):
    original = video.decode_video

    def interrupted(path):
        for i, frame in enumerate(original(path)):
            if i == 5:
                raise KeyboardInterrupt
            yield frame

    monkeypatch.setattr(video, "decode_video", interrupted)
    with pytest.raises(KeyboardInterrupt):
        open_cached(root)
    assert list(cache.iterdir()) == []
    monkeypatch.undo()
    monkeypatch.setenv("LEROBOT_JAX_CACHE", str(cache.parent))
    plain = LeRobotDataset("test/recorded", root).read(np.arange(17))[IMAGE]
    np.testing.assert_array_equal(open_cached(root).read(np.arange(17))[IMAGE], plain)


def test_a_large_dataset_is_not_cached(root: Path, cache: Path):
    dataset = LeRobotDataset("test/recorded", root, frame_cache_gb=1e-5)
    assert dataset.read(np.arange(3))[IMAGE].shape == (3, 32, 48, 3)
    assert not cache.exists()


def test_a_full_disk_is_reported(root: Path, cache: Path, monkeypatch):
    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(frames, "_decode_to_folder", full)
    with pytest.raises(InputError, match=r"could not keep decoded frames of .*file-000.mp4.*No space left"):
        open_cached(root)
