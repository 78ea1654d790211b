import json
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest

from lerobot_jax.data import metadata, statistics
from lerobot_jax.data.dataset import LeRobotDataset
from lerobot_jax.errors import InputError
from tests.data.recordings import FEATURES, record


def frame(**changes) -> dict:
    return {
        "observation.images.top": np.zeros((32, 48, 3), np.uint8),
        "observation.state": np.zeros(3, np.float32),
        "action": np.zeros(2, np.float32),
        "next.reward": np.zeros(1, np.float32),
        "next.done": np.zeros(1, bool),
        "task": "t",
    } | changes


@pytest.fixture
def writer(tmp_path: Path):
    return LeRobotDataset.create("test/new", fps=10, features=FEATURES, root=tmp_path / "new")


def test_files_have_lerobots_layout(tmp_path: Path):
    root = record(tmp_path / "dataset").root
    files = sorted(str(path.relative_to(root)) for path in root.rglob("*") if path.is_file())
    assert files == [
        "data/chunk-000/file-000.parquet",
        "meta/episodes/chunk-000/file-000.parquet",
        "meta/info.json",
        "meta/stats.json",
        "meta/tasks.parquet",
        "videos/observation.images.top/chunk-000/file-000.mp4",
    ]
    table = pq.ParquetFile(root / files[0])
    assert table.num_row_groups == 3  # one an episode
    assert str(table.schema_arrow.field("action").type).startswith("fixed_size_list")
    info = json.loads((root / "meta/info.json").read_text())
    assert info["splits"] == {"train": "0:3"}
    assert info["features"]["observation.images.top"]["info"]["video.codec"] == "av1"
    assert metadata.load_tasks(root) == ["task 0", "task 1"]


def test_frames_are_checked(writer):
    faults = {
        r"missing \['action'\]": {k: v for k, v in frame().items() if k != "action"},
        r"unknown \['acton'\]": frame(acton=0),
        r"missing \['task'\]": {k: v for k, v in frame().items() if k != "task"},
        r"'action' must be float32 of shape \(2,\), not float64": frame(action=np.zeros(2)),
        r"'action' must be float32 of shape \(2,\), not float32 of shape \(3,\)": frame(
            action=np.zeros(3, np.float32)
        ),
        "'action' must be a numpy array, not list": frame(action=[0, 0]),
        r"'observation.images.top' must have shape": frame(
            **{"observation.images.top": np.zeros((8, 8, 3), np.uint8)}
        ),
        "must lie in 0..1": frame(**{"observation.images.top": np.full((32, 48, 3), 2.0)}),
    }
    for message, bad in faults.items():
        with pytest.raises(InputError, match=message):
            writer.add_frame(bad)
    with pytest.raises(InputError, match="add at least one frame"):
        writer.save_episode()


def test_nan_is_reported_with_its_place(writer):
    writer.add_frame(frame())
    writer.add_frame(frame(action=np.array([0, np.nan], np.float32)))
    with pytest.raises(InputError, match="'action' is NaN or infinite in frame 1 of episode 0"):
        writer.save_episode()


def test_a_dropped_episode_leaves_no_trace(writer):
    writer.add_frame(frame(**{"observation.state": np.ones(3, np.float32)}))
    writer.clear_episode_buffer()
    writer.add_frame(frame(task="kept"))
    writer.save_episode()
    writer.finalize()
    dataset = LeRobotDataset("test/new", writer.root)
    assert (len(dataset), dataset[0]["task"]) == (1, "kept")
    assert dataset.meta.stats["observation.state"]["max"].max() == 0


def test_episodes_of_one_frame_are_as_good_as_others(writer):
    """Their statistics are computed in the data's own types, others' in float."""
    lengths = [1] * 10 + [2]
    for length in lengths:
        for _ in range(length):
            writer.add_frame(frame())
        writer.save_episode()
    writer.finalize()
    dataset = LeRobotDataset("test/new", writer.root)
    assert dataset.meta.episodes["length"].tolist() == lengths
    rows = pq.read_table(writer.root / "meta/episodes").to_pylist()
    assert [row["stats/next.done/max"] for row in rows] == [[0.0]] * 11


def test_no_recording_is_left_beside_the_videos(writer):
    for _ in range(2):
        writer.add_frame(frame())
        writer.save_episode()
    writer.add_frame(frame())
    writer.finalize()
    names = [path.name for path in (writer.root / "videos").rglob("*") if path.is_file()]
    assert names == ["file-000.mp4"]
    assert not list(writer.root.rglob("recording"))


def test_existing_folders_and_bad_features_are_refused(writer, tmp_path: Path):
    with pytest.raises(InputError, match="already exists"):
        LeRobotDataset.create("test/new", fps=10, features=FEATURES, root=writer.root)
    for feature, message in (
        ({"dtype": "float32"}, "needs 'dtype' and 'shape'"),
        ({"dtype": "video", "shape": (3,)}, "images"),
    ):
        with pytest.raises(InputError, match=message):
            LeRobotDataset.create("test/bad", fps=10, features={"x": feature}, root=tmp_path / "bad")


def test_channel_first_and_float_images_are_taken(writer):
    image = np.random.default_rng(0).integers(0, 255, (32, 48, 3)).astype(np.uint8)
    writer.add_frame(frame(**{"observation.images.top": image}))
    writer.add_frame(frame(**{"observation.images.top": np.moveaxis(image, -1, 0)}))
    writer.add_frame(frame(**{"observation.images.top": image / 255}))
    writer.save_episode()
    writer.finalize()
    shown = LeRobotDataset("test/new", writer.root).read(np.arange(3))["observation.images.top"].astype(int)
    assert np.abs(shown[1] - shown[0]).mean() < 8
    assert np.abs(shown[2] - shown[0]).mean() < 8


def test_statistics_of_vectors_and_images():
    rng = np.random.default_rng(0)
    values = rng.normal(5, 2, (20_000, 3)).astype(np.float32)
    stats = statistics.vector_statistics(values)
    np.testing.assert_allclose(stats["mean"], values.mean(0), rtol=1e-5)
    np.testing.assert_allclose(stats["std"], values.std(0), rtol=1e-4)
    np.testing.assert_array_equal(stats["min"], values.min(0))
    np.testing.assert_array_equal(stats["count"], [20_000])
    for name, fraction in statistics.QUANTILES.items():
        np.testing.assert_allclose(stats[name], np.quantile(values, fraction, axis=0), atol=0.01)
    images = rng.integers(0, 256, (5, 8, 6, 3)).astype(np.uint8)
    stats = statistics.image_statistics(images)
    assert stats["mean"].shape == (3, 1, 1)
    np.testing.assert_allclose(stats["mean"].ravel(), images.mean((0, 1, 2)) / 255, rtol=1e-5)


def test_combined_statistics_are_those_of_the_whole():
    rng = np.random.default_rng(0)
    parts = [rng.normal(i, 1 + i, (n, 2)) for i, n in enumerate((30, 70, 11))]
    combined = statistics.combine_statistics([{"x": statistics.vector_statistics(part)} for part in parts])[
        "x"
    ]
    whole = np.concatenate(parts)
    np.testing.assert_allclose(combined["mean"], whole.mean(0))
    np.testing.assert_allclose(combined["std"], whole.std(0))
    np.testing.assert_array_equal(combined["max"], whole.max(0))
    np.testing.assert_array_equal(combined["count"], [111])


def test_sampled_frames():
    """LeRobot's table: all of few frames, then n ** 0.75."""
    assert [len(statistics.sampled_frames(n)) for n in (1, 50, 500, 1000, 2000)] == [1, 50, 105, 177, 299]
    assert statistics.shrink_for_statistics(np.zeros((480, 640, 3))).shape == (120, 160, 3)
    assert statistics.shrink_for_statistics(np.zeros((96, 96, 3))).shape == (96, 96, 3)
