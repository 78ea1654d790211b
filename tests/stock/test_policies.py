"""A policy folder gives the same actions in both frameworks, whoever made it."""

from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest

from lerobot_jax import convert
from lerobot_jax.features import FeatureType, NormalizationMode, PolicyFeature
from lerobot_jax.policies.act import ACTConfig
from lerobot_jax.policies.base import load_policy
from lerobot_jax.policies.diffusion import DiffusionConfig
from lerobot_jax.policies.multi_task_dit import MultiTaskDiTConfig
from lerobot_jax.policies.vqbet import VQBeTConfig
from tests.goldens import CLIP
from tests.stock.conftest import Peer, lerobot_python
from tests.stock.policies import assert_starts_like_stock, new_policy

pytestmark = [pytest.mark.lerobot, pytest.mark.usefixtures("stand_ins")]

STATE = PolicyFeature(FeatureType.STATE, (3,))
ENV = PolicyFeature(FeatureType.ENV, (5,))
IMAGE = PolicyFeature(FeatureType.VISUAL, (3, 40, 56))
OURS = {
    "two cameras": ACTConfig(
        input_features={
            "observation.state": STATE,
            "observation.images.a": IMAGE,
            "observation.images.b": IMAGE,
        },
        dim_model=64,
        n_heads=4,
        dim_feedforward=96,
        chunk_size=12,
        n_action_steps=5,
    ),
    "environment state": ACTConfig(
        input_features={"observation.environment_state": ENV, "observation.state": STATE},
        normalization_mapping=dict.fromkeys(("STATE", "ENV", "ACTION"), NormalizationMode.MIN_MAX),
        pre_norm=True,
        feedforward_activation="gelu",
        n_decoder_layers=2,
        dim_model=32,
        n_heads=2,
        dim_feedforward=64,
        chunk_size=8,
        n_action_steps=8,
        use_vae=False,
    ),
    "ensembling": ACTConfig(
        input_features={"observation.images.a": IMAGE, "observation.state": STATE},
        vision_backbone="resnet50",
        replace_final_stride_with_dilation=True,
        temporal_ensemble_coeff=0.01,
        n_action_steps=1,
        chunk_size=6,
        dim_model=32,
        n_heads=2,
        dim_feedforward=64,
    ),
}
DIFFUSION = {
    "DDPM, random crops": DiffusionConfig(
        input_features={"observation.state": STATE, "observation.images.a": IMAGE},
        horizon=8,
        n_action_steps=5,
        crop_shape=(36, 50),
        down_dims=(32, 64),
        pretrained_backbone_weights=None,
        use_group_norm=True,
        num_train_timesteps=20,
    ),
    "DDIM, two encoders, resized": DiffusionConfig(
        input_features={
            "observation.images.a": IMAGE,
            "observation.state": STATE,
            "observation.images.b": IMAGE,
        },
        n_obs_steps=3,
        horizon=16,
        n_action_steps=8,
        resize_shape=(48, 44),
        crop_ratio=0.8,
        vision_backbone="resnet34",
        down_dims=(16, 24, 32),
        kernel_size=3,
        use_film_scale_modulation=False,
        noise_scheduler_type="DDIM",
        num_inference_steps=10,
    ),
    "environment state, actions predicted": DiffusionConfig(
        input_features={"observation.environment_state": ENV, "observation.state": STATE},
        normalization_mapping=dict.fromkeys(("STATE", "ENV", "ACTION"), NormalizationMode.MEAN_STD),
        n_obs_steps=1,
        horizon=4,
        n_action_steps=4,
        down_dims=(64,),
        prediction_type="sample",
        beta_schedule="laplace",
        clip_sample_range=3.0,
        num_train_timesteps=50,
        num_inference_steps=7,
    ),
}
VQBET = {
    "VQ-BeT, batch norm": VQBeTConfig(
        input_features={"observation.images.a": IMAGE, "observation.state": STATE},
        crop_shape=(36, 50),
        vqvae_n_embed=6,
        vqvae_embedding_dim=16,
        gpt_block_size=40,
        gpt_input_dim=24,
        gpt_output_dim=20,
        gpt_n_layer=3,
        gpt_n_head=4,
        gpt_hidden_dim=32,
    ),
    "VQ-BeT, codes one by one, an unused input": VQBeTConfig(
        input_features={
            "observation.state": STATE,
            "observation.environment_state": ENV,
            "observation.images.a": IMAGE,
        },
        n_obs_steps=3,
        n_action_pred_token=4,
        action_chunk_size=1,
        vision_backbone="resnet34",
        crop_shape=None,
        pretrained_backbone_weights=None,
        use_group_norm=True,
        spatial_softmax_num_keypoints=7,
        gpt_input_dim=40,
        gpt_n_layer=2,
        gpt_n_head=1,
        gpt_hidden_dim=48,
        bet_softmax_temperature=2.0,
        sequentially_select=True,
    ),
}
SMALL_DIT: dict[str, Any] = {
    "hidden_dim": 24,
    "num_layers": 2,
    "num_heads": 3,
    "timestep_embed_dim": 16,
    "vision_encoder_name": CLIP,
    "text_encoder_name": CLIP,
    "tokenizer_max_length": 24,
    "image_crop_shape": (32, 32),
}
MULTI_TASK_DIT = {
    "flow matching, two towers": MultiTaskDiTConfig(
        **SMALL_DIT,
        input_features={
            "observation.images.b": IMAGE,
            "observation.state": STATE,
            "observation.images.a": IMAGE,
        },
        n_obs_steps=1,
        horizon=9,
        n_action_steps=9,
        objective="flow_matching",
        num_integration_steps=7,
        integration_method="rk4",
        sigma_min=0.1,
        use_separate_rgb_encoder_per_camera=True,
        rope_base=50.0,
    ),
    "DDPM, keypoints that are not seen": MultiTaskDiTConfig(
        **SMALL_DIT | {"image_crop_shape": None},
        input_features={"observation.environment_state": ENV, "observation.state": STATE},
        n_obs_steps=3,
        horizon=12,
        n_action_steps=5,
        num_train_timesteps=20,
        use_rope=False,
        use_positional_encoding=True,
    ),
}
STOCK_DIT: dict[str, tuple[dict[str, Any], dict[str, tuple[int, ...]]]] = {
    "DDIM, tasks padded left": (
        SMALL_DIT
        | {
            "noise_scheduler_type": "DDIM",
            "num_inference_steps": 5,
            "image_resize_shape": (34, 40),
            "tokenizer_padding_side": "left",
            "use_positional_encoding": True,
        },
        {"observation.state": (4,), "observation.images.a": (3, 50, 64), "observation.images.b": (3, 50, 64)},
    ),
    "Euler, a crop that stock drops": (
        SMALL_DIT | {"objective": "flow_matching", "num_integration_steps": 10, "image_crop_shape": (40, 40)},
        {"observation.images.top": (3, 32, 32), "observation.state": (2,)},
    ),
}
# Settings, inputs and names of observations outside, for policies that stock LeRobot makes
STOCK: dict[str, tuple[dict[str, Any], dict[str, tuple[int, ...]], dict[str, str]]] = {
    "two cameras, renamed": (
        {
            "dim_model": 48,
            "n_heads": 3,
            "dim_feedforward": 80,
            "chunk_size": 10,
            "n_action_steps": 4,
            "replace_final_stride_with_dilation": 0,  # what lerobot-train writes for False
        },
        {"observation.images.a": (3, 48, 40), "observation.images.b": (3, 33, 65), "observation.state": (6,)},
        {"observation.images.front": "observation.images.a"},
    ),
    "keypoints, quantiles": (
        {
            "normalization_mapping": {"STATE": "QUANTILES", "ENV": "QUANTILE10", "ACTION": "QUANTILES"},
            "pre_norm": True,
            "feedforward_activation": "gelu",
            "n_encoder_layers": 2,
            "n_decoder_layers": 3,
            "use_vae": False,
            "dim_model": 32,
            "chunk_size": 7,
            "n_action_steps": 7,
        },
        {"observation.environment_state": (9,), "observation.state": (4,)},
        {},
    ),
    "everything, ensembling": (
        {
            "normalization_mapping": {"VISUAL": "MIN_MAX", "STATE": "IDENTITY", "ACTION": "MIN_MAX"},
            "vision_backbone": "resnet34",
            "latent_dim": 5,
            "n_vae_encoder_layers": 1,
            "temporal_ensemble_coeff": -0.1,
            "n_action_steps": 1,
            "chunk_size": 5,
            "dim_model": 64,
        },
        {
            "observation.state": (2,),
            "observation.environment_state": (3,),
            "observation.images.top": (3, 64, 64),
        },
        {},
    ),
}


def make_observations(
    path: Path, shapes: dict[str, tuple[int, ...]], steps: int = 9, batch: int = 2
) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(2)
    arrays = {key: rng.uniform(0, 1, (steps, batch, *s)).astype(np.float32) for key, s in shapes.items()}
    np.savez(path, allow_pickle=False, **arrays)
    return arrays


def assert_acts_like_stock(stock: Peer, folder: Path, observations: Path) -> None:
    """Compare the first chunk and every selected action of a policy folder on the same raw observations."""
    theirs = stock("act", folder=folder, observations=observations)
    policy = load_policy(folder)
    with np.load(observations) as file:
        ours = dict(file)
    first = policy.preprocess({key: value[0] for key, value in ours.items()})
    sample = jax.jit(policy.sample_actions)
    chunk = policy.postprocess(sample(policy.params, policy.buffers, first, jax.random.key(0)))
    np.testing.assert_allclose(chunk, theirs["chunk"], rtol=1e-4, atol=1e-4)
    runner = policy.make_runner(chunk.shape[0])
    for t, expected in enumerate(theirs["actions"]):
        actions = runner.select_action({key: value[t] for key, value in ours.items()})
        np.testing.assert_allclose(actions, expected, rtol=1e-4, atol=1e-4, err_msg=f"step {t}")
    assert np.ptp(theirs["actions"], axis=(0, 1)).min() > 1e-2  # the policy is not a constant


@pytest.mark.parametrize("name", OURS)
def test_stock_loads_our_policy_and_acts_alike(stock: Peer, tmp_path: Path, name: str):
    policy = new_policy(OURS[name], action=2)
    policy.save_pretrained(tmp_path / "policy")
    shapes = {key: feature.shape for key, feature in policy.config.input_features.items()}
    make_observations(tmp_path / "observations.npz", shapes)
    assert_acts_like_stock(stock, tmp_path / "policy", tmp_path / "observations.npz")


@pytest.mark.parametrize("name", STOCK)
def test_our_policy_loads_stocks_and_acts_alike(stock: Peer, tmp_path: Path, name: str):
    settings, inputs, rename_map = STOCK[name]
    folder, observations = tmp_path / "policy", tmp_path / "observations.npz"
    settings = settings | {"pretrained_backbone_weights": None}
    stock(
        "make_stock",
        folder=folder,
        kind="act",
        inputs=inputs,
        action=3,
        settings=settings,
        rename_map=rename_map,
    )
    original = {new: old for old, new in rename_map.items()}
    make_observations(observations, {original.get(key, key): shape for key, shape in inputs.items()})
    assert_acts_like_stock(stock, folder, observations)


@pytest.mark.parametrize("name", [*DIFFUSION, *VQBET])
def test_stock_generates_our_actions_from_the_same_noise(tmp_path: Path, name: str):
    new_policy((DIFFUSION | VQBET)[name], action=2).save_pretrained(tmp_path)
    convert.main(["verify", str(tmp_path), f"--lerobot_python={lerobot_python()}"])


def test_our_vqbet_loads_stocks_and_chooses_the_same_codes(stock: Peer, tmp_path: Path):
    small = {"gpt_n_layer": 2, "gpt_n_head": 2, "gpt_hidden_dim": 16, "gpt_input_dim": 32, "vqvae_n_embed": 7}
    inputs = {"observation.image": (3, 90, 86), "observation.state": (4,)}
    settings = small | {"n_obs_steps": 2, "bet_softmax_temperature": 1.0, "pretrained_backbone_weights": None}
    what = {"kind": "vqbet", "inputs": inputs, "action": 3, "settings": settings, "rename_map": {}}
    stock("make_stock", folder=tmp_path, **what)
    convert.main(["verify", str(tmp_path), f"--lerobot_python={lerobot_python()}"])


@pytest.mark.parametrize("name", MULTI_TASK_DIT)
def test_stock_generates_our_actions_for_a_task(tmp_path: Path, name: str):
    policy = new_policy(MULTI_TASK_DIT[name], action=2)
    # A new policy's layers do nothing yet.
    moved = jax.tree.map(
        lambda x: x + 0.1 * jax.random.normal(jax.random.key(x.size), x.shape), policy.params
    )
    policy.replace(params=moved).save_pretrained(tmp_path)
    convert.main(["verify", str(tmp_path), f"--lerobot_python={lerobot_python()}"])


@pytest.mark.parametrize("name", STOCK_DIT)
def test_we_generate_stocks_actions_for_a_task(stock: Peer, tmp_path: Path, name: str):
    settings, inputs = STOCK_DIT[name]
    made = {"kind": "multi_task_dit", "inputs": inputs, "action": 3, "settings": settings, "rename_map": {}}
    stock("make_stock", folder=tmp_path, **made)
    convert.main(["verify", str(tmp_path), f"--lerobot_python={lerobot_python()}"])


# Stock LeRobot moves the running statistics of batch norms when it makes one of the others.
NEW = (
    *OURS,
    "DDPM, random crops",
    "environment state, actions predicted",
    "flow matching, two towers",
    "VQ-BeT, codes one by one, an unused input",
)


@pytest.mark.parametrize("name", NEW)
def test_new_policies_start_like_stock_ones(stock: Peer, tmp_path: Path, name: str):
    policy = new_policy((OURS | DIFFUSION | MULTI_TASK_DIT | VQBET)[name], action=2)
    assert_starts_like_stock(stock, policy, tmp_path)
