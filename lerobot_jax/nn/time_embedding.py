"""The embedding of diffusion steps and times that policies share."""

import math

import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Num


class SinusoidalPosEmb(nnx.Module):
    """Embeds diffusion steps, or times: sines, then cosines, at frequencies from 1 to 1/10000."""

    def __init__(self, d: int):
        self.d = d

    def __call__(self, time: Num[Array, " b"]) -> Float[Array, "b d"]:
        half = self.d // 2
        frequency = jnp.exp(jnp.arange(half) * -(math.log(10000) / (half - 1)))
        angle = time[:, None].astype(jnp.float32) * frequency[None]
        return jnp.concatenate([jnp.sin(angle), jnp.cos(angle)], axis=-1)
