"""`stats --write` gives what stock LeRobot computes where that is exact, and stock reads it."""

import shutil
from pathlib import Path

import numpy as np
import PIL.Image
import pytest

from lerobot_jax import dataset as command
from lerobot_jax.data import video
from lerobot_jax.data.inspection.statistics_reading import read_column
from lerobot_jax.data.metadata import LeRobotDatasetMetadata
from lerobot_jax.data.statistics import QUANTILES, averaged_statistics
from tests.data.recordings import FEATURES, record
from tests.stock.conftest import lerobot_python, run_command

pytestmark = pytest.mark.lerobot

PEER = Path(__file__).with_name("statistics_peer.py")
NUMBERS = ("observation.state", "action", "next.reward", "next.done", "counter")
COUNTER = {"dtype": "int64", "shape": (2,), "names": None}


def test_written_statistics_are_those_of_stock_where_it_is_exact(tmp_path: Path):
    lengths = (12, 230, 7, 61)
    ours = record(tmp_path / "ours", lengths, FEATURES | {"counter": COUNTER}, encoding=video.H264).root
    command.main(["stats", str(ours), "--write"])
    theirs = shutil.copytree(ours, tmp_path / "theirs")
    meta = LeRobotDatasetMetadata.load("test/recorded", ours)
    save_frames(meta, tmp_path / "frames")
    run_command(lerobot_python(), PEER, theirs, tmp_path / "frames", tmp_path / "out.npz", folder=tmp_path)
    stock = np.load(tmp_path / "out.npz")
    for key, values in meta.stats.items():  # it reads what we wrote
        for name, value in values.items():
            np.testing.assert_array_equal(stock[f"stored/{key}/{name}"], value, err_msg=f"{key} {name}")
    episode = read_column(meta, "episode_index")
    for key in NUMBERS:
        values = read_column(meta, key)
        for name in ("min", "max", "count"):
            np.testing.assert_array_equal(meta.stats[key][name], stock[f"computed/{key}/{name}"], err_msg=key)
        rows = values.reshape(len(values), -1).astype(np.float64)
        np.testing.assert_allclose(meta.stats[key]["mean"], rows.mean(0), rtol=1e-14)
        np.testing.assert_allclose(meta.stats[key]["std"], rows.std(0), rtol=1e-13)
        # Stock sums hundreds of float32 rows one by one, and its variance is a difference of squares.
        epsilon = 16 * float(np.finfo(np.float32).eps)
        np.testing.assert_allclose(stock[f"computed/{key}/mean"], rows.mean(0), rtol=epsilon, err_msg=key)
        off = np.abs(stock[f"computed/{key}/std"] ** 2 - rows.var(0))
        assert (off <= epsilon * (rows**2).mean(0)).all(), key
        averaged = averaged_statistics(values, episode)
        for name, fraction in QUANTILES.items():
            np.testing.assert_allclose(meta.stats[key][name], np.quantile(rows, fraction, axis=0), rtol=1e-13)
            np.testing.assert_allclose(
                averaged[name], stock[f"computed/{key}/{name}"], rtol=1e-12, err_msg=key
            )
    for name, value in meta.stats["observation.images.top"].items():
        np.testing.assert_allclose(
            value, stock[f"camera/observation.images.top/{name}"], rtol=1e-12, atol=1e-14, err_msg=name
        )


def save_frames(meta: LeRobotDatasetMetadata, folder: Path) -> None:
    """Write the decoded frames as PNG files, in a folder for each episode."""
    frames = [
        frame for _, frame in video.decode_video(meta.root / meta.video_file(0, "observation.images.top"))
    ]
    assert len(frames) == meta.total_frames
    for episode in range(meta.total_episodes):
        place = folder / f"{episode:03d}"
        place.mkdir(parents=True)
        start = meta.episodes["dataset_from_index"][episode]
        for i in range(meta.episodes["length"][episode]):
            PIL.Image.fromarray(frames[start + i]).save(place / f"{i:05d}.png")
