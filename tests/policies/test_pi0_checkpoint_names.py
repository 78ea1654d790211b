"""Checkpoints of pi0 and pi0.5 that lack a prefix or a tied array, or name the network of the time differently."""

import shutil
from pathlib import Path

import numpy as np
import pytest

from lerobot_jax import state_dict, torch_state
from lerobot_jax.errors import InputError
from lerobot_jax.policies import base
from lerobot_jax.policies.base import load_policy
from lerobot_jax.policies.pi0.checkpoint_names import with_todays_names
from lerobot_jax.state_dict import StateDict, Tensor
from tests.goldens import ROOT, Golden
from tests.recorded_sizes import use_sizes

PALIGEMMA = "model.paligemma_with_expert.paligemma"
EMBEDDING, LM_HEAD = f"{PALIGEMMA}.model.language_model.embed_tokens.weight", f"{PALIGEMMA}.lm_head.weight"


def checkpoint(*keys: str) -> StateDict:
    """Give a state dict whose arrays are told apart by how they are read."""

    def tensor(key: str) -> Tensor:
        return Tensor((2, 3), np.dtype(np.float32), lambda: np.full((2, 3), len(key), np.float32))

    return StateDict({key: tensor(key) for key in keys}, source="a checkpoint")


@pytest.mark.parametrize(
    ("policy_type", "found", "today"),
    [
        ("pi0", "action_in_proj.bias", "model.action_in_proj.bias"),
        ("pi0", "model.action_in_proj.bias", "model.action_in_proj.bias"),
        ("pi0", "time_mlp_in.weight", "model.action_time_mlp_in.weight"),
        ("pi0", "model.time_mlp_out.bias", "model.action_time_mlp_out.bias"),
        ("pi0", "action_time_mlp_out.bias", "model.action_time_mlp_out.bias"),
        ("pi05", "action_time_mlp_in.weight", "model.time_mlp_in.weight"),
        ("pi05", "model.time_mlp_out.bias", "model.time_mlp_out.bias"),
        ("pi05", "state_proj.weight", "model.state_proj.weight"),  # for the loader to refuse
    ],
)
def test_names_are_todays(policy_type: str, found: str, today: str):
    state = checkpoint(found)
    renamed = with_todays_names(state, policy_type)
    assert renamed.tensors == {today: state.tensors[found]}
    assert renamed.source == state.source


@pytest.mark.parametrize("found", [EMBEDDING, LM_HEAD])
def test_tied_arrays_have_both_names(found: str):
    state = checkpoint(found.removeprefix("model."))
    (tensor,) = state.tensors.values()
    assert with_todays_names(state, "pi0").tensors == {EMBEDDING: tensor, LM_HEAD: tensor}


def test_arrays_that_are_no_longer_tied_are_kept():
    state = checkpoint(EMBEDDING, LM_HEAD)
    assert with_todays_names(state, "pi05").tensors == state.tensors


def test_two_keys_of_one_name_are_refused():
    with pytest.raises(
        InputError, match=r"model\.time_mlp_in\.bias and action_time_mlp_in\.bias are two names"
    ):
        with_todays_names(checkpoint("model.time_mlp_in.bias", "action_time_mlp_in.bias"), "pi05")


@pytest.mark.parametrize("policy_type", ["pi0", "pi05"])
def test_files_like_those_of_lerobots_base_models_are_loaded(
    policy_type: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    golden = Golden(ROOT / policy_type / "2cam_empty_s0")
    use_sizes(golden.meta["arch"], monkeypatch)
    folder = shutil.copytree(golden.path / "model", tmp_path / "model")
    today = state_dict.read(golden.path / "model")
    found = today.renamed({key: key.removeprefix("model.") for key in today if key != EMBEDDING})
    state_dict.write(found, folder / "model.safetensors")
    policy = load_policy(folder)
    loaded = torch_state.to_torch(policy.module, policy.params, policy.buffers)
    for key in today:
        np.testing.assert_array_equal(loaded[key], today[LM_HEAD if key == EMBEDDING else key])
    base._module.cache_clear()
