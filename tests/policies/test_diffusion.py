"""What the contract and the goldens do not say about Diffusion Policy."""

import dataclasses
from pathlib import Path

import jax
import numpy as np
import pytest
import safetensors.numpy

from lerobot_jax import train, visualize
from lerobot_jax.errors import InputError
from lerobot_jax.features import ACTION, OBS_STATE, FeatureType, PolicyFeature
from lerobot_jax.policies.base import load_config, load_policy, load_pretrained_parts, make_policy
from lerobot_jax.policies.diffusion import DiffusionConfig
from lerobot_jax.processors import ActionTarget
from tests.data.recordings import record

RECIPE = """
from lerobot_jax.config import DatasetConfig, TrainConfig
from lerobot_jax.policies.diffusion import DiffusionConfig

def get_config(variant=""):
    return TrainConfig(
        job_name="tiny",
        dataset=DatasetConfig(repo_id="test/recorded", root="{root}", eval_split=0.3),
        policy=DiffusionConfig(
            horizon=8, n_action_steps=4, vision_backbone="resnet10w4", pretrained_backbone_weights=None,
            crop_shape=(28, 28), spatial_softmax_num_keypoints=3, down_dims=(8, 16), n_groups=4, kernel_size=3,
            diffusion_step_embed_dim=8, num_train_timesteps=10, num_inference_steps=2, optimizer_lr=1e-3,
        ),
        steps=4, batch_size=8, log_freq=2, save_freq=2, env_eval_freq=0, eval_steps=2, ema_decay=0.9,
    )
"""
FEATURES = {
    "observation.images.top": {
        "dtype": "video",
        "shape": (32, 32, 3),
        "names": ["height", "width", "channels"],
    },
    "observation.state": {"dtype": "float32", "shape": (2,), "names": None},
    "action": {"dtype": "float32", "shape": (2,), "names": None},
}


@pytest.mark.slow
def test_batch_norms_are_averaged_exported_and_resumed(tmp_path: Path):
    root = record(tmp_path / "dataset", lengths=(12, 15, 13), features=FEATURES).root
    recipe = tmp_path / "tiny.py"
    recipe.write_text(RECIPE.format(root=root))
    whole, half = (
        [f"--config={recipe}", f"--config.output_dir={tmp_path / name}"] for name in ("whole", "half")
    )
    train.main(whole)
    train.main([*half, "--config.steps=2"])
    train.main([*half, "--config.resume=True"])
    folders = [tmp_path / name / "checkpoints/last/pretrained_model" for name in ("whole", "half")]
    weights, resumed = (safetensors.numpy.load_file(folder / "model.safetensors") for folder in folders)
    for key, value in weights.items():
        np.testing.assert_array_equal(value, resumed[key], err_msg=key)
    backbone = "diffusion.rgb_encoder.0.backbone"
    assert weights[f"{backbone}.1.num_batches_tracked"] == 4
    assert np.ptp(weights[f"{backbone}.7.0.bn2.running_var"]) > 0  # all began with 1
    assert load_config(folders[0]).crop_shape == (28, 28)
    path = tmp_path / "chunks.png"
    visualize.main([f"--policy.path={folders[0]}", f"--output={path}"])
    assert path.stat().st_size > 5000


def test_images_start_from_published_weights(tmp_path: Path):
    """Files have torchvision's names, and those before 2018 count no batches."""
    config = dataclasses.replace(DiffusionConfig.tiny(), pretrained_backbone_weights=None)
    ones = {
        "mean": np.ones(1, np.float32),
        "std": np.ones(1, np.float32),
        "min": np.zeros(1),
        "max": np.ones(1),
    }
    stats = dict.fromkeys((*config.input_features, ACTION), ones)
    policy = make_policy(config, stats)
    params, buffers = policy.init(jax.random.key(0))
    policy.replace(params=params, buffers=buffers).save_pretrained(tmp_path / "policy")
    saved = safetensors.numpy.load_file(tmp_path / "policy/model.safetensors")
    prefix, names = "diffusion.rgb_encoder.0.backbone.", {"0": "conv1", "1": "bn1"}
    names |= {str(3 + i): f"layer{i}" for i in range(1, 5)}
    published = {"fc.weight": np.zeros((2, 2), np.float32)}
    for key, value in saved.items():
        if key.startswith(prefix) and not key.endswith("num_batches_tracked"):
            first, _, rest = key.removeprefix(prefix).partition(".")
            published[f"{names[first]}.{rest}"] = value + 1
    path = tmp_path / "resnet.safetensors"
    safetensors.numpy.save_file(published, path)
    config = dataclasses.replace(config, pretrained_backbone_weights=str(path))
    policy = make_policy(config, stats)
    params, buffers = load_pretrained_parts(policy, *policy.init(jax.random.key(0)))
    policy.replace(params=params, buffers=buffers).save_pretrained(tmp_path / "started")
    started = safetensors.numpy.load_file(tmp_path / "started/model.safetensors")
    for key, value in saved.items():
        moved = key.startswith(prefix) and not key.endswith("num_batches_tracked")
        np.testing.assert_array_equal(started[key], value + 1 if moved else value, err_msg=key)
    assert load_policy(tmp_path / "started").config.pretrained_backbone_weights is None


@pytest.mark.slow
def test_recomputing_blocks_changes_nothing():
    config = DiffusionConfig.tiny()
    features = {k: f for k, f in config.input_features.items() if k == OBS_STATE}
    features["observation.environment_state"] = PolicyFeature(FeatureType.ENV, (4,))
    config = dataclasses.replace(config, input_features=features, crop_shape=None)
    ones = {"min": -np.ones(1, np.float32), "max": np.ones(1, np.float32)}
    rng = np.random.default_rng(0)
    batch = {
        OBS_STATE: rng.normal(size=(2, 2, 3)).astype(np.float32),
        "observation.environment_state": rng.normal(size=(2, 2, 4)).astype(np.float32),
        ACTION: rng.normal(size=(2, 8, 2)).astype(np.float32),
        "action_is_pad": np.zeros((2, 8), bool),
    }
    gradients = []
    for recompute in (False, True):
        config = dataclasses.replace(config, gradient_checkpointing=recompute)
        policy = make_policy(config, {OBS_STATE: ones, ACTION: ones})
        params, buffers = policy.init(jax.random.key(0))
        gradient_fn = jax.jit(jax.grad(policy.loss_fn, has_aux=True), static_argnames="train")
        program = gradient_fn.lower(params, buffers, batch, jax.random.key(1), train=True).as_text()
        assert ("optimization_barrier" in program) == recompute
        gradients.append(gradient_fn(params, buffers, batch, jax.random.key(1), train=True)[0])
    for a, b in zip(*map(jax.tree.leaves, gradients), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"horizon": 10}, "horizon must be a multiple of 4, because the U-Net has 2 levels"),
        ({"n_action_steps": 8}, r"n_action_steps must be at most horizon - n_obs_steps \+ 1 = 7, not 8"),
        ({"down_dims": (8, 12)}, r"down_dims must be multiples of n_groups=8"),
        ({"kernel_size": 4}, "kernel_size must be odd"),
        ({"use_group_norm": True, "pretrained_backbone_weights": "x"}, "group norm does not suit"),
        ({"use_group_norm": True}, "a multiple of 16 channels, not 4"),
        ({"resize_shape": (8, 8), "crop_shape": None, "crop_ratio": 0.01}, "leaves nothing of resize_shape"),
        (
            {"resize_shape": (32, 32)},
            r"crop_shape \(28, 28\) has no effect with resize_shape; give crop_ratio",
        ),
        ({"optimizer_lr": -1.0}, "optimizer_lr must not be negative"),
        ({"crop_ratio": 0.0}, r"crop_ratio must be in \(0, 1\]"),
        ({"num_inference_steps": 11}, r"num_inference_steps must be in 1\.\.num_train_timesteps=10, not 11"),
        ({"vision_backbone": "vgg16"}, "vision_backbone must be one of resnet"),
        ({"scheduler_name": "polynomial"}, "scheduler_name must be cosine"),
    ],
)
def test_impossible_settings_are_refused(changes: dict, message: str):
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(DiffusionConfig.tiny(), **changes)


@pytest.mark.parametrize(
    ("inputs", "message"),
    [
        ({OBS_STATE: None}, "needs 'observation.state'"),
        ({"observation.images.top": None}, "needs at least one image"),
        ({"observation.images.b": (3, 40, 32)}, "all images must have one shape"),
        ({"observation.images.top": (3, 28, 20)}, r"crop_shape \(28, 28\) does not fit into"),
    ],
)
def test_features_that_do_not_suit_are_refused(inputs: dict, message: str):
    config = DiffusionConfig.tiny()
    features = {k: PolicyFeature(FeatureType.VISUAL, v) for k, v in inputs.items() if v}
    kept = {key: value for key, value in config.input_features.items() if key not in inputs}
    with pytest.raises(InputError, match=message):
        dataclasses.replace(config, input_features=kept | features).check_features()


def test_no_statistics_for_each_step_of_a_part_of_the_chunk():
    for target in (ActionTarget("delta"), ActionTarget("relative", statistics_per_step=True)):
        config = dataclasses.replace(DiffusionConfig.tiny(), action_target=target)
        with pytest.raises(InputError, match="gives only a part of the actions that it is trained on"):
            make_policy(config, {}, target_stats={})
