"""Adafactor (Shazeer & Stern, arXiv:1804.04235): of a matrix's second moment, only the means of rows and columns.

The arithmetic is that of `torch.optim.Adafactor`, as all optimizers here have PyTorch's: steps relative to a
parameter's size, at most 1 / sqrt(step), no first moment, and epsilon as a lower bound instead of a summand.
`optax.adafactor` follows another line (t5x's: epsilon within the squares, nothing factored below 128, the two
largest axes), and would take the layers of a stack for a part of one array.

Two things are not as in PyTorch. Convolutions are factored along their channels, as in t5x, not along their window,
which would save almost nothing. And the layers of a stack are arrays of their own, as they are in PyTorch's policy.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float, Int

from lerobot_jax.nn.weights import is_stacked

Tree = dict[str, Any]

MIN_SCALE = 1e-3  # parameters that are smaller on average move as if they were this large
MAX_UPDATE = 1.0  # root mean square of an update before it is scaled


class Factors(NamedTuple):
    """The second moment's means along the last axis and along the one before it."""

    row: Float[Array, "... rows 1"]
    column: Float[Array, "... 1 columns"]


class AdafactorState(NamedTuple):
    count: Int[Array, ""]
    second: Any  # for each parameter `Factors`, or the whole moment if it is a vector


def scale_by_adafactor(
    beta2_decay: float, names: Tree, decays: Tree, rates: Tree, schedule: Callable[[Any], Any]
) -> optax.GradientTransformation:
    """Give Adafactor's step and weight decay in units of the learning rate.

    Args:
        beta2_decay: the second moment's decay rate is 1 - step ** beta2_decay.
        names: each parameter's dotted name.
        decays: its weight decay.
        rates: its learning rate, relative to its size; the cap of 1 / sqrt(step) is on the scheduled rate.
        schedule: factor on the rates at a step. With phases of training, it is read at the phase's own step here.
    """

    def init(params):
        second = jax.tree.map(_zeros, params, names)
        return AdafactorState(jnp.zeros((), jnp.int32), second)

    def update(updates, state, params=None):
        step = (state.count + 1).astype(jnp.float32)
        factor = schedule(state.count)

        def move(second, g, p, name, decay, rate):
            second = _follow(second, g, step**beta2_decay)
            axes = tuple(range(int(is_stacked(name)), g.ndim))
            cap = jnp.minimum(1.0, 1 / (jnp.sqrt(step) * (rate * factor)))
            scale = jnp.maximum(MIN_SCALE, _root_mean_square(p, axes)) * cap
            return second, decay * p + scale * _clip(_divide(g, second), axes)

        pairs = jax.tree.map(move, state.second, updates, params, names, decays, rates, is_leaf=_is_moment)
        is_pair = lambda node: isinstance(node, tuple) and not _is_moment(node)  # noqa: E731
        second, moves = (jax.tree.map(lambda pair, i=i: pair[i], pairs, is_leaf=is_pair) for i in range(2))
        return moves, AdafactorState(state.count + 1, second)

    return optax.GradientTransformation(init, update)


def _is_moment(node: Any) -> bool:
    return isinstance(node, Factors)


def _zeros(param: Any, name: str) -> Factors | jax.Array:
    if param.ndim - is_stacked(name) < 2:
        return jnp.zeros_like(param)
    *lead, rows, columns = param.shape
    return Factors(jnp.zeros((*lead, rows, 1), param.dtype), jnp.zeros((*lead, 1, columns), param.dtype))


def _follow(second: Any, g: jax.Array, rate: jax.Array) -> Any:
    """Move the second moment towards that of the gradient."""
    squares = jnp.square(g)
    if not isinstance(second, Factors):
        return second + rate * (squares - second)
    means = Factors(squares.mean(-1, keepdims=True), squares.mean(-2, keepdims=True))
    return jax.tree.map(lambda old, new: old + rate * (new - old), second, means)


def _divide(g: jax.Array, second: Any) -> jax.Array:
    """Divide a gradient by the root of its second moment."""
    eps = jnp.finfo(g.dtype).eps
    if isinstance(second, Factors):
        second = second.row * second.column / jnp.maximum(second.row.mean(-2, keepdims=True), eps)
    return g * jax.lax.rsqrt(jnp.maximum(second, eps**2))


def _clip(update: jax.Array, axes: tuple[int, ...]) -> jax.Array:
    return update / jnp.maximum(1.0, _root_mean_square(update, axes) / MAX_UPDATE)


def _root_mean_square(x: jax.Array, axes: tuple[int, ...]) -> jax.Array:
    return jnp.sqrt(jnp.square(x).mean(axes, keepdims=True))
