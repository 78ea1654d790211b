"""Weights as they are stored -> as layers compute with them."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float


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


def ready(tree: Any) -> Any:
    """Give a tree of stored weights with adapters merged into theirs."""
    return jax.tree.map(lambda x: x.merge() if is_adapted(x) else x, tree, is_leaf=is_adapted)
