"""Attention with PyTorch's arithmetic, and `torch.nn.MultiheadAttention` with its parameters."""

import math

import einops
import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Bool, Float, PRNGKeyArray

from lerobot_jax.nn.dropout import dropout
from lerobot_jax.nn.initializers import torch_uniform
from lerobot_jax.nn.linear import Linear


def attend(
    query: Float[Array, "b n q h"],
    key: Float[Array, "b n k h"],
    value: Float[Array, "b n k h"],
    mask: Bool[Array, "#b #n #q k"] | None = None,
    *,
    dropout_rate: float = 0.0,
    dropout_key: PRNGKeyArray | None = None,
) -> Float[Array, "b n q h"]:
    """Give each query the mean of the values, weighted by how well their keys match; softmax is in float32.

    Args:
        query: heads before positions.
        key: of what is attended to.
        value: what is averaged.
        mask: which keys a query sees, True: seen; one that sees none gets zeros.
        dropout_rate: of the weights.
        dropout_key: without it, nothing is dropped.
    """
    scores = jnp.einsum("bnqh,bnkh->bnqk", query / math.sqrt(query.shape[-1]), key).astype(jnp.float32)
    if mask is not None:
        scores = jnp.where(mask, scores, jnp.finfo(jnp.float32).min)
    weights = jax.nn.softmax(scores, axis=-1).astype(query.dtype)
    if mask is not None:
        weights = jnp.where(mask, weights, 0)
    weights = dropout(weights, dropout_rate, dropout_key)
    return jnp.einsum("bnqk,bnkh->bnqh", weights, value)


class MultiheadAttention(nnx.Module):
    """Attention with packed input projections: `in_proj_weight` is (3 d, d), rows for queries, keys, values."""

    def __init__(
        self,
        features: int,
        num_heads: int,
        *,
        dropout: float = 0.0,
        out_kernel_init: nnx.Initializer = torch_uniform,
        dtype: jnp.dtype = jnp.float32,
        rngs: nnx.Rngs,
    ):
        # torch: xavier_uniform over the packed (3 d, d) matrix, biases zero
        xavier = nnx.initializers.xavier_uniform()
        self.in_proj_weight = nnx.Param(xavier(rngs.params(), (3 * features, features), jnp.float32))
        self.in_proj_bias = nnx.Param(jnp.zeros(3 * features))
        zeros = nnx.initializers.zeros_init()
        self.out_proj = Linear(
            features, features, kernel_init=out_kernel_init, bias_init=zeros, dtype=dtype, rngs=rngs
        )
        self.num_heads = num_heads
        self.dropout = dropout
        self.dtype = dtype

    def __call__(
        self,
        query: Float[Array, "b q d"],
        key: Float[Array, "b k d"],
        value: Float[Array, "b k d"],
        key_padding_mask: Bool[Array, "b k"] | None = None,
        dropout_key: PRNGKeyArray | None = None,
    ) -> Float[Array, "b q d"]:
        """Attend from `query` to `key` and `value`; keys where the mask is True are ignored."""
        d = query.shape[-1]
        if query is key:
            q, k = jnp.split(self._project(query, 0, 2 * d), 2, axis=-1)
        else:
            q, k = self._project(query, 0, d), self._project(key, d, 2 * d)
        v = self._project(value, 2 * d, 3 * d)
        q, k, v = (einops.rearrange(x, "b l (n h) -> b n l h", n=self.num_heads) for x in (q, k, v))
        mask = None if key_padding_mask is None else ~key_padding_mask[:, None, None, :]
        attended = attend(q, k, v, mask, dropout_rate=self.dropout, dropout_key=dropout_key)
        return self.out_proj(einops.rearrange(attended, "b n q h -> b q (n h)"))

    def _project(self, x: Float[Array, "b l d"], start: int, stop: int) -> Float[Array, "b l {stop-start}"]:
        """Apply some rows of the packed projection."""
        weight = self.in_proj_weight[start:stop].astype(self.dtype)
        bias = self.in_proj_bias[start:stop].astype(self.dtype)
        return x.astype(self.dtype) @ weight.T + bias[None, None]
