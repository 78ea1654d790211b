"""Diffusion Policy: a U-Net turns noise into a chunk of actions, given the last observations.

Paper: "Diffusion Policy: Visuomotor Policy Learning via Action Diffusion" (https://arxiv.org/abs/2303.04137).
Mirrors `lerobot.policies.diffusion.modeling_diffusion`; module names are LeRobot's, so that torch_state.py needs no
table.

Differences, on purpose: images and sequences are channel-last; the history of observations and the action queue
live in rollout.py; sampling is one `lax.scan`, whose noise comes from the key; batch norms begin with PyTorch's
running statistics (see nn/rgb_encoder.py).
"""

import functools
from typing import Any

import einops
import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int, PRNGKeyArray

from lerobot_jax.features import ACTION, ACTION_IS_PAD, OBS_ENV_STATE, OBS_STATE
from lerobot_jax.nn.resnet import NAMES, NUMBERS, TORCHVISION_WEIGHTS
from lerobot_jax.nn.rgb_encoder import RgbEncoder
from lerobot_jax.policies.base import Batch, Metrics, Policy, PretrainedPart
from lerobot_jax.policies.diffusion.config import DiffusionConfig
from lerobot_jax.policies.diffusion.unet import DiffusionConditionalUnet1d
from lerobot_jax.transforms import geometry


class DiffusionPolicy(Policy):
    """Trained to tell the noise in noisy actions (or the actions), it starts from noise when it acts."""

    config: DiffusionConfig

    def __init__(self, config: DiffusionConfig, *, rngs: nnx.Rngs):
        self.config = config
        self.diffusion = DiffusionModel(config, rngs=rngs)

    def loss(
        self,
        batch: Batch,
        *,
        key: PRNGKeyArray,
        train: bool,
        reduction: str = "mean",
        noise: Float[Array, "b chunk act"] | None = None,
        timestep: Int[Array, " b"] | None = None,
        crop: Int[Array, "encoders 2"] | None = None,
    ) -> tuple[Float[Array, "..."], Metrics]:
        """Compare predicted with added noise, or predicted with recorded actions.

        Args:
            batch: normalized observations (b t ...), `action` (b horizon act) and `action_is_pad` (b horizon).
            key: for the draws that are not given.
            train: crop at random and use a batch's statistics in batch norms; without, as when acting.
            reduction: "mean": LeRobot's loss. "none": one loss a sample, whose mean is LeRobot's loss.
            noise: added to the actions, standard normal.
            timestep: how many steps of noise are added.
            crop: top and left of what each image encoder sees, when it crops at random.

        Returns:
            (loss, {})
        """
        config, actions = self.config, batch[ACTION]
        noise_key, timestep_key, crop_key = jax.random.split(key, 3)
        if noise is None:
            noise = jax.random.normal(noise_key, actions.shape)
        if timestep is None:
            timestep = jax.random.randint(timestep_key, (len(actions),), 0, config.num_train_timesteps)
        if crop is None and train:
            crop = self.diffusion.draw_crops(crop_key)
        cond = self.diffusion.encode(batch, train, crop if train else None)
        noisy = config.noise_schedule.add_noise(actions, noise, timestep)
        predicted = self.diffusion.unet(noisy, timestep, cond, train)
        target = noise if config.prediction_type == "epsilon" else actions
        error = jnp.square(predicted - target)  # b horizon act
        if config.do_mask_loss_for_padding:
            valid = ~batch[ACTION_IS_PAD][..., None]  # b horizon 1
            num_valid = jnp.maximum(valid.sum() * error.shape[-1], 1)
            losses = (error * valid).sum((1, 2)) * (len(error) / num_valid)  # b
        else:
            losses = error.mean((1, 2))
        return (losses.mean() if reduction == "mean" else losses), {}

    def sample_actions(
        self,
        batch: Batch,
        *,
        key: PRNGKeyArray,
        noise: Float[Array, "b horizon act"] | None = None,
        step_noise: Float[Array, "noises b horizon act"] | None = None,
    ) -> Float[Array, "b chunk act"]:
        """Generate normalized actions from the current observation on, `n_action_steps` of them.

        Args:
            batch: normalized observations (b t ...).
            key: for the draws that are not given.
            noise: where to begin.
            step_noise: what DDPM's steps add.
        """
        draws = self.sampling_draws(len(batch[OBS_STATE]), key)
        noise = draws["noise"] if noise is None else noise
        step_noise = draws["step_noise"] if step_noise is None else step_noise
        cond = self.diffusion.encode(batch)

        def predict(x: Float[Array, "b horizon act"], timestep: Int[Array, ""]) -> Array:
            return self.diffusion.unet(x, jnp.broadcast_to(timestep, len(x)), cond)

        schedule, steps = self.config.noise_schedule, self.config.num_sampling_steps
        actions = schedule.sample(predict, noise, step_noise, steps)
        start = self.config.n_obs_steps - 1
        return actions[:, start : start + self.config.n_action_steps]

    def sampling_draws(self, batch_size: int, key: PRNGKeyArray) -> dict[str, Array]:
        config = self.config
        shape = (batch_size, config.horizon, *config.action_feature.shape)
        num = config.noise_schedule.num_step_noises(config.num_sampling_steps)
        noise_key, step_key = jax.random.split(key)
        return {
            "noise": jax.random.normal(noise_key, shape),
            "step_noise": jax.random.normal(step_key, (num, *shape)),
        }

    @classmethod
    def pretrained_parts(cls, config: DiffusionConfig) -> list[PretrainedPart]:
        """Start the image encoders from ImageNet weights."""
        weights = config.pretrained_backbone_weights
        if weights is None or not config.image_features:
            return []
        source = TORCHVISION_WEIGHTS.get(weights, weights)
        advice = (
            "give a safetensors file with torchvision's keys as policy.pretrained_backbone_weights, or None"
        )
        names: dict[str, str] = dict(zip(NAMES, NUMBERS, strict=True))
        encoders: list[tuple[Any, ...]] = [("rgb_encoder",)]
        if config.use_separate_rgb_encoder_per_camera:
            encoders = [("rgb_encoder", i) for i in range(len(config.image_features))]
        return [
            PretrainedPart(("diffusion", *encoder, "backbone"), source, r"fc\..*", advice, names)
            for encoder in encoders
        ]


class DiffusionModel(nnx.Module):
    """The image encoders and the U-Net."""

    rgb_encoder: Any  # one, or a list of them

    def __init__(self, config: DiffusionConfig, *, rngs: nnx.Rngs):
        state, env, images = config.robot_state_feature, config.env_state_feature, config.image_features
        assert state is not None  # by config.check_features
        num_features = state.shape[0] + (env.shape[0] if env else 0)
        if images:
            _, height, width = next(iter(images.values())).shape
            new_encoder = functools.partial(
                RgbEncoder,
                config.vision_backbone,
                (height, width),
                resize=config.resize_size,
                crop=config.crop_size,
                num_keypoints=config.spatial_softmax_num_keypoints,
                use_group_norm=config.use_group_norm,
                dtype=config.compute_dtype,
                rngs=rngs,
            )
            if config.use_separate_rgb_encoder_per_camera:
                self.rgb_encoder = nnx.List([new_encoder() for _ in images])
            else:
                self.rgb_encoder = new_encoder()
            num_features += 2 * config.spatial_softmax_num_keypoints * len(images)
        self.unet = DiffusionConditionalUnet1d(config, num_features * config.n_obs_steps, rngs=rngs)
        self.config = config

    def encode(
        self, batch: Batch, train: bool = False, crop: Int[Array, "encoders 2"] | None = None
    ) -> Float[Array, "b cond"]:
        """Put what was observed into one vector: states, images, environment state, step after step."""
        features = [batch[OBS_STATE]]  # b t d
        cameras = self.config.image_features
        if cameras and self.config.use_separate_rgb_encoder_per_camera:
            for i, (camera, encoder) in enumerate(zip(cameras, self.rgb_encoder, strict=True)):
                images = einops.rearrange(batch[camera], "b t h w c -> (b t) h w c")
                encoded = encoder(images, train, None if crop is None else crop[i])
                features.append(einops.rearrange(encoded, "(b t) d -> b t d", b=len(batch[camera])))
        elif cameras:
            images = jnp.stack([batch[camera] for camera in cameras], axis=2)  # b t v h w c
            shape = {"b": images.shape[0], "t": images.shape[1]}
            images = einops.rearrange(images, "b t v h w c -> (b t v) h w c")
            encoded = self.rgb_encoder(images, train, None if crop is None else crop[0])
            features.append(einops.rearrange(encoded, "(b t v) d -> b t (v d)", **shape))
        if self.config.env_state_feature:
            features.append(batch[OBS_ENV_STATE])
        x = jnp.concatenate([f.astype(jnp.float32) for f in features], axis=-1)
        return einops.rearrange(x, "b t d -> b (t d)")

    def draw_crops(self, key: PRNGKeyArray) -> Int[Array, "encoders 2"] | None:
        """Draw what each image encoder sees of a batch's images; None if that is not random."""
        config = self.config
        if not config.image_features or config.crop_size is None or not config.crop_is_random:
            return None
        _, height, width = next(iter(config.image_features.values())).shape
        size = config.resize_size or (height, width)
        num = len(self.rgb_encoder) if config.use_separate_rgb_encoder_per_camera else 1
        return geometry.draw_corners(key, num, size, config.crop_size)
