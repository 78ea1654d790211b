import itertools
from pathlib import Path

import jax
import numpy as np
import pytest

from lerobot_jax import sharding
from lerobot_jax.data import loader
from lerobot_jax.data.dataset import LeRobotDataset
from tests.data.recordings import record

KEYS = ["index", "action", "action_is_pad", "observation.images.top"]


@pytest.fixture(scope="module")
def dataset(tmp_path_factory) -> LeRobotDataset:
    root: Path = record(tmp_path_factory.mktemp("data") / "dataset").root
    return LeRobotDataset("test/recorded", root, delta_timestamps={"action": [0.0, 0.1]}, frame_cache_gb=1)


def batches(dataset: LeRobotDataset, num: int, **changes) -> list[dict]:
    settings = {"seed": 3, "first_step": 0, "num_workers": 2, "prefetch_factor": 2} | changes
    rows = np.arange(3, 15)
    iterator = loader.training_batches(dataset, rows, KEYS, batch_size=5, **settings)
    return list(itertools.islice(iterator, num))


def indices(found: list[dict]) -> list[list[int]]:
    return [batch["index"].tolist() for batch in found]


def test_a_batch_depends_on_seed_and_step_only(dataset: LeRobotDataset):
    expected = batches(dataset, 8)
    for start, workers, ahead in ((0, 1, 1), (3, 4, 1), (5, 2, 7)):
        found = batches(dataset, 8 - start, first_step=start, num_workers=workers, prefetch_factor=ahead)
        for a, b in zip(expected[start:], found, strict=True):
            for key in KEYS:
                np.testing.assert_array_equal(a[key], b[key])
    assert indices(batches(dataset, 8, seed=4)) != indices(expected)


def test_every_epoch_is_another_permutation(dataset: LeRobotDataset):
    order = list(itertools.chain(*indices(batches(dataset, 12))))  # 60 samples, 5 epochs of 12
    epochs = [order[i : i + 12] for i in range(0, 60, 12)]
    assert all(sorted(epoch) == list(range(3, 15)) for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs}) == 5


def test_validation_batches_cover_the_rows_once(dataset: LeRobotDataset):
    found = list(loader.validation_batches(dataset, np.arange(2, 9), KEYS, batch_size=3))
    assert indices(found) == [[2, 3, 4], [5, 6, 7], [8]]


def test_batches_are_split_over_the_devices(dataset: LeRobotDataset):
    mesh = sharding.make_mesh()
    assert mesh.size == 8
    source = iter([{"x": np.arange(16).reshape(16, 1)} for _ in range(3)])
    placed = list(loader.prefetch_to_device(source, sharding.batch_sharding(mesh, 16)))
    assert len(placed) == 3
    assert placed[0]["x"].addressable_shards[0].data.shape == (2, 1)
    np.testing.assert_array_equal(jax.device_get(placed[2]["x"]), np.arange(16).reshape(16, 1))
    with pytest.raises(ValueError, match="batch_size=12 must be a multiple of the 8 devices"):
        sharding.batch_sharding(mesh, 12)
