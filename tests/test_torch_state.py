import dataclasses
from pathlib import Path

import jax
import ml_dtypes
import numpy as np
import pytest
import safetensors.numpy

from lerobot_jax import state_dict, torch_state
from lerobot_jax.errors import InputError
from lerobot_jax.policies import base
from lerobot_jax.policies.base import load_policy
from tests.goldens import ROOT

FOLDERS = sorted(path.parent for path in ROOT.glob("*/*/model/model.safetensors"))


@pytest.mark.parametrize("folder", FOLDERS, ids=lambda p: f"{p.parent.parent.name}-{p.parent.name}")
def test_weights_survive_a_round_trip_bit_for_bit(folder: Path, tmp_path: Path):
    load_policy(folder).save_pretrained(tmp_path)
    written, original = (safetensors.numpy.load_file(f / "model.safetensors") for f in (tmp_path, folder))
    assert set(written) == set(original)
    for key, value in original.items():
        np.testing.assert_array_equal(written[key], value, err_msg=key)
        assert written[key].dtype == value.dtype


@pytest.mark.parametrize("dtype", [np.float16, ml_dtypes.bfloat16])
def test_dtypes_are_kept(dtype: type, tmp_path: Path):
    policy = load_policy(FOLDERS[0])
    halved = jax.tree.map(lambda x: np.asarray(x).astype(dtype), (policy.params, policy.buffers))
    state_dict.write(torch_state.to_torch(policy.module, *halved), tmp_path / "model.safetensors")
    params, _ = torch_state.from_torch(policy.module, state_dict.read(tmp_path / "model.safetensors"))
    for expected, found in zip(jax.tree.leaves(halved[0]), jax.tree.leaves(params), strict=True):
        assert found.dtype == dtype
        np.testing.assert_array_equal(expected, found)


def test_all_misfits_are_listed_at_once(tmp_path: Path):
    policy = load_policy(FOLDERS[0])
    state = dict(torch_state.to_torch(policy.module, policy.params, policy.buffers))
    state["surplus.weight"] = state.pop("model.action_head.weight")
    state["model.action_head.bias"] = state["model.action_head.bias"][:1]
    state_dict.write(state, tmp_path / "model.safetensors")
    with pytest.raises(InputError) as error:
        torch_state.from_torch(policy.module, state_dict.read(tmp_path / "model.safetensors"))
    for part in (
        "missing model.action_head.weight",
        "model.action_head.bias has shape (1,)",
        "unknown surplus.weight",
    ):
        assert part in str(error.value)


def test_damaged_files_are_reported(tmp_path: Path):
    policy = load_policy(FOLDERS[0])
    path = tmp_path / "model.safetensors"
    with pytest.raises(InputError, match=r"model.safetensors: no such file"):
        torch_state.from_torch(policy.module, state_dict.read(path))
    path.write_bytes((FOLDERS[0] / "model.safetensors").read_bytes()[:5000])
    with pytest.raises(InputError, match=r"model.safetensors: damaged or incomplete"):
        torch_state.from_torch(policy.module, state_dict.read(path))


def test_backbone_weights_with_torchvisions_names(tmp_path: Path):
    """ImageNet weights fill the image encoder and nothing else; the classifier's keys may be in the file."""
    source = load_policy(ROOT / "act/vae_2cam_s0/model")
    state = torch_state.to_torch(source.module, source.params, source.buffers)
    prefix = "model.backbone."
    weights = {k.removeprefix(prefix): v + 1 for k, v in state.items() if k.startswith(prefix)}
    weights |= {"fc.weight": np.zeros((4, 32), np.float32), "bn1.num_batches_tracked": np.array(0)}
    state_dict.write(weights, tmp_path / "resnet.safetensors")
    config = dataclasses.replace(
        source.config, pretrained_backbone_weights=str(tmp_path / "resnet.safetensors")
    )
    policy = source.replace(config=config)
    params, buffers = base.load_pretrained_parts(policy, *policy.init(jax.random.key(0)))
    loaded = torch_state.to_torch(policy.module, params, buffers)
    for key in weights.keys() - {"fc.weight", "bn1.num_batches_tracked"}:
        np.testing.assert_array_equal(loaded[prefix + key], weights[key])
    assert config.exported().pretrained_backbone_weights is None
    state_dict.write(weights | {"layer9.weight": np.zeros(1)}, tmp_path / "resnet.safetensors")
    with pytest.raises(InputError, match=r"unknown layer9\.weight"):
        base.load_pretrained_parts(policy, params, buffers)
    missing = dataclasses.replace(config, pretrained_backbone_weights="ResNet18_Weights.IMAGENET1K_V1")
    with pytest.raises(InputError, match=r"timm/resnet18.tv_in1k.*pretrained_backbone_weights, or None"):
        base.load_pretrained_parts(source.replace(config=missing), params, buffers)
