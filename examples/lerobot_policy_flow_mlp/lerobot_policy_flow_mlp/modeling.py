"""Conditional flow matching with an MLP: from the current state to a chunk of actions.

Lipman et al., "Flow Matching for Generative Modeling", arXiv:2210.02747, with straight paths: x_0 is noise, x_1 the
actions, x_t = (1 - t) x_0 + t x_1, and the network learns the velocity x_1 - x_0 at (x_t, t).
"""

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Bool, Float, PRNGKeyArray

from lerobot_jax.features import ACTION, ACTION_IS_PAD
from lerobot_jax.nn.linear import LayerNorm, Linear
from lerobot_jax.policies.base import Batch, Metrics, Policy
from lerobot_policy_flow_mlp.config import FlowMLPConfig

NUM_HARMONICS = 8  # of the time embedding


class FlowMLPPolicy(Policy):
    """Flow matching with its loss: the squared error of the velocity."""

    config: FlowMLPConfig

    def __init__(self, config: FlowMLPConfig, *, rngs: nnx.Rngs):
        self.config = config
        self.model = VelocityMLP(config, rngs=rngs)

    def loss(
        self,
        batch: Batch,
        *,
        key: PRNGKeyArray,
        train: bool,
        reduction: str = "mean",
        noise: Float[Array, "b chunk act"] | None = None,
        time: Float[Array, " b"] | None = None,
    ) -> tuple[Float[Array, "..."], Metrics]:
        """Compare the predicted with the true velocity at a random time, padded steps left out.

        Args:
            batch: normalized observations, `action` (b chunk act) and `action_is_pad` (b chunk).
            key: for noise and time.
            train: has no effect: nothing is dropped out.
            reduction: "mean", or "none": one loss a sample, whose mean is the loss.
            noise: x_0, standard normal, drawn from `key` unless given.
            time: t in [0, 1), uniform, drawn from `key` unless given.

        Returns:
            (loss, {})
        """
        noise_key, time_key = jax.random.split(key)
        actions = hold_last_action(batch[ACTION], batch[ACTION_IS_PAD])
        noise = jax.random.normal(noise_key, actions.shape) if noise is None else noise
        time = jax.random.uniform(time_key, (len(actions),)) if time is None else time

        t = time[:, None, None]  # b 1 1
        x_t = (1 - t) * noise + t * actions
        velocity = self.model(self.observation(batch), x_t, time)

        valid = ~batch[ACTION_IS_PAD][..., None]  # b chunk 1
        error = (velocity - (actions - noise)) ** 2 * valid
        num_valid = jnp.maximum(valid.sum() * error.shape[-1], 1)
        losses = error.sum((1, 2)) * (len(error) / num_valid)  # b
        return (losses.mean() if reduction == "mean" else losses), {}

    def sampling_draws(self, batch_size: int, key: PRNGKeyArray) -> dict[str, Array]:
        """Draw what `sample_actions` draws from this key: `noise` (b chunk act)."""
        shape = (batch_size, self.config.chunk_size, *self.config.action_feature.shape)
        return {"noise": jax.random.normal(key, shape)}

    def sample_actions(
        self, batch: Batch, *, key: PRNGKeyArray, noise: Float[Array, "b chunk act"] | None = None
    ) -> Float[Array, "b chunk act"]:
        """Follow the velocity from noise to actions in Euler steps."""
        observation = self.observation(batch)
        noise = self.sampling_draws(len(observation), key)["noise"] if noise is None else noise
        num_steps = self.config.num_inference_steps

        def step(i: Array, x: Float[Array, "b chunk act"]) -> Float[Array, "b chunk act"]:
            time = jnp.full(len(x), i / num_steps)
            return x + self.model(observation, x, time) / num_steps

        return jax.lax.fori_loop(0, num_steps, step, noise)

    def observation(self, batch: Batch) -> Float[Array, "b obs"]:
        """Join all inputs into one vector."""
        return jnp.concatenate([batch[key] for key in self.config.input_features], axis=-1)


class VelocityMLP(nnx.Module):
    """The network: the velocity at (x_t, t), given the observation."""

    def __init__(self, config: FlowMLPConfig, *, rngs: nnx.Rngs):
        d, dtype = config.hidden_dim, config.compute_dtype
        num_observed = sum(feature.shape[0] for feature in config.input_features.values())
        num_actions = config.chunk_size * config.action_feature.shape[0]
        self.input_proj = Linear(num_observed + num_actions + 2 * NUM_HARMONICS, d, dtype=dtype, rngs=rngs)
        self.blocks = nnx.List([ResidualBlock(config, rngs=rngs) for _ in range(config.num_blocks)])
        self.norm = LayerNorm(d, dtype=dtype, rngs=rngs)
        self.output_proj = Linear(d, num_actions, dtype=dtype, rngs=rngs)

    def __call__(
        self, observation: Float[Array, "b obs"], x_t: Float[Array, "b chunk act"], time: Float[Array, " b"]
    ) -> Float[Array, "b chunk act"]:
        inputs = [observation, x_t.reshape(len(x_t), -1), embed_time(time)]
        x = self.input_proj(jnp.concatenate(inputs, axis=-1))  # b d
        for block in self.blocks:
            x = block(x)
        return self.output_proj(self.norm(x)).reshape(x_t.shape).astype(jnp.float32)


class ResidualBlock(nnx.Module):
    def __init__(self, config: FlowMLPConfig, *, rngs: nnx.Rngs):
        d, dtype = config.hidden_dim, config.compute_dtype
        self.norm = LayerNorm(d, dtype=dtype, rngs=rngs)
        self.linear1 = Linear(d, d, dtype=dtype, rngs=rngs)
        self.linear2 = Linear(d, d, dtype=dtype, rngs=rngs)

    def __call__(self, x: Float[Array, "b d"]) -> Float[Array, "b d"]:
        return x + self.linear2(jax.nn.silu(self.linear1(self.norm(x))))


def embed_time(time: Float[Array, " b"]) -> Float[Array, "b harmonics"]:
    """Give sines and cosines of pi t, 2 pi t, 3 pi t, ..."""
    angle = time[:, None] * (jnp.pi * jnp.arange(1, NUM_HARMONICS + 1)[None])
    return jnp.concatenate([jnp.sin(angle), jnp.cos(angle)], axis=-1)


def hold_last_action(
    actions: Float[Array, "b chunk act"], is_pad: Bool[Array, "b chunk"]
) -> Float[Array, "b chunk act"]:
    """Repeat the last real action in padded steps, because the network sees the whole chunk."""
    last = jnp.maximum((~is_pad).sum(1, keepdims=True) - 1, 0)  # b 1
    index = jnp.minimum(jnp.arange(actions.shape[1])[None], last)  # b chunk
    return jnp.take_along_axis(actions, index[..., None], axis=1)
