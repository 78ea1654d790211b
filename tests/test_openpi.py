"""Checkpoints of openpi, written here at a tiny size, become LeRobot policies that do the same."""

import functools
import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lerobot_jax import convert, openpi, state_dict, torch_state
from lerobot_jax.compilation import compile_quickly
from lerobot_jax.errors import InputError
from lerobot_jax.policies import base
from lerobot_jax.policies.base import FunctionalPolicy, load_policy
from lerobot_jax.policies.pi0 import PI0Config
from lerobot_jax.processors.tokenizer import find_tokenizer, read_tokenizer
from tests import openpi_model
from tests.goldens import ROOT
from tests.recorded_sizes import use_sizes

EXPERT = "model.paligemma_with_expert.gemma_expert.model.layers."
LLM = "PaliGemma/llm/layers"
STATE_DIM, ACTION_DIM, CHUNK = 5, 4, 6


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


@pytest.fixture
def sizes(monkeypatch: pytest.MonkeyPatch, stand_ins: None) -> Iterator[None]:
    """Let LeRobot's variants have the sizes of the checkpoints here, and a small tokenizer."""
    gemma = {"depth": openpi_model.DEPTH, "num_heads": openpi_model.HEADS, "head_dim": openpi_model.HEAD_DIM}
    (width, hidden), (expert_width, expert_hidden) = openpi_model.WIDTHS.values()
    vision = {
        "hidden_size": openpi_model.VISION_WIDTH,
        "num_hidden_layers": openpi_model.VISION_DEPTH,
        "num_attention_heads": openpi_model.VISION_HEADS,
        "intermediate_size": openpi_model.VISION_MLP,
        "patch_size": openpi_model.PATCH,
    }
    arch = {
        "gemma_2b": {"width": width, "mlp_dim": hidden, **gemma},
        "gemma_300m": {"width": expert_width, "mlp_dim": expert_hidden, **gemma},
        "vision": vision,
        "vocab_size": openpi_model.VOCAB,
    }
    use_sizes({"pi_tiny": arch}, monkeypatch)
    yield
    base._module.cache_clear()


def draw_stats(dim: int, seed: int) -> dict[str, Any]:
    rng = np.random.default_rng(seed)
    low, high = rng.normal(size=dim), 2 + rng.random(dim)
    std = high / 2
    std[-1] = 0.0  # a joint that never moved
    stats = {"mean": low + high / 2, "std": std, "q01": low, "q99": low + high}
    return {name: values.tolist() for name, values in stats.items()}


STATE_STATS, ACTION_STATS = draw_stats(STATE_DIM, 1), draw_stats(ACTION_DIM, 2)


def make_checkpoint(folder: Path, policy_type: str, *, adapters: bool = False) -> Mapping[str, np.ndarray]:
    """Write a checkpoint with statistics."""
    shapes = openpi_model.shapes(policy_type) | (openpi_model.adapter_shapes() if adapters else {})
    arrays = openpi_model.random_arrays(shapes)
    write_stats(folder / "assets" / "robot" / "norm_stats.json", state=STATE_STATS, actions=ACTION_STATS)
    openpi_model.write(arrays, folder)
    return arrays


def convert_it(folder: Path, *options: str) -> FunctionalPolicy:
    output = folder.with_name("policy")
    arguments = ["openpi", str(folder), f"--output_dir={output}", f"--chunk_size={CHUNK}", *options]
    convert.main(arguments)
    return load_policy(output, check_certificate=False)


def observe(policy: FunctionalPolicy) -> dict[str, Any]:
    """Draw raw observations in openpi's statistics."""
    rng = np.random.default_rng(3)
    low, high = np.asarray(STATE_STATS["q01"]), np.asarray(STATE_STATS["q99"])
    images = {key: rng.integers(0, 256, (2, 28, 28, 3), np.uint8) for key in policy.config.image_features}
    state = (low + (high - low) * rng.random((2, STATE_DIM))).astype(np.float32)
    return {**images, "observation.state": state, "task": ["pick up_the red\ncube ", "Open the drawer!"]}


def normalized(x: np.ndarray, stats: Mapping[str, Any], policy_type: str) -> np.ndarray:
    """Normalize as openpi does."""
    mean, std, q01, q99 = (np.asarray(stats[name]) for name in ("mean", "std", "q01", "q99"))
    return (x - mean) / (std + 1e-6) if policy_type == "pi0" else (x - q01) / (q99 - q01 + 1e-6) * 2 - 1


def unnormalized(x: np.ndarray, stats: Mapping[str, Any], policy_type: str) -> np.ndarray:
    mean, std, q01, q99 = (np.asarray(stats[name]) for name in ("mean", "std", "q01", "q99"))
    return x * (std + 1e-6) + mean if policy_type == "pi0" else (x + 1) / 2 * (q99 - q01 + 1e-6) + q01


def prompts(observation: Mapping[str, Any], state: np.ndarray, policy_type: str, length: int) -> Any:
    """Tokenize as openpi does."""
    tokenizer = read_tokenizer(find_tokenizer("google/paligemma-3b-pt-224"))
    tokens, mask = np.zeros((2, length), int), np.zeros((2, length), bool)
    for i, task in enumerate(observation["task"]):
        text = task.strip().replace("_", " ").replace("\n", " ")
        if policy_type == "pi05":
            bins = np.digitize(state[i], bins=np.linspace(-1, 1, 257)[:-1]) - 1
            text = f"Task: {text}, State: {' '.join(map(str, bins))};\nAction: "
        else:
            text += "\n"
        ids = tokenizer.encode(text)
        tokens[i, : len(ids)], mask[i, : len(ids)] = ids, True
    return tokens, mask


@pytest.mark.parametrize(("policy_type", "adapters"), [("pi0", False), ("pi0", True), ("pi05", False)])
def test_converted_policies_do_what_openpi_does(
    policy_type: str, adapters: bool, tmp_path: Path, sizes: None
):
    arrays = make_checkpoint(tmp_path / "checkpoint", policy_type, adapters=adapters)
    policy = convert_it(tmp_path / "checkpoint")
    config = policy.config
    assert isinstance(config, PI0Config)
    assert config.type == policy_type
    assert list(config.image_features) == [
        f"observation.images.{name}" for name in ("base_0_rgb", "left_wrist_0_rgb", "right_wrist_0_rgb")
    ]
    observation = observe(policy)
    if policy_type == "pi0":  # LeRobot leaves the task as it is
        observation["task"] = [
            task.strip().replace("_", " ").replace("\n", " ") for task in observation["task"]
        ]
    batch = policy.preprocess(observation)
    state = normalized(observation["observation.state"].astype(np.float64), STATE_STATS, policy_type)
    tokens, mask = prompts(observation, state, policy_type, config.tokenizer_max_length)
    np.testing.assert_array_equal(batch["observation.language.tokens"], tokens)
    np.testing.assert_array_equal(batch["observation.language.attention_mask"], mask)
    noise = np.random.default_rng(4).normal(size=(2, CHUNK, openpi_model.ACTION_DIM)).astype(np.float32)
    wanted = openpi_model.sample(
        arrays,
        [observation[key] / 255 * 2 - 1 for key in config.image_features],
        [np.ones(2, bool)] * 3,
        tokens,
        mask,
        np.pad(state, ((0, 0), (0, openpi_model.ACTION_DIM - STATE_DIM))),
        noise,
        config.num_inference_steps,
    )[..., :ACTION_DIM]
    arguments = (policy.params, policy.buffers, batch, jax.random.key(0))
    act = functools.partial(policy.sample_actions, noise=jnp.asarray(noise))
    given = compile_quickly(act, *arguments)(*arguments)
    np.testing.assert_allclose(given, wanted, rtol=0, atol=1e-4 * np.abs(wanted).max())
    wanted = unnormalized(wanted, ACTION_STATS, policy_type)
    np.testing.assert_allclose(policy.postprocess(given), wanted, rtol=0, atol=1e-4 * np.abs(wanted).max())


def test_delta_actions_are_relative_ones(tmp_path: Path, sizes: None, monkeypatch: pytest.MonkeyPatch):
    make_checkpoint(tmp_path, "pi05")
    arguments = ["openpi", str(tmp_path), "--output_dir=x", "--chunk_size=6", "--delta_actions", "2", "-1"]
    given: list[openpi.Settings] = []
    monkeypatch.setitem(convert.COMMANDS, "openpi", (convert.OpenPI, given.append))
    convert.main(arguments)
    policy = openpi.read_policy(tmp_path, given[0])
    state = np.arange(10, dtype=np.float32).reshape(2, 5)
    predicted = np.random.default_rng(0).normal(size=(2, CHUNK, ACTION_DIM)).astype(np.float32)
    mask = np.array([True, True, False, False])
    wanted = unnormalized(predicted, ACTION_STATS, "pi05") + (state[:, :ACTION_DIM] * mask)[:, None]
    actions = policy.postprocess(jnp.asarray(predicted), {"observation.state": state})
    np.testing.assert_allclose(actions, wanted, rtol=1e-5, atol=1e-5)
    policy.config.save(tmp_path)
    policy.save_processors(tmp_path)
    assert base.load_config(tmp_path).action_target == policy.config.action_target
    with pytest.raises(InputError, match=r"delta_actions tell of 5 joints, but the action has 4"):
        openpi.read_policy(tmp_path, openpi.Settings(CHUNK, delta_actions=(4, -1)))


def test_the_prompt_can_be_without_the_state(tmp_path: Path, sizes: None):
    make_checkpoint(tmp_path, "pi05")
    policy = openpi.read_policy(tmp_path, openpi.Settings(CHUNK, discrete_state_input=False))
    observation = observe(policy) | {"task": ["pick up the red cube", "Open the drawer!"]}
    tokens, mask = prompts(observation, np.zeros(0), "pi0", policy.config.tokenizer_max_length)
    batch = policy.preprocess(observation)
    np.testing.assert_array_equal(batch["observation.language.tokens"], tokens)
    np.testing.assert_array_equal(batch["observation.language.attention_mask"], mask)


def test_weights_can_be_rounded_as_lerobot_does(tmp_path: Path, sizes: None):
    arrays = make_checkpoint(tmp_path, "pi0")
    policy = openpi.read_policy(tmp_path / "params", openpi.Settings(CHUNK), "bfloat16")
    assert policy.config.to_dict()["dtype"] == "bfloat16"
    recorded = state_dict.read(ROOT / "pi0" / "bf16_s0" / "model")
    state = torch_state.to_torch(policy.module, policy.params, policy.buffers)
    assert {k: t.dtype for k, t in state.tensors.items()} == {k: t.dtype for k, t in recorded.tensors.items()}
    key = f"{EXPERT}1.mlp.down_proj.weight"
    np.testing.assert_array_equal(state[key], arrays[f"{LLM}/mlp_1/linear"][1].T.astype(jnp.bfloat16))


def test_robots_may_have_fewer_dimensions_than_the_statistics(tmp_path: Path, sizes: None):
    make_checkpoint(tmp_path, "pi0")
    settings = openpi.Settings(CHUNK, cameras=("top",), state_dim=3, action_dim=2)
    policy = openpi.read_policy(tmp_path, settings)
    shapes = {key: feature.shape for key, feature in policy.config.input_features.items()}
    assert shapes == {"observation.images.top": (3, 28, 28), "observation.state": (3,)}
    assert policy.config.action_feature.shape == (2,)
    predicted = np.random.default_rng(0).normal(size=(2, CHUNK, 2)).astype(np.float32)
    stats = {name: values[:2] for name, values in ACTION_STATS.items()}
    wanted = unnormalized(predicted, stats, "pi0")
    np.testing.assert_allclose(policy.postprocess(jnp.asarray(predicted)), wanted, rtol=1e-5)
    with pytest.raises(InputError, match=r"action_dim must be from 1 to 4"):
        openpi.read_policy(tmp_path, openpi.Settings(CHUNK, action_dim=5))


def test_other_sizes_than_lerobots_are_refused(tmp_path: Path):
    make_checkpoint(tmp_path, "pi0")
    with pytest.raises(
        InputError, match=r"params has GemmaSettings\(width=24.*none of LeRobot's gemma_2b, gemma_300m"
    ):
        openpi.read_policy(tmp_path, openpi.Settings(CHUNK))


def test_settings_that_cannot_be_are_refused(tmp_path: Path, sizes: None):
    make_checkpoint(tmp_path, "pi0")
    with pytest.raises(InputError, match=r"chunk_size must be at least 1"):
        openpi.read_policy(tmp_path, openpi.Settings(0))
    with pytest.raises(InputError, match=r"chunk_size"):
        convert.main(["openpi", str(tmp_path), f"--output_dir={tmp_path}/new"])
    with pytest.raises(InputError, match=r"exists already"):
        convert.main(["openpi", str(tmp_path), f"--output_dir={tmp_path}", "--chunk_size=6"])
