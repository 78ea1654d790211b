import dataclasses
import functools
import weakref
from pathlib import Path

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
import safetensors.numpy
from flax import nnx

from lerobot_jax import state_dict, torch_state
from lerobot_jax.errors import InputError
from lerobot_jax.nn import variables
from lerobot_jax.nn.linear import Embedding, Linear
from lerobot_jax.nn.stack import Stack
from lerobot_jax.nn.variables import Buffer
from lerobot_jax.policies import base
from lerobot_jax.policies.base import load_policy
from lerobot_jax.state_dict import StateDict
from tests.goldens import ROOT, Golden
from tests.recorded_sizes import use_sizes

FOLDERS = sorted(path.parent for path in ROOT.glob("*/*/model/model.safetensors"))


@pytest.mark.parametrize("folder", FOLDERS, ids=lambda p: f"{p.parent.parent.name}-{p.parent.name}")
def test_weights_survive_a_round_trip_bit_for_bit(
    folder: Path, tmp_path: Path, stand_ins: None, monkeypatch: pytest.MonkeyPatch
):
    use_sizes(Golden(folder.parent).meta.get("arch", {}), monkeypatch)
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
    source = load_policy(ROOT / "act/vae_minmax_s0/model")
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


class Block(nnx.Module):
    def __init__(self, rngs: nnx.Rngs):
        self.linear = Linear(3, 3, rngs=rngs)
        self.norm = nnx.RMSNorm(3, rngs=rngs)

    def __call__(self, x, scale):
        return x + scale * self.norm(self.linear(x))


class Counter(nnx.Module):
    """A layer with torch's batch counter."""

    def __init__(self):
        self.num_batches_tracked = Buffer(jnp.zeros((), jnp.int32))


class Model(nnx.Module):
    """One layer of every kind that has a layout rule."""

    def __init__(self, rngs: nnx.Rngs):
        self.up = nnx.ConvTranspose(2, 5, (3,), strides=(2,), padding="VALID", rngs=rngs)
        self.conv = nnx.Conv(2, 4, (3, 2), rngs=rngs)
        self.group = nnx.GroupNorm(4, num_groups=2, rngs=rngs)
        self.layers = Stack(lambda rngs: Block(rngs), 4, rngs=rngs)
        self.wte = Embedding(7, 3, rngs=rngs)
        self.lm_head = self.wte
        self.bn = Counter()

    def arrays(self):
        _, params, buffers = nnx.split(self, nnx.Param, Buffer)
        return nnx.to_pure_dict(params), nnx.to_pure_dict(buffers)


@pytest.fixture
def model() -> Model:
    return Model(nnx.Rngs(0))


def test_every_layer_type_has_torchs_names_and_shapes(model: Model):
    state = torch_state.to_torch(model, *model.arrays())
    shapes = {key: (tensor.shape, str(tensor.dtype)) for key, tensor in state.tensors.items()}
    blocks = {f"layers.{i}.linear.weight": ((3, 3), "float32") for i in range(4)}
    blocks |= {f"layers.{i}.linear.bias": ((3,), "float32") for i in range(4)}
    blocks |= {f"layers.{i}.norm.weight": ((3,), "float32") for i in range(4)}
    assert shapes == blocks | {
        "up.weight": ((2, 5, 3), "float32"),
        "up.bias": ((5,), "float32"),
        "conv.weight": ((4, 2, 3, 2), "float32"),
        "conv.bias": ((4,), "float32"),
        "group.weight": ((4,), "float32"),
        "group.bias": ((4,), "float32"),
        "lm_head.weight": ((7, 3), "float32"),  # of two names, safetensors keeps the first
        "bn.num_batches_tracked": ((), "int64"),
    }
    assert state.metadata == {"wte.weight": "lm_head.weight"}
    assert all(state[key].shape == shape for key, (shape, _) in shapes.items())


def test_a_stack_runs_its_layers_in_order(model: Model):
    state = torch_state.to_torch(model, *model.arrays())
    x = np.random.default_rng(0).normal(size=(2, 3)).astype(np.float32)
    expected = x
    for i in range(4):
        y = expected @ state[f"layers.{i}.linear.weight"].T + state[f"layers.{i}.linear.bias"]
        y = y / np.sqrt((y**2).mean(-1, keepdims=True) + 1e-6) * state[f"layers.{i}.norm.weight"]
        expected = expected + 0.5 * y
    np.testing.assert_allclose(jax.jit(model.layers)(x, 0.5), expected, rtol=1e-5)


def test_transposed_convolution_in_torchs_layout(model: Model):
    """torch: output[s * t + k] += input[t] @ weight[:, :, k]."""
    state = torch_state.to_torch(model, *model.arrays())
    x = np.random.default_rng(0).normal(size=(1, 4, 2)).astype(np.float32)  # b t c
    expected = np.zeros((1, 2 * 3 + 3, 5), np.float32) + state["up.bias"]
    for t in range(4):
        for k in range(3):
            expected[:, 2 * t + k] += x[:, t] @ state["up.weight"][:, :, k]
    np.testing.assert_allclose(model.up(x), expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("stored", ["lm_head.weight", "wte.weight"])
def test_all_layers_survive_a_round_trip(model: Model, stored: str, tmp_path: Path):
    params, buffers = model.arrays()
    buffers["bn"]["num_batches_tracked"] = jnp.int32(41)
    state = dict(torch_state.to_torch(model, params, buffers))
    state[stored] = state.pop("lm_head.weight")  # either of two tied names will do
    state_dict.write(state, tmp_path / "model.safetensors")
    loaded = torch_state.from_torch(nnx.eval_shape(lambda: Model(nnx.Rngs(0))), state_dict.read(tmp_path))
    jax.tree.map(np.testing.assert_array_equal, loaded, (params, buffers))
    assert loaded[1]["bn"]["num_batches_tracked"].dtype == np.int32


class Counting(nnx.Module):
    def __init__(self):
        self.bias = nnx.Param(jnp.ones(2))
        self.steps = variables.Counter(jnp.full((3,), 7, jnp.int32))
        self.is_over = variables.Progress(jnp.ones((), bool))


def test_counts_that_torch_does_not_save_begin_at_0():
    module = Counting()
    params, buffers = (nnx.to_pure_dict(nnx.state(module, kind)) for kind in (nnx.Param, Buffer))
    assert set(buffers) == {"steps", "is_over"}
    state = torch_state.to_torch(module, params, buffers)
    assert {key: str(tensor.dtype) for key, tensor in state.tensors.items()} == {
        "bias": "float32",
        "is_over": "bool",
    }
    _, loaded = torch_state.from_torch(nnx.eval_shape(Counting), state)
    np.testing.assert_array_equal(loaded["steps"], np.zeros(3, np.int32))
    assert loaded["steps"].dtype == np.int32
    assert loaded["is_over"]


def test_tied_weights_that_differ_and_wrong_types_are_reported(model: Model):
    state = dict(torch_state.to_torch(model, *model.arrays()))
    state["wte.weight"] = state["lm_head.weight"] + 1
    state["layers.2.linear.weight"] = state["layers.2.linear.weight"].astype(np.float64)
    state["bn.num_batches_tracked"] = np.float32(0).reshape(())
    state["group.bias"] = np.zeros(4, np.int8)
    state["layers.1.linear.bias"] = state["layers.1.linear.bias"].astype(np.float16)
    with pytest.raises(InputError) as error:
        torch_state.from_torch(model, StateDict.of({k: np.asarray(v) for k, v in state.items()}))
    for part in (
        "wte.weight differs from lm_head.weight",
        "layers.2.linear.weight has type float64",
        "bn.num_batches_tracked has type float32",
        "group.bias has type int8",
        "layers.1.linear.bias has type float16, layers.0.linear.bias float32",
    ):
        assert part in str(error.value)


def test_large_transposed_matrices_are_copied_exactly():
    rng = np.random.default_rng(0)
    for shape in ((1, 1), (63, 65), (200, 130), (5, 1000)):
        matrix = rng.integers(0, 2**16, shape).astype(np.uint16).view(ml_dtypes.bfloat16)
        copy = torch_state.contiguous(matrix.T)
        assert copy.flags.c_contiguous
        assert copy.tobytes() == matrix.T.tobytes()


def test_few_arrays_are_on_the_host_at_a_time(tmp_path: Path):
    """Each goes to the devices before the next but a few are read."""
    read_so_far: list[weakref.ref] = []
    policy = load_policy(FOLDERS[0])
    stored = torch_state.to_torch(policy.module, policy.params, policy.buffers)

    def read(tensor: state_dict.Tensor) -> np.ndarray:
        array = tensor.read().copy()
        read_so_far.append(weakref.ref(array))
        return array

    tensors = {
        key: tensor._replace(read=functools.partial(read, tensor)) for key, tensor in stored.tensors.items()
    }
    most = 0

    def put(path, array):
        nonlocal most
        most = max(most, sum(each() is not None for each in read_so_far))
        return jnp.array(array, copy=True)

    params, _ = torch_state.from_torch(policy.module, StateDict(tensors), put=put)
    assert len(tensors) > 50
    assert most <= 3 * state_dict.NUM_THREADS
    jax.tree.map(np.testing.assert_array_equal, params, policy.params)
