"""Activations as PyTorch computes them: in float32, rounded once.

In bfloat16, JAX would round after each of their operations, and lose most of the derivative where tanh saturates.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float


def gelu_tanh(x: Float[Array, "*b d"]) -> Float[Array, "*b d"]:
    """Give `torch.nn.functional.gelu(x, approximate="tanh")`."""
    return jax.nn.gelu(x.astype(jnp.float32), approximate=True).astype(x.dtype)


def silu(x: Float[Array, "*b d"]) -> Float[Array, "*b d"]:
    """Give `torch.nn.functional.silu(x)`."""
    return jax.nn.silu(x.astype(jnp.float32)).astype(x.dtype)
