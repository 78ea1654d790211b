"""A loss with branches, of which one is computed."""

from collections.abc import Callable
from typing import Any

import jax
from jaxtyping import Array, Bool, Float

Tree = Any
Loss = Callable[..., tuple[Float[Array, "..."], Tree]]  # (params, *args) -> loss, others


def conditional_loss(
    is_true: Bool[Array, ""], on_true: Loss, on_false: Loss, params: Tree, *args: Tree
) -> tuple[Float[Array, "..."], Tree]:
    """Give `jax.lax.cond(is_true, on_true, on_false, params, *args)`, whose gradient is one branch's too.

    The gradient of `jax.lax.cond` is a second conditional, and between the two, every branch hands over all that
    any branch remembers: the cheap one fills the activations of the expensive one with zeros. Here gradients are
    computed inside of the branch: for a scalar loss together with it, for several losses by computing them again.

    Args:
        is_true: which branch.
        on_true: computes `(loss, others)` from `(params, *args)`.
        on_false: gives the same shapes.
        params: what the loss is differentiated by.
        args: what both need besides; without gradient, as are the others.
    """

    @jax.custom_vjp
    def choose(is_true, params, args):
        return jax.lax.cond(is_true, on_true, on_false, params, *args)

    def forward(is_true, params, args):
        if jax.eval_shape(on_true, params, *args)[0].shape:
            return choose(is_true, params, args), (is_true, params, args)
        branches = [jax.value_and_grad(branch, has_aux=True) for branch in (on_true, on_false)]
        return jax.lax.cond(is_true, *branches, params, *args)

    def backward(remembered, cotangents):
        loss_cotangent, _ = cotangents
        if loss_cotangent.shape:
            is_true, params, args = remembered
            pullbacks = [_pullback(branch, loss_cotangent) for branch in (on_true, on_false)]
            gradient = jax.lax.cond(is_true, *pullbacks, params, *args)
        else:
            gradient = jax.tree.map(lambda g: g * loss_cotangent.astype(g.dtype), remembered)
        return None, gradient, None

    choose.defvjp(forward, backward)
    return choose(is_true, params, args)


def _pullback(branch: Loss, cotangent: Float[Array, "..."]) -> Callable[..., Tree]:
    def gradient(params: Tree, *args: Tree) -> Tree:
        _, pull, _ = jax.vjp(lambda params: branch(params, *args), params, has_aux=True)
        return pull(cotangent)[0]

    return gradient
