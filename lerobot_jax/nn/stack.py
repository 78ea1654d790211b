"""Equal blocks run one after the other, compiled once."""

import dataclasses
from collections.abc import Callable, Sequence
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
        return scan_stacks((self,), lambda blocks, x: (blocks[0](x, *args), None), x)[0]


def scan_stacks(
    stacks: Sequence[Stack],
    apply: Callable[..., tuple[Any, Any]],
    x: Any,
    per_layer: tuple[Any, ...] = (),
) -> tuple[Any, Any]:
    """Go through the layers of one or several stacks side by side.

    Args:
        stacks: of equal length.
        apply: `apply(blocks, x, *of_layer)` gives (x, what to keep of the layer), for one block of each stack.
        x: what goes from layer to layer; samples are the first axis.
        per_layer: trees of arrays whose first axis is that of layers; each layer is given its part of them.

    Returns:
        (x after the last layer, what was kept, with a leading axis of layers)
    """
    graphdefs, arrays = zip(*(nnx.split(stack.block) for stack in stacks), strict=True)
    types = [weights.cast_types(stack.block) for stack in stacks]
    settings = execution.current()
    if settings.remat is None:
        settings = dataclasses.replace(settings, remat="full")

    @settings.checkpoint
    def step(x, inputs):
        layers, of_layer = inputs
        blocks = [
            nnx.merge(graphdef, nnx.State(weights.ready(layer, each)))
            for graphdef, layer, each in zip(graphdefs, layers, types, strict=True)
        ]
        x, kept = apply(blocks, x, *of_layer)
        return settings.shard_batch(x), kept

    layers = [nnx.to_pure_dict(each) for each in arrays]
    return jax.lax.scan(step, settings.shard_batch(x), (layers, per_layer))
