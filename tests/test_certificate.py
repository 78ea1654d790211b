"""A policy's folder is checked against its certificate when it is loaded."""

import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lerobot_jax import certificate, state_dict
from lerobot_jax.errors import InputError
from lerobot_jax.policies.base import FunctionalPolicy, load_policy
from tests.goldens import ROOT


@pytest.fixture(scope="module")
def policy() -> FunctionalPolicy:
    return load_policy(ROOT / "act/vae_minmax_s0/model")


@pytest.fixture
def folder(policy: FunctionalPolicy, tmp_path: Path) -> Path:
    policy.save_pretrained(tmp_path / "policy")
    return tmp_path / "policy"


def test_an_unchanged_folder_loads(policy: FunctionalPolicy, folder: Path):
    loaded = load_policy(folder)
    for a, b in zip(jax.tree.leaves(loaded.params), jax.tree.leaves(policy.params), strict=True):
        np.testing.assert_array_equal(a, b)


def change_array(path: Path, key: str, change) -> None:
    state = dict(state_dict.read(path))
    state[key] = change(state[key])
    state_dict.write(state, path)


def test_a_changed_weight_is_named(folder: Path):
    """One bit of one number is enough."""

    def flip_last_bit(weight: np.ndarray) -> np.ndarray:
        bits = weight.copy().view(np.uint32)
        bits.reshape(-1)[7] ^= 1
        return bits.view(np.float32)

    change_array(folder / "model.safetensors", "model.decoder.layers.0.linear1.weight", flip_last_bit)
    with pytest.raises(
        InputError, match=r"'model.decoder.layers.0.linear1.weight' was changed.*convert certify"
    ):
        load_policy(folder)


def test_a_changed_statistic_is_named(folder: Path):
    name = "policy_preprocessor_step_3_normalizer_processor.safetensors"
    change_array(folder / name, "observation.state.mean", lambda mean: mean + 1)
    with pytest.raises(InputError, match=rf"{name}: statistic 'observation.state.mean' was changed"):
        load_policy(folder)


@pytest.mark.parametrize(
    ("file", "path", "message"),
    [
        ("config.json", ["n_action_steps"], r"config.json: 'n_action_steps' is 1, was \d"),
        ("policy_preprocessor.json", ["steps", 3, "config", "eps"], r"'steps.3.config.eps' is 1, was 1e-08"),
    ],
)
def test_a_changed_setting_is_named(folder: Path, file: str, path: list, message: str):
    content = json.loads((folder / file).read_text())
    place = content
    for name in path[:-1]:
        place = place[name]
    place[path[-1]] = 1
    (folder / file).write_text(json.dumps(content))
    with pytest.raises(InputError, match=message):
        load_policy(folder)


def test_where_a_policy_runs_may_be_changed(folder: Path):
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"device": "mps", "license": "mit"}))
    load_policy(folder)


def test_other_actions_from_the_same_files_are_reported(folder: Path, monkeypatch: pytest.MonkeyPatch):
    original = jax.nn.relu
    monkeypatch.setattr(jax.nn, "relu", lambda x: original(x) * 1.05)
    with pytest.raises(InputError, match=r"its files are what was saved, but the policy gives other actions"):
        load_policy(folder)


def test_a_damaged_certificate_is_reported(folder: Path):
    path = folder / certificate.CERTIFICATE_NAME
    path.write_bytes(path.read_bytes()[:100])
    with pytest.raises(InputError, match=r"certificate.safetensors: damaged or incomplete"):
        load_policy(folder)
    state_dict.write({"x": np.zeros(1)}, path)
    with pytest.raises(InputError, match=r"not a certificate"):
        load_policy(folder)
    path.unlink()
    load_policy(folder)


def test_the_tolerance_is_of_the_size_of_rounding(policy: FunctionalPolicy):
    """Float32 weights allow about a ten-thousandth; weights that were rounded to bfloat16 and back do not pass."""
    certified = certificate.Certifier(policy).act(policy.params, policy.buffers)
    scale = np.abs(certified["action"]).max(axis=(0, 1))
    assert (certified["tolerance"] <= 1e-3 * scale).all()
    rounded = jax.tree.map(lambda x: x.astype(jnp.bfloat16).astype(x.dtype), policy.params)
    moved = certificate.Certifier(policy).act(rounded, policy.buffers)["action"]
    assert (np.abs(moved - certified["action"]) > certified["tolerance"]).any()


def test_observations_lie_in_the_range_of_the_statistics():
    policy = load_policy(ROOT / "act/vae_minmax_s0/model")
    observations = certificate.make_observations(policy)
    stats = policy.preprocessor.steps[-1].stats["observation.state"]
    state = observations["observation.state"]
    assert (state >= stats["min"] - 1e-6).all()
    assert (state <= stats["max"] + 1e-6).all()
    images = {k: v for k, v in observations.items() if "image" in k}
    assert all(v.dtype == np.uint8 and v.shape[-1] == 3 for v in images.values())
