"""pi0 and pi0.5 compute the same in both frameworks, whoever made or adapted the policy."""

import dataclasses
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy

from lerobot_jax import adapter_folder, convert, lora, state_dict, torch_state
from lerobot_jax.features import FeatureType, NormalizationMode, PolicyFeature
from lerobot_jax.peft_targets import PeftConfig
from lerobot_jax.policies import base
from lerobot_jax.policies.base import FunctionalPolicy, load_config, load_policy
from lerobot_jax.policies.pi0 import PI0Config
from lerobot_jax.policies.pi05 import PI05Config
from lerobot_jax.processors.text import OBS_LANGUAGE_ATTENTION_MASK, OBS_LANGUAGE_TOKENS
from tests.recorded_sizes import use_sizes
from tests.stock.conftest import Peer
from tests.stock.policies import assert_starts_like_stock, new_policy

pytestmark = [pytest.mark.lerobot, pytest.mark.usefixtures("stand_ins", "small")]

KEY = jax.random.key(0)
SIZES = {
    "gemma_2b": {"width": 40, "depth": 2, "mlp_dim": 56, "num_heads": 8, "head_dim": 16},
    "gemma_300m": {"width": 24, "depth": 2, "mlp_dim": 36, "num_heads": 8, "head_dim": 16},
    "vision": {
        "hidden_size": 18,
        "intermediate_size": 20,
        "num_hidden_layers": 2,
        "num_attention_heads": 3,
        "patch_size": 14,
    },
    "vocab_size": 512,
}
CAMERAS = {"observation.images.top": (3, 30, 44), "observation.images.wrist": (3, 52, 28)}
STATE, ACTION, WIDE = 6, 4, 9
JOINTS = ("shoulder", "elbow", "wrist.pos", "Gripper.pos")
SETTINGS: dict[str, Any] = {
    "chunk_size": 7,
    "n_action_steps": 3,
    "num_inference_steps": 5,
    "max_state_dim": 11,
    "max_action_dim": WIDE,
    "image_resolution": (42, 42),
}
RELATIVE: dict[str, Any] = {
    "use_relative_actions": True,
    "relative_exclude_joints": ("gripper",),
    "action_feature_names": JOINTS,
}
QUANTILES = {"VISUAL": "IDENTITY", "STATE": "QUANTILES", "ACTION": "QUANTILES"}
INPUTS = {key: PolicyFeature(FeatureType.VISUAL, shape) for key, shape in CAMERAS.items()}
OURS = {
    "pi0": PI0Config(
        **SETTINGS,
        **RELATIVE,
        input_features=INPUTS | {"observation.state": PolicyFeature(FeatureType.STATE, (STATE,))},
        normalization_mapping={key: NormalizationMode(mode) for key, mode in QUANTILES.items()},
        empty_cameras=1,
        tokenizer_max_length=40,
    ),
    "pi05": PI05Config(
        **SETTINGS,
        input_features={"observation.state": PolicyFeature(FeatureType.STATE, (STATE,))} | INPUTS,
        empty_cameras=2,
        tokenizer_max_length=90,
        min_period=1e-2,
    ),
}
STOCK: dict[str, dict[str, Any]] = {
    "pi0": {"tokenizer_max_length": 24, "empty_cameras": 2, "freeze_vision_encoder": True},
    "pi05": RELATIVE | {"tokenizer_max_length": 70, "train_expert_only": True},
}
TASKS = ["  pick_up the\n“red” cube 🧊  ", "", "Öffne die Schublade; then <eos> push\tit!\n"]


@pytest.fixture(scope="module")
def stock(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Peer]:
    peer = Peer(tmp_path_factory.mktemp("stock"), Path(__file__).with_name("pi0_peer.py"))
    peer("use_sizes", sizes=SIZES)
    yield peer
    peer.close()


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    use_sizes({"pi_tiny": SIZES}, monkeypatch)
    yield
    base._module.cache_clear()


def moved(policy: FunctionalPolicy, share: float = 0.1) -> FunctionalPolicy:
    """Move every weight, also those that start as zeros."""
    rng = np.random.default_rng(4)

    def move(x: Any) -> jax.Array:
        return (x + share * rng.normal(size=x.shape)).astype(x.dtype)

    return policy.replace(params=jax.tree.map(move, policy.params))


def make_batch(path: Path) -> dict[str, np.ndarray]:
    """Write raw samples, of states and actions far outside the statistics, and the draws; give them."""
    rng = np.random.default_rng(2)
    arrays = {key: rng.uniform(size=(len(TASKS), *shape)) for key, shape in CAMERAS.items()}
    chunk = (len(TASKS), SETTINGS["chunk_size"])
    arrays |= {"observation.state": 2 * rng.normal(size=(len(TASKS), STATE))}
    arrays |= {"action": 2 * rng.normal(size=(*chunk, ACTION)), "noise": rng.normal(size=(*chunk, WIDE))}
    arrays |= {"time": rng.uniform(0.001, 1, len(TASKS))}
    arrays = {key: value.astype(np.float32) for key, value in arrays.items()}
    arrays["action_is_pad"] = np.arange(chunk[1])[None] >= np.array([chunk[1], 2, 5])[:, None]
    np.savez(path, allow_pickle=False, **arrays)
    return arrays


def compute(policy: FunctionalPolicy, batch: dict[str, np.ndarray]) -> tuple[dict[str, np.ndarray], Any]:
    """Compute what `compute` in pi0_peer.py does; the gradients are a tree of their own."""
    draws = {name: jnp.asarray(batch[name]) for name in ("noise", "time")}
    raw = {key: value for key, value in batch.items() if key not in draws}
    inputs = policy.preprocess(raw | {"task": TASKS})

    def loss_of(params: Any) -> Any:
        mean, each = (
            policy.loss_fn(params, {}, inputs, KEY, train=True, reduction=reduction, **draws)
            for reduction in ("mean", "none")
        )
        return mean[0], {"losses": each[0], "loss_per_dim": jnp.stack([*mean[1][0].values()])}

    (loss, found), gradients = jax.jit(jax.value_and_grad(loss_of, has_aux=True))(policy.params)
    chunk = jax.jit(policy.sample_actions)(policy.params, {}, inputs, KEY, noise=draws["noise"])
    found |= {"loss": loss, "chunk": policy.postprocess(chunk, raw)}
    return {key: np.asarray(value) for key, value in found.items()}, gradients


def compute_all(policy: FunctionalPolicy, batch: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Compute what `compute` in pi0_peer.py does."""
    found, gradients = compute(policy, batch)
    named = torch_state.to_torch(policy.module, gradients, {})
    return found | {f"grad/{key}": np.asarray(value, np.float32) for key, value in named.items()}


def assert_same(ours: dict[str, np.ndarray], theirs: dict[str, np.ndarray]) -> None:
    largest = max(np.abs(value).max() for key, value in theirs.items() if key.startswith("grad/"))
    for key, value in theirs.items():
        limit = 1e-5 * largest if key.startswith("grad/") else 1e-4
        np.testing.assert_allclose(ours[key], value, rtol=1e-4, atol=limit, err_msg=key)
    assert np.ptp(theirs["chunk"], axis=(0, 1)).min() > 1e-2  # the policy is not a constant


@pytest.mark.parametrize("name", OURS)
def test_stock_computes_what_our_policy_does(stock: Peer, tmp_path: Path, name: str):
    policy = moved(new_policy(OURS[name], ACTION))
    policy.save_pretrained(tmp_path)
    batch = make_batch(tmp_path / "batch.npz")
    theirs = stock("compute", folder=tmp_path, given=tmp_path / "batch.npz", tasks=TASKS)
    assert_same(compute_all(policy, batch), theirs)


def test_stock_takes_every_weight(stock: Peer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """And says so by the command that users have; a weight that is missing or left over is an error."""
    policy = moved(new_policy(OURS["pi0"], ACTION))
    policy.save_pretrained(tmp_path)

    def run_stock(python: str, folder: Path, given: Path, out: Path) -> None:
        stock("verify", folder=folder, given=given, out=out)

    monkeypatch.setattr(convert, "_run_stock", run_stock)  # its process has not the small sizes
    convert.main(["verify", str(tmp_path), "--lerobot_python=the peer's"])
    weights = dict(state_dict.read(tmp_path))
    head = "model.action_out_proj.bias"
    for change in ({"model.extra": weights[head]}, {head: None}):
        changed = {key: value for key, value in (weights | change).items() if value is not None}
        state_dict.write(changed, tmp_path / state_dict.MODEL_NAME)
        with pytest.raises(pytest.fail.Exception, match=next(iter(change))):
            stock("try_to_load", folder=tmp_path)


@pytest.mark.parametrize("name", STOCK)
def test_we_compute_what_stock_s_policy_does(stock: Peer, tmp_path: Path, name: str):
    settings = SETTINGS | {"normalization_mapping": QUANTILES} | STOCK[name]
    inputs = CAMERAS | {"observation.state": (STATE,)}
    made = {"kind": name, "inputs": inputs, "action": ACTION, "settings": settings, "rename_map": {}}
    stock("make_stock", folder=tmp_path, **made)
    batch = make_batch(tmp_path / "batch.npz")
    theirs = stock("compute", folder=tmp_path, given=tmp_path / "batch.npz", tasks=TASKS)
    assert_same(compute_all(load_policy(tmp_path), batch), theirs)


@pytest.mark.parametrize(("name", "kept"), [("pi0", "float32"), ("pi0", "bfloat16"), ("pi05", "float32")])
def test_in_bfloat16_we_are_as_near_to_float32_as_stock_is(stock: Peer, tmp_path: Path, name: str, kept: str):
    """As the test of this name in tests/policies/test_pi0.py, for weights that are kept in either type."""
    config = dataclasses.replace(OURS[name], dtype="bfloat16")
    policy = moved(new_policy(config, ACTION))
    policy = policy.replace(params=jax.tree.map(lambda x: x.astype(kept), policy.params))
    policy.save_pretrained(tmp_path)
    batch = make_batch(tmp_path / "batch.npz")
    theirs = stock("compute", folder=tmp_path, given=tmp_path / "batch.npz", tasks=TASKS)
    ours = compute_all(policy, batch)
    whole = load_policy(tmp_path, config=dataclasses.replace(load_config(tmp_path), dtype="float32"))
    whole = whole.replace(params=jax.tree.map(lambda x: x.astype(jnp.float32), whole.params))
    exact = compute_all(whole, batch)
    for kinds in (["chunk"], ["losses", "loss_per_dim"], [key for key in theirs if key.startswith("grad/")]):
        a, b, c = (np.concatenate([x[key].ravel() for key in kinds]) for x in (ours, theirs, exact))
        costs = np.linalg.norm(b - c)
        assert 0 < np.linalg.norm(a - c) < 2 * costs, kinds[0]
        assert np.linalg.norm(a - b) < 3 * costs, kinds[0]


@pytest.mark.parametrize("name", OURS)
def test_prompts_are_stock_s(stock: Peer, tmp_path: Path, name: str):
    """States on the edges of bins, far outside, and of a dimension that never moves; texts of all kinds."""
    low = np.array([0, 1e4, -3e6, 0.5, -0.1, 7], np.float32)
    span = np.array([2, 1e-1, 5e6, 0, 0.3, 1 / 3], np.float32)
    stats = {"mean": low, "std": span + 1, "min": low - 1, "max": low + 9, "q01": low, "q99": low + span}
    policy = new_policy(OURS[name], ACTION, {"observation.state": stats})
    policy.config.exported().save(tmp_path)
    policy.save_processors(tmp_path)
    share = np.random.default_rng(0).integers(0, 257, (20, 6)).astype(np.float32) / 256
    state = low + span * share
    state[1::3] = np.nextafter(state[1::3], np.float32(np.inf))
    state[2::3] = np.nextafter(state[2::3], np.float32(-np.inf))
    state[:4] = np.array([[-1e20], [1e20], [0.0], [-0.0]])
    texts = [
        "",
        " ",
        "\n",
        "_",
        "a\nb_c",
        "\tTask: x, State: 1;\nAction: ",
        "<bos><eos><pad>",
        "日本語 🤖",
        "\u00a0x",
    ]
    texts += [
        "long " * 60,
        "e\u0301 é",
        "a  b",
        "\r\n",
        "\u2028",
        "\\n",
        "0 -1 255",
        "“”",
        "▁x",
        "A" * 30,
        "x\n",
    ]
    np.savez(tmp_path / "given.npz", allow_pickle=False, **{"observation.state": state})
    theirs = stock("preprocess", folder=tmp_path, given=tmp_path / "given.npz", tasks=texts)
    ours = policy.tokenize({"observation.state": state, "task": texts})
    for key in (OBS_LANGUAGE_TOKENS, OBS_LANGUAGE_ATTENTION_MASK):
        np.testing.assert_array_equal(ours[key], theirs[key], err_msg=key)
    full = ours[OBS_LANGUAGE_ATTENTION_MASK].all(axis=1)
    assert full.any()
    assert not full.all()


@pytest.mark.parametrize(("name", "maker"), [("pi0", "ours"), ("pi05", "stock")])
def test_adapters_are_used_and_trained_alike(stock: Peer, tmp_path: Path, name: str, maker: str):
    folder, adapters = tmp_path / "base", tmp_path / "adapters"
    policy = moved(new_policy(OURS[name], ACTION))
    policy.save_pretrained(folder)
    settings: dict[str, Any] = {"r": 3, "lora_alpha": 5}
    config = dataclasses.replace(policy.config, pretrained_path=str(folder))
    plan = lora.plan(PeftConfig(**settings), config, policy.module)
    if maker == "ours":
        adapted = policy.replace(params=plan.attach(policy.params, KEY))
        adapter_folder.write(adapters, policy.module, plan, moved(adapted).params, policy.buffers)
        dataclasses.replace(policy.config.exported(), use_peft=True).save(adapters)
        policy.save_processors(adapters)
    else:
        stock("adapt", folder=folder, adapters=adapters, settings=settings | {"method_type": "LORA"})
    batch, given = make_batch(tmp_path / "batch.npz"), tmp_path / "batch.npz"
    theirs = stock("compute", folder=folder, given=given, tasks=TASKS, adapters=adapters)
    adapted = load_policy(adapters, merge_adapters=False)
    found, gradients = compute(adapted, batch)
    adapter_folder.write(tmp_path / "gradients", policy.module, plan, gradients, {})
    named = safetensors.numpy.load_file(tmp_path / "gradients/adapter_model.safetensors")
    theirs = {key.replace(".default.", "."): value for key, value in theirs.items()}
    found |= {f"grad/{key}": value for key, value in named.items()}
    assert found.keys() == theirs.keys()
    assert_same(found, theirs)


@pytest.mark.parametrize("name", OURS)
def test_new_policies_start_like_stock_ones(stock: Peer, tmp_path: Path, name: str):
    assert_starts_like_stock(stock, new_policy(OURS[name], ACTION), tmp_path)
