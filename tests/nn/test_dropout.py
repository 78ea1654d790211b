import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lerobot_jax.nn.dropout import dropout

KEY = jax.random.key(0)


@pytest.mark.parametrize("shape", [(400, 256), (20, 30, 101), (1, 1, 1), (7,)])
@pytest.mark.parametrize("rate", [0.1, 0.5])
def test_entries_are_dropped_or_scaled_up(shape, rate: float):
    y = np.asarray(dropout(jnp.ones(shape), rate, KEY))
    assert y.shape == shape
    np.testing.assert_allclose(y[y != 0], 1 / (1 - rate), rtol=1e-4)
    assert abs((y == 0).mean() - rate) <= 5 * np.sqrt(rate * (1 - rate) / y.size) + (y.size < 100)


def test_neighbours_that_share_a_draw_are_independent():
    dropped = np.asarray(dropout(jnp.ones((1000, 200)), 0.5, KEY)) == 0
    for other in (np.roll(dropped, 1, axis=1), np.roll(dropped, 1, axis=0)):
        assert abs(np.corrcoef(dropped.ravel(), other.ravel())[0, 1]) < 0.01


def test_the_backward_pass_drops_the_same_entries():
    x = jnp.ones((30, 40))
    gradient = jax.jit(jax.grad(lambda x: dropout(x, 0.3, KEY).sum()))(x)
    np.testing.assert_array_equal(gradient, dropout(x, 0.3, KEY))


def test_without_a_key_nothing_happens():
    x = jnp.arange(6.0)
    assert dropout(x, 0.5, None) is x
    assert dropout(x, 0.0, KEY) is x
