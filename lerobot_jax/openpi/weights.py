"""The weights of openpi's pi0 and pi0.5 under LeRobot's names.

Adapters of openpi's LoRA variants are merged as openpi applies them. Three points of that are its own: the MLP's
are not scaled; the attention's are scaled by alpha / rank, which is 1 in all of its variants; and the second factor
of the attention's output is summed over the heads by itself.
"""

import functools
import threading
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import einops
import jax
import ml_dtypes
import numpy as np
import orbax.checkpoint as ocp
from flax.traverse_util import flatten_dict, unflatten_dict

from lerobot_jax.errors import InputError
from lerobot_jax.openpi.arrays import (
    EMBEDDING,
    EXPERT_LM_HEAD,
    LM_HEAD,
    MULTIPLES,
    StoredArray,
    is_rounded_by_lerobot,
    list_arrays,
)
from lerobot_jax.state_dict import StateDict, Tensor

PARAMS = "params"
LORA_RANKS = (16, 32)  # of openpi's own variants, whose alpha is their rank


class Weights(NamedTuple):
    """A checkpoint's weights under LeRobot's names, computed when they are asked for, and what they are of."""

    state: StateDict
    policy_type: str  # pi0 or pi05
    sizes: Mapping[str, int]  # of the axes


def read_weights(folder: Path, lora_scale: float | None = None, dtype: str | None = None) -> Weights:
    """Open the weights of an openpi checkpoint.

    Args:
        folder: the checkpoint's folder, or its `params`.
        lora_scale: alpha / rank of adapters in the attention; None: 1, if they have the rank of openpi's variants.
        dtype: bfloat16: of what LeRobot's policies of that type have in it; float32: of all; None: as stored.

    Raises:
        InputError: when there is no such checkpoint, or naming all arrays that are missing, unknown or misshapen.
    """
    store = _Store(_find_params(folder))
    if "action_in_proj/kernel" not in store.forms:
        raise InputError(f"{store.folder} is neither pi0 nor pi0.5: it has no action_in_proj/kernel")
    policy_type = "pi05" if "time_mlp_in/kernel" in store.forms else "pi0"
    arrays = list_arrays(policy_type)
    sizes = _check(arrays, store)
    scales = _lora_scales(arrays, lora_scale, sizes, store)
    tensors: dict[str, Tensor] = {}
    for array in arrays:
        tensors |= _tensors(array, scales.get(array.path), sizes, store)
    tensors[LM_HEAD] = tensors[EMBEDDING]  # tied
    # LeRobot's expert has a head that is never used, and openpi's has none.
    shape, kind = (sizes["vocab"], sizes["expert_width"]), tensors[EMBEDDING].dtype
    tensors[EXPERT_LM_HEAD] = Tensor(shape, kind, lambda: np.zeros(shape, kind))
    tensors = {key: _cast(key, tensor, dtype) for key, tensor in tensors.items()}
    return Weights(StateDict(tensors, source=str(store.folder)), policy_type, sizes)


def _cast(key: str, tensor: Tensor, dtype: str | None) -> Tensor:
    if dtype is None or (dtype == "bfloat16" and not is_rounded_by_lerobot(key)):
        return tensor
    kind = np.dtype(ml_dtypes.bfloat16 if dtype == "bfloat16" else np.float32)
    return Tensor(tensor.shape, kind, lambda: tensor.read().astype(kind))


def _find_params(folder: Path) -> Path:
    if folder.name == PARAMS:
        return folder
    if (folder / PARAMS).is_dir():
        return folder / PARAMS
    if not folder.is_dir():
        raise InputError(f"{folder}: no such folder")
    steps = sorted(
        (path.parent for path in folder.glob(f"*/{PARAMS}")), key=lambda path: (len(path.name), path)
    )
    there = f"; give one of {', '.join(map(str, steps))}" if steps else ""
    raise InputError(f"{folder} is no checkpoint of openpi: it has no folder {PARAMS}{there}")


class _Store:
    """The arrays of an Orbax folder, read one by one. The last one is kept, because its layers are read in turn."""

    def __init__(self, folder: Path):
        self.folder = folder
        try:
            with ocp.Checkpointer(ocp.PyTreeCheckpointHandler()) as checkpointer:
                tree = checkpointer.metadata(folder.resolve()).item_metadata.tree
            forms: dict[Any, Any] = {**flatten_dict(tree[PARAMS])}
        except Exception as error:  # Orbax and TensorStore raise many kinds
            raise InputError(f"{folder}: no weights of openpi ({type(error).__name__}: {error})") from None
        # A training run's checkpoint has each array in a node of its own, which nnx makes.
        is_wrapped = all(path[-1] == "value" for path in forms)
        self._paths = {"/".join(path[:-1] if is_wrapped else path): path for path in forms}
        self.forms = {name: forms[path] for name, path in self._paths.items()}
        self._lock = threading.Lock()
        self._last: tuple[str, np.ndarray] | None = None

    def read(self, name: str) -> np.ndarray:
        """Read an array."""
        path = (PARAMS, *self._paths[name])
        item = unflatten_dict({path: self.forms[name]})
        as_numpy = unflatten_dict({path: ocp.RestoreArgs(restore_type=np.ndarray)})
        arguments = ocp.args.PyTreeRestore(item=item, restore_args=as_numpy, partial_restore=True)
        try:
            with ocp.Checkpointer(ocp.PyTreeCheckpointHandler()) as checkpointer:
                restored = checkpointer.restore(self.folder.resolve(), args=arguments)
        except Exception as error:  # Orbax and TensorStore raise many kinds
            raise InputError(f"{self.folder}: {name} is damaged ({type(error).__name__}: {error})") from None
        (array,) = jax.tree.leaves(restored)
        return array

    def read_merged(self, array: StoredArray, lora_scale: float | None) -> np.ndarray:
        """Read an array, with its adapters merged unless there is no scale for them."""
        with self._lock:
            if self._last is None or self._last[0] != array.path:
                self._last = None  # frees it first
                whole = self.read(array.path)
                if lora_scale is not None:
                    whole = self._merge(array, whole, lora_scale)
                self._last = array.path, whole
            return self._last[1]

    def _merge(self, array: StoredArray, whole: np.ndarray, scale: float) -> np.ndarray:
        """Add the product of an array's adapters, layer by layer, in float32, which adapters are trained in."""
        assert array.adapters is not None
        a, b = (self.read(path).astype(np.float32) for path in array.adapters)
        if "attn_vec_einsum" in array.path:
            # openpi's equation for the second factor has the heads among its inputs, but not in what it is given.
            b = b.sum(axis=1, keepdims=True)
        merged = np.empty(whole.shape, np.float32)
        for layer, target in enumerate(merged):
            target[...] = whole[layer].astype(np.float32) + np.float32(scale) * (a[layer] @ b[layer])
        return merged


def _tensors(
    array: StoredArray, lora_scale: float | None, sizes: Mapping[str, int], store: _Store
) -> Iterator[tuple[str, Tensor]]:
    """Give what LeRobot has instead of an array."""

    def rearrange(part: np.ndarray) -> np.ndarray:
        return einops.rearrange(part, f"{array.axes} -> {array.order}")

    shape = [_size(axis, sizes) or 0 for axis in array.axes.split()]
    shape = rearrange(np.broadcast_to(np.zeros((), np.int8), shape)).shape
    dtype = np.dtype(np.float32 if lora_scale is not None else store.forms[array.path].dtype)

    def read(index: tuple[int, ...]) -> np.ndarray:
        return rearrange(store.read_merged(array, lora_scale)[index])

    for part, key in enumerate(array.keys):
        parts = (part,) if len(array.keys) > 1 else ()
        for layer in [()] if array.layers is None else [(i,) for i in range(sizes[array.layers])]:
            yield key.format(*layer), Tensor(shape, dtype, functools.partial(read, (*layer, *parts)))


def _check(arrays: Sequence[StoredArray], store: _Store) -> dict[str, int]:
    """Give the sizes of the axes, or raise `InputError` listing what is missing, unknown or misshapen."""
    sizes: dict[str, int] = {}
    problems, known = [], set()
    for array in arrays:
        wanted = {array.path: array.all_axes}
        if _has_adapters(array, store):
            assert array.adapters is not None
            a, b = array.adapters
            rank = f"rank of {array.path}"
            wanted |= {a: [*array.all_axes[:-1], rank], b: [*array.all_axes[:-2], rank, array.all_axes[-1]]}
        for path, axes in wanted.items():
            known.add(path)
            if path not in store.forms:
                problems.append(f"missing {path}")
            elif not _fits(axes, store.forms[path].shape, sizes):
                described = ", ".join(
                    axis if axis.isdigit() else f"{axis}={sizes.get(axis, '?')}" for axis in axes
                )
                problems.append(f"{path} has shape {store.forms[path].shape}, it must be ({described})")
    problems += [f"unknown {path}" for path in sorted(store.forms.keys() - known)]
    if problems:
        raise InputError(f"{store.folder} is not pi0 or pi0.5 as openpi has them: {'; '.join(problems)}")
    return sizes


def _fits(axes: Sequence[str], shape: Sequence[int], sizes: dict[str, int]) -> bool:
    """Tell whether a shape is that of the axes, whose sizes are noted where they are first seen."""
    wanted = [_size(axis, sizes) for axis in axes]
    if len(shape) != len(axes) or any(w not in (None, size) for w, size in zip(wanted, shape, strict=True)):
        return False
    for axis, size in zip(axes, shape, strict=True):
        if axis.isdigit():
            continue
        sizes[axis] = size
        sizes |= {multiple: factor * size for multiple, factor in MULTIPLES.get(axis, {}).items()}
    return True


def _size(axis: str, sizes: Mapping[str, int]) -> int | None:
    return int(axis) if axis.isdigit() else sizes.get(axis)


def _has_adapters(array: StoredArray, store: _Store) -> bool:
    return array.adapters is not None and not store.forms.keys().isdisjoint(array.adapters)


def _lora_scales(
    arrays: Sequence[StoredArray], given: float | None, sizes: Mapping[str, int], store: _Store
) -> dict[str, float]:
    """Give what the product of each array's adapters is multiplied by."""
    scales = {}
    for array in arrays:
        if not _has_adapters(array, store):
            continue
        rank = sizes[f"rank of {array.path}"]
        if array.is_of_attention and given is None and rank not in LORA_RANKS:
            raise InputError(
                f"{store.folder}: {array.path} has adapters of rank {rank}, unlike openpi's variants "
                f"({', '.join(map(str, LORA_RANKS))}), and no alpha is stored; give --lora_scale, alpha / rank"
            )
        scales[array.path] = (1.0 if given is None else given) if array.is_of_attention else 1.0
    if given is not None and not scales:
        raise InputError(f"{store.folder} has no adapters, so there is nothing to scale with --lora_scale")
    return scales
