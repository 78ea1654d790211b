"""What the contract and the goldens do not say about VQ-BeT."""

import dataclasses
import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy
from flax import nnx

from lerobot_jax import checkpoint, train
from lerobot_jax.checkpoint import TRAINING_STATE
from lerobot_jax.errors import InputError
from lerobot_jax.features import OBS_STATE, FeatureType, PolicyFeature
from lerobot_jax.metrics import read_metrics
from lerobot_jax.policies.base import load_structure
from lerobot_jax.policies.vqbet import VQBeTConfig
from lerobot_jax.policies.vqbet.modeling import focal_losses
from lerobot_jax.policies.vqbet.vqvae import VqVae
from tests.data.recordings import record

RECIPE = """
from lerobot_jax.config import DatasetConfig, TrainConfig
from lerobot_jax.policies.vqbet import VQBeTConfig

def get_config(variant=""):
    return TrainConfig(
        job_name="tiny",
        dataset=DatasetConfig(repo_id="test/recorded", root="{root}"),
        policy=VQBeTConfig(
            n_obs_steps=2, n_action_pred_token=2, action_chunk_size=3, vision_backbone="resnet10w4",
            crop_shape=(28, 28), pretrained_backbone_weights=None, spatial_softmax_num_keypoints=3,
            n_vqvae_training_steps=3, vqvae_n_embed=4, vqvae_embedding_dim=6, vqvae_enc_hidden_dim=8,
            vqvae_kmeans_init=True, gpt_block_size=12, gpt_input_dim=8, gpt_output_dim=8, gpt_n_layer=1,
            gpt_n_head=2, gpt_hidden_dim=8, scheduler_warmup_steps=1,
        ),
        steps=6, batch_size=8, log_freq=1, save_freq=2, keep_last=0, env_eval_freq=0, ema_decay=0.9,
        gradient_accumulation_steps=2,
    )
"""
FEATURES = {
    "observation.image": {"dtype": "video", "shape": (32, 32, 3), "names": ["height", "width", "channels"]},
    "observation.state": {"dtype": "float32", "shape": (2,), "names": None},
    "action": {"dtype": "float32", "shape": (2,), "names": None},
}
VQVAE = "vqbet.action_head.vqvae_model"


@pytest.mark.slow
def test_phases_change_in_a_run_and_in_a_resumed_one(tmp_path: Path):
    """With averaged weights and gradient accumulation; the codes are learned in the first three of six steps."""
    root = record(tmp_path / "dataset", lengths=(12, 15, 13), features=FEATURES).root
    recipe = tmp_path / "tiny.py"
    recipe.write_text(RECIPE.format(root=root))
    whole, half = (
        [f"--config={recipe}", f"--config.output_dir={tmp_path / name}"] for name in ("whole", "half")
    )
    train.main(whole)
    train.main([*half, "--config.steps=2"])
    train.main([*half, "--config.resume=True"])

    weights = {}
    for step in (2, 4, 6):
        runs = [tmp_path / name / f"checkpoints/{step:06d}" for name in ("whole", "half")]
        exported, resumed = (
            safetensors.numpy.load_file(run / "pretrained_model/model.safetensors") for run in runs
        )
        for key, value in exported.items():
            np.testing.assert_array_equal(value, resumed[key], err_msg=f"{step} {key}")
        policy = load_structure(runs[0] / "pretrained_model")
        raw, raw_resumed = (checkpoint.restore_weights(policy, run / TRAINING_STATE, "raw") for run in runs)
        both = [jax.tree.leaves((run.params, run.buffers)) for run in (raw, raw_resumed)]
        for ours, theirs in zip(*both, strict=True):
            np.testing.assert_array_equal(ours, theirs)
        weights[step] = raw
        assert exported[f"{VQVAE}.discretized"] == exported[f"{VQVAE}.vq_layer.freeze_codebook"] == (step > 3)
        assert f"{VQVAE}.optimized_steps" not in exported
        vqvae = raw.buffers["vqbet"]["action_head"]["vqvae_model"]
        assert vqvae["optimized_steps"] == min(step, 3)  # not one for each forward pass
    config = json.loads((tmp_path / "whole/checkpoints/last/pretrained_model/config.json").read_text())
    assert "vqvae_kmeans_init" not in config

    def part(step: int, *names: str) -> list[np.ndarray]:
        tree = weights[step].params["vqbet"]
        for name in names:
            tree = tree[name]
        return [np.asarray(x) for x in jax.tree.leaves(tree)]

    learned, kept = (part(step, "action_head", "vqvae_model") for step in (4, 6))
    assert all((a == b).all() for a, b in zip(learned, kept, strict=True))
    assert any((a != b).any() for a, b in zip(part(4, "policy"), part(6, "policy"), strict=True))
    records = read_metrics(tmp_path / "whole/metrics.jsonl")
    assert ["recon_l1_error" in row for row in records] == [True] * 3 + [False] * 3
    assert ["offset_loss" in row for row in records] == [False] * 3 + [True] * 3


def new_vqvae(**changes) -> VqVae:
    config = dataclasses.replace(VQBeTConfig.tiny(), vqvae_n_embed=3, **changes)
    return VqVae(config, rngs=nnx.Rngs(params=0))


def test_codes_begin_as_the_centres_of_clusters_if_asked():
    centres = jnp.array([[0.0] * 6, [8.0] * 6, [-8.0] * 6])
    x = jnp.repeat(centres, jnp.array([5, 3, 8]), axis=0) + 0.01 * jax.random.normal(
        jax.random.key(0), (16, 6)
    )
    layer = new_vqvae(vqvae_kmeans_init=True).vq_layer
    book = layer.codebooks[0]
    assert not book.initted[0]
    # This key begins with a vector of each cluster; others need not find them.
    quantized = layer(x, False, jax.random.key(1))
    np.testing.assert_allclose(quantized.vectors, x, atol=0.05)
    order = np.argsort(book.embed[0, :, 0])
    np.testing.assert_allclose(book.embed[0, order], centres[jnp.array([2, 0, 1])], atol=0.05)
    np.testing.assert_array_equal(book.cluster_size[0, order], [8, 5, 3])
    np.testing.assert_allclose(book.embed_avg[...], book.embed[...] * book.cluster_size[..., None], rtol=1e-6)
    assert book.initted[0]
    before = book.embed[...]
    layer(10 + x, False, jax.random.key(1))  # once is enough
    np.testing.assert_array_equal(book.embed[...], before)
    layer(10 + x, True, jax.random.key(1))
    assert (np.asarray(book.embed[...]) != before).any()


def test_unused_codes_are_huge_at_first_unless_they_begin_as_clusters():
    """As in LeRobot: cluster sizes begin at 0, and a code is divided by its cluster's size."""
    chunks = jax.random.normal(jax.random.key(0), (40, 6))
    largest = []
    for has_kmeans in (False, True):
        vqvae = new_vqvae(vqvae_kmeans_init=has_kmeans)
        first = vqvae.vq_layer.codebooks[0]
        if not has_kmeans:
            first.embed[...] = first.embed[...].at[0, 2].set(100.0)  # nothing is near
        decoded, _ = vqvae.reconstruct(chunks, True, jax.random.key(1))
        assert np.isfinite(decoded).all()
        largest.append(np.abs(first.embed[...]).max())
    assert largest[0] > 1e3
    assert largest[1] < 10


def test_focal_loss_is_the_cross_entropy_of_what_is_wrong():
    logits = jnp.log(jnp.array([[0.9, 0.1], [0.5, 0.5]]))
    expected = [-(0.1**2) * np.log(0.9), -(0.5**2) * np.log(0.5)]
    np.testing.assert_allclose(focal_losses(logits, jnp.array([0, 1])), expected, rtol=1e-4)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"n_action_pred_token": 0}, "n_action_pred_token must be at least 1"),
        ({"gpt_n_head": 3}, "gpt_hidden_dim must be a multiple of gpt_n_head=3, not 8"),
        ({"gpt_block_size": 6}, "gpt_block_size must be at least 7"),
        ({"use_group_norm": True, "pretrained_backbone_weights": "x"}, "group norm does not suit"),
        ({"use_group_norm": True}, "a multiple of 16 channels, not 4"),
        ({"crop_shape": (28, 0)}, r"crop_shape must be \(height, width\)"),
        ({"dropout": 1.0}, r"dropout must be in \[0, 1\)"),
        ({"bet_softmax_temperature": 0.0}, "bet_softmax_temperature must be positive"),
        ({"n_vqvae_training_steps": -1}, "n_vqvae_training_steps must not be negative"),
        ({"vision_backbone": "vgg16"}, "vision_backbone must be one of resnet"),
    ],
)
def test_impossible_settings_are_refused(changes: dict, message: str):
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(VQBeTConfig.tiny(), **changes)


@pytest.mark.parametrize(
    ("inputs", "message"),
    [
        ({OBS_STATE: None}, "needs 'observation.state'"),
        ({"observation.images.top": None}, "needs exactly one image, not 0"),
        ({"observation.images.b": PolicyFeature(FeatureType.VISUAL, (3, 32, 32))}, "one image, not 2"),
        ({"observation.images.top": PolicyFeature(FeatureType.VISUAL, (3, 28, 20))}, "does not fit into"),
        ({"observation.environment_state": PolicyFeature(FeatureType.ENV, (4,))}, "from the wrong tokens"),
    ],
)
def test_features_that_do_not_suit_are_refused(inputs: dict, message: str):
    config = VQBeTConfig.tiny()
    features = {key: feature for key, feature in (config.input_features | inputs).items() if feature}
    with pytest.raises(InputError, match=message):
        dataclasses.replace(config, input_features=features).check_features()
