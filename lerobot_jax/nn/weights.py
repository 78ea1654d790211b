"""Weights as they are stored, and as layers compute with them."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from flax.traverse_util import flatten_dict, unflatten_dict
from jax.sharding import NamedSharding, PartitionSpec

from lerobot_jax.nn import execution

LOOKED_UP = "embedding"  # the name of `nnx.Embed`'s table
STACKED = "block"  # in the path of arrays with a leading axis of layers: the attribute of `nn.stack.Stack`


def ready(weights: Any, dtype: jnp.dtype | None = None) -> Any:
    """Give weights as layers compute with them: gathered from the devices that store a part each.

    Those of stacks are left as they are: a stack makes each layer's ready in its turn, so that the whole weights of
    one layer at a time exist. So are tables of embeddings: a few rows travel instead. The gradient of a gathered
    weight is summed right into the parts (reduce-scatter); that of a plain sharding constraint would be summed on
    every device.

    Args:
        weights: a nested dict of arrays.
        dtype: matrices are cast to it before they travel; for layers that would cast them anyway. Their gradients
            then travel in it too.
    """
    mesh = execution.current().mesh
    if mesh is None or mesh.shape["fsdp"] == 1:
        return weights
    made = {}
    flat: dict[Any, Any] = {**flatten_dict(weights)}
    for path, weight in flat.items():
        if STACKED not in path and path[-1] != LOOKED_UP:
            if dtype is not None and weight.ndim > 1 and jnp.issubdtype(weight.dtype, jnp.floating):
                weight = weight.astype(dtype)
            weight = _gathered(".".join(map(str, path)), weight)
        made[path] = weight
    return unflatten_dict(made)


def _gathered(name: str, weight: jax.Array) -> jax.Array:
    mesh, spec = execution.current().mesh, execution.current().partition(name, weight.shape)
    if "fsdp" not in spec:
        return weight
    assert mesh is not None
    whole = PartitionSpec(*(None if axis == "fsdp" else axis for axis in spec))
    return _gather(weight, NamedSharding(mesh, spec), NamedSharding(mesh, whole))


@functools.partial(jax.custom_vjp, nondiff_argnums=(1, 2))
def _gather(weight: jax.Array, stored: NamedSharding, whole: NamedSharding) -> jax.Array:
    # Held where it is stored first: else the compiler may gather before a cast, which moves twice the bytes.
    return jax.lax.with_sharding_constraint(jax.lax.with_sharding_constraint(weight, stored), whole)


def _gather_forward(weight: jax.Array, stored: NamedSharding, whole: NamedSharding) -> tuple[jax.Array, None]:
    return _gather(weight, stored, whole), None


def _gather_backward(stored: NamedSharding, whole: NamedSharding, _: None, gradient: Any) -> tuple[Any]:
    return (jax.lax.with_sharding_constraint(gradient, stored),)


_gather.defvjp(_gather_forward, _gather_backward)
