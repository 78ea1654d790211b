"""Equal blocks run one after the other, compiled once."""

from collections.abc import Callable
from typing import Any

import jax
from flax import nnx

from lerobot_jax.nn.variables import Buffer


class Stack(nnx.Module):
    """`length` equal blocks, kept as one block whose arrays have a leading axis of layers.

    `jax.lax.scan` runs them, so that compile time does not grow with depth; with `jax.checkpoint`, so that only
    the blocks' inputs are kept for the backward pass. In PyTorch's names, the blocks are `0`, `1`, ....

    Args:
        make_block: builds one block from its `nnx.Rngs`; blocks draw no random numbers when they are called.
        length: how many blocks.
    """

    def __init__(self, make_block: Callable[[nnx.Rngs], nnx.Module], length: int, *, rngs: nnx.Rngs):
        def init(key):
            _, params, buffers = nnx.split(make_block(nnx.Rngs(params=key)), nnx.Param, Buffer)
            return params, buffers

        graphdef = nnx.graphdef(nnx.eval_shape(lambda: make_block(nnx.Rngs(params=0))))
        self.block = nnx.merge(graphdef, *jax.vmap(init)(jax.random.split(rngs.params(), length)))
        self.length = length

    def __call__(self, x: Any, *args: Any) -> Any:
        """Apply the blocks to `x` in turn, each as `block(x, *args)`."""
        graphdef, arrays = nnx.split(self.block)

        @jax.checkpoint
        def apply(x, layer):
            return nnx.merge(graphdef, layer)(x, *args), None

        return jax.lax.scan(apply, x, arrays)[0]
