"""Float32 arithmetic that rounds where PyTorch rounds, whatever XLA makes of it.

PyTorch fuses some multiplications with the addition that follows (one rounding), others not (two); XLA decides
anew in each program, and divides by a constant by multiplying with its inverse. On uint8 images that shows: where
results are truncated to whole levels, an error of 1e-7 can become a level.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float


def rounded(product: Float[Array, "..."]) -> Float[Array, "..."]:
    """Round a product before anything is added to it."""
    return jnp.minimum(product, 1e30)


def divide(x: Float[Array, "..."], constant: float) -> Float[Array, "..."]:
    """Divide finite numbers by a constant, which XLA must not see to be one."""
    return x / (0 * x + constant)


def multiply(x: Float[Array, "..."], y: Float[Array, ""]) -> Float[Array, "..."]:
    """Give x y, rounded once; x are whole numbers below 4096."""
    y_high, y_low = _halves(y)
    return x * y_high + x * y_low


def add_product(
    summand: Float[Array, "..."], x: Float[Array, "..."], y: Float[Array, ""]
) -> Float[Array, "..."]:
    """Give summand + x y as if rounded once."""
    (x_high, x_low), (y_high, y_low) = _halves(x), _halves(y)
    product, product_rest = x_high * y_high, x_high * y_low + x_low * y
    total = summand + product
    part = total - summand
    rest = (summand - (total - part)) + (product - part)  # what `total` lost by rounding (Knuth's two-sum)
    return total + (rest + product_rest)


def _halves(x: Float[Array, "..."]) -> tuple[Float[Array, "..."], Float[Array, "..."]]:
    """Split numbers of 24 bits into sums of two of 12 bits, whose products are exact."""
    bits = jax.lax.bitcast_convert_type(x, jnp.int32)
    high = jax.lax.bitcast_convert_type(bits & -(2**12), jnp.float32)
    return high, x - high
