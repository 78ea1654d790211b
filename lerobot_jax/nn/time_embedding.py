"""The embeddings of diffusion steps and times that policies share."""

import math

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float, Num

PIECE_BITS = 12  # the product of two pieces is exact in float32


class SinusoidalPosEmb(nnx.Module):
    """Embeds diffusion steps, or times: sines, then cosines, at frequencies from 1 to 1/10000."""

    def __init__(self, d: int):
        self.d = d

    def __call__(self, time: Num[Array, " b"]) -> Float[Array, "b d"]:
        half = self.d // 2
        frequency = jnp.exp(jnp.arange(half) * -(math.log(10000) / (half - 1)))
        angle = time[:, None].astype(jnp.float32) * frequency[None]
        return jnp.concatenate([jnp.sin(angle), jnp.cos(angle)], axis=-1)


def embed_time(
    time: Float[Array, "*b"], features: int, min_period: float, max_period: float
) -> Float[Array, "*b {features}"]:
    """Give sines, then cosines, of a time at periods from `min_period` to `max_period`, evenly in logarithm.

    With periods of thousandths, a phase has hundreds of turns, of which float32 would lose the fourth digit.
    LeRobot computes in float64 (`create_sinusoidal_pos_embedding`); here, times and frequencies are taken apart
    into pieces whose products are exact, and whole turns are dropped from each product.
    """
    fractions = np.linspace(0.0, 1.0, features // 2)
    frequencies = 1 / (min_period * (max_period / min_period) ** fractions)  # in turns
    high = jax.lax.reduce_precision(time, exponent_bits=8, mantissa_bits=PIECE_BITS - 1)
    turns = jnp.zeros((*time.shape, features // 2), jnp.float32)
    for frequency in _pieces(frequencies):
        frequency = frequency.reshape(*(1,) * time.ndim, -1)
        for part in (high, time - high):
            product = part[..., None] * frequency
            turns = turns + (product - jnp.round(product))
    phases = 2 * jnp.pi * (turns - jnp.round(turns))
    return jnp.concatenate([jnp.sin(phases), jnp.cos(phases)], axis=-1)


def _pieces(values: np.ndarray) -> list[np.ndarray]:
    """Take float64 numbers apart into three float32 numbers of few bits that sum to them."""
    pieces, rest = [], values
    for _ in range(3):
        mantissa, exponent = np.frexp(rest)
        piece = np.ldexp(np.round(np.ldexp(mantissa, PIECE_BITS)), exponent - PIECE_BITS)
        pieces.append(piece.astype(np.float32))
        rest = rest - piece
    return pieces
