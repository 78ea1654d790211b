import dataclasses
import json
import shutil
from pathlib import Path

import jax
import numpy as np
import pytest

from lerobot_jax.errors import InputError
from lerobot_jax.processors import AbsoluteActions, RelativeActions, load_pipelines

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
