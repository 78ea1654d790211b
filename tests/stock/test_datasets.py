"""What one framework records, the other reads."""

from pathlib import Path

import numpy as np
import pytest

from lerobot_jax.data import video
from lerobot_jax.data.dataset import LeRobotDataset
from tests.stock.conftest import Peer

pytestmark = pytest.mark.lerobot

FEATURES = {
    "observation.images.top": {
        "dtype": "video",
        "shape": (32, 48, 3),
        "names": ["height", "width", "channels"],
    },
    "observation.images.side": {
        "dtype": "image",
        "shape": (24, 24, 3),
        "names": ["height", "width", "channels"],
    },
    "observation.state": {"dtype": "float32", "shape": (3,), "names": ["a", "b", "c"]},
    "action": {"dtype": "float32", "shape": (2,), "names": None},
    "next.reward": {"dtype": "float32", "shape": (1,), "names": None},
    "next.done": {"dtype": "bool", "shape": (1,), "names": None},
}
DELTAS = {
    "action": [0.0, 0.1, 0.2, 0.3],
    "observation.images.top": [-0.1, 0.0],
    "observation.state": [-0.2, 0.0],
}


def make_frames(path: Path) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(3)
    lengths = [12, 7, 15]
    n = sum(lengths)
    smooth = rng.integers(0, 255, (n, 4, 6, 3)).repeat(8, 1).repeat(8, 2).astype(np.uint8)
    frames = {
        "observation.images.top": smooth,
        "observation.images.side": rng.integers(0, 255, (n, 24, 24, 3)).astype(np.uint8),
        "observation.state": rng.normal(50, 20, (n, 3)).astype(np.float32),
        "action": rng.normal(0, 1, (n, 2)).astype(np.float32),
        "next.reward": rng.uniform(0, 1, (n, 1)).astype(np.float32),
        "next.done": np.isin(np.arange(n), np.cumsum(lengths) - 1)[:, None],
        "episode_ends": np.cumsum(lengths),
        "tasks": np.array(["push", "pull", "push"]),
    }
    np.savez(path, **frames)
    return frames


def write_ours(root: Path, frames: dict[str, np.ndarray], encoding: video.VideoEncoding) -> None:
    writer = LeRobotDataset.create("test/ours", 10, FEATURES, root=root, encoding=encoding)
    start = 0
    for end, task in zip(frames["episode_ends"], frames["tasks"], strict=True):
        for t in range(start, end):
            writer.add_frame({"task": str(task)} | {key: frames[key][t] for key in FEATURES})
        writer.save_episode()
        start = end
    writer.finalize()


def assert_equal_to_stock(dataset: LeRobotDataset, recorded: dict[str, np.ndarray]) -> None:
    batch = dataset.read(np.arange(len(dataset)))
    assert set(batch) == {key for key in recorded if not key.startswith("stats/")}
    for key, value in batch.items():
        np.testing.assert_array_equal(np.asarray(value), recorded[key], err_msg=key)
    for key, stats in dataset.meta.stats.items():
        for name, value in stats.items():
            np.testing.assert_array_equal(value, recorded[f"stats/{key}/{name}"], err_msg=f"{key} {name}")


@pytest.mark.parametrize("vcodec", ["libsvtav1", "h264"])
def test_datasets_both_ways(stock: Peer, tmp_path: Path, vcodec: str):
    """Frames, indices, timestamps, tasks, padding and statistics are equal, whoever writes and whoever reads."""
    frames = make_frames(tmp_path / "frames.npz")
    encoding = video.VideoEncoding() if vcodec == "libsvtav1" else video.H264
    write_ours(tmp_path / "ours", frames, encoding)
    frames_path, root = tmp_path / "frames.npz", tmp_path / "stock"
    stock("write_dataset", frames=frames_path, features=FEATURES, root=root, vcodec=vcodec)
    for root in (tmp_path / "ours", tmp_path / "stock"):
        for episodes in (None, [2, 0]):
            read = stock("read_dataset", root=root, episodes=episodes, delta_timestamps=DELTAS)
            assert_equal_to_stock(LeRobotDataset("test/ours", root, episodes, DELTAS), read)
    ours, theirs = (LeRobotDataset("test/ours", tmp_path / name).meta for name in ("ours", "stock"))
    for key, stats in theirs.stats.items():
        for name, value in stats.items():
            np.testing.assert_array_equal(ours.stats[key][name], value, err_msg=f"{key} {name}")
    info = [{k: v for k, v in meta.info.items() if k != "features"} for meta in (ours, theirs)]
    assert info[0] == info[1]
    assert ours.features == theirs.features
