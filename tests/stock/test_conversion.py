"""A v2.1 dataset, converted here and by LeRobot's own converter: everything is equal, times to 0.1 ms."""

import json
import shutil
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest

from lerobot_jax.data import video
from lerobot_jax.data.conversion import convert_to_v30
from lerobot_jax.data.dataset import LeRobotDataset
from lerobot_jax.data.metadata import LeRobotDatasetMetadata
from tests.data.recordings import FEATURES
from tests.data.v21 import VARIED, record_v21
from tests.stock import conftest

pytestmark = pytest.mark.lerobot

IMAGES = {"observation.images.top": FEATURES["observation.images.top"] | {"dtype": "image"}}
# name: (features, lengths, video encoding, files' sizes in MB, folders' sizes in episodes)
CASES = {
    "several files": (VARIED, (5, 8, 4, 9, 3, 7), video.VideoEncoding(), (0.015, 0.002), 4),
    "one file, H.264": (FEATURES, (12, 7, 15), video.H264, (100, 200), 1000),
    "images only": (FEATURES | IMAGES, (5, 8), video.H264, (100, 200), 1000),
}


@pytest.fixture(scope="module")
def stock(tmp_path_factory: pytest.TempPathFactory) -> Iterator[conftest.Peer]:
    peer = conftest.Peer(tmp_path_factory.mktemp("stock"), Path(__file__).with_name("conversion_peer.py"))
    yield peer
    peer.close()


@pytest.mark.parametrize("case", CASES)
def test_converted_datasets_are_equal(stock: conftest.Peer, tmp_path: Path, case: str):
    features, lengths, encoding, sizes, chunks_size = CASES[case]
    old = record_v21(tmp_path / "old", lengths, features, chunks_size, encoding=encoding)
    ours, theirs = tmp_path / "ours", tmp_path / "theirs"
    convert_to_v30(LeRobotDatasetMetadata.load("test/recorded", old), ours, *sizes)
    shutil.copytree(old, theirs)
    stock("convert", root=theirs, data_files_size_in_mb=sizes[0], video_files_size_in_mb=sizes[1])
    assert_same_files(ours, theirs)
    for place in ("data/*/*", "videos/*/*/*"):
        assert (len(list(ours.glob(place))) > 1) == (case == "several files")
    arguments = {"episodes": None, "delta_timestamps": None}
    read = [stock("read_dataset", root=root, **arguments) for root in (ours, theirs)]
    assert set(read[0]) == set(read[1])
    for key, values in read[1].items():
        np.testing.assert_array_equal(read[0][key], values, err_msg=key)
    before = LeRobotDataset("test/recorded", old).read(np.arange(sum(lengths)))
    for key, values in before.items():
        np.testing.assert_array_equal(values, read[1][key], err_msg=key)


def assert_same_files(ours: Path, theirs: Path) -> None:
    """Compare what the files hold, and for videos which there are."""
    names = [
        sorted(str(p.relative_to(root)) for p in root.rglob("*") if p.is_file()) for root in (ours, theirs)
    ]
    assert names[0] == names[1]
    for name in names[0]:
        if name.endswith(".json"):
            ours_json, theirs_json = (json.loads((root / name).read_text()) for root in (ours, theirs))
            assert ours_json == theirs_json, name
        elif name.endswith(".parquet"):
            tables = [pq.read_table(root / name).to_pydict() for root in (ours, theirs)]
            assert set(tables[0]) == set(tables[1])
            for column, values in tables[1].items():
                if column.startswith("videos/") and column.endswith("_timestamp"):
                    np.testing.assert_allclose(tables[0][column], values, rtol=0, atol=1e-4, err_msg=column)
                else:
                    assert tables[0][column] == values, (name, column)
