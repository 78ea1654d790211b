"""Folders that are not what they should be: clear errors, before anything is computed."""

import dataclasses
import json
import shutil
from pathlib import Path

import jax
import numpy as np
import pytest

from lerobot_jax import state_dict
from lerobot_jax.errors import InputError
from lerobot_jax.policies.act import ACTConfig
from lerobot_jax.policies.base import load_config, load_policy, make_policy
from lerobot_jax.processors import ActionTarget
from tests.goldens import ROOT


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return shutil.copytree(ROOT / "act/env_prenorm_s0/model", tmp_path / "model")


def edit(path: Path, **changes) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"type": "teleport"}, r"no policy of type 'teleport'"),
        ({"type": "antigravity.x"}, r"config.json: type 'antigravity.x' is not imported"),
        ({"type": "../act"}, r"type '\.\./act' is not imported"),
        ({"type": 3}, r"config.json: must be an object with a text"),
        ({"chunk_sizes": 3}, r"config.json.*unknown setting 'chunk_sizes'.*nearest known is 'chunk_size'"),
        ({"n_heads": 5}, r"config.json.*n_heads"),
        ({"dim_model": "wide"}, r"config.json.*dim_model must be of type int"),
        ({"input_features": {"observation.state": {"type": "SMELL", "shape": [2]}}}, r"config.json.*SMELL"),
        ({"input_features": ["observation.state"]}, r"config.json.*input_features"),
        ({"normalization_mapping": {"STATE": "HALF"}}, r"config.json.*HALF"),
    ],
)
def test_impossible_configs_are_reported(folder: Path, changes: dict, message: str):
    edit(folder / "config.json", **changes)
    with pytest.raises(InputError, match=message):
        load_policy(folder)


def test_configs_that_are_no_objects_are_reported(folder: Path):
    for content in ("[]", "3", "null", '"act"', "{"):
        (folder / "config.json").write_text(content)
        with pytest.raises(InputError, match=r"config.json"):
            load_policy(folder)


def test_a_feature_without_statistics_is_reported(folder: Path):
    config = json.loads((folder / "config.json").read_text())
    features = config["input_features"] | {"observation.state": {"type": "STATE", "shape": [3]}}
    assert "observation.state" not in config["input_features"] or features != config["input_features"]
    path = folder / "policy_preprocessor.json"
    pipeline = json.loads(path.read_text())
    declared = pipeline["steps"][-1]["config"]["features"]
    declared.pop(next(key for key in declared if key.startswith("observation.")))
    path.write_text(json.dumps(pipeline))
    with pytest.raises(
        InputError, match=r"config.json declares 'observation\..*policy_preprocessor.json has no"
    ):
        load_policy(folder)


def test_a_statistic_that_is_gone_is_reported(folder: Path):
    path = next(folder.glob("policy_preprocessor*.safetensors"))
    state = dict(state_dict.read(path))
    for name in ("mean", "std", "min", "max", "q01", "q99"):
        state.pop(f"observation.environment_state.{name}", None)
    state_dict.write(state, path)
    with pytest.raises(
        InputError, match=r"policy_preprocessor.json: 'observation.environment_state' .*are missing"
    ):
        load_policy(folder)


STATS = {
    "observation.state": {"mean": np.zeros(3, np.float32), "std": np.ones(3, np.float32)},
    "observation.images.top": {"mean": np.zeros((3, 1, 1)), "std": np.ones((3, 1, 1))},
    "action": {"mean": np.zeros(2, np.float32), "std": np.ones(2, np.float32)},
}


@pytest.mark.parametrize(
    "target",
    [
        ActionTarget("relative", ("grip",), action_names=("x", "gripper")),
        ActionTarget("delta"),
        ActionTarget(statistics_per_step=True),
    ],
    ids=repr,
)
def test_what_a_policy_predicts_comes_back_with_it(target: ActionTarget, tmp_path: Path):
    config = dataclasses.replace(ACTConfig.tiny(), action_target=target)
    shape = (4, 2) if target.statistics_per_step else (2,)
    stats = {"mean": np.full(shape, 3, np.float32), "std": np.full(shape, 2, np.float32)}
    policy = make_policy(config, STATS, target_stats=stats)
    params, buffers = policy.init(jax.random.key(0))
    policy.replace(params=params, buffers=buffers).save_pretrained(tmp_path)
    assert "action_target" not in json.loads((tmp_path / "config.json").read_text())  # stock would refuse it
    assert load_config(tmp_path).action_target == target
    loaded = load_policy(tmp_path)  # its certificate is checked
    assert loaded.config == policy.config
    np.testing.assert_array_equal(loaded.preprocessor.steps[-1].stats["action"]["mean"], stats["mean"])


def test_a_dataset_s_statistics_are_not_taken_for_those_of_the_target():
    relative = dataclasses.replace(ACTConfig.tiny(), action_target=ActionTarget("relative"))
    with pytest.raises(InputError, match="target_stats must be given if, and only if"):
        make_policy(relative, STATS)
    with pytest.raises(InputError, match="target_stats must be given if, and only if"):
        make_policy(ACTConfig.tiny(), STATS, target_stats=STATS["action"])
