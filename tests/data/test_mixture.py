from pathlib import Path

import numpy as np
import pytest

from lerobot_jax.data.dataset import LeRobotDataset
from lerobot_jax.data.mixture import BLOCK, Assignment, FeatureMap, MixedSamples, pad_statistics
from lerobot_jax.data.samples import ShuffledRows
from lerobot_jax.errors import InputError
from lerobot_jax.features import FeatureType, PolicyFeature
from tests.data.recordings import FEATURES, record

TOP, SIDE = "observation.images.top", "observation.images.side"
POLICY = {
    TOP: PolicyFeature(FeatureType.VISUAL, (3, 32, 48)),
    SIDE: PolicyFeature(FeatureType.VISUAL, (3, 32, 48)),
    "observation.state": PolicyFeature(FeatureType.STATE, (4,)),
    "action": PolicyFeature(FeatureType.ACTION, (2,)),
}
DELTAS = {"action": [0.0, 0.1]}


@pytest.fixture(scope="module")
def datasets(tmp_path_factory) -> list[LeRobotDataset]:
    """One with a camera and 3 joints, one with that camera under another name, a second camera, and 4 joints."""
    folder: Path = tmp_path_factory.mktemp("mixture")
    other = {key: value for key, value in FEATURES.items() if key not in (TOP, "observation.state")}
    other |= {"observation.images.front": FEATURES[TOP], SIDE: FEATURES[TOP]}
    other |= {"observation.state": FEATURES["observation.state"] | {"shape": (4,), "names": None}}
    roots = [record(folder / "a").root, record(folder / "b", (7, 9), other).root]
    return [LeRobotDataset(f"test/{root.name}", root, delta_timestamps=DELTAS) for root in roots]


@pytest.fixture(scope="module")
def mixed(datasets: list[LeRobotDataset]) -> MixedSamples:
    renames = [{}, {"observation.images.front": TOP}]
    parts = []
    for i, (dataset, rename) in enumerate(zip(datasets, renames, strict=True)):
        original = {new: old for old, new in rename.items()}
        keys = [original.get(key, key) for key in POLICY] + ["index", "action_is_pad", "task"]
        finish = FeatureMap(POLICY, {"action": 2}, rename)
        parts.append(ShuffledRows(dataset, np.arange(len(dataset)), keys, seed=5, stream=i, finish=finish))
    return MixedSamples(parts, weights=[3, 1], seed=5)


def test_datasets_are_drawn_by_weight():
    which, _ = Assignment([0.5, 0.3, 0.2], seed=1).at(np.arange(3 * BLOCK))
    for block in which.reshape(3, BLOCK):
        assert np.bincount(block).tolist() == [5000, 3000, 2000]
    # Locally, too: shares of 1000 positions are those of random draws.
    shares = (which.reshape(-1, 1000) == 0).mean(1)
    assert 0.4 < shares.min() < shares.max() < 0.6


def test_each_datasets_samples_are_numbered_without_gaps():
    which, number = Assignment([2, 1, 4], seed=1).at(np.arange(2 * BLOCK + 77))
    for dataset in range(3):
        assert number[which == dataset].tolist() == list(range((which == dataset).sum()))


def test_a_position_means_the_same_wherever_one_begins():
    assignment = Assignment([2, 1], seed=1)
    whole = assignment.at(np.arange(3 * BLOCK))
    for start in (0, 1234, BLOCK - 3, 2 * BLOCK + 1):
        for all_of_it, part in zip(whole, Assignment([2, 1], seed=1).at(start + np.arange(64)), strict=True):
            np.testing.assert_array_equal(all_of_it[start : start + 64], part)
    assert (Assignment([2, 1], seed=2).at(np.arange(99))[0] != whole[0][:99]).any()


def test_a_weight_that_would_never_be_drawn_is_refused():
    with pytest.raises(InputError, match=r"weight 1e-06 is less than 1/10000 of the sum"):
        Assignment([1, 1e-6], seed=0)


def test_samples_are_those_of_their_datasets(mixed: MixedSamples, datasets: list[LeRobotDataset]):
    batch = mixed.read(np.arange(40, 80))
    which, index = batch["dataset_index"], batch["index"]
    assert 0 < which.sum() < 20
    for i in range(40):
        own = datasets[which[i]][int(index[i])]
        np.testing.assert_array_equal(batch["action"][i], own["action"])
        np.testing.assert_array_equal(batch["action_is_pad"][i], own["action_is_pad"])
        assert batch["task"][i] == own["task"]
        width = own["observation.state"].shape[0]
        np.testing.assert_array_equal(batch["observation.state"][i, :width], own["observation.state"])
        assert not batch["observation.state"][i, width:].any()
        top, side = (TOP, None) if which[i] == 0 else ("observation.images.front", SIDE)
        np.testing.assert_array_equal(batch[TOP][i], own[top])
        np.testing.assert_array_equal(batch[SIDE][i], np.zeros_like(own[top]) if side is None else own[side])
        assert (batch[f"{TOP}_is_pad"][i], batch[f"{SIDE}_is_pad"][i]) == (False, side is None)


def test_numbers_are_of_one_type_whatever_the_datasets_have():
    to_policy = FeatureMap({"action": POLICY["action"]}, {}, {})
    for dtype in (np.int64, np.float32):
        assert to_policy({"action": np.ones((3, 2), dtype)})["action"].dtype == np.float32


def test_every_epoch_of_each_dataset_has_all_its_frames(mixed: MixedSamples, datasets: list[LeRobotDataset]):
    batch = mixed.read(np.arange(400))
    for i, dataset in enumerate(datasets):
        drawn = batch["index"][batch["dataset_index"] == i]
        epochs = drawn[: len(drawn) // len(dataset) * len(dataset)].reshape(-1, len(dataset))
        assert len(epochs) > 4
        for epoch in epochs:
            assert sorted(epoch) == list(range(len(dataset)))


def test_padded_statistics_keep_zeros():
    stats = {
        "observation.state": {"mean": np.array([5.0, 6, 7]), "std": np.full(3, 2.0), "count": np.array([9])}
    }
    padded = pad_statistics(stats, POLICY)
    assert padded["observation.state"]["mean"].tolist() == [5, 6, 7, 0]
    assert padded["observation.state"]["std"].tolist() == [2, 2, 2, 1]
    assert padded["observation.state"]["count"].tolist() == [9]
    assert padded[SIDE]["std"].shape == (3, 1, 1)
    assert "action" not in padded  # what is missing altogether stays an error
