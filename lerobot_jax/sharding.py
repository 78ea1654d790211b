"""The mesh of devices, how batches are split over it, and where each array of the train state lies."""

import dataclasses
import math
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
from jax.experimental import mesh_utils
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from lerobot_jax.errors import InputError
from lerobot_jax.nn.execution import BATCH_AXES, Execution
from lerobot_jax.nn.weights import is_stacked

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
        name = ".".join(map(str, names))
        spec = execution.partition(name, leaf.shape, is_stacked=is_stacked(name) and len(leaf.shape) > 0)
        return NamedSharding(mesh, spec)

    return jax.tree_util.tree_map_with_path(place, tree)


def place(tree: Any, shardings: Any) -> Any:
    """Put arrays that every process has whole where they belong; each device gets its part only."""

    def put(array: Any, sharding: NamedSharding) -> jax.Array:
        if isinstance(array, jax.Array) and not isinstance(array, np.ndarray):
            return jax.device_put(array, sharding)
        return jax.make_array_from_callback(array.shape, sharding, lambda index: array[index])

    return jax.tree.map(put, tree, shardings)
