"""How a policy's functions are compiled: over which devices, and what is computed twice to save memory.

What they compute does not depend on it. It is in use while a function is traced, so that layers need no arguments
for it; where nothing is set, they run as on one device.
"""

import contextvars
import dataclasses
import re
from collections.abc import Callable
from typing import Any, Literal, NamedTuple

import jax
from flax import nnx
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from lerobot_jax.nn.variables import Buffer

Remat = Literal["none", "dots", "full"]
BATCH_AXES = ("data", "fsdp")


class TensorAxis(NamedTuple):
    """An axis of weights that tensor parallelism splits."""

    pattern: str  # a regular expression, matched at the end of dotted parameter names
    axis: int  # negative: counted from the last


@dataclasses.dataclass(frozen=True)
class Execution:
    """Devices, split weights, recomputation; the one in use is `current()`.

    Attributes:
        mesh: the devices, along the axes data, fsdp and tensor; None: whatever the arrays are on.
        tensor_axes: the policy's axes for tensor parallelism; the first match counts.
        min_shard_size: arrays with fewer numbers (in a stack: in a layer) are whole on every device.
        remat: what the backward pass computes again in each block of layers instead of keeping it; None: in stacks
            all but the blocks' inputs, elsewhere nothing.
        changed: what to make of each weight before layers compute with it; in stacks, of a layer's in its turn.
    """

    mesh: Mesh | None = None
    tensor_axes: tuple[TensorAxis, ...] = ()
    min_shard_size: int = 0
    remat: Remat | None = None
    changed: Callable[[jax.Array], jax.Array] | None = None

    def __call__(self, function: Callable[..., Any]) -> Callable[..., Any]:
        """Give the function that is traced with this in use."""

        def traced(*args: Any) -> Any:
            token = _current.set(self)
            try:
                return function(*args)
            finally:
                _current.reset(token)

        return traced

    def partition(self, name: str, shape: tuple[int, ...], *, is_stacked: bool = False) -> PartitionSpec:
        """Say how an array is split: its hinted axis over `tensor`, of the others the largest over `fsdp`.

        Args:
            name: its dotted name.
            shape: its shape.
            is_stacked: whether the first axis is that of layers, which is never split.
        """
        assert self.mesh is not None
        if is_stacked:
            return PartitionSpec(None, *self.partition(name, shape[1:]))
        name = name.removesuffix(".base")  # a weight with an adapter lies as it would without
        num_fsdp, num_tensor = self.mesh.shape["fsdp"], self.mesh.shape["tensor"]
        axes: list[str | None] = [None] * len(shape)
        size = 1
        for length in shape:
            size *= length
        if size < self.min_shard_size:
            return PartitionSpec()
        hint = next((each for each in self.tensor_axes if re.search(f"(?:{each.pattern})$", name)), None)
        if num_tensor > 1 and hint is not None and _has_axis(shape, hint.axis, num_tensor):
            axes[hint.axis] = "tensor"
        free = [i for i, length in enumerate(shape) if axes[i] is None and length % num_fsdp == 0]
        # Not the last axis if there is another: parts of it are not what TPUs add up and pass on (reduce-scatter).
        free = [i for i in free if i < len(shape) - 1] or free
        if num_fsdp > 1 and free:
            axes[max(free, key=lambda i: shape[i])] = "fsdp"
        return PartitionSpec(*axes)

    def shard_batch(self, tree: Any) -> Any:
        """Keep activations split by samples, so that none is gathered, if their number can be divided."""
        if self.mesh is None:
            return tree
        sharding = NamedSharding(self.mesh, PartitionSpec(BATCH_AXES))
        parts = self.mesh.shape["data"] * self.mesh.shape["fsdp"]

        def constrain(x: jax.Array) -> jax.Array:
            is_split = x.ndim > 0 and x.shape[0] % parts == 0
            return jax.lax.with_sharding_constraint(x, sharding) if is_split else x

        return jax.tree.map(constrain, tree)

    def checkpoint(self, function: Callable[..., Any]) -> Callable[..., Any]:
        """Let the backward pass compute again what `remat` says."""
        if self.remat in (None, "none"):
            return function
        policy = {
            "full": jax.checkpoint_policies.nothing_saveable,
            "dots": jax.checkpoint_policies.dots_with_no_batch_dims_saveable,
        }[self.remat]
        return jax.checkpoint(function, policy=policy)


def _has_axis(shape: tuple[int, ...], axis: int, parts: int) -> bool:
    """Tell whether there is such an axis, and it can be divided; moments may have other shapes than parameters."""
    return -len(shape) <= axis < len(shape) and shape[axis] % parts == 0


_PLAIN = Execution()
_current: contextvars.ContextVar[Execution] = contextvars.ContextVar("execution", default=_PLAIN)


def current() -> Execution:
    """Give what is in use where a function is being traced."""
    return _current.get()


def run_block(block: nnx.Module, *args: Any, **kwargs: Any) -> Any:
    """Call a block of layers as `block(*args, **kwargs)`, with what `remat` says for its backward pass.

    Returns:
        The block's result: arrays whose first axis is that of samples. Buffers that the block changes are changed.
    """
    execution = current()
    if execution.remat in (None, "none"):
        return execution.shard_batch(block(*args, **kwargs))
    graphdef, params, buffers = nnx.split(block, nnx.Param, Buffer)

    def run(params: nnx.State, buffers: nnx.State) -> tuple[Any, nnx.State]:
        module = nnx.merge(graphdef, params, buffers)
        result = module(*args, **kwargs)  # closed over: what is no array stays as it is
        return result, nnx.state(module, Buffer)

    result, buffers = execution.checkpoint(run)(params, buffers)
    nnx.update(block, buffers)
    return execution.shard_batch(result)
