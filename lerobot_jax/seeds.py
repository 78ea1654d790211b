"""Several seeds as one program: the train states of all are one tree with a leading axis, and the step is mapped.

Seed i of such a run is the run of that seed alone: its initial weights, batches, noise and augmentation have the
same bits. Sums are made in another order, so that parameters are equal within float32's rounding: 1e-6 after a few
steps of SGD. Adam divides a gradient by its own size: where the true gradient is zero (the key biases of attention,
which softmax does not see), it consists of rounding errors, and Adam makes whole steps of them. Such parameters
differ more; they change nothing that the policy does.

With one seed there is no such axis, and nothing here changes a function or an array.
"""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from lerobot_jax import sharding
from lerobot_jax.errors import InputError


@dataclasses.dataclass(frozen=True)
class SeedLayout:
    """How the seeds of a run lie on the devices.

    Where their number is a multiple of the devices', each device computes some seeds by itself; else all devices
    compute all of them, each for its part of the batch, as with one seed.

    Attributes:
        num: how many seeds.
        mesh: the devices.
    """

    num: int
    mesh: Mesh

    @property
    def lead(self) -> tuple[int, ...]:
        """The leading axes of arrays: (seeds,), or none with one seed."""
        return (self.num,) if self.num > 1 else ()

    @property
    def is_split(self) -> bool:
        """Whether each device has seeds of its own."""
        return self.num > 1 and self.num % self.mesh.size == 0

    @property
    def state(self) -> NamedSharding:
        """Where the train state of several seeds lies."""
        return NamedSharding(self.mesh, PartitionSpec("data")) if self.is_split else self.replicated

    @property
    def replicated(self) -> NamedSharding:
        """A whole copy on every device."""
        return sharding.replicated(self.mesh)

    @property
    def metrics(self) -> NamedSharding | None:
        """Where numbers lie that a step gives; None: as the compiler likes."""
        return self.replicated if self.num == 1 else None

    def stacked_shapes(self, shapes: Any) -> Any:
        """Give the shapes and shardings of the train state of all seeds, of those of one."""
        if self.num == 1:
            return shapes
        return jax.tree.map(
            lambda x: jax.ShapeDtypeStruct((*self.lead, *x.shape), x.dtype, sharding=self.state), shapes
        )

    def batches(self, batch_size: int, axis: int = 0) -> NamedSharding:
        """Where batches of all seeds lie, whose samples are along an axis of each seed's batch.

        Raises:
            InputError: when neither the seeds nor the samples can be divided among the devices.
        """
        if self.is_split:
            return self.state
        if self.num > 1 and batch_size % self.mesh.size:
            raise InputError(
                f"num_seeds={self.num} or batch_size={batch_size} must be a multiple of the {self.mesh.size} "
                "devices"
            )
        return sharding.batch_sharding(self.mesh, batch_size, axis + len(self.lead))

    def shared_batch(self, batch_size: int) -> sharding.BatchPlacement:
        """Where a batch lies that is the same for all seeds; it may be one that cannot be divided."""
        is_whole = self.is_split or batch_size % sharding.num_batch_parts(self.mesh)
        where = self.replicated if is_whole else sharding.batch_sharding(self.mesh, batch_size)
        return sharding.BatchPlacement.of(where, batch_size)

    def over_seeds(self, function: Callable[..., Any], in_axes: tuple[int | None, ...]) -> Callable[..., Any]:
        """Make a function of one seed's arrays one of all seeds' arrays.

        Args:
            function: a pure function.
            in_axes: for each argument 0, or None if it is the same for all seeds.
        """
        if self.num == 1:
            return function
        mapped = jax.vmap(function, in_axes)
        if not self.is_split:
            return mapped
        # Told by hand, since the compiler does not find out by itself that the devices need nothing of each other.
        specs = tuple(PartitionSpec() if axis is None else PartitionSpec("data") for axis in in_axes)
        return jax.shard_map(
            mapped, mesh=self.mesh, in_specs=specs, out_specs=PartitionSpec("data"), check_vma=False
        )

    def stack(self, trees: Sequence[Any]) -> Any:
        """Put the trees of each seed together, where the train state lies."""
        if self.num == 1:
            return trees[0]
        stack = jax.jit(
            lambda *trees: jax.tree.map(lambda *x: jnp.stack(x), *trees), out_shardings=self.state
        )
        return stack(*trees)

    def take(self, tree: Any, i: int) -> Any:
        """Give a whole copy of the i-th seed's part to every device."""
        return tree if self.num == 1 else jax.jit(_take, out_shardings=self.replicated)(tree, i)

    def each(self, tree: dict[str, Any]) -> list[dict[str, Any]]:
        """Give each seed's part of arrays on the host."""
        return [tree] if self.num == 1 else [{k: v[i] for k, v in tree.items()} for i in range(self.num)]


def _take(tree: Any, i: jax.Array) -> Any:
    return jax.tree.map(lambda x: jax.lax.dynamic_index_in_dim(x, i, keepdims=False), tree)
