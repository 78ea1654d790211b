"""Gemma's decoder as pi0 and pi0.5 use it: layers of one transformer, or of several that attend jointly.

Papers: Gemma (https://arxiv.org/abs/2403.08295); pi0 (https://arxiv.org/abs/2410.24164), whose action expert is a
second Gemma of smaller width in the same attention; pi0.5 (https://arxiv.org/abs/2504.16054), whose expert's norms
are told the time (adaRMS).
Mirrors `transformers.models.gemma.modeling_gemma` and `lerobot.policies.pi_gemma`; module names are theirs. Norms,
softmax and rotations' angles are float32; the rest is in the layers' dtype.
"""

import dataclasses
import itertools
from collections.abc import Sequence

import einops
import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Bool, Float, Int

from lerobot_jax.nn import initializers
from lerobot_jax.nn.activations import gelu_tanh
from lerobot_jax.nn.linear import Linear
from lerobot_jax.nn.stack import Stack, scan_stacks

ROPE_BASE = 10000.0
NORM_EPSILON = 1e-6
FLOAT32 = jnp.dtype(jnp.float32)

Keys = Float[Array, "b _k 1 h"]
"""Keys or values, which all heads share."""
Cache = tuple[Float[Array, "layers b _k 1 h"], Float[Array, "layers b _k 1 h"]]
"""Keys and values of every layer."""


@dataclasses.dataclass(frozen=True)
class GemmaSettings:
    """The sizes of a Gemma; all heads of queries share one of keys and values."""

    width: int
    depth: int
    mlp_dim: int
    num_heads: int
    head_dim: int


GEMMA_SIZES = {
    "gemma_2b": GemmaSettings(2048, 18, 16_384, 8, 256),
    "gemma_300m": GemmaSettings(1024, 18, 4096, 8, 256),
    "dummy": GemmaSettings(32, 3, 48, 8, 8),  # for tests, as openpi's of this name
}


class GemmaModel(nnx.Module):
    """Layers and a last norm; with `vocab_size` also the embeddings of tokens.

    Args:
        settings: sizes.
        vocab_size: how many tokens it knows; None: it reads vectors only.
        is_adaptive: whether its norms take a condition.
        dtype: in which it computes.
        norm_dtype: in which its norms compute what they make of the condition.
    """

    def __init__(
        self,
        settings: GemmaSettings,
        *,
        vocab_size: int | None = None,
        is_adaptive: bool = False,
        dtype: jnp.dtype,
        norm_dtype: jnp.dtype = FLOAT32,
        rngs: nnx.Rngs,
    ):
        if vocab_size is not None:
            self.embed_tokens = GemmaEmbedding(vocab_size, settings.width, dtype=dtype, rngs=rngs)
        self.settings = settings
        norm = {"is_adaptive": is_adaptive, "dtype": norm_dtype}

        def make_layer(rngs: nnx.Rngs) -> GemmaLayer:
            return GemmaLayer(settings, norm, dtype=dtype, rngs=rngs)

        self.layers = Stack(make_layer, settings.depth, rngs=rngs)
        self.norm = GemmaRMSNorm(settings.width, **norm, rngs=rngs)


class GemmaEmbedding(nnx.Embed):
    """Vectors of tokens, times the root of their width."""

    def __init__(self, vocab_size: int, features: int, *, dtype: jnp.dtype, rngs: nnx.Rngs):
        init = nnx.initializers.normal(0.02)
        super().__init__(vocab_size, features, embedding_init=init, dtype=dtype, rngs=rngs)

    def __call__(self, tokens: Int[Array, "b l"]) -> Float[Array, "b l d"]:
        # Rows before their type: so their gradients are summed in float32.
        rows = self.embedding[...][tokens].astype(self.dtype)
        return rows * jnp.asarray(self.features**0.5, self.dtype)


class GemmaRMSNorm(nnx.Module):
    """Scale to a mean square of 1, times 1 + weight; or, if it is adaptive, as a condition says.

    Mirrors `PiGemmaRMSNorm`: also gives the gate by which what comes of the result is multiplied; None is 1.
    """

    def __init__(self, features: int, *, is_adaptive: bool, dtype: jnp.dtype, rngs: nnx.Rngs):
        if is_adaptive:
            zeros = nnx.initializers.zeros_init()
            self.dense = Linear(features, 3 * features, kernel_init=zeros, dtype=dtype, rngs=rngs)
        else:
            self.weight = nnx.Param(jnp.zeros(features))
        self.is_adaptive = is_adaptive

    def __call__(
        self, x: Float[Array, "b l d"], condition: Float[Array, "b #l d"] | None
    ) -> tuple[Float[Array, "b l d"], Float[Array, "b #l d"] | None]:
        values = x.astype(jnp.float32)
        normal = values * jax.lax.rsqrt(jnp.mean(jnp.square(values), -1, keepdims=True) + NORM_EPSILON)
        if not self.is_adaptive:
            return (normal * (1 + self.weight[...].astype(jnp.float32))[None, None]).astype(x.dtype), None
        assert condition is not None
        scale, shift, gate = jnp.split(self.dense(condition).astype(jnp.float32), 3, axis=-1)
        return (normal * (1 + scale) + shift).astype(x.dtype), gate.astype(x.dtype)


class GemmaLayer(nnx.Module):
    """Attention and an MLP, each after its norm."""

    def __init__(self, settings: GemmaSettings, norm: dict, *, dtype: jnp.dtype, rngs: nnx.Rngs):
        self.self_attn = GemmaAttention(settings, dtype=dtype, rngs=rngs)
        self.mlp = GemmaMLP(settings, dtype=dtype, rngs=rngs)
        self.input_layernorm = GemmaRMSNorm(settings.width, **norm, rngs=rngs)
        self.post_attention_layernorm = GemmaRMSNorm(settings.width, **norm, rngs=rngs)

    def finish(
        self,
        x: Float[Array, "b l d"],
        attended: Float[Array, "b l n h"],
        gate: Float[Array, "b #l d"] | None,
        condition: Float[Array, "b #l d"] | None,
    ) -> Float[Array, "b l d"]:
        """Add what was attended to, and what the MLP makes of it."""
        x = _add(x, self.self_attn.o_proj(einops.rearrange(attended, "b l n h -> b l (n h)")), gate)
        hidden, gate = self.post_attention_layernorm(x, condition)
        return _add(x, self.mlp(hidden), gate)


class GemmaAttention(nnx.Module):
    """The projections of attention."""

    def __init__(self, settings: GemmaSettings, *, dtype: jnp.dtype, rngs: nnx.Rngs):
        d, inner = settings.width, settings.num_heads * settings.head_dim
        self.q_proj = _linear(d, inner, dtype, rngs)
        self.k_proj, self.v_proj = (_linear(d, settings.head_dim, dtype, rngs) for _ in range(2))
        self.o_proj = _linear(inner, d, dtype, rngs)
        self.num_heads = settings.num_heads

    def project(
        self, x: Float[Array, "b l d"], rotation: tuple[Array, Array]
    ) -> tuple[Float[Array, "b l n h"], Keys, Keys]:
        """Give queries, keys and values, rotated by their positions."""
        query = einops.rearrange(self.q_proj(x), "b l (n h) -> b l n h", n=self.num_heads)
        key, value = self.k_proj(x)[:, :, None], self.v_proj(x)[:, :, None]
        return rotate(query, *rotation), rotate(key, *rotation), value


class GemmaMLP(nnx.Module):
    """GeGLU: a linear layer gated by the GELU of another."""

    def __init__(self, settings: GemmaSettings, *, dtype: jnp.dtype, rngs: nnx.Rngs):
        d, hidden = settings.width, settings.mlp_dim
        self.gate_proj, self.up_proj = (_linear(d, hidden, dtype, rngs) for _ in range(2))
        self.down_proj = _linear(hidden, d, dtype, rngs)

    def __call__(self, x: Float[Array, "b l d"]) -> Float[Array, "b l d"]:
        return self.down_proj(gelu_tanh(self.gate_proj(x)) * self.up_proj(x))


def attend_jointly(
    models: Sequence[GemmaModel],
    xs: Sequence[Float[Array, "b _l _d"]],
    conditions: Sequence[Float[Array, "b _l _d"] | None],
    positions: Int[Array, "b l"],
    mask: Bool[Array, "b l _k"],
    cache: Cache | None = None,
) -> tuple[list[Float[Array, "b _l _d"]], Cache]:
    """Run transformers of equal depth whose tokens attend to each other, and to those of a cache.

    Args:
        models: the transformers.
        xs: the tokens of each.
        conditions: what its norms are told, for models whose norms are adaptive.
        positions: of all tokens, one model's after the other's.
        mask: which tokens each of them sees, True: seen; those in the cache come first.
        cache: the keys and values of earlier tokens.

    Returns:
        The tokens of each model after its last norm, and the keys and values of all of them.
    """
    rotation = rotations(positions, models[0].settings.head_dim, xs[0].dtype)
    ends = np.cumsum([x.shape[1] for x in xs])
    parts = [tuple(part[:, a:b] for part in rotation) for a, b in itertools.pairwise([0, *ends])]

    def apply(layers, xs, *cached):
        hidden, gates = zip(
            *(layer.input_layernorm(x, c) for layer, x, c in zip(layers, xs, conditions, strict=True)),
            strict=True,
        )
        projected = [
            layer.self_attn.project(h, part) for layer, h, part in zip(layers, hidden, parts, strict=True)
        ]
        query, key, value = (jnp.concatenate(each, axis=1) for each in zip(*projected, strict=True))
        seen = (key, value)
        if cached:
            seen = [jnp.concatenate(each, axis=1) for each in zip(cached, seen, strict=True)]
        attended = jnp.split(
            jax.nn.dot_product_attention(query, *seen, mask=mask[:, None]), ends[:-1], axis=1
        )
        xs = [
            layer.finish(x, each, gate, c)
            for layer, x, each, gate, c in zip(layers, xs, attended, gates, conditions, strict=True)
        ]
        return xs, (key, value)

    stacks = [model.layers for model in models]
    xs, new = scan_stacks(stacks, apply, list(xs), () if cache is None else cache)
    return [model.norm(x, c)[0] for model, x, c in zip(models, xs, conditions, strict=True)], new


def rotations(
    positions: Int[Array, "b l"], head_dim: int, dtype: jnp.dtype
) -> tuple[Float[Array, "b l 1 h"], Float[Array, "b l 1 h"]]:
    """Give the cosines and sines of RoPE (Su et al., https://arxiv.org/abs/2104.09864), halves equal."""
    frequencies = 1 / ROPE_BASE ** (np.arange(0, head_dim, 2, dtype=np.float32) / head_dim)
    angles = positions.astype(jnp.float32)[..., None] * frequencies[None, None]
    angles = jnp.concatenate([angles, angles], axis=-1)[:, :, None]
    return jnp.cos(angles).astype(dtype), jnp.sin(angles).astype(dtype)


def rotate(
    x: Float[Array, "b l n h"], cos: Float[Array, "b l 1 h"], sin: Float[Array, "b l 1 h"]
) -> Float[Array, "b l n h"]:
    """Rotate pairs of dimensions, one of each half."""
    first, second = jnp.split(x, 2, axis=-1)
    return x * cos + jnp.concatenate([-second, first], axis=-1) * sin


def _add(x: Array, change: Array, gate: Array | None) -> Array:
    return x + (change if gate is None else change * gate)


def _linear(features: int, new_features: int, dtype: jnp.dtype, rngs: nnx.Rngs) -> nnx.Linear:
    # Gemma's would be normal(0.02), but LeRobot puts its own layers into the model after that is initialized.
    init = initializers.torch_uniform
    return nnx.Linear(features, new_features, use_bias=False, kernel_init=init, dtype=dtype, rngs=rngs)
