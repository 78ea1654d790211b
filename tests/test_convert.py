"""The convert command, as a user runs it."""

import dataclasses
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest

from lerobot_jax import convert, state_dict
from lerobot_jax.errors import InputError
from lerobot_jax.features import FeatureType, NormalizationMode, PolicyFeature
from lerobot_jax.policies.act.config import ACTConfig
from lerobot_jax.policies.base import FunctionalPolicy, load_policy
from lerobot_jax.processors import Normalizer
from tests.stock.policies import new_policy

MODES = {"VISUAL": "MEAN_STD", "STATE": "MIN_MAX", "ENV": "MEAN_STD", "ACTION": "MIN_MAX"}


def small_policy(vision_backbone: str = "resnet18w4", **inputs: PolicyFeature) -> FunctionalPolicy:
    """Initialize an ACT policy; `__` in the names of inputs stands for a dot."""
    config = dataclasses.replace(
        ACTConfig.tiny(),
        vision_backbone=vision_backbone,
        input_features={key.replace("__", "."): feature for key, feature in inputs.items()},
        normalization_mapping={kind: NormalizationMode(mode) for kind, mode in MODES.items()},
    )
    return new_policy(config, action=3)


IMAGE = PolicyFeature(FeatureType.VISUAL, (3, 32, 32))
STATE = PolicyFeature(FeatureType.STATE, (3,))
ENV = PolicyFeature(FeatureType.ENV, (5,))


@pytest.fixture(scope="module")
def policy() -> FunctionalPolicy:
    return small_policy(
        observation__images__cam_high=IMAGE, observation__state=STATE, observation__environment_state=ENV
    )


@pytest.fixture
def folder(policy: FunctionalPolicy, tmp_path: Path) -> Path:
    policy.save_pretrained(tmp_path / "policy")
    return tmp_path / "policy"


def make_old(policy: FunctionalPolicy, folder: Path) -> Path:
    """Write a policy as LeRobot did before its processors: normalization buffers among the weights."""
    policy.save_pretrained(folder)
    state = dict(state_dict.read(folder))
    needed = {"MEAN_STD": ("mean", "std"), "MIN_MAX": ("min", "max")}
    normalizer = next(step for step in policy.preprocessor.steps if isinstance(step, Normalizer))
    for key, feature in normalizer.features.items():
        places = ["normalize_targets", "unnormalize_outputs"] if key == "action" else ["normalize_inputs"]
        for place in places:
            for name in needed[MODES[feature.type]]:
                buffer = f"{place}.buffer_{key.replace('.', '_')}.{name}"
                state[buffer] = np.asarray(normalizer.stats[key][name], np.float32)
    for path in [*folder.glob("policy_*"), folder / "certificate.safetensors"]:
        path.unlink()
    state_dict.write(state, folder / "model.safetensors")
    return folder


def assert_same_policy(a: FunctionalPolicy, b: FunctionalPolicy) -> None:
    jax.tree.map(np.testing.assert_array_equal, (a.params, a.buffers), (b.params, b.buffers))
    observation = {
        key: np.random.default_rng(0).uniform(0, 1, (2, *feature.shape)).astype(np.float32)
        for key, feature in a.config.input_features.items()
    }
    for key, value in a.preprocess(observation).items():
        np.testing.assert_array_equal(value, b.preprocess(observation)[key], err_msg=key)
    actions = jax.numpy.asarray(np.random.default_rng(1).normal(size=(2, 3)), "float32")
    np.testing.assert_array_equal(a.postprocess(actions), b.postprocess(actions))


def test_old_policies_are_migrated(policy: FunctionalPolicy, tmp_path: Path):
    """Camera names with underscores and the environment state, too, which LeRobot's script misses."""
    old = make_old(policy, tmp_path / "old")
    assert_same_policy(load_policy(old), policy)
    convert.main(["from-torch", str(old), f"--output_dir={tmp_path}/new"])
    assert_same_policy(load_policy(tmp_path / "new"), policy)
    assert (tmp_path / "new/certificate.safetensors").exists()
    assert not any("normalize" in key for key in state_dict.read(tmp_path / "new"))


def test_modes_of_old_policies_without_a_mapping_are_inferred(policy: FunctionalPolicy, tmp_path: Path):
    old = make_old(policy, tmp_path / "old")
    config = json.loads((old / "config.json").read_text())
    del config["normalization_mapping"]
    (old / "config.json").write_text(json.dumps(config))
    assert_same_policy(load_policy(old), policy)


def test_old_policies_with_broken_statistics_are_refused(policy: FunctionalPolicy, tmp_path: Path):
    old = make_old(policy, tmp_path / "old")
    good = dict(state_dict.read(old))
    key = "normalize_inputs.buffer_observation_state.min"
    faults = {
        r"normalize_inputs.buffer_observation_joints.min is a statistic of none of": {
            **good,
            "normalize_inputs.buffer_observation_joints.min": good[key],
        },
        r"buffer_observation_state.min is not finite": {**good, key: np.full(3, np.inf, np.float32)},
        r"unnormalize_outputs.buffer_action.min contradicts": {
            **good,
            "unnormalize_outputs.buffer_action.min": good["unnormalize_outputs.buffer_action.min"] + 1,
        },
        r"'observation.state'.*MIN_MAX.*\['min'\] are missing": {k: v for k, v in good.items() if k != key},
    }
    for message, state in faults.items():
        state_dict.write(state, old / "model.safetensors")
        with pytest.raises(InputError, match=message):
            load_policy(old)


@pytest.mark.parametrize("dtype", [None, "bfloat16", "float16"])
def test_from_torch_keeps_or_rounds_every_array(folder: Path, tmp_path: Path, dtype: str | None):
    extra = [] if dtype is None else [f"--dtype={dtype}"]
    convert.main(["from-torch", str(folder), f"--output_dir={tmp_path}/out", *extra])
    before, after = state_dict.read(folder), state_dict.read(tmp_path / "out")
    assert set(before) == set(after)
    for key, value in before.items():
        wanted = value if dtype is None else value.astype(jax.numpy.dtype(dtype))
        assert after[key].dtype == wanted.dtype
        assert after[key].tobytes() == wanted.tobytes()
    with pytest.raises(InputError, match=r"out exists already"):
        convert.main(["from-torch", str(folder), f"--output_dir={tmp_path}/out"])


def test_diff_says_what_differs(folder: Path, tmp_path: Path, capsys):
    other = shutil.copytree(folder, tmp_path / "other")
    convert.main(["diff", str(folder), str(other)])
    assert "and all settings are equal, bit for bit" in capsys.readouterr().out
    convert.main(["diff", str(folder), str(other / "model.safetensors")])
    assert "arrays are equal, bit for bit" in capsys.readouterr().out
    state = dict(state_dict.read(other))
    state["model.action_head.bias"] = state["model.action_head.bias"] + np.float32(0.5)
    state["model.action_head.weight"] = state["model.action_head.weight"].astype(np.float16)
    del state["model.encoder_robot_state_input_proj.bias"]
    state_dict.write(state, other / "model.safetensors")
    config = json.loads((other / "config.json").read_text())
    (other / "config.json").write_text(json.dumps(config | {"n_action_steps": 1}))
    with pytest.raises(InputError, match=r"3 of \d+ arrays and 1 settings differ"):
        convert.main(["diff", str(folder), str(other)])
    rows = {line.split()[0]: line for line in capsys.readouterr().out.splitlines()}
    assert rows["model.action_head.bias"].endswith("0.5")
    assert "float16" in rows["model.action_head.weight"]
    assert "missing" in rows["model.encoder_robot_state_input_proj.bias"]
    assert "'n_action_steps' is 1" in rows["config.json:"]
    assert len(rows) == 5  # with the header


def test_certify_accepts_what_was_changed(folder: Path):
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"n_action_steps": 1}))
    with pytest.raises(InputError, match=r"'n_action_steps' is 1"):
        load_policy(folder)
    (folder / "policy_postprocessor.json").rename(folder / "aside.json")
    with pytest.raises(InputError, match=r"policy_postprocessor.json: no such file"):
        convert.main(["certify", str(folder)])
    assert (folder / "certificate.safetensors").exists()
    (folder / "aside.json").rename(folder / "policy_postprocessor.json")
    convert.main(["certify", str(folder)])
    assert load_policy(folder).config.n_action_steps == 1


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["to-torch"], "Missing"),
        (["to-torch", "nowhere", "--output_dir=x"], "nowhere: no such folder"),
        (["to-torch", ".", "--output_dir=x"], "has no config.json"),
        (["to-torch", ".", "--output_dir=x", "--dtype=int8"], "int8"),
        (["from-torch", "nowhere", "--output_dir=x"], "nowhere: no such folder"),
        (["translate"], "no command 'translate'; there are to-torch"),
    ],
)
def test_wrong_arguments_are_explained(arguments: list[str], message: str, tmp_path: Path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(InputError, match=message):
        convert.main(arguments)


def test_verify_reports_a_python_without_lerobot(folder: Path):
    with pytest.raises(InputError, match=r"could not run .*No module named 'torch'"):
        convert.main(["verify", str(folder), f"--lerobot_python={sys.executable}"])
    with pytest.raises(InputError, match=r"--lerobot_python=/nowhere/python cannot be run"):
        convert.main(["verify", str(folder), "--lerobot_python=/nowhere/python"])


@pytest.mark.lerobot
def test_stock_lerobot_verifies_our_policies_and_contradicts_changed_ones(tmp_path: Path, capsys):
    folder, python = tmp_path / "policy", os.environ["LEROBOT_PYTHON"]
    small_policy("resnet18", observation__images__cam_high=IMAGE, observation__state=STATE).save_pretrained(
        folder
    )
    convert.main(["verify", str(folder), f"--lerobot_python={python}"])
    assert "computes the same" in capsys.readouterr().out
    # What stock LeRobot gets is not what the certificate says: another statistic, under our loader's nose.
    path = next(folder.glob("policy_preprocessor*.safetensors"))
    original, read = load_policy(folder), dict(state_dict.read(path))
    read["observation.state.min"] = read["observation.state.min"] - 0.01
    state_dict.write(read, path)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(convert.base, "load_policy", lambda _: original)
        with pytest.raises(InputError, match=r"differ in 2 quantities"):
            convert.main(["verify", str(folder), f"--lerobot_python={python}"])


@pytest.mark.lerobot
def test_old_policies_are_migrated_as_stock_lerobot_migrates_them(tmp_path: Path):
    policy = small_policy("resnet18", observation__images__top=IMAGE, observation__state=STATE)
    old = make_old(policy, tmp_path / "old")
    program = (  # as its command, but the Hub, which cannot be reached, does not check the model card
        "import huggingface_hub; from lerobot.processor.migrate_policy_normalization import main; "
        "huggingface_hub.ModelCard.validate = lambda self: None; main()"
    )
    arguments = [f"--pretrained-path={old}", f"--output-dir={tmp_path}/stock"]
    subprocess.run([os.environ["LEROBOT_PYTHON"], "-c", program, *arguments], check=True)
    convert.main(["from-torch", str(old), f"--output_dir={tmp_path}/ours"])
    names = {path.name for path in (tmp_path / "stock").glob("*.safetensors")}
    assert names == {path.name for path in (tmp_path / "ours").glob("*.safetensors")} - {
        "certificate.safetensors"
    }
    for name in names:
        stock, ours = state_dict.read(tmp_path / "stock" / name), state_dict.read(tmp_path / "ours" / name)
        assert set(stock) == set(ours)
        for key, value in stock.items():
            assert value.tobytes() == ours[key].tobytes(), key
    for name in ("policy_preprocessor.json", "policy_postprocessor.json"):
        stock, ours = (json.loads((tmp_path / place / name).read_text()) for place in ("stock", "ours"))
        # Stock drops the mode of environment states, which this policy has none of.
        for step in (*stock["steps"], *ours["steps"]):
            step["config"].get("norm_map", {}).pop("ENV", None)
        assert stock == ours
