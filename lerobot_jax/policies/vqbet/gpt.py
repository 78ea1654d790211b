"""The transformer of VQ-BeT: a GPT whose tokens are vectors.

Mirrors `GPT` of `lerobot.policies.vqbet.vqbet_utils`, which is Andrej Karpathy's nanoGPT.
"""

import functools
import math

import einops
import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, PRNGKeyArray

from lerobot_jax.nn.dropout import dropout, split_key
from lerobot_jax.nn.execution import run_block
from lerobot_jax.nn.linear import LayerNorm, Linear
from lerobot_jax.nn.sequential import Sequential
from lerobot_jax.nn.variables import Buffer
from lerobot_jax.policies.vqbet.config import VQBeTConfig

STD = 0.02  # of the initial weights
gelu = functools.partial(jax.nn.gelu, approximate=False)


def _linear(
    config: VQBeTConfig, in_features: int, out_features: int, std: float = STD, *, rngs: nnx.Rngs
) -> Linear:
    return Linear(
        in_features,
        out_features,
        kernel_init=nnx.initializers.normal(std),
        bias_init=nnx.initializers.zeros_init(),
        dtype=config.compute_dtype,
        rngs=rngs,
    )


class GPT(nnx.Module):
    """Lets each token see itself and those before it."""

    def __init__(self, config: VQBeTConfig, *, rngs: nnx.Rngs):
        self.transformer = Transformer(config, rngs=rngs)
        self.lm_head = nnx.Linear(
            config.gpt_hidden_dim,
            config.gpt_output_dim,
            use_bias=False,
            kernel_init=nnx.initializers.normal(STD),
            dtype=config.compute_dtype,
            rngs=rngs,
        )

    def __call__(
        self, tokens: Float[Array, "b l in"], dropout_key: PRNGKeyArray | None = None
    ) -> Float[Array, "b l out"]:
        return self.lm_head(self.transformer(tokens, dropout_key)).astype(jnp.float32)


class Transformer(nnx.Module):
    """Embeds the tokens and their positions, and passes them through the blocks."""

    def __init__(self, config: VQBeTConfig, *, rngs: nnx.Rngs):
        d = config.gpt_hidden_dim
        self.wte = _linear(config, config.gpt_input_dim, d, rngs=rngs)
        self.wpe = nnx.Embed(config.gpt_block_size, d, embedding_init=nnx.initializers.normal(STD), rngs=rngs)
        self.h = nnx.List([Block(config, rngs=rngs) for _ in range(config.gpt_n_layer)])
        self.ln_f = LayerNorm(d, dtype=config.compute_dtype, rngs=rngs)
        self.dropout = config.dropout

    def __call__(self, tokens: Float[Array, "b l in"], key: PRNGKeyArray | None) -> Float[Array, "b l d"]:
        keys = split_key(key, 1 + len(self.h))
        x = self.wte(tokens)
        positions = self.wpe.embedding[: x.shape[1]].astype(x.dtype)  # l d
        x = dropout(x + positions[None], self.dropout, keys[0])
        for block, block_key in zip(self.h, keys[1:], strict=True):
            x = run_block(block, x, block_key)
        return self.ln_f(x)


class Block(nnx.Module):
    """Attention and two linear layers, each behind a norm and beside a residual connection."""

    def __init__(self, config: VQBeTConfig, *, rngs: nnx.Rngs):
        d, dtype = config.gpt_hidden_dim, config.compute_dtype
        self.ln_1 = LayerNorm(d, dtype=dtype, rngs=rngs)
        self.attn = CausalSelfAttention(config, rngs=rngs)
        self.ln_2 = LayerNorm(d, dtype=dtype, rngs=rngs)
        self.mlp = Sequential(
            [_linear(config, d, 4 * d, rngs=rngs), gelu, _linear(config, 4 * d, d, rngs=rngs)]
        )
        self.dropout = config.dropout

    def __call__(self, x: Float[Array, "b l d"], key: PRNGKeyArray | None) -> Float[Array, "b l d"]:
        attention_key, mlp_key = split_key(key, 2)
        x = x + self.attn(self.ln_1(x), attention_key)
        return x + dropout(self.mlp(self.ln_2(x)), self.dropout, mlp_key)


class CausalSelfAttention(nnx.Module):
    """Attention to what came before."""

    def __init__(self, config: VQBeTConfig, *, rngs: nnx.Rngs):
        d, length = config.gpt_hidden_dim, config.gpt_block_size
        self.c_attn = _linear(config, d, 3 * d, rngs=rngs)
        self.c_proj = _linear(config, d, d, STD / math.sqrt(2 * config.gpt_n_layer), rngs=rngs)
        # LeRobot's mask, under its name: 1 where a token may look.
        self.bias = Buffer(jnp.tril(jnp.ones((1, 1, length, length))))
        self.num_heads = config.gpt_n_head
        self.dropout, self.dtype = config.dropout, config.compute_dtype

    def __call__(self, x: Float[Array, "b l d"], key: PRNGKeyArray | None) -> Float[Array, "b l d"]:
        keys = split_key(key, 2)
        length, width = x.shape[1], x.shape[2] // self.num_heads
        q, k, v = einops.rearrange(self.c_attn(x), "b l (p n h) -> p b n l h", p=3, n=self.num_heads)
        scores = jnp.einsum("bnqh,bnkh->bnqk", q, k).astype(jnp.float32) / math.sqrt(width)
        scores = jnp.where(self.bias[:, :, :length, :length] == 0, -jnp.inf, scores)
        attention = jax.nn.softmax(scores, axis=-1).astype(self.dtype)
        attention = dropout(attention, self.dropout, keys[0])
        attended = jnp.einsum("bnqk,bnkh->bnqh", attention, v)
        attended = einops.rearrange(attended, "b n q h -> b q (n h)")
        return dropout(self.c_proj(attended), self.dropout, keys[1])
