import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lerobot_jax.nn.conditional import conditional_loss

PARAMS = {"cheap": jnp.array([0.5, -1.0]), "dear": jnp.array([[1.0, 2.0], [-0.5, 0.3]])}
X = jnp.linspace(-1.0, 1.0, 24).reshape(12, 2)
HIDDEN = (12, 2)  # what the expensive branch remembers for its gradient


def dear(params, x, scale):
    hidden = jnp.tanh(x @ params["dear"])
    return scale * jnp.square(hidden).sum(1), hidden.max()


def cheap(params, x, scale):
    return scale * (x[:, 0] - params["cheap"].sum()) ** 2, x.min()


def mean(branch):
    def loss(*args):
        losses, other = branch(*args)
        return losses.mean(), other

    return loss


def chosen_gradient(choose, is_dear, branches, weights):
    def loss(params, is_dear):
        losses, other = choose(is_dear, *branches, params, X, jnp.float32(3.0))
        return jnp.sum(losses * weights), other

    return jax.value_and_grad(loss, has_aux=True), (PARAMS, is_dear)


@pytest.mark.parametrize("is_dear", [True, False])
@pytest.mark.parametrize("is_scalar", [True, False])
def test_losses_and_gradients_are_those_of_the_branch(is_dear: bool, is_scalar: bool):
    branches = [mean(branch) if is_scalar else branch for branch in (dear, cheap)]
    weights = jnp.float32(0.7) if is_scalar else jnp.arange(12.0)
    results = []
    for choose in (conditional_loss, jax.lax.cond):
        gradient_fn, args = chosen_gradient(choose, jnp.asarray(is_dear), branches, weights)
        results.append(jax.jit(gradient_fn)(*args))
    for ours, plain in zip(*map(jax.tree.leaves, results), strict=True):
        np.testing.assert_allclose(ours, plain, rtol=1e-6)
    gradients = results[0][1]
    assert np.any(gradients["dear"]) == is_dear
    assert np.any(gradients["cheap"]) != is_dear


@pytest.mark.parametrize("is_scalar", [True, False])
def test_no_branch_hands_over_what_it_remembers(is_scalar: bool):
    branches = [mean(branch) if is_scalar else branch for branch in (dear, cheap)]
    weights = jnp.float32(1.0) if is_scalar else jnp.ones(12)

    def handed_over(choose):
        gradient_fn, args = chosen_gradient(choose, jnp.asarray(True), branches, weights)
        equations = jax.make_jaxpr(gradient_fn)(*args).eqns
        return [var.aval.shape for e in equations if e.primitive.name == "cond" for var in e.outvars]

    assert HIDDEN in handed_over(jax.lax.cond)
    assert HIDDEN not in handed_over(conditional_loss)
