"""Checkpoints of openpi, written here at a tiny size, become LeRobot policies that do the same."""

import json
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest

from lerobot_jax import openpi
from lerobot_jax.errors import InputError
from tests import openpi_model

EXPERT = "model.paligemma_with_expert.gemma_expert.model.layers."
LLM = "PaliGemma/llm/layers"


@pytest.fixture(scope="module", params=["pi0", "pi05"])
def policy_type(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.mark.parametrize("wrapped", [False, True])
def test_products_are_those_of_openpi(tmp_path: Path, wrapped: bool):
    arrays = openpi_model.random_arrays(openpi_model.shapes("pi05"))
    weights = openpi.read_weights(openpi_model.write(arrays, tmp_path, wrapped=wrapped))
    assert weights.policy_type == "pi05"
    rng, i = np.random.default_rng(0), 2
    x, heads = rng.normal(size=(5, 24)), rng.normal(size=(5, 8, 8))
    key, value = np.einsum("td,ckdh->ctkh", x, arrays[f"{LLM}/attn/kv_einsum_1/w"][i])
    gate, up = np.einsum("td,cdf->ctf", x, arrays[f"{LLM}/mlp_1/gating_einsum"][i])
    norm = f"{LLM}/pre_ffw_norm_1/Dense_0"
    expected = {
        "self_attn.q_proj": np.einsum("td,ndh->tnh", x, arrays[f"{LLM}/attn/q_einsum_1/w"][i]),
        "self_attn.k_proj": key,
        "self_attn.v_proj": value,
        "mlp.gate_proj": gate,
        "mlp.up_proj": up,
        "post_attention_layernorm.dense": x @ arrays[f"{norm}/kernel"][i],
        "self_attn.o_proj": np.einsum("tnh,nhd->td", heads, arrays[f"{LLM}/attn/attn_vec_einsum_1/w"][i]),
    }
    for name, wanted in expected.items():
        inputs = heads.reshape(5, -1) if name == "self_attn.o_proj" else x
        given = inputs @ weights.state[f"{EXPERT}{i}.{name}.weight"].T
        np.testing.assert_allclose(given, wanted.reshape(5, -1), rtol=1e-6, atol=1e-6, err_msg=name)
    np.testing.assert_array_equal(
        weights.state[f"{EXPERT}{i}.post_attention_layernorm.dense.bias"], arrays[f"{norm}/bias"][i]
    )


def test_numbers_keep_their_type(tmp_path: Path):
    arrays = openpi_model.random_arrays(openpi_model.shapes("pi0"))
    arrays = {name: x.astype(jnp.bfloat16) if "llm" in name else x for name, x in arrays.items()}
    state = openpi.read_weights(openpi_model.write(arrays, tmp_path)).state
    for key, value in state.items():
        is_rounded = "language_model" in key or ".lm_head" in key or "gemma_expert" in key
        assert (
            value.dtype == state.tensors[key].dtype == jnp.dtype(jnp.bfloat16 if is_rounded else jnp.float32)
        ), key
        assert value.shape == state.tensors[key].shape


def test_all_that_does_not_fit_is_listed(tmp_path: Path):
    arrays = openpi_model.random_arrays(openpi_model.shapes("pi0"))
    arrays["PaliGemma/llm/layers/attn/q_einsum_2/w"] = np.zeros((3, 8))
    arrays["PaliGemma/img/pos_embedding"] = np.zeros((1, 4, 15), np.float32)
    arrays["PaliGemma/llm/layers/mlp/gating_einsum_lora_a"] = np.zeros((3, 2, 32, 16), np.float32)
    arrays.pop("state_proj/bias")
    openpi_model.write(arrays, tmp_path / "5")
    with pytest.raises(InputError) as caught:
        openpi.read_weights(tmp_path / "5")
    for problem in (
        "unknown PaliGemma/llm/layers/attn/q_einsum_2/w",
        "PaliGemma/img/pos_embedding has shape (1, 4, 15), it must be (1, patches=?, vision_width=16)",
        "missing PaliGemma/llm/layers/mlp/gating_einsum_lora_b",
        "missing state_proj/bias",
    ):
        assert problem in str(caught.value)
    with pytest.raises(InputError, match=r"has no folder params; give one of .*/5$"):
        openpi.read_weights(tmp_path)
    with pytest.raises(InputError, match=r"nowhere: no such folder"):
        openpi.read_weights(tmp_path / "nowhere")
    (tmp_path / "6" / "params").mkdir(parents=True)
    with pytest.raises(InputError, match=r"6/params: no weights of openpi"):
        openpi.read_weights(tmp_path / "6")
    openpi_model.write({"PaliGemma/llm/embedder/input_embedding": np.zeros((2, 2))}, tmp_path / "7")
    with pytest.raises(InputError, match=r"neither pi0 nor pi0.5"):
        openpi.read_weights(tmp_path / "7")


def test_the_scale_of_unusual_adapters_must_be_said(tmp_path: Path):
    shapes = openpi_model.shapes("pi0") | openpi_model.adapter_shapes(rank=4)
    arrays = openpi_model.random_arrays(shapes)
    openpi_model.write(arrays, tmp_path)
    with pytest.raises(InputError, match=r"adapters of rank 4, unlike .*give --lora_scale"):
        openpi.read_weights(tmp_path)
    key = f"{EXPERT}0.self_attn.q_proj.weight"
    name = f"{LLM}/attn/q_einsum_1"
    product = np.einsum("ndl,nlh->ndh", arrays[f"{name}/lora_a"][0], arrays[f"{name}/lora_b"][0])
    wanted = (arrays[f"{name}/w"][0] + 0.5 * product).transpose(0, 2, 1).reshape(64, 24)
    given = openpi.read_weights(tmp_path, lora_scale=0.5).state[key]
    np.testing.assert_allclose(given, wanted, rtol=1e-5, atol=1e-6)
    openpi_model.write(openpi_model.random_arrays(openpi_model.shapes("pi0")), tmp_path / "plain")
    with pytest.raises(InputError, match=r"has no adapters"):
        openpi.read_weights(tmp_path / "plain", lora_scale=1.0)


STATS = {"mean": [0.5, -1.0], "std": [2.0, 0.0], "q01": [-1.0, 3.0], "q99": [1.5, 3.0]}


def write_stats(path: Path, **changes: object) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps({"norm_stats": {"state": STATS, "actions": STATS} | changes}))
    return path


def test_statistics_that_do_not_fit_are_refused(tmp_path: Path):
    folder = tmp_path / "checkpoint"
    with pytest.raises(InputError, match=r"--norm_stats; there is none"):
        openpi.find_statistics(folder)
    path = write_stats(folder / "assets" / "someone" / "robot" / "norm_stats.json")
    assert openpi.find_statistics(folder) == path
    write_stats(folder / "assets" / "other" / "norm_stats.json")
    with pytest.raises(InputError, match=r"--norm_stats; there are .*/other/.*/someone/robot/"):
        openpi.find_statistics(folder)
    faults = {
        r"actions: 'q99' must be a list of numbers, it is None": {"actions": STATS | {"q99": None}},
        r"state: 'q01' must be a list of numbers": {"state": STATS | {"q01": [1.0, "a"]}},
        r"state: q01 and q99 must be as long": {"state": STATS | {"q01": [1.0]}},
        r"must have state and actions; it has": {"effort": STATS},
    }
    for message, changes in faults.items():
        with pytest.raises(InputError, match=message):
            openpi.read_statistics(write_stats(path, **changes), "pi05")
    openpi.read_statistics(write_stats(path, actions=STATS | {"q99": None}), "pi0")
