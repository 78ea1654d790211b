from pathlib import Path

import numpy as np
import pytest

from lerobot_jax.data.dataset import LeRobotDataset
from lerobot_jax.data.target_statistics import complete_statistics, name_joints, target_statistics
from lerobot_jax.errors import InputError
from lerobot_jax.features import FeatureType, NormalizationMode, PolicyFeature
from lerobot_jax.processors import ActionTarget, default_pipelines
from lerobot_jax.processors.actions import Representation
from tests.data.recordings import FEATURES, record

LENGTHS = (9, 3, 6, 12)  # the second is shorter than a chunk
CHUNK = 4
NAMES = ("shoulder", "gripper")
QUANTILES = {"q01": 0.01, "q10": 0.1, "q50": 0.5, "q90": 0.9, "q99": 0.99}


def drift(lengths: tuple[int, ...] = LENGTHS) -> dict[str, np.ndarray]:
    """Make columns whose actions run away from the state; the state has one dimension more."""
    rng = np.random.default_rng(0)
    state = np.cumsum(rng.normal(1, 2, (sum(lengths), 3)), axis=0).astype(np.float32)
    return {
        "action": state[:, :2] + rng.normal(0.5, 1, (len(state), 2)).astype(np.float32),
        "observation.state": state,
        "episode_index": np.repeat(np.arange(len(lengths)), lengths),
        "frame_index": np.concatenate([np.arange(n) for n in lengths]),
    }


def chunks_of(columns: dict[str, np.ndarray], representation: str, exclude: bool) -> np.ndarray:
    """Transform every whole chunk, frame by frame: n chunk act."""
    chunks = []
    for episode in np.unique(columns["episode_index"]):
        rows = columns["episode_index"] == episode
        actions, states = columns["action"][rows], columns["observation.state"][rows]
        for first in range(len(actions) - CHUNK + 1):
            chunk = actions[first : first + CHUNK].copy()
            before = np.concatenate([states[first : first + 1, :2], chunk[:-1]])
            reference = {"absolute": 0 * chunk, "relative": states[None, first, :2] + 0 * chunk}
            reference = reference.get(representation, before).copy()
            if exclude:
                reference[:, 1] = 0
            chunks.append(chunk - reference)
    return np.stack(chunks)


@pytest.mark.parametrize("exclude", [False, True])
@pytest.mark.parametrize("per_step", [False, True])
@pytest.mark.parametrize("representation", ["absolute", "relative", "delta"])
def test_statistics_are_those_of_all_whole_chunks(
    representation: Representation, per_step: bool, exclude: bool, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr("lerobot_jax.data.target_statistics.BLOCK", 20)  # several blocks
    columns = drift()
    target = ActionTarget(representation, ("grip",) if exclude else (), per_step, NAMES)
    found = target_statistics(columns, target, range(CHUNK))
    chunks = chunks_of(columns, representation, exclude).astype(np.float64)
    values = chunks if per_step else chunks.reshape(-1, 2)
    expected = {name: getattr(values, name)(axis=0) for name in ("min", "max", "mean", "std")}
    expected |= {name: np.quantile(values, q, axis=0) for name, q in QUANTILES.items()}
    assert set(found) == {*expected, "count"}
    for name, value in expected.items():
        assert found[name].shape == ((CHUNK, 2) if per_step else (2,))
        np.testing.assert_allclose(found[name], value, rtol=1e-6, atol=1e-6, err_msg=name)
    np.testing.assert_array_equal(
        found["count"], [len(chunks)] * CHUNK if per_step else [len(chunks) * CHUNK]
    )


def test_the_order_and_the_gaps_of_the_rows_do_not_matter():
    """Episodes may be left out or come in any order, and two datasets may stand one after the other."""
    columns = drift()
    target = ActionTarget("relative")
    expected = target_statistics(columns, target, range(CHUNK))
    parts = [{k: v[columns["episode_index"] == e] for k, v in columns.items()} for e in (3, 0, 2, 1)]
    reordered = {key: np.concatenate([part[key] for part in parts]) for key in columns}
    for name, value in target_statistics(reordered, target, range(CHUNK)).items():
        np.testing.assert_allclose(value, expected[name], rtol=1e-6)
    twice = {key: np.concatenate([parts[1][key]] * 2) for key in columns}  # episode 0, then episode 0
    once = target_statistics(parts[1], target, range(CHUNK))
    found = target_statistics(twice, target, range(CHUNK))
    np.testing.assert_array_equal(found["count"], 2 * once["count"])
    np.testing.assert_allclose(found["std"], once["std"], rtol=1e-6)


@pytest.mark.parametrize("mode", ["MEAN_STD", "MIN_MAX", "QUANTILES", "QUANTILE10"])
@pytest.mark.parametrize(
    "target", [ActionTarget("relative"), ActionTarget("delta"), ActionTarget("relative", (), True)], ids=repr
)
def test_what_training_sees_is_normalized(target: ActionTarget, mode: str, tmp_path: Path):
    """Of the unpadded chunks of a dataset, each with its frame's state, as the preprocessor gives them."""
    features = {key: FEATURES[key] for key in ("observation.state", "action")}
    root = record(tmp_path / "data", (60, 4, 45), features).root
    dataset = LeRobotDataset("test", root, delta_timestamps={"action": [0.1 * k for k in range(CHUNK)]})
    stats = complete_statistics(dataset.meta.stats, dataset.columns)
    stats["action"] = target_statistics(dataset.columns, target, range(CHUNK))
    inputs = {"observation.state": PolicyFeature(FeatureType.STATE, (3,))}
    outputs = {"action": PolicyFeature(FeatureType.ACTION, (2,))}
    modes = dict.fromkeys(("STATE", "ACTION"), NormalizationMode(mode))
    pre, _ = default_pipelines(inputs, outputs, modes, stats, "cpu", target=target)
    batch = dataset.read(np.arange(len(dataset)), ["observation.state", "action", "action_is_pad"])
    whole = ~batch.pop("action_is_pad").any(axis=1)
    seen = np.asarray(pre(batch)["action"])[whole]
    axis = 0 if target.statistics_per_step else (0, 1)
    if mode == "MEAN_STD":
        np.testing.assert_allclose(seen.mean(axis=axis), 0, atol=1e-5)
        np.testing.assert_allclose(seen.std(axis=axis), 1, atol=1e-5)
    low, high = {"QUANTILES": (0.01, 0.99), "QUANTILE10": (0.1, 0.9)}.get(mode, (0, 1))
    if mode != "MEAN_STD":
        np.testing.assert_allclose(np.quantile(seen, low, axis=axis), -1, atol=1e-5)
        np.testing.assert_allclose(np.quantile(seen, high, axis=axis), 1, atol=1e-5)


def test_a_policy_without_chunks_counts_every_frame():
    columns = drift()
    found = target_statistics(columns, ActionTarget("relative"), None)
    difference = columns["action"] - columns["observation.state"][:, :2]
    np.testing.assert_allclose(found["max"], difference.max(axis=0), rtol=1e-6)
    np.testing.assert_array_equal(found["count"], [len(difference)])


def test_what_cannot_be_computed_is_reported():
    columns = drift()
    with pytest.raises(InputError, match=r"no episode has the 13 frames of a chunk, the longest has 12"):
        target_statistics(columns, ActionTarget("relative"), range(13))
    with pytest.raises(InputError, match=r"begins at the observation; this one predicts the steps -1 to 6"):
        target_statistics(columns, ActionTarget("delta"), range(-1, 7))
    found = target_statistics(columns, ActionTarget("relative"), range(-1, 7))  # which has no such need
    np.testing.assert_array_equal(found["count"], [(2 + 5) * 8])
    without = {key: column for key, column in columns.items() if key != "observation.state"}
    with pytest.raises(InputError, match=r"relative actions need 'observation.state', the dataset has"):
        target_statistics(without, ActionTarget("relative"), range(CHUNK))
    small = columns | {"observation.state": columns["observation.state"][:, :1]}
    with pytest.raises(InputError, match=r"need the 2 dimensions of 'action' in .* which has 1"):
        target_statistics(small, ActionTarget("relative"), range(CHUNK))


@pytest.mark.parametrize(
    "names", [["shoulder", "gripper"], {"motors": ["shoulder", "gripper"]}, {"shoulder": 0, "gripper": 1}]
)
def test_joints_get_the_names_of_the_dataset(names):
    target = ActionTarget("relative", ("GRIP",))
    named = name_joints(target, {"action": {"shape": (2,), "names": names}})
    assert named.action_names == NAMES
    np.testing.assert_array_equal(named.moving(2), [True, False])


def test_joints_that_are_not_there_are_reported():
    target = ActionTarget("delta", ("shoulder", "hand"))
    with pytest.raises(InputError, match=r"no joint is called 'hand'; the dataset names shoulder, gripper"):
        name_joints(target, {"action": {"shape": (2,), "names": list(NAMES)}})
    for names in (None, ["one"]):
        with pytest.raises(
            InputError, match=r"'shoulder'; the dataset does not name its action's dimensions"
        ):
            name_joints(target, {"action": {"shape": (2,), "names": names}})
    nothing = {"action": {"shape": (2,), "names": None}}
    assert name_joints(ActionTarget("delta"), nothing) == ActionTarget("delta")
    absolute = ActionTarget(exclude_joints=("hand",))
    assert name_joints(absolute, nothing) is absolute


def test_missing_statistics_are_completed_and_others_kept():
    columns = drift() | {
        "observation.done": np.array([True, False] * 15),
        "task": np.array(["x"] * 30, object),
    }
    kept = {"min": np.array([-1.0, -2.0]), "count": np.array([7])}
    found = complete_statistics({"action": kept, "observation.image": {"mean": np.ones((3, 1, 1))}}, columns)
    assert set(found) == {"action", "observation.state", "observation.done", "observation.image"}
    np.testing.assert_array_equal(found["action"]["min"], kept["min"])
    np.testing.assert_array_equal(found["action"]["count"], [7])
    for key in ("action", "observation.state"):
        np.testing.assert_allclose(found[key]["mean"], columns[key].astype(np.float64).mean(axis=0))
        for name, q in QUANTILES.items():
            np.testing.assert_allclose(found[key][name], np.quantile(columns[key], q, axis=0), rtol=1e-6)
    np.testing.assert_allclose(found["observation.done"]["mean"], [0.5])
    assert set(found["observation.image"]) == {"mean"}  # images are not in the columns
