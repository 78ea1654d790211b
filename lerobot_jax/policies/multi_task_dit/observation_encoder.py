"""What is observed and what is to be done, as one vector.

Mirrors `ObservationEncoder` of `lerobot.policies.multi_task_dit.modeling_multi_task_dit`.
"""

from typing import Any

import einops
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Bool, Float, Int, PRNGKeyArray

from lerobot_jax.errors import InputError
from lerobot_jax.features import OBS_STATE
from lerobot_jax.nn.clip import CLIPTextModel, CLIPVisionModel
from lerobot_jax.nn.clip_settings import CLIPTextSettings, CLIPVisionSettings, read_clip_settings
from lerobot_jax.nn.linear import Linear
from lerobot_jax.nn.variables import freeze
from lerobot_jax.policies.multi_task_dit.config import MultiTaskDiTConfig
from lerobot_jax.processors.text import OBS_LANGUAGE_ATTENTION_MASK, OBS_LANGUAGE_TOKENS
from lerobot_jax.transforms import geometry


class ObservationEncoder(nnx.Module):
    """Puts states, what CLIP makes of the images, and what it makes of the task side by side."""

    def __init__(self, config: MultiTaskDiTConfig, *, rngs: nnx.Rngs):
        """Draw the weights.

        Raises:
            InputError: when CLIP's dimensions cannot be found, or do not suit the images or the tokenizer.
        """
        self.config = config
        state, cameras = config.robot_state_feature, config.image_features
        assert state is not None  # by config.check_features
        num_features = state.shape[0] + config.hidden_dim
        if cameras:
            vision = _vision_settings(config)
            num_features += len(cameras) * vision.hidden_size
            if config.use_separate_rgb_encoder_per_camera:
                self.vision_encoders = nnx.List(
                    [CLIPVisionEncoder(vision, config, rngs=rngs) for _ in cameras]
                )
            else:
                self.vision_encoder = CLIPVisionEncoder(vision, config, rngs=rngs)
        self.text_encoder = CLIPTextEncoder(_text_settings(config), config, rngs=rngs)
        self.cond_dim = num_features * config.n_obs_steps

    def __call__(
        self, batch: dict[str, Any], crop: Int[Array, "encoders 2"] | None = None
    ) -> Float[Array, "b cond"]:
        """Encode normalized observations (b t ...) and the tokens of the task (b l).

        Args:
            batch: the observations.
            crop: top and left of what each image tower sees; it is the middle unless given.
        """
        state = batch[OBS_STATE]  # b t d
        features = [state, *self._encode_images(batch, crop)]
        text = self.text_encoder(batch[OBS_LANGUAGE_TOKENS], batch[OBS_LANGUAGE_ATTENTION_MASK])
        features.append(jnp.broadcast_to(text[:, None], (*state.shape[:2], text.shape[-1])))
        x = jnp.concatenate([f.astype(jnp.float32) for f in features], axis=-1)
        return einops.rearrange(x, "b t d -> b (t d)")

    def _encode_images(
        self, batch: dict[str, Any], crop: Int[Array, "encoders 2"] | None
    ) -> list[Float[Array, "b t d"]]:
        cameras, features = self.config.image_features, []
        if not cameras:
            return features
        if self.config.use_separate_rgb_encoder_per_camera:
            for i, (camera, encoder) in enumerate(zip(cameras, self.vision_encoders, strict=True)):
                images = einops.rearrange(batch[camera], "b t h w c -> (b t) h w c")
                encoded = encoder(images, None if crop is None else crop[i])
                features.append(einops.rearrange(encoded, "(b t) d -> b t d", b=len(batch[camera])))
            return features
        images = jnp.stack([batch[camera] for camera in cameras], axis=2)  # b t v h w c
        shape = {"b": images.shape[0], "t": images.shape[1]}
        images = einops.rearrange(images, "b t v h w c -> (b t v) h w c")
        encoded = self.vision_encoder(images, None if crop is None else crop[0])
        return [einops.rearrange(encoded, "(b t v) d -> b t (v d)", **shape)]

    def draw_crops(self, key: PRNGKeyArray) -> Int[Array, "encoders 2"] | None:
        """Draw what each image tower sees of a batch's images; None if that is not random."""
        config = self.config
        if not config.image_features or config.image_crop_shape is None or not config.image_crop_is_random:
            return None
        _, height, width = next(iter(config.image_features.values())).shape
        size = config.image_resize_shape or (height, width)
        num = len(self.vision_encoders) if config.use_separate_rgb_encoder_per_camera else 1
        return geometry.draw_corners(key, num, size, config.image_crop_shape)


def _vision_settings(config: MultiTaskDiTConfig) -> CLIPVisionSettings:
    settings = read_clip_settings(CLIPVisionSettings, config.vision_encoder_name)
    size = (settings.image_size, settings.image_size)
    if config.seen_size != size:
        raise InputError(
            f"image_crop_shape {config.image_crop_shape} and image_resize_shape {config.image_resize_shape} make "
            f"images of {config.seen_size}; {config.vision_encoder_name} wants {size}"
        )
    return settings


def _text_settings(config: MultiTaskDiTConfig) -> CLIPTextSettings:
    settings = read_clip_settings(CLIPTextSettings, config.text_encoder_name)
    is_too_long = config.tokenizer_max_length > settings.max_position_embeddings
    if is_too_long and config.tokenizer_padding == "max_length":
        raise InputError(
            f"tokenizer_max_length is {config.tokenizer_max_length}, {config.text_encoder_name} reads at most "
            f"{settings.max_position_embeddings} tokens"
        )
    return settings


class CLIPVisionEncoder(nnx.Module):
    """Resizes, crops, and takes the class token of CLIP's image tower."""

    def __init__(self, settings: CLIPVisionSettings, config: MultiTaskDiTConfig, *, rngs: nnx.Rngs):
        self.model = CLIPVisionModel(settings, dtype=config.compute_dtype, rngs=rngs)
        self.resize, self.crop = config.image_resize_shape, config.image_crop_shape

    def __call__(
        self, images: Float[Array, "b h w 3"], corner: Int[Array, "2"] | None = None
    ) -> Float[Array, "b d"]:
        """Encode normalized images; `corner` is top and left of the crop, which is the middle unless given."""
        if self.resize is not None:
            images = geometry.resize(images, self.resize)
        if self.crop is not None and corner is not None:
            images = geometry.crop(images, corner[0], corner[1], self.crop)
        elif self.crop is not None:
            images = geometry.center_crop(images, self.crop)
        return self.model(images)[:, 0]


class CLIPTextEncoder(nnx.Module):
    """CLIP's text tower, frozen, and a linear layer that is trained."""

    def __init__(self, settings: CLIPTextSettings, config: MultiTaskDiTConfig, *, rngs: nnx.Rngs):
        self.text_encoder = CLIPTextModel(settings, dtype=config.compute_dtype, rngs=rngs)
        freeze(self.text_encoder)
        self.projection = Linear(
            settings.hidden_size, config.hidden_dim, dtype=config.compute_dtype, rngs=rngs
        )

    def __call__(self, tokens: Int[Array, "b l"], mask: Bool[Array, "b l"]) -> Float[Array, "b d"]:
        return self.projection(self.text_encoder(tokens, mask))
