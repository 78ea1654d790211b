"""A transformer over action steps whose layers are modulated by what is observed and by the time (AdaLN-Zero).

Paper: "Scalable Diffusion Models with Transformers" (https://arxiv.org/abs/2212.09748). Mirrors
`DiffusionTransformer` of `lerobot.policies.multi_task_dit.modeling_multi_task_dit`.
"""

import functools

import einops
import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float, Num, PRNGKeyArray

from lerobot_jax.nn.attention import MultiheadAttention, attend
from lerobot_jax.nn.dropout import split_key
from lerobot_jax.nn.execution import run_block
from lerobot_jax.nn.linear import Linear
from lerobot_jax.nn.sequential import Sequential
from lerobot_jax.nn.time_embedding import SinusoidalPosEmb
from lerobot_jax.policies.multi_task_dit.config import MultiTaskDiTConfig

EPSILON = 1e-6


class DiffusionTransformer(nnx.Module):
    """Predicts noise, clean actions or velocities from noisy actions."""

    def __init__(self, config: MultiTaskDiTConfig, cond_dim: int, *, rngs: nnx.Rngs):
        """Draw the weights.

        Args:
            config: the policy's settings.
            cond_dim: width of what is observed.
            rngs: `params`.
        """
        d, dtype, act = config.timestep_embed_dim, config.compute_dtype, config.action_feature.shape[0]
        linear = functools.partial(Linear, dtype=dtype, rngs=rngs)
        self.time_mlp = Sequential([SinusoidalPosEmb(d), linear(d, 2 * d), gelu, linear(2 * d, d), gelu])
        self.input_proj = linear(act, config.hidden_dim)
        if config.use_positional_encoding:
            shape = (1, config.horizon, config.hidden_dim)
            self.pos_embedding = nnx.Param(0.02 * jax.random.normal(rngs.params(), shape))
        self.transformer_blocks = nnx.List(
            [TransformerBlock(config, d + cond_dim, rngs=rngs) for _ in range(config.num_layers)]
        )
        self.output_proj = linear(config.hidden_dim, act)
        self.config = config

    def __call__(
        self,
        x: Float[Array, "b horizon act"],
        time: Num[Array, " b"],
        cond: Float[Array, "b cond"],
        dropout_key: PRNGKeyArray | None = None,
    ) -> Float[Array, "b horizon act"]:
        """Predict what the objective asks for.

        Args:
            x: noisy actions.
            time: how noisy they are: the diffusion step, or the time of the flow.
            cond: what is observed.
            dropout_key: without it, nothing is dropped.
        """
        dtype = self.config.compute_dtype
        cond = jnp.concatenate([self.time_mlp(time), cond.astype(dtype)], axis=-1)
        x = self.input_proj(x)  # b horizon d
        if self.config.use_positional_encoding:
            x = x + self.pos_embedding[...].astype(dtype)
        keys = split_key(dropout_key, len(self.transformer_blocks))
        for block, key in zip(self.transformer_blocks, keys, strict=True):
            x = run_block(block, x, cond, key)
        return self.output_proj(x).astype(jnp.float32)


def gelu(x: Float[Array, "..."]) -> Float[Array, "..."]:
    """Give the exact GELU; the one in the layers is approximated by a tanh."""
    return jax.nn.gelu(x, approximate=False)


class TransformerBlock(nnx.Module):
    """Attention and two linear layers; shifts, scales and gates come from what is observed."""

    def __init__(self, config: MultiTaskDiTConfig, cond_dim: int, *, rngs: nnx.Rngs):
        d, dtype = config.hidden_dim, config.compute_dtype
        if config.use_rope:
            self.attn = RoPEAttention(config, rngs=rngs)
        else:
            self.multihead_attn = MultiheadAttention(
                d, config.num_heads, dropout=config.dropout, dtype=dtype, rngs=rngs
            )
        self.norm1, self.norm2 = (
            nnx.LayerNorm(
                d,
                epsilon=EPSILON,
                use_bias=False,
                use_scale=False,
                use_fast_variance=False,
                dtype=dtype,
                rngs=rngs,
            )
            for _ in range(2)
        )
        self.mlp = Sequential(
            [Linear(d, 4 * d, dtype=dtype, rngs=rngs), jax.nn.gelu, Linear(4 * d, d, dtype=dtype, rngs=rngs)]
        )
        zeros = nnx.initializers.zeros_init()  # a new policy's layers do nothing at first
        modulation = Linear(cond_dim, 6 * d, kernel_init=zeros, bias_init=zeros, dtype=dtype, rngs=rngs)
        self.adaLN_modulation = Sequential([jax.nn.silu, modulation])
        self.use_rope = config.use_rope

    def __call__(
        self, x: Float[Array, "b l d"], cond: Float[Array, "b cond"], dropout_key: PRNGKeyArray | None
    ) -> Float[Array, "b l d"]:
        modulation = self.adaLN_modulation(cond)[:, None]  # b 1 (6 d)
        shift1, scale1, gate1, shift2, scale2, gate2 = jnp.split(modulation, 6, axis=-1)
        y = self.norm1(x) * (1 + scale1) + shift1
        attended = (
            self.attn(y, dropout_key)
            if self.use_rope
            else self.multihead_attn(y, y, y, dropout_key=dropout_key)
        )
        x = x + gate1 * attended
        return x + gate2 * self.mlp(self.norm2(x) * (1 + scale2) + shift2)


class RoPEAttention(nnx.Module):
    """Self-attention in which queries and keys are rotated by their step (https://arxiv.org/abs/2104.09864)."""

    def __init__(self, config: MultiTaskDiTConfig, *, rngs: nnx.Rngs):
        d = config.hidden_dim
        self.qkv_proj = Linear(d, 3 * d, dtype=config.compute_dtype, rngs=rngs)
        self.out_proj = Linear(d, d, dtype=config.compute_dtype, rngs=rngs)
        self.config = config

    def __call__(self, x: Float[Array, "b l d"], dropout_key: PRNGKeyArray | None) -> Float[Array, "b l d"]:
        config = self.config
        q, k, v = einops.rearrange(
            self.qkv_proj(x), "b l (three n h) -> three b n l h", three=3, n=config.num_heads
        )
        q, k = rotate(q, config.rope_base), rotate(k, config.rope_base)
        attended = attend(q, k, v, dropout_rate=config.dropout, dropout_key=dropout_key)
        return self.out_proj(einops.rearrange(attended, "b n l h -> b l (n h)"))


def rotate(x: Float[Array, "b n l h"], base: float) -> Float[Array, "b n l h"]:
    """Rotate pairs of dimensions (i, i + h / 2) by the position times base ** (-2 i / h)."""
    length, h = x.shape[-2:]
    frequencies = 1 / np.float32(base) ** (np.arange(0, h, 2, dtype=np.float32) / h)
    angles = np.outer(np.arange(length, dtype=np.float32), frequencies)
    cos, sin = (jnp.asarray(f(angles), x.dtype)[None, None] for f in (np.cos, np.sin))  # 1 1 l h/2
    first, second = jnp.split(x, 2, axis=-1)
    return jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1)
