from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from lerobot_jax.data import statistics
from lerobot_jax.data.inspection import statistics_reading
from lerobot_jax.data.metadata import LeRobotDatasetMetadata
from lerobot_jax.data.video import H264
from lerobot_jax.errors import InputError
from tests.data.recordings import FEATURES, record

SIDE = {"dtype": "image", "shape": (24, 32, 3), "names": ["height", "width", "channels"]}
MATRIX = {"dtype": "float64", "shape": (2, 3), "names": None}


def test_exact_statistics_are_numpys():
    values = np.random.default_rng(0).gamma(2, 50, (5000, 3)).astype(np.float32)
    exact = statistics.exact_statistics(values)
    wide = values.astype(np.float64)
    np.testing.assert_array_equal(exact["min"], wide.min(0))
    np.testing.assert_array_equal(exact["max"], wide.max(0))
    np.testing.assert_allclose(exact["mean"], wide.mean(0), rtol=1e-14)
    np.testing.assert_allclose(exact["std"], wide.std(0), rtol=1e-13)
    for name, fraction in statistics.QUANTILES.items():
        np.testing.assert_allclose(exact[name], np.quantile(wide, fraction, axis=0), rtol=1e-14)
    np.testing.assert_array_equal(exact["count"], [5000])


def test_exact_statistics_keep_lerobots_shapes():
    """The last axis stays, and a count is that of frames."""
    for shape in ((7,), (7, 4), (7, 2, 3)):
        values = np.arange(np.prod(shape)).reshape(shape)
        exact, usual = statistics.exact_statistics(values), statistics.vector_statistics(values)
        assert {name: v.shape for name, v in exact.items()} == {name: v.shape for name, v in usual.items()}
        for name in ("min", "max", "mean", "count"):
            np.testing.assert_allclose(exact[name], usual[name])
    assert statistics.exact_statistics(np.array([True, False]))["mean"] == [0.5]


def test_what_lerobot_stores_is_explained_and_nothing_else():
    """Its float32 moments far from zero and its averaged quantiles are; a shift by a hundredth is not."""
    rng = np.random.default_rng(0)
    values = (1000 + rng.normal(0, 1, (3000, 2)) * [0.5, 30] + np.arange(3000)[:, None] / 10).astype(
        np.float32
    )
    episode = np.repeat([0, 1, 2], [500, 1500, 1000])
    exact, averaged = statistics.exact_statistics(values), statistics.averaged_statistics(values, episode)
    assert (
        np.abs(averaged["q01"] - exact["q01"]) > 10
    ).all()  # the average of episodes' quantiles is another thing
    for name, stored in averaged.items():
        assert statistics.explained(name, stored, exact, averaged).all(), name
        assert statistics.explained(name, exact[name], exact, averaged).all(), name
        shifted = stored + np.maximum(1, 0.01 * (exact["max"] - exact["min"])[: len(stored)])
        assert not statistics.explained(name, shifted, exact, averaged).any(), name


def test_recorded_statistics_are_explained(tmp_path: Path):
    meta = record(tmp_path / "dataset", (5, 80, 4), FEATURES | {"matrix": MATRIX}, encoding=H264).meta
    episode = statistics_reading.read_column(meta, "episode_index")
    for key in ("observation.state", "action", "next.reward", "next.done", "matrix", "timestamp", "index"):
        values = statistics_reading.read_column(meta, key)
        exact, averaged = statistics.exact_statistics(values), statistics.averaged_statistics(values, episode)
        for name, stored in meta.stats[key].items():
            assert statistics.explained(name, stored, exact, averaged).all(), (key, name)


def test_columns_are_read_over_files_in_their_own_type(tmp_path: Path):
    dataset = record(
        tmp_path / "dataset", (5, 8, 4), FEATURES | {"matrix": MATRIX}, encoding=H264, data_files_size_in_mb=0
    )
    matrix = statistics_reading.read_column(dataset.meta, "matrix")
    assert (matrix.shape, matrix.dtype) == ((17, 2, 3), np.float64)
    np.testing.assert_array_equal(statistics_reading.read_column(dataset.meta, "index"), np.arange(17))
    action = statistics_reading.read_column(dataset.meta, "action")
    np.testing.assert_array_equal(action, dataset.columns["action"])


def test_unusable_columns_are_named(tmp_path: Path):
    meta = record(tmp_path / "dataset", (5,), encoding=H264).meta
    path = meta.root / meta.data_file(0)
    table = pq.read_table(path)
    reward = table["next.reward"].to_numpy().copy()
    reward[2] = np.nan
    pq.write_table(
        table.set_column(table.column_names.index("next.reward"), "next.reward", pa.array(reward)), path
    )
    with pytest.raises(InputError, match=r"file-000.parquet: 'next.reward' is NaN or infinite in row 2"):
        statistics_reading.read_column(meta, "next.reward")
    pq.write_table(table.drop_columns(["action"]), path)
    with pytest.raises(InputError, match=r"lacks the columns \['action'\]"):
        statistics_reading.read_column(meta, "action")


def test_camera_statistics_are_those_of_the_recording(tmp_path: Path):
    """Equal for images in tables; near for a video, whose frames lost a little."""
    features = {"observation.images.side": SIDE, **FEATURES}
    meta = record(tmp_path / "dataset", (5, 130, 4), features, encoding=H264, video_files_size_in_mb=0).meta
    done: list[int] = []
    computed = statistics_reading.camera_statistics(meta, "observation.images.side", done.append)
    for name, stored in meta.stats["observation.images.side"].items():
        np.testing.assert_allclose(computed[name], stored, rtol=1e-14, err_msg=name)
    assert sum(done) == 3
    computed = statistics_reading.camera_statistics(meta, "observation.images.top", done.append)
    stored = meta.stats["observation.images.top"]
    np.testing.assert_array_equal(computed["count"], stored["count"])
    np.testing.assert_allclose(computed["mean"], stored["mean"], atol=0.02)
    np.testing.assert_allclose(computed["std"], stored["std"], atol=0.02)


def test_a_video_that_is_too_short_is_named(tmp_path: Path):
    dataset = record(tmp_path / "dataset", (5, 8), encoding=H264)
    meta = LeRobotDatasetMetadata.load("test/recorded", dataset.root)
    meta.episodes["length"] = np.array([5, 12])
    with pytest.raises(InputError, match=r"file-000.mp4: no frame at 1.300 s, which episode 1 needs"):
        statistics_reading.camera_statistics(meta, "observation.images.top", lambda n: None)
