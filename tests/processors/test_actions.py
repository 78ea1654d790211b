import dataclasses
import json
import shutil
from pathlib import Path

import jax
import numpy as np
import pytest

from lerobot_jax.errors import InputError
from lerobot_jax.features import FeatureType, NormalizationMode, PolicyFeature
from lerobot_jax.processors import (
    AbsoluteActions,
    ActionTarget,
    DeltaActions,
    RelativeActions,
    SummedActions,
    default_pipelines,
    load_pipelines,
)
from lerobot_jax.processors.actions import Representation, from_target, to_target

GOLDEN = Path(__file__).parent / "golden"
STATE = np.array([[1.0, 2.0, 3.0, 9.0], [10.0, 20.0, 30.0, 90.0]], np.float32)  # one more than actions have
NAMES = ["shoulder.pos", "elbow.pos", "Left_Gripper.pos"]


@pytest.mark.parametrize(
    ("exclude", "names", "kept"),
    [
        ([], NAMES, []),
        (["gripper"], None, []),
        (["gripper"], NAMES, [2]),
        (["GRIPPER", ""], NAMES, [2]),
        (["pos"], NAMES, [0, 1, 2]),
        (["shoulder.pos", "elbow"], NAMES, [0, 1]),
        (["elbow"], NAMES[:2], [1]),  # the last dimension has no name
    ],
)
@pytest.mark.parametrize("shape", [(2, 3), (2, 5, 3)])
def test_actions_become_relative_except_in_excluded_joints(exclude, names, kept, shape):
    action = np.arange(np.prod(shape), dtype=np.float32).reshape(shape)
    relative = RelativeActions(True, exclude, names)
    batch = {"action": action, "observation.state": STATE}
    result = jax.jit(relative)(batch)
    for i in range(3):
        state = STATE[:, i] if len(shape) == 2 else STATE[:, None, i]
        np.testing.assert_array_equal(result["action"][..., i], action[..., i] - (0 if i in kept else state))
    np.testing.assert_array_equal(result["observation.state"], STATE)
    np.testing.assert_array_equal(relative(batch)["action"], result["action"])  # numpy alike
    restored = jax.jit(AbsoluteActions(True, relative))(result)
    np.testing.assert_array_equal(restored["action"], action)


def test_actions_keep_their_type():
    batch = {"action": np.ones((2, 3), np.float16), "observation.state": STATE}
    assert RelativeActions(True)(batch)["action"].dtype == np.float16


def test_disabled_steps_and_observations_pass():
    batch = {"action": np.ones((2, 3), np.float32)}
    assert RelativeActions(False)(batch) is batch
    assert AbsoluteActions(False)(batch) is batch
    observation = {"observation.state": STATE}
    assert RelativeActions(True)(observation) is observation


def test_missing_states_and_partners_are_errors():
    batch = {"action": np.ones((2, 3), np.float32)}
    with pytest.raises(InputError, match=r"need 'observation.state' in the batch; it has \['action'\]"):
        RelativeActions(True)(batch)
    with pytest.raises(InputError, match=r"need 'observation.state'"):
        AbsoluteActions(True, RelativeActions(True))(batch)
    with pytest.raises(InputError, match="preprocessor has no 'relative_actions_processor'"):
        AbsoluteActions(True)(batch | {"observation.state": STATE})
    with pytest.raises(InputError, match=r"at least the 3 dimensions of 'action'; 'observation.state' has 2"):
        RelativeActions(True)(batch | {"observation.state": STATE[:, :2]})


def test_loaded_pipelines_are_paired(tmp_path: Path):
    pre, post = load_pipelines(GOLDEN / "pi0_relative")
    (relative,) = [step for step in pre.steps if isinstance(step, RelativeActions)]
    (absolute,) = [step for step in post.steps if isinstance(step, AbsoluteActions)]
    assert absolute.relative is relative
    folder = shutil.copytree(GOLDEN / "pi0_relative", tmp_path / "alone")
    path = folder / "policy_preprocessor.json"
    described = json.loads(path.read_text())
    steps = [step for step in described["steps"] if "relative" not in step["registry_name"]]
    path.write_text(json.dumps({**described, "steps": steps}))
    _, post = load_pipelines(folder)
    with pytest.raises(InputError, match="preprocessor has no 'relative_actions_processor'"):
        post({"action": np.ones((2, 4), np.float32), "observation.state": STATE})
    assert post.steps[1].to_config() == {"enabled": True}
    assert dataclasses.replace(relative, enabled=False).to_config()["exclude_joints"] == ["gripper"]


def test_deltas_are_counted_from_action_to_action_and_from_the_state():
    state = np.array([[10.0, 20.0, 30.0]], np.float32)
    actions = np.array([[[11.0, 20.0, 5.0], [13.0, 19.0, 6.0], [16.0, 17.0, 8.0]]], np.float32)
    target = ActionTarget("delta", ("gripper",), action_names=("x", "y", "gripper"))
    deltas = to_target(actions, state, target)
    np.testing.assert_array_equal(deltas, [[[1, 0, 5], [2, -1, 6], [3, -2, 8]]])
    np.testing.assert_array_equal(from_target(deltas, state, target), actions)


@pytest.mark.parametrize("representation", ["absolute", "relative", "delta"])
@pytest.mark.parametrize("exclude", [(), ("grip",), ("x", "y", "grip")])
def test_targets_become_the_same_actions_again(representation: Representation, exclude: tuple[str, ...]):
    rng = np.random.default_rng(0)
    actions = rng.integers(-50, 50, (4, 7, 3)).astype(np.float32)  # small whole numbers: sums are exact
    state = rng.integers(-50, 50, (4, 5)).astype(np.float32)
    target = ActionTarget(representation, exclude, action_names=("x", "y", "gripper"))
    predicted = jax.jit(to_target, static_argnums=2)(actions, state, target)
    np.testing.assert_array_equal(predicted, to_target(actions, state, target))  # numpy alike
    assert isinstance(to_target(actions, state, target), np.ndarray)
    restored = jax.jit(from_target, static_argnums=2)(predicted, state, target)
    np.testing.assert_array_equal(restored, actions)
    np.testing.assert_array_equal(from_target(np.asarray(predicted), state, target), actions)
    moved = np.any(np.asarray(predicted) != actions, axis=(0, 1))
    np.testing.assert_array_equal(moved, target.moving(3))


def test_the_last_of_several_observation_steps_is_the_state():
    states = np.array([[[1.0, 1.0], [5.0, 7.0]]], np.float32)  # b t state
    actions = np.full((1, 3, 2), 10, np.float32)
    relative = RelativeActions(True)({"action": actions, "observation.state": states})["action"]
    np.testing.assert_array_equal(relative, np.broadcast_to([5, 3], (1, 3, 2)))


def test_deltas_of_a_single_action_are_refused():
    batch = {"action": np.ones((2, 3), np.float32), "observation.state": STATE}
    for step in (DeltaActions(True), SummedActions(True, DeltaActions(True))):
        with pytest.raises(InputError, match=r"a whole chunk \(b, chunk, 3\), not \(2, 3\)"):
            step(batch)


STATS = {
    "observation.state": {"mean": np.arange(4.0), "std": np.ones(4)},
    "action": {"mean": np.array([0.5, 1.0, 2.0]), "std": np.array([1.0, 2.0, 4.0])},
}
PER_STEP = {"mean": np.arange(15.0).reshape(5, 3), "std": 1 + np.arange(15.0).reshape(5, 3)[::-1]}
INPUTS = {"observation.state": PolicyFeature(FeatureType.STATE, (4,))}
OUTPUTS = {"action": PolicyFeature(FeatureType.ACTION, (3,))}
MODES = dict.fromkeys(("STATE", "ACTION"), NormalizationMode.MEAN_STD)


@pytest.mark.parametrize("per_step", [False, True])
@pytest.mark.parametrize("representation", ["absolute", "relative", "delta"])
def test_pipelines_carry_the_target_through_their_files(
    representation: Representation, per_step: bool, tmp_path: Path
):
    """Their files say what is predicted; batches become the same, and actions the same again."""
    is_absolute = representation == "absolute"
    joints = ((), None) if is_absolute else (("gripper",), tuple(NAMES))
    target = ActionTarget(representation, joints[0], per_step, joints[1])
    stats = STATS | ({"action": PER_STEP} if per_step else {})
    pipelines = default_pipelines(INPUTS, OUTPUTS, MODES, stats, "cpu", target=target)
    for pipeline in pipelines:
        pipeline.save(tmp_path)
    rng = np.random.default_rng(0)
    batch = {"action": rng.normal(size=(2, 5, 3)).astype(np.float32), "observation.state": STATE}
    seen = []
    for pre, post in (pipelines, load_pipelines(tmp_path)):
        assert pre.action_target == target
        seen.append(jax.jit(pre)(batch)["action"])
        restored = jax.jit(post)({"action": seen[-1], "observation.state": STATE})["action"]
        np.testing.assert_allclose(restored, batch["action"], atol=2e-5)
    np.testing.assert_array_equal(*seen)
    chosen = stats["action"]
    expected = (np.asarray(to_target(batch["action"], STATE, target)) - chosen["mean"]) / chosen["std"]
    np.testing.assert_allclose(seen[0], expected, atol=2e-6)
    names = {s["registry_name"] for f in tmp_path.glob("*.json") for s in json.loads(f.read_text())["steps"]}
    ours = {name for name in names if name.startswith("lerobot_jax")}
    assert len(ours) == 2 * (representation == "delta") + 2 * per_step  # what stock LeRobot cannot load


def test_statistics_of_each_step_need_the_whole_chunk():
    target = ActionTarget(statistics_per_step=True)
    stats = STATS | {"action": PER_STEP}
    pre, post = default_pipelines(INPUTS, OUTPUTS, MODES, stats, "cpu", target=target)
    for shape in ((5, 3), (1, 3), (2, 4, 3)):
        with pytest.raises(InputError, match=rf"shape \(b, 5, 3\), not \({shape[0]}, "):
            post({"action": np.ones(shape, np.float32)})
    with pytest.raises(InputError, match="'action' has statistics for each step"):
        pre({"action": np.ones((5, 3), np.float32)})


def test_a_target_needs_the_state_among_the_inputs():
    environment = {"observation.environment_state": PolicyFeature(FeatureType.ENV, (4,))}
    small = {"observation.state": PolicyFeature(FeatureType.STATE, (2,))}
    for inputs, has in ((environment, r"have \['observation.env"), (small, "have 'observation.state' of 2")):
        with pytest.raises(InputError, match=rf"representation=relative needs .* at least 3 .*{has}"):
            default_pipelines(inputs, OUTPUTS, {}, STATS, "cpu", target=ActionTarget("relative"))


def test_partners_of_another_kind_are_refused():
    batch = {"action": np.ones((2, 5, 3), np.float32), "observation.state": STATE}
    with pytest.raises(InputError, match="has no 'lerobot_jax_delta_actions' step"):
        SummedActions(True, RelativeActions(True))(batch)
    with pytest.raises(InputError, match="has no 'relative_actions_processor' step"):
        AbsoluteActions(True, DeltaActions(True))(batch)
