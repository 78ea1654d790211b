"""pi0: flow matching by an action expert that attends to what a vision-language model reads.

Paper: "pi0: A Vision-Language-Action Flow Model for General Robot Control" (https://arxiv.org/abs/2410.24164).
Mirrors `lerobot.policies.pi0.modeling_pi0.PI0Policy`. As there, time goes from 1 (noise) to 0 (actions), and
actions after an episode's end count in the loss.

Differences that change no number: all cameras go through the image tower at once, and those that a batch lacks not
at all, since nothing would attend to them; the prefix is read once, and its keys and values serve all steps.
"""

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Bool, Float, Int, PRNGKeyArray

from lerobot_jax.errors import InputError
from lerobot_jax.features import ACTION, OBS_STATE
from lerobot_jax.nn.activations import silu
from lerobot_jax.nn.gemma import GEMMA_SIZES
from lerobot_jax.nn.linear import Linear
from lerobot_jax.nn.paligemma import PALIGEMMA_SIZES, PaliGemmaWithExpert
from lerobot_jax.nn.time_embedding import embed_time
from lerobot_jax.policies import action_prefix
from lerobot_jax.policies.base import Batch, Metrics, Policy
from lerobot_jax.policies.pi0.checkpoint_names import with_todays_names
from lerobot_jax.policies.pi0.config import PI0Config
from lerobot_jax.policies.rtc import euler
from lerobot_jax.processors.text import OBS_LANGUAGE_ATTENTION_MASK, OBS_LANGUAGE_TOKENS
from lerobot_jax.state_dict import StateDict

Prefix = tuple[Float[Array, "b p d"], Bool[Array, "b p"]]
"""Embeddings of images and prompt, and which of them are no padding."""
Suffix = tuple[Float[Array, "b s e"], Float[Array, "b #s e"] | None]
"""Embeddings of state and noisy actions, and what the expert's norms are told."""


class PI0Policy(Policy):
    """A vision-language model and an action expert under LeRobot's names."""

    config: PI0Config

    def __init__(self, config: PI0Config, *, rngs: nnx.Rngs):
        self.config = config
        self.model = PI0Model(config, rngs=rngs)

    @classmethod
    def with_todays_names(cls, config: PI0Config, state: StateDict) -> StateDict:
        return with_todays_names(state, config.type)

    def loss(
        self,
        batch: Batch,
        *,
        key: PRNGKeyArray,
        train: bool,
        reduction: str = "mean",
        noise: Float[Array, "b chunk wide"] | None = None,
        time: Float[Array, " b"] | None = None,
        delays: Int[Array, " b"] | None = None,
    ) -> tuple[Float[Array, "..."], Metrics]:
        """Give the mean squared error of the velocity.

        Args:
            batch: normalized inputs, `action` (b chunk act), images in 0..1, tokens of the prompt.
            key: for the draws that are not given.
            train: whether delays are drawn, if the settings want some.
            reduction: "mean" or "none".
            noise: mixed with the actions, as wide as max_action_dim.
            time: from 0 (actions) to 1 (noise).
            delays: how many of each sample's first actions are given and not in the loss.

        Returns:
            (loss, {"loss_per_dim/i": the loss of action dimension i})
        """
        config, width = self.config, batch[ACTION].shape[-1]
        noise_key, time_key, delay_key = jax.random.split(key, 3)
        actions = _pad(batch[ACTION], config.max_action_dim)
        noise = jax.random.normal(noise_key, actions.shape) if noise is None else noise
        time = self._draw_time(time_key, len(actions)) if time is None else time
        if config.rtc_training_delay and train and delays is None:
            delays = action_prefix.draw_delays(delay_key, len(actions), config.rtc_training_delay)
        if delays is not None:
            time = action_prefix.times_of_actions(time, delays, config.chunk_size)
        share = time.reshape(len(time), -1, 1)  # b 1|chunk 1
        noisy = share * noise + (1 - share) * actions
        velocity = self.model.velocity(self._prefix(batch), self._suffix(batch, noisy, time))
        losses = jnp.square(noise - actions - velocity)[..., :width]  # b chunk act
        if delays is not None:
            losses = losses * action_prefix.loss_weights(delays, config.chunk_size)[..., None]
        metrics = {f"loss_per_dim/{i}": losses[..., i].mean() for i in range(width)}
        losses = losses.mean((1, 2))
        return (losses.mean() if reduction == "mean" else losses), metrics

    def sample_actions(
        self,
        batch: Batch,
        *,
        key: PRNGKeyArray,
        noise: Float[Array, "b chunk wide"] | None = None,
        prev_chunk_left_over: Float[Array, "b left some"] | None = None,
        inference_delay: int | Int[Array, ""] | None = None,
        execution_horizon: int | Int[Array, ""] | None = None,
    ) -> Float[Array, "b chunk act"]:
        """Follow the velocity from noise to normalized actions.

        Args:
            batch: normalized observations, images in 0..1, tokens of the prompt.
            key: for the noise if it is not given.
            noise: where to begin, as wide as max_action_dim.
            prev_chunk_left_over: normalized actions of the chunk before that are still to be executed, for
                real-time chunking.
            inference_delay: how many of them will be executed before the new chunk is there.
            execution_horizon: how many of them count; None: as rtc_config says.
        """
        config = self.config
        if noise is None:
            noise = self.sampling_draws(len(batch[OBS_STATE]), key)["noise"]
        embedded, is_token = self._prefix(batch)
        cache = self.model.read((embedded, is_token))

        def denoise(x_t: Array, time: Array) -> Array:
            return self.model.velocity_after(cache, is_token, self._suffix(batch, x_t, time))

        actions = euler(
            denoise,
            noise,
            config.num_inference_steps,
            config=config.rtc_config,
            prev_chunk_left_over=prev_chunk_left_over,
            inference_delay=inference_delay,
            execution_horizon=execution_horizon,
        )
        return actions[..., : config.action_feature.shape[0]]

    def sampling_draws(self, batch_size: int, key: PRNGKeyArray) -> dict[str, Array]:
        shape = (batch_size, self.config.chunk_size, self.config.max_action_dim)
        return {"noise": jax.random.normal(key, shape)}

    def _draw_time(self, key: PRNGKeyArray, batch_size: int) -> Float[Array, " b"]:
        config = self.config
        alpha, beta = config.time_sampling_beta_alpha, config.time_sampling_beta_beta
        drawn = jax.random.beta(key, alpha, beta, (batch_size,))
        return drawn * config.time_sampling_scale + config.time_sampling_offset

    def _prefix(self, batch: Batch) -> Prefix:
        cameras = [key for key in self.config.image_features if key in batch]
        if not cameras:
            raise InputError(f"the batch has none of the cameras {sorted(self.config.image_features)}")
        size = self.config.image_resolution
        images = [resize_with_pad(batch[key], *size) * 2 - 1 for key in cameras]
        # In a mixture of datasets, some samples lack a camera that others have.
        nowhere = jnp.zeros(len(batch[OBS_STATE]), bool)
        is_shown = ~jnp.stack([batch.get(f"{key}_is_pad", nowhere) for key in cameras], axis=1)
        return self.model.embed_prefix(
            images, is_shown, batch[OBS_LANGUAGE_TOKENS], batch[OBS_LANGUAGE_ATTENTION_MASK]
        )

    def _suffix(
        self, batch: Batch, noisy: Float[Array, "b chunk act"], time: Float[Array, "b *chunk"]
    ) -> Suffix:
        return self.model.embed_suffix(_pad(batch[OBS_STATE], self.config.max_state_dim), noisy, time)


class PI0Model(nnx.Module):
    """The networks, from tokens, images, state and noisy actions to the velocity."""

    is_adaptive = False
    num_state_tokens = 1

    def __init__(self, config: PI0Config, *, rngs: nnx.Rngs):
        expert, dtype = GEMMA_SIZES[config.action_expert_variant], config.projection_dtype
        self.paligemma_with_expert = PaliGemmaWithExpert(
            PALIGEMMA_SIZES[config.paligemma_variant],
            expert,
            config.image_resolution[0],
            is_adaptive=self.is_adaptive,
            dtype=config.compute_dtype,
            vision_dtype=dtype,
            rngs=rngs,
        )
        self.action_in_proj = Linear(config.max_action_dim, expert.width, dtype=dtype, rngs=rngs)
        self.action_out_proj = Linear(expert.width, config.max_action_dim, rngs=rngs)
        self.config = config
        self.make_projections(expert.width, dtype, rngs)

    def make_projections(self, width: int, dtype: jnp.dtype, rngs: nnx.Rngs) -> None:
        """Build the layers by which state and time come in."""
        self.state_proj = Linear(self.config.max_state_dim, width, dtype=dtype, rngs=rngs)
        self.action_time_mlp_in = Linear(2 * width, width, dtype=dtype, rngs=rngs)
        self.action_time_mlp_out = Linear(width, width, dtype=dtype, rngs=rngs)

    def embed_suffix(
        self,
        state: Float[Array, "b state"],
        noisy: Float[Array, "b chunk act"],
        time: Float[Array, "b *chunk"],
    ) -> Suffix:
        """Embed the state, and each noisy action with the time: that of its sample, or its own."""
        actions = self.action_in_proj(noisy)
        times = self.embed_time(time).astype(actions.dtype)  # b 1|chunk d
        x = jnp.concatenate([actions, jnp.broadcast_to(times, actions.shape)], axis=-1)
        x = self.action_time_mlp_out(silu(self.action_time_mlp_in(x)))
        return jnp.concatenate([self.state_proj(state)[:, None], x], axis=1), None

    def embed_time(self, time: Float[Array, "b *chunk"]) -> Float[Array, "b _times d"]:
        """Embed times as sines and cosines; of one for each sample, the second axis is 1."""
        time = time[:, None] if time.ndim == 1 else time
        config, width = self.config, self.action_in_proj.out_features
        return embed_time(time, width, config.min_period, config.max_period)

    def embed_prefix(
        self,
        images: list[Float[Array, "b h w c"]],
        is_shown: Bool[Array, "b v"],
        tokens: Int[Array, "b l"],
        mask: Bool[Array, "b l"],
    ) -> Prefix:
        """Embed images in -1..1, of the cameras that a sample has, and the tokens of the prompt."""
        seen, read = (
            self.paligemma_with_expert.embed_images(images),
            self.paligemma_with_expert.embed_tokens(tokens),
        )
        is_seen = jnp.repeat(is_shown, seen.shape[1] // len(images), axis=1)
        is_token = jnp.concatenate([is_seen, mask], axis=1)
        return jnp.concatenate([seen, read], axis=1), is_token

    def velocity(self, prefix: Prefix, suffix: Suffix) -> Float[Array, "b chunk act"]:
        """Give the velocity, reading prefix and suffix at once; for training."""
        (embedded, is_token), (actions, condition) = prefix, suffix
        parts = np.concatenate([np.zeros(embedded.shape[1], int), self._parts(actions)])
        is_before = jnp.asarray(parts[None] <= parts[:, None])[None]
        is_token = jnp.concatenate([is_token, jnp.ones(actions.shape[:2], bool)], axis=1)
        mask = is_before & is_token[:, None] & is_token[:, :, None]
        positions = jnp.cumsum(is_token, axis=1) - 1
        return self._out(self.paligemma_with_expert(embedded, actions, condition, positions, mask))

    def read(self, prefix: Prefix) -> tuple[Array, Array]:
        """Give the keys and values of the prefix."""
        embedded, is_token = prefix
        mask = is_token[:, None] & is_token[:, :, None]
        return self.paligemma_with_expert.read(embedded, jnp.cumsum(is_token, axis=1) - 1, mask)

    def velocity_after(
        self, cache: tuple[Array, Array], is_token: Bool[Array, "b p"], suffix: Suffix
    ) -> Float[Array, "b chunk act"]:
        """Give the velocity of a suffix that sees a prefix that was read before."""
        actions, condition = suffix
        parts = self._parts(actions)
        own = jnp.broadcast_to((parts[None] <= parts[:, None])[None], (len(actions), len(parts), len(parts)))
        before = jnp.broadcast_to(is_token[:, None], (*actions.shape[:2], is_token.shape[1]))
        positions = jnp.sum(is_token, axis=1, keepdims=True) + jnp.arange(len(parts))[None]
        mask = jnp.concatenate([before, own], axis=2)
        return self._out(self.paligemma_with_expert.continue_from(cache, actions, condition, positions, mask))

    def _parts(self, suffix: Float[Array, "b s e"]) -> np.ndarray:
        """Number the parts of a suffix, (s,): a token sees those of its own part and of the parts before."""
        is_action = np.arange(suffix.shape[1]) >= self.num_state_tokens
        return 1 + is_action

    def _out(self, x: Float[Array, "b s e"]) -> Float[Array, "b chunk act"]:
        return self.action_out_proj(x[:, -self.config.chunk_size :].astype(jnp.float32))


def resize_with_pad(
    image: Float[Array, "b h w c"], height: int, width: int
) -> Float[Array, "b {height} {width} c"]:
    """Resize an image in 0..1 so that it fits, in the middle of a black one (LeRobot's `resize_with_pad_torch`)."""
    b, old_height, old_width, channels = image.shape
    if (old_height, old_width) == (height, width):
        return image
    ratio = max(old_width / width, old_height / height)
    size = int(old_height / ratio), int(old_width / ratio)
    resized = jax.image.resize(image, (b, *size, channels), "linear", antialias=False)
    top, left = (height - size[0]) // 2, (width - size[1]) // 2
    around = ((0, 0), (top, height - size[0] - top), (left, width - size[1] - left), (0, 0))
    return jnp.pad(jnp.clip(resized, 0, 1), around)


def _pad(vector: Float[Array, "*b d"], width: int) -> Float[Array, "*b {width}"]:
    return jnp.pad(vector, [(0, 0)] * (vector.ndim - 1) + [(0, width - vector.shape[-1])])
