"""Adam's step as PyTorch computes it, with its two moments kept in 32, 16 or 8 bits a number.

bfloat16: rounded up or down at random, so that the average is right. Rounded to the nearest, the second moment
could not fall: it changes by 0.1 % a step (beta 0.999), and bfloat16's numbers are 0.4 to 0.8 % apart.

int8: Dettmers et al., "8-bit Optimizers via Block-wise Quantization", arXiv:2110.02861. A number is one of 256 of a
table between -1 and 1 (or 0 and 1), times the largest magnitude of its block. As in their bitsandbytes, the step
itself is computed with the moments before they are rounded, and small arrays stay in float32. Other than there,
blocks go along the last axis, so that codes and scales can be sharded as the parameters are, and a second moment
that is not 0 never becomes 0, which would make that parameter's next step many times too long.
"""

import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Float, UInt8, UInt32

MIN_SIZE = 4096  # smaller arrays are not quantized
MIN_AXIS = 16  # nor are those with so short a last axis that the scales would outweigh the codes
BLOCK = 256  # numbers with a common scale, at most


class Quantized(NamedTuple):
    """An array as codes of a byte and scales of blocks along the last axis."""

    codes: UInt8[Array, "*lead length"]
    scales: Float[Array, "*lead blocks"]


def scale_by_adam(betas: tuple[float, float], eps: float, moments_dtype: str) -> optax.GradientTransformation:
    """Scale gradients as torch's Adam does, with moments kept in float32, bfloat16 or int8."""
    b1, b2 = betas
    if moments_dtype == "float32":
        return optax.scale_by_adam(b1, b2, eps)

    def init(params):
        count = jnp.zeros((), jnp.int32)
        zeros = jax.tree.map(lambda p: jnp.zeros(p.shape, jnp.float32), params)
        mu, nu = _store_all((zeros, zeros), moments_dtype, count)
        return optax.ScaleByAdamState(count=count, mu=mu, nu=nu)

    def update(updates, state, params=None):
        del params
        count = state.count + 1
        old_mu, old_nu = (
            jax.tree.map(lambda kept, table=table: _load(kept, table), kept, is_leaf=_is_quantized)
            for kept, table in ((state.mu, SIGNED), (state.nu, UNSIGNED))
        )
        mu = jax.tree.map(lambda m, g: b1 * m + (1 - b1) * g, old_mu, updates)
        nu = jax.tree.map(lambda v, g: b2 * v + (1 - b2) * jnp.square(g), old_nu, updates)
        steps = jax.tree.map(
            lambda m, v, g: (m / (1 - b1**count) / (jnp.sqrt(v / (1 - b2**count)) + eps)).astype(g.dtype),
            *(mu, nu, updates),
        )
        kept_mu, kept_nu = _store_all((mu, nu), moments_dtype, count)
        return steps, optax.ScaleByAdamState(count=count, mu=kept_mu, nu=kept_nu)

    return optax.GradientTransformation(init, update)


def _store_all(moments: tuple[Any, Any], dtype: str, count: jax.Array) -> tuple[Any, Any]:
    """Round both moments of all parameters; random bits follow from the count of steps alone."""
    leaves = [jax.tree.leaves(moment) for moment in moments]
    if dtype == "int8":
        kept = [[_quantize_if_large(x, t) for x in xs] for xs, t in zip(leaves, TABLES, strict=True)]
    else:
        seeds = jax.random.bits(jax.random.fold_in(jax.random.key(0), count), (len(leaves[0]),), jnp.uint32)
        kept = [[], []]
        for m, v, seed in zip(*leaves, seeds, strict=True):
            bits = _hash(seed, m.shape)
            kept[0].append(round_at_random(m, bits & 0xFFFF))
            kept[1].append(round_at_random(v, bits >> 16))
    structure = jax.tree.structure(moments[0])
    return jax.tree.unflatten(structure, kept[0]), jax.tree.unflatten(structure, kept[1])


def _load(kept: Any, table: np.ndarray) -> jax.Array:
    return dequantize(kept, table) if isinstance(kept, Quantized) else kept.astype(jnp.float32)


def _is_quantized(node: Any) -> bool:
    return isinstance(node, Quantized)


def _quantize_if_large(x: jax.Array, table: np.ndarray) -> Any:
    return quantize(x, table) if x.size >= MIN_SIZE and x.shape[-1] >= MIN_AXIS else x


def _hash(seed: UInt32[Array, ""], shape: tuple[int, ...]) -> UInt32[Array, "..."]:
    """Give each place of an array its own bits; as random as rounding needs, and a tenth of the work of JAX's."""
    bits = jnp.arange(math.prod(shape), dtype=jnp.uint32).reshape(shape) * np.uint32(0x9E3779B1) + seed
    for shift, factor in ((16, 0x85EBCA6B), (13, 0xC2B2AE35)):  # the end of MurmurHash3
        bits = (bits ^ (bits >> shift)) * np.uint32(factor)
    return bits ^ (bits >> 16)


def round_at_random(x: Float[Array, "*shape"], bits: UInt32[Array, "*shape"]) -> Array:
    """Round float32 to one of the two nearest bfloat16, so that the expected value is the number itself.

    Args:
        x: the numbers; what is not finite stays so.
        bits: 16 random bits each, as a number below 2**16.
    """
    whole = jax.lax.bitcast_convert_type(x, jnp.uint32)
    rounded = jax.lax.bitcast_convert_type((whole + bits) >> 16 << 16, jnp.float32)
    return jnp.where(jnp.isfinite(x), rounded, x).astype(jnp.bfloat16)


def dynamic_table(*, signed: bool) -> np.ndarray:
    """Give the 256 numbers of the dynamic tree data type, from -1 or 0 to 1, in order.

    Each decade from 1e-7 to 1 has twice as many numbers as the one below, evenly spread.
    """
    numbers = [0.0, 1.0]
    for i in range(7):
        edges = np.linspace(0.1, 1, 2 ** (i if signed else i + 1) + 1)
        middles = 10.0 ** (i - 6) * (edges[:-1] + edges[1:]) / 2
        numbers += [*middles, *(-middles if signed else [])]
    return np.sort(np.array(numbers, np.float32))


SIGNED, UNSIGNED = TABLES = dynamic_table(signed=True), dynamic_table(signed=False)


def quantize(x: Float[Array, "*lead length"], table: np.ndarray) -> Quantized:
    """Give each number's nearest one in the table, relative to the largest magnitude of its block."""
    blocks = _in_blocks(x)
    scales = jnp.abs(blocks).max(-1)
    codes = _nearest(blocks / jnp.where(scales > 0, scales, 1)[..., None], table)
    return Quantized(codes.reshape(*x.shape[:-1], -1)[..., : x.shape[-1]], scales)


def _nearest(relative: jax.Array, table: np.ndarray) -> UInt8[Array, "..."]:
    """Give the index of the nearest number in a table, computed: looking it up takes ten times longer."""
    is_signed = table[0] < 0
    size = jnp.abs(relative)
    zero, sizes = (127, table[127:]) if is_signed else (0, table)
    first = 1 if is_signed else 2  # how many numbers the lowest decade has; each other has twice as many
    ends = first * (2 ** np.arange(1, 7) - 1)  # index of the last number of each decade but the highest
    in_decade, num = size, jnp.full(size.shape, first * 2.0**6)
    for edge in (sizes[ends] + sizes[ends + 1]) / 2:
        in_decade = jnp.where(size < edge, 10 * in_decade, in_decade)
        num = jnp.where(size < edge, num / 2, num)
    place = jnp.clip(jnp.floor((in_decade - 0.1) / 0.9 * num), 0, num - 1)
    index = num - (first - 1) + place  # those of lower decades are num - first, and there is 0
    is_tiny = size < sizes[1] / 2 if is_signed else size == 0
    index = jnp.where(is_tiny, 0, index)
    if is_signed:
        index = jnp.where(relative < 0, -index, index)
    index = jnp.where(relative > (table[-2] + table[-1]) / 2, 255 - zero, index)
    return (zero + index).astype(jnp.uint8)


def dequantize(kept: Quantized, table: np.ndarray) -> Float[Array, "*lead length"]:
    blocks = jnp.asarray(table)[_in_blocks(kept.codes)] * kept.scales[..., None]
    return blocks.reshape(*kept.codes.shape[:-1], -1)[..., : kept.codes.shape[-1]]


def _in_blocks(x: jax.Array) -> Array:
    """Divide the last axis into the fewest blocks that are equally long and no longer than BLOCK."""
    length = x.shape[-1]
    num = math.ceil(length / BLOCK)
    size = math.ceil(length / num)
    padded = jnp.pad(x, [(0, 0)] * (x.ndim - 1) + [(0, num * size - length)])
    return padded.reshape(*x.shape[:-1], num, size)
