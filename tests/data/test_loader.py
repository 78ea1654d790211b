import functools
import itertools
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest

from lerobot_jax import sharding
from lerobot_jax.data import loader
from lerobot_jax.data.dataset import LeRobotDataset
from lerobot_jax.data.samples import DeviceRows, Samples, SeedSamples, ShuffledRows, device_bytes
from tests.data.recordings import record

KEYS = ["index", "action", "action_is_pad", "observation.images.top"]
ROWS = np.arange(3, 15)


@pytest.fixture(scope="module")
def dataset(tmp_path_factory) -> LeRobotDataset:
    root: Path = record(tmp_path_factory.mktemp("data") / "dataset").root
    return LeRobotDataset("test/recorded", root, delta_timestamps={"action": [-0.1, 0.0, 0.1]})


def batches(samples: Samples, num: int, **changes) -> list[dict]:
    settings: dict[str, Any] = {"first_step": 0, "num_workers": 2, "prefetch_factor": 2} | changes
    return list(itertools.islice(loader.training_batches(samples, 5, **settings), num))


def indices(found: list[dict]) -> list[list[int]]:
    return [batch["index"].tolist() for batch in found]


def test_a_batch_depends_on_seed_and_step_only(dataset: LeRobotDataset):
    samples = ShuffledRows(dataset, ROWS, KEYS, seed=3)
    expected = batches(samples, 8)
    for start, workers, ahead in ((0, 1, 1), (3, 4, 1), (5, 2, 7)):
        found = batches(samples, 8 - start, first_step=start, num_workers=workers, prefetch_factor=ahead)
        for a, b in zip(expected[start:], found, strict=True):
            for key in KEYS:
                np.testing.assert_array_equal(a[key], b[key])
    for other in ({"seed": 4}, {"seed": 3, "stream": 1}):
        assert indices(batches(ShuffledRows(dataset, ROWS, KEYS, **other), 8)) != indices(expected)


def test_the_order_stays_the_same_in_every_version(dataset: LeRobotDataset):
    """Checkpoints are continued after updates of numpy and of this package."""
    found = batches(ShuffledRows(dataset, ROWS, KEYS, seed=3), 3)
    assert indices(found) == [[9, 4, 14, 11, 8], [5, 10, 13, 12, 7], [6, 3, 12, 10, 11]]


def test_every_epoch_is_another_permutation(dataset: LeRobotDataset):
    found = batches(ShuffledRows(dataset, ROWS, KEYS, seed=3), 12)
    order = list(itertools.chain(*indices(found)))  # 60 samples, 5 epochs of 12
    epochs = [order[i : i + 12] for i in range(0, 60, 12)]
    assert all(sorted(epoch) == list(range(3, 15)) for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs}) == 5


def test_devices_give_the_same_batches_as_the_host(dataset: LeRobotDataset):
    mesh = sharding.make_mesh()
    split = sharding.batch_sharding(mesh, 8)
    assert device_bytes(dataset) > 17 * 32 * 48 * 3
    on_device = DeviceRows(dataset, ROWS, KEYS, 3, sharding.replicated(mesh), split)
    on_host = ShuffledRows(dataset, ROWS, KEYS, 3)
    for start in (0, 8, 1000):
        a, b = on_host.read(start + np.arange(8)), on_device.read(start + np.arange(8))
        assert set(a) == set(b) == set(KEYS)
        for key in KEYS:
            assert b[key].sharding.is_equivalent_to(split, b[key].ndim)
            np.testing.assert_array_equal(a[key], b[key])


def test_batches_of_several_seeds_are_those_of_each(dataset: LeRobotDataset):
    mesh, seeds, positions = sharding.make_mesh(), [3, 4, 5], 8 + np.arange(8)
    split = sharding.batch_sharding(mesh, 8, axis=1)
    alone = [ShuffledRows(dataset, ROWS, KEYS, seed) for seed in seeds]
    on_host = SeedSamples(alone).read(positions)
    on_device = DeviceRows(dataset, ROWS, KEYS, seeds, sharding.replicated(mesh), split).read(positions)
    for i, samples in enumerate(alone):
        for key, value in samples.read(positions).items():
            np.testing.assert_array_equal(on_host[key][i], value)
            np.testing.assert_array_equal(on_device[key][i], value)
            assert on_device[key].sharding.is_equivalent_to(split, value.ndim + 1)


def test_validation_batches_cover_the_rows_once(dataset: LeRobotDataset):
    whole = sharding.replicated(sharding.make_mesh())
    place = functools.partial(sharding.BatchPlacement.of, whole)
    found = list(loader.validation_batches(dataset, np.arange(2, 9), KEYS, 3, place))
    assert [placement.size for placement, _ in found] == [3, 3, 1]
    assert indices([batch for _, batch in found]) == [[2, 3, 4], [5, 6, 7], [8]]


def test_errors_of_reading_threads_reach_the_caller():
    class Broken:
        def read(self, positions: np.ndarray) -> dict:
            raise ValueError(f"cannot read {positions[0]}")

    with pytest.raises(ValueError, match="cannot read 10"):
        batches(Broken(), 1, first_step=2)


def test_batches_are_split_over_the_devices(dataset: LeRobotDataset):
    mesh = sharding.make_mesh()
    assert mesh.size == 8
    source: Iterator[dict] = iter([{"x": np.arange(16).reshape(16, 1)} for _ in range(3)])
    placement = sharding.BatchPlacement.of(sharding.batch_sharding(mesh, 16), 16)
    placed = list(loader.prefetch_to_device(source, placement))
    assert len(placed) == 3
    assert placed[0]["x"].addressable_shards[0].data.shape == (2, 1)
    np.testing.assert_array_equal(jax.device_get(placed[2]["x"]), np.arange(16).reshape(16, 1))
    with pytest.raises(ValueError, match="batch_size=12 must be a multiple of the 8 devices"):
        sharding.batch_sharding(mesh, 12)
