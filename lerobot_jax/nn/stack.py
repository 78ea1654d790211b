"""Equal blocks run one after the other, compiled once."""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
from flax import nnx

from lerobot_jax.nn import execution, weights
from lerobot_jax.nn.variables import Buffer


class Stack(nnx.Module):
    """`length` equal blocks, kept as one block whose arrays have a leading axis of layers.

    `jax.lax.scan` runs them, so that compile time does not grow with depth; unless the run's `remat` says something
    else, only the blocks' inputs are kept for the backward pass. Where devices store a part of the weights each,
    those of one layer at a time are gathered. In PyTorch's names, the blocks are `0`, `1`, ....

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
        """Apply the blocks to `x` in turn, each as `block(x, *args)`; in `x`, samples are the first axis."""
        graphdef, arrays = nnx.split(self.block)
        types = weights.cast_types(self.block)
        settings = execution.current()
        if settings.remat is None:
            settings = dataclasses.replace(settings, remat="full")

        @settings.checkpoint
        def apply(x, layer):
            block = nnx.merge(graphdef, nnx.State(weights.ready(layer, types)))
            return settings.shard_batch(block(x, *args)), None

        return jax.lax.scan(apply, settings.shard_batch(x), nnx.to_pure_dict(arrays))[0]
