"""The mesh of devices: batches are split over it, parameters are the same on each."""

import jax
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from lerobot_jax.errors import InputError


def make_mesh() -> Mesh:
    """Arrange all devices along the axis `data`."""
    return jax.make_mesh((jax.device_count(),), ("data",), axis_types=(AxisType.Auto,))


def batch_sharding(mesh: Mesh, batch_size: int, axis: int = 0) -> NamedSharding:
    """Split batches over the devices along an axis."""
    if batch_size % mesh.size:
        raise InputError(f"batch_size={batch_size} must be a multiple of the {mesh.size} devices")
    return NamedSharding(mesh, PartitionSpec(*[None] * axis, "data"))


def replicated(mesh: Mesh) -> NamedSharding:
    """Keep a whole copy on every device."""
    return NamedSharding(mesh, PartitionSpec())
