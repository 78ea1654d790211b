"""Weights as they are stored, and as layers compute with them."""

import dataclasses
import functools
import re
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from flax.traverse_util import empty_node, flatten_dict, unflatten_dict
from jax.sharding import NamedSharding, PartitionSpec
from jaxtyping import Array, Float

from lerobot_jax.nn import execution
from lerobot_jax.nn.linear import WholeEmbedding

Path = tuple[Any, ...]  # names and list positions from a module down to an array

CAST = ("kernel", "in_proj_weight")  # what layers with a `dtype` cast to it
ADAPTER_PARTS = ("left", "right")  # of a `LoraWeight`, which lie on the devices by rules of their own
LOOKED_UP = "embedding"  # the name of `nnx.Embed`'s table


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class LoraWeight:
    """A weight with a low-rank change (LoRA, Hu et al. 2021): `base + scale * left @ right`, in float32.

    It stands in a tree of parameters where the weight stood. In a stack of layers, each field has the leading axis
    of layers, and a layer without an adapter has scale 0. `left` and `right` are in the weight's own layout: of a
    kernel (*space, in, out), PEFT's A is (*space, in, r) and B (r, out).

    With `echo`, the change is added once more, times that, and this has no gradient.
    """

    # No checked shapes: jax.tree.map puts anything in here.
    base: Any  # (..., in, out)
    left: Any  # (..., in, r)
    right: Any  # ([layers] r out)
    scale: Any  # () or (layers,)
    echo: Any = None  # the same

    @property
    def shape(self) -> tuple[int, ...]:
        return self.base.shape

    @property
    def dtype(self) -> np.dtype:
        return np.dtype(np.float32)

    def __getitem__(self, layer: Any) -> "LoraWeight":
        """Give one layer of a stack."""
        return jax.tree.map(lambda x: x[layer], self)

    def merge(self) -> Float[Array, "..."]:
        """Give the weight with its change."""
        left, right = self._factors()
        change = jnp.matmul(left, right, precision="highest")
        merged = self.base.astype(jnp.float32) + self._scaled(change, self.scale)
        if self.echo is None:
            return merged
        return merged + self._scaled(jax.lax.stop_gradient(change), self.echo)

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> np.ndarray:
        """Merge on the host."""
        left, right = (np.asarray(x, np.float32) for x in self._factors())
        change = left @ right
        merged = np.asarray(self.base).astype(np.float32) + self._scaled(change, np.asarray(self.scale))
        if self.echo is not None:
            merged = merged + self._scaled(change, np.asarray(self.echo))
        return merged if dtype is None else merged.astype(dtype)

    def _factors(self) -> tuple[Any, Any]:
        """Give both with the same axes: those of layers, then of space, then of the matrix."""
        lead = self.scale.ndim
        space = (1,) * (self.left.ndim - self.right.ndim)
        return self.left, self.right.reshape(*self.right.shape[:lead], *space, *self.right.shape[lead:])

    @staticmethod
    def _scaled(change: Any, scale: Any) -> Any:
        return change * scale.reshape(*scale.shape, *(1,) * (change.ndim - scale.ndim))


def is_adapted(x: Any) -> bool:
    return isinstance(x, LoraWeight)


def is_stacked(name: str) -> bool:
    """Tell by its dotted name whether an array has a leading axis of layers: it is in the `block` of a `Stack`.

    What has numbers below a `block` is a list of that name.
    """
    return re.search(r"(^|\.)block\.(?!\d)", name) is not None


def cast_types(module: nnx.Module) -> dict[Path, Any]:
    """Give the types to which the layers of a module cast their matrices before use, by the matrices' paths."""
    found = {}
    for path, layer in nnx.iter_modules(module):
        dtype = getattr(layer, "dtype", None)
        has = [name for name in CAST if isinstance(getattr(layer, name, None), nnx.Variable)]
        found |= {(*path, name): dtype for name in has if dtype is not None}
    return found


def cast_paths(module: nnx.Module) -> frozenset[Path]:
    """Give the paths of the weights that layers cast before use, so that these may be kept in a narrower type."""
    tables = {
        (*path, LOOKED_UP)
        for path, layer in nnx.iter_modules(module)
        if isinstance(layer, nnx.Embed) and not isinstance(layer, WholeEmbedding)
    }
    return frozenset(cast_types(module)) | tables


def as_computed(weights: Any, types: Mapping[Path, Any]) -> Any:
    """Give weights in the types in which layers compute with them: the same results from half of the memory.

    Args:
        weights: a nested dict of arrays and `LoraWeight`s, which stay as they are.
        types: what `cast_types` gives.
    """
    flat: dict[Any, Any] = {**flatten_dict(weights, keep_empty_nodes=True)}
    return unflatten_dict(
        {
            path: weight.astype(types[path]) if path in types and not is_adapted(weight) else weight
            for path, weight in flat.items()
        }
    )


def ready(weights: Any, types: Mapping[Path, Any]) -> Any:
    """Give weights as layers compute with them: gathered from the devices that store a part each, adapters merged.

    Those of stacks are left as they are: a stack makes each layer's ready in its turn, so that the whole weights of
    one layer at a time exist. So are tables of embeddings: a few rows travel instead. The gradient of a gathered
    weight is summed right into the parts (reduce-scatter); that of a plain sharding constraint would be summed on
    every device.

    Args:
        weights: a nested dict of arrays and `LoraWeight`s.
        types: matrices that have one are cast to it before they travel, since layers would cast them anyway. Their
            gradients then travel in it too.
    """
    made = {}
    flat: dict[Any, Any] = {**flatten_dict(weights, keep_empty_nodes=True)}
    changed = execution.current().changed
    for path, weight in flat.items():
        if is_stacked(".".join(map(str, path))):
            made[path] = weight
            continue
        if changed is not None and weight is not empty_node:
            weight = jax.tree.map(changed, weight)
        if path[-1] == LOOKED_UP and not is_adapted(weight):
            made[path] = weight
        elif is_adapted(weight):
            parts = {key: _gathered((*path, key), x) for key, x in vars(weight).items() if x is not None}
            made[path] = LoraWeight(**parts).merge()
        else:
            made[path] = _gathered(path, weight, types.get(path))
    return unflatten_dict(made)


def _gathered(path: Path, weight: Any, dtype: Any = None) -> Any:
    mesh = execution.current().mesh
    if mesh is None or mesh.shape["fsdp"] == 1:
        return weight
    spec = execution.current().partition(".".join(map(str, path)), weight.shape)
    if "fsdp" not in spec:
        return weight
    weight = weight if dtype is None else weight.astype(dtype)
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
