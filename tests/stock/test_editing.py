"""Edited datasets: stock LeRobot reads them as their sources, and its own tools give the same."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest

from lerobot_jax.data import video
from lerobot_jax.data.editing import COUNTING, delete_episodes, merge_datasets, split_dataset
from lerobot_jax.data.metadata import LeRobotDatasetMetadata
from tests.data.recordings import FEATURES, record
from tests.stock import conftest

pytestmark = pytest.mark.lerobot

FEATURES_WITH_IMAGES = FEATURES | {
    "observation.images.side": {
        "dtype": "image",
        "shape": (16, 24, 3),
        "names": ["height", "width", "channels"],
    },
    "note": {"dtype": "string", "shape": (1,), "names": None},
}
VIDEO = "observation.images.top"
B_FRAMES = video.VideoEncoding(vcodec="h264", g=12, preset=None)


@pytest.fixture(scope="module")
def stock(tmp_path_factory: pytest.TempPathFactory) -> Iterator[conftest.Peer]:
    peer = conftest.Peer(tmp_path_factory.mktemp("stock"), Path(__file__).with_name("editing_peer.py"))
    yield peer
    peer.close()


def make(root: Path, lengths: tuple[int, ...], **settings: Any) -> LeRobotDatasetMetadata:
    return record(root, lengths, FEATURES_WITH_IMAGES, **settings).meta


def read(stock: conftest.Peer, root: Path, episodes: list[int] | None = None) -> dict[str, np.ndarray]:
    return stock("read_dataset", root=root, episodes=episodes, delta_timestamps=None)


def assert_items_equal(
    got: dict[str, np.ndarray], parts: list[dict[str, np.ndarray]], but: tuple[str, ...] = COUNTING
) -> None:
    """Compare a dataset's items with those of parts, one after another."""
    for key in got:
        if key in but or key.startswith("stats/"):
            continue
        np.testing.assert_array_equal(got[key], np.concatenate([part[key] for part in parts]), err_msg=key)
    np.testing.assert_array_equal(got["index"], np.arange(len(got["index"])))


def assert_statistics_close(got: dict[str, np.ndarray], theirs: dict[str, np.ndarray]) -> None:
    """Compare with LeRobot's statistics of a dataset, which LeRobot leaves as they were where it renumbers."""
    names = {name for name in theirs if name.startswith("stats/")}
    assert {name for name in got if name.startswith("stats/")} == names
    for name in names:
        if name.split("/")[1] not in COUNTING:
            np.testing.assert_allclose(got[name], theirs[name], rtol=1e-12, err_msg=name)


@pytest.mark.parametrize("encoding", [video.VideoEncoding(), B_FRAMES], ids=["av1", "h264"])
def test_edited_datasets_are_those_of_lerobot(stock: conftest.Peer, tmp_path: Path, encoding):
    """LeRobot encodes anew where a part of a file is left out, which changes its pixels, but not ours."""
    a = make(tmp_path / "a", (5, 8, 4, 7), encoding=encoding)
    b = make(tmp_path / "b", (6, 3), encoding=encoding)
    sources = {meta.root: read(stock, meta.root) for meta in (a, b)}

    ours = merge_datasets([a, b], tmp_path / "ours")
    stock("merge", roots=[a.root, b.root], output=tmp_path / "theirs")
    got, theirs = read(stock, ours.root), read(stock, tmp_path / "theirs")
    assert_items_equal(got, list(sources.values()))
    assert_items_equal(got, [theirs], but=())
    assert_statistics_close(got, theirs)
    stock_info = LeRobotDatasetMetadata.load("test/theirs", tmp_path / "theirs").info
    assert ours.info == stock_info
    rows, stock_rows = (pq.read_table(tmp_path / n / "meta/episodes").to_pylist() for n in ("ours", "theirs"))
    for row, wanted in zip(rows, stock_rows, strict=True):
        for name, value in wanted.items():
            # There, old statistics of what counts are shifted; here they are computed again.
            if name.startswith(("stats/index/", "stats/episode_index/", "stats/task_index/")):
                assert np.allclose(row[name], value, atol=1e-9), name
            elif name.endswith("_timestamp"):
                assert row[name] == pytest.approx(value, abs=1e-12), name
            else:
                assert row[name] == value, name

    kept = [0, 2, 3]
    ours = delete_episodes(a, [1], tmp_path / "ours-less")
    stock("delete", root=a.root, episodes=[1], output=tmp_path / "theirs-less")
    got, theirs = read(stock, ours.root), read(stock, tmp_path / "theirs-less")
    assert_items_equal(got, [read(stock, a.root, [e]) for e in kept])
    assert_items_equal(got, [theirs], but=("task_index", VIDEO))
    assert_statistics_close(got, theirs)

    splits = {"train": 0.75, "val": 0.25}
    written = split_dataset(a, splits, tmp_path / "ours-split")
    stock("split", root=a.root, splits=splits, output=tmp_path / "theirs-split")
    for name, episodes in (("train", [0, 1, 2]), ("val", [3])):
        got, theirs = read(stock, written[name].root), read(stock, tmp_path / "theirs-split" / name)
        assert_items_equal(got, [read(stock, a.root, [e]) for e in episodes])
        assert_items_equal(got, [theirs], but=("task_index", VIDEO))
        assert_statistics_close(got, theirs)


def test_what_lerobot_edited_can_be_edited(stock: conftest.Peer, tmp_path: Path):
    """There, episodes that were encoded anew in one go need not begin at keyframes."""
    source = make(tmp_path / "source", (5, 8, 3, 7, 9), encoding=B_FRAMES)
    stock("delete", root=source.root, episodes=[1], output=tmp_path / "stock")
    edited = LeRobotDatasetMetadata.load("test/stock", tmp_path / "stock")
    ours = delete_episodes(edited, [0, 2], tmp_path / "ours")
    got = read(stock, ours.root)
    assert_items_equal(got, [read(stock, edited.root, [e]) for e in (1, 3)])
    stock("delete", root=ours.root, episodes=[1], output=tmp_path / "stock-again")
    assert_items_equal(
        read(stock, tmp_path / "stock-again"), [read(stock, ours.root, [0])], but=(*COUNTING, VIDEO)
    )
