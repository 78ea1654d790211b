"""The mesh of devices, how batches are split over it, and where each array of the train state lies."""

import dataclasses
import math
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
from jax.experimental import mesh_utils
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from lerobot_jax import distributed
from lerobot_jax.errors import InputError
from lerobot_jax.nn.execution import BATCH_AXES, Execution
from lerobot_jax.nn.weights import ADAPTER_PARTS, is_stacked
from lerobot_jax.state_dict import empty_aligned

AXES = ("data", "fsdp", "tensor")


@dataclasses.dataclass(frozen=True)
class MeshConfig:
    """How the devices are arranged; the product of the axes is their number, -1 stands for the rest."""

    data: int = -1
    """Groups of devices that each hold the whole train state, for a part of the batch each."""
    fsdp: int = 1
    """Devices that share one copy of the train state (FSDP, ZeRO-3) and split the batch further."""
    tensor: int = 1
    """Devices that share the matrix products of a layer, for the same samples (tensor parallelism)."""
    min_shard_size: int = 2**16
    """Arrays with fewer numbers are kept whole on every device."""

    def __post_init__(self):
        sizes = (self.data, self.fsdp, self.tensor)
        if any(size < 1 and size != -1 for size in sizes) or sizes.count(-1) > 1:
            raise ValueError(
                f"mesh: data, fsdp and tensor must be positive, or one of them -1; they are {sizes}"
            )
        if self.min_shard_size < 0:
            raise ValueError(f"mesh.min_shard_size must not be negative, it is {self.min_shard_size}")

    def shape(self, num_devices: int) -> tuple[int, int, int]:
        """Give the sizes of the axes for a number of devices.

        Raises:
            InputError: when their product cannot be that number.
        """
        sizes = (self.data, self.fsdp, self.tensor)
        known = math.prod(size for size in sizes if size != -1)
        rest = num_devices // known if -1 in sizes else 1
        data, fsdp, tensor = (rest if size == -1 else size for size in sizes)
        if data * fsdp * tensor != num_devices:
            raise InputError(
                f"mesh: data={self.data}, fsdp={self.fsdp}, tensor={self.tensor} cannot be made of "
                f"{num_devices} devices; the product of the three must be their number, -1 stands for the rest"
            )
        return data, fsdp, tensor


def make_mesh(config: MeshConfig | None = None, devices: Sequence[Any] | None = None) -> Mesh:
    """Arrange devices along the axes data, fsdp and tensor.

    Neighbours in a TPU's network stay neighbours; several slices (pods that a slower network connects) lie along
    `data`, so that only gradients travel between them.

    Args:
        config: the sizes of the axes; by default all devices lie along `data`.
        devices: by default all there are.

    Raises:
        InputError: when the devices cannot be arranged so.
    """
    devices = jax.devices() if devices is None else devices
    shape = (config or MeshConfig()).shape(len(devices))
    num_slices = len({getattr(device, "slice_index", 0) for device in devices})
    if num_slices > 1:
        if shape[0] % num_slices:
            raise InputError(f"mesh: data={shape[0]} must be a multiple of the {num_slices} slices")
        inside = (shape[0] // num_slices, *shape[1:])
        array = mesh_utils.create_hybrid_device_mesh(inside, (num_slices, 1, 1), devices)
    else:
        array = mesh_utils.create_device_mesh(shape, devices, allow_split_physical_axes=True)
    return Mesh(array, AXES, axis_types=(AxisType.Auto,) * len(AXES))


def num_batch_parts(mesh: Mesh) -> int:
    """Tell among how many groups of devices a batch is divided."""
    return math.prod(mesh.shape[axis] for axis in BATCH_AXES)


def batch_sharding(mesh: Mesh, batch_size: int, axis: int = 0) -> NamedSharding:
    """Split batches over the devices along an axis."""
    if batch_size % num_batch_parts(mesh):
        parts = num_batch_parts(mesh)
        raise InputError(
            f"batch_size={batch_size} must be a multiple of the {parts} devices (mesh.data x mesh.fsdp)"
        )
    return NamedSharding(mesh, PartitionSpec(*[None] * axis, BATCH_AXES))


@dataclasses.dataclass(frozen=True)
class BatchPlacement:
    """Where batches lie, and which of their samples this process reads: those that its devices need.

    Attributes:
        sharding: that of the arrays; the last axis it names is the samples'.
        size: how many samples they have along that axis.
        rows: which of them this process reads, in order.
    """

    sharding: NamedSharding
    size: int
    rows: np.ndarray

    @classmethod
    def of(cls, sharding: NamedSharding, size: int) -> "BatchPlacement":
        """Find the rows that this process needs."""
        if jax.process_count() == 1:
            return cls(sharding, size, np.arange(size))
        samples = NamedSharding(sharding.mesh, PartitionSpec(*sharding.spec[-1:]))
        wanted = np.zeros(size, bool)
        for index in samples.addressable_devices_indices_map((size,)).values():
            wanted[index] = True
        return cls(sharding, size, np.flatnonzero(wanted))

    def rows_of_step(self, num: int) -> np.ndarray:
        """Give the rows to read of so many batches that follow one another."""
        return np.concatenate([i * self.size + self.rows for i in range(num)])

    def put(self, batch: dict[str, Any]) -> dict[str, jax.Array]:
        """Make arrays of the whole batch on the devices, of what this process has of it, or of such arrays."""
        if jax.process_count() == 1:
            return jax.device_put(batch, self.sharding)
        return {key: self._put(value) for key, value in batch.items()}

    def _put(self, value: Any) -> jax.Array:
        if isinstance(value, jax.Array):
            return jax.device_put(value, self.sharding)
        axis = max(len(self.sharding.spec) - 1, 0)

        def part(index: Any) -> np.ndarray:
            start, stop, _ = index[axis].indices(self.size)
            first = np.searchsorted(self.rows, start)
            return value[(*index[:axis], slice(first, first + stop - start))]

        shape = (*value.shape[:axis], self.size, *value.shape[axis + 1 :])
        return jax.make_array_from_callback(shape, self.sharding, part)


def replicated(mesh: Mesh) -> NamedSharding:
    """Keep a whole copy on every device."""
    return NamedSharding(mesh, PartitionSpec())


def state_shardings(execution: Execution, tree: Any) -> Any:
    """Say where each array lies: parameters, moments, averages and buffers by one rule, `Execution.partition`.

    Args:
        execution: has the mesh and the policy's axes for tensor parallelism.
        tree: arrays or their shapes; dicts inside name the parameters.
    """
    mesh = execution.mesh
    assert mesh is not None

    def place(path: tuple[Any, ...], leaf: Any) -> NamedSharding:
        names = [entry.key for entry in path if isinstance(entry, jax.tree_util.DictKey)]
        if isinstance(path[-1], jax.tree_util.GetAttrKey) and path[-1].name in ADAPTER_PARTS:
            names.append(path[-1].name)
        name = ".".join(map(str, names))
        spec = execution.partition(name, leaf.shape, is_stacked=is_stacked(name) and len(leaf.shape) > 0)
        return NamedSharding(mesh, spec)

    return jax.tree_util.tree_map_with_path(place, tree)


def place(tree: Any, shardings: Any) -> Any:
    """Put arrays that every process has whole where they belong; each device gets its part only.

    Those that are there already stay as they are. The others take the way through the host: `jax.device_put` may
    give the memory of one array to several, and a train step that uses it again for its results would crash.
    """

    def put(array: Any, sharding: NamedSharding) -> jax.Array:
        if isinstance(array, jax.Array) and array.sharding == sharding:
            return array
        array = host_view(array) if isinstance(array, jax.Array) else array
        return place_as(array, jax.ShapeDtypeStruct(array.shape, array.dtype, sharding=sharding))

    return jax.tree.map(put, tree, shardings)


def place_as(array: np.ndarray, like: jax.ShapeDtypeStruct) -> jax.Array:
    """Put an array that every process has whole where it belongs, in another type if need be.

    When this returns, the devices have what they need of it, so that the next may be read into the host's memory.
    """

    def part(index: Any) -> np.ndarray:
        return np.asarray(array[index], like.dtype)

    assert like.sharding is not None
    return jax.make_array_from_callback(array.shape, like.sharding, part).block_until_ready()


def local_copy(tree: Any) -> Any:
    """Give arrays that process 0 can use by itself; the others get None and wait for nothing else."""
    return tree if jax.process_count() == 1 else to_host(tree)


def to_host(tree: Any) -> Any:
    """Copy arrays to the memory of process 0, one after another; all processes take part, the others get None.

    The devices need room for one more whole array, not for all of them.
    """

    def copy(array: jax.Array) -> np.ndarray | None:
        if not (array.is_fully_addressable or array.is_fully_replicated):
            assert isinstance(array.sharding, NamedSharding)
            assert isinstance(array.sharding.mesh, Mesh)
            array = jax.device_put(array, replicated(array.sharding.mesh))
            array.block_until_ready()
        # Copied, not viewed: the memory of the array may be used again.
        return host_copy(array) if distributed.is_first() else None

    return jax.tree.map(copy, tree)


def host_copy(array: jax.Array) -> np.ndarray:
    """Copy an array of which this process has all parts to the host.

    Unlike with `np.asarray`, the array does not keep another copy.
    """
    made = empty_aligned(array.shape, array.dtype)
    for shard in _parts(array):
        made[shard.index] = np.asarray(shard.data)
    return made


def host_view(array: jax.Array) -> np.ndarray:
    """Give `host_copy`, or an array's own memory if the host can read it."""
    parts = _parts(array)
    return np.asarray(parts[0].data) if len(parts) == 1 else host_copy(array)


def _parts(array: jax.Array) -> list[jax.Shard]:
    """Give each part of an array once, however many devices have it."""
    return list({str(shard.index): shard for shard in array.addressable_shards}.values())
