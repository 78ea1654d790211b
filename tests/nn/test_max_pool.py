import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lerobot_jax.nn.max_pool import max_pool


def reference(x):
    border = ((0, 0), (1, 1), (1, 1), (0, 0))
    return jax.lax.reduce_window(x, -jnp.inf, jax.lax.max, (1, 3, 3, 1), (1, 2, 2, 1), border)


@pytest.mark.parametrize("size", [(6, 6), (7, 9), (8, 5), (1, 2)])
def test_gradient_is_that_of_jax_also_between_equals(size):
    x = jnp.round(2 * jax.random.normal(jax.random.key(0), (3, *size, 4)))  # full of equal pixels
    y, gradient = jax.vjp(max_pool, x)
    expected, expected_gradient = jax.vjp(reference, x)
    np.testing.assert_array_equal(y, expected)
    dy = jax.random.normal(jax.random.key(1), y.shape)
    np.testing.assert_allclose(gradient(dy)[0], expected_gradient(dy)[0], atol=1e-6)


def test_other_devices_keep_the_rule_of_jax():
    step = jax.jit(jax.grad(lambda x: max_pool(x).sum())).trace(jnp.ones((2, 8, 8, 3)))
    texts = {name: step.lower(lowering_platforms=(name,)).as_text() for name in ("cpu", "cuda")}
    assert "select_and_scatter" in texts["cuda"]
    assert "select_and_scatter" not in texts["cpu"]
