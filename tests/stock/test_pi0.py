"""pi0 and pi0.5 compute the same in both frameworks, whoever made or adapted the policy."""

import dataclasses
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax.traverse_util import unflatten_dict

from lerobot_jax import adapter_folder, lora, torch_state
from lerobot_jax.features import FeatureType, NormalizationMode, PolicyFeature
from lerobot_jax.peft_targets import PeftConfig
from lerobot_jax.policies import base
from lerobot_jax.policies.base import FunctionalPolicy, load_config, load_policy
from lerobot_jax.policies.pi0 import PI0Config
from lerobot_jax.policies.pi05 import PI05Config
from lerobot_jax.processors.text import OBS_LANGUAGE_ATTENTION_MASK, OBS_LANGUAGE_TOKENS
from tests.goldens import use_sizes
from tests.stock.conftest import Peer
from tests.stock.policies import new_policy

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


def compute(policy: FunctionalPolicy, batch: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Compute what `compute` in pi0_peer.py does."""
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
    if not any(map(lora.is_adapted, jax.tree.leaves(policy.params, is_leaf=lora.is_adapted))):
        named = torch_state.to_torch(policy.module, gradients, {})
        found |= {f"grad/{key}": value for key, value in named.items()}
    return {key: np.asarray(value, np.float32) for key, value in found.items()}


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
    assert_same(compute(policy, batch), theirs)


@pytest.mark.parametrize("name", STOCK)
def test_we_compute_what_stock_s_policy_does(stock: Peer, tmp_path: Path, name: str):
    settings = SETTINGS | {"normalization_mapping": QUANTILES} | STOCK[name]
    inputs = CAMERAS | {"observation.state": (STATE,)}
    made = {"kind": name, "inputs": inputs, "action": ACTION, "settings": settings, "rename_map": {}}
    stock("make_stock", folder=tmp_path, **made)
    batch = make_batch(tmp_path / "batch.npz")
    theirs = stock("compute", folder=tmp_path, given=tmp_path / "batch.npz", tasks=TASKS)
    assert_same(compute(load_policy(tmp_path), batch), theirs)
