"""A policy's parameters and buffers <-> the PyTorch state dict of the same policy in LeRobot.

The module tree is the mapping: attribute names equal LeRobot's, so the dotted path of a variable is its key, and
one layout rule per layer type turns arrays from one framework's order into the other's. No policy has a table of
its own, and no value is cast.
"""

import functools
import itertools
import re
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from flax.traverse_util import flatten_dict, unflatten_dict

from lerobot_jax import sharding
from lerobot_jax.errors import InputError
from lerobot_jax.nn.stack import Stack
from lerobot_jax.nn.variables import Counter
from lerobot_jax.state_dict import StateDict, Tensor, compute_ahead, empty_aligned

Tree = dict[str, Any]
Path = tuple[str | int, ...]  # names and list positions from a module down to an array


class Layout(NamedTuple):
    """How one array of a layer is called and laid out in PyTorch."""

    torch_name: str
    to_torch: Callable[[np.ndarray], np.ndarray] = np.asarray
    from_torch: Callable[[np.ndarray], np.ndarray] = np.asarray


def _out_in_first(kernel: np.ndarray) -> np.ndarray:
    return np.moveaxis(kernel, (-1, -2), (0, 1))  # (*space, in, out) -> (out, in, *space)


def _out_in_last(weight: np.ndarray) -> np.ndarray:
    return np.moveaxis(weight, (0, 1), (-1, -2))


def _flip(kernel: np.ndarray) -> np.ndarray:
    """Reverse the spatial axes (the first ones): PyTorch's transposed convolution walks them the other way."""
    return np.flip(kernel, tuple(range(kernel.ndim - 2)))


# Variables that are not listed are stored as PyTorch stores them, under the same name.
LAYOUTS: dict[type[nnx.Module], dict[str, Layout]] = {
    nnx.Linear: {"kernel": Layout("weight", _out_in_first, _out_in_last)},
    nnx.Conv: {"kernel": Layout("weight", _out_in_first, _out_in_last)},
    nnx.ConvTranspose: {
        "kernel": Layout(  # (*space, in, out) <-> (in, out, *space)
            "weight",
            lambda kernel: np.moveaxis(_flip(kernel), (-2, -1), (0, 1)),
            lambda weight: _flip(np.moveaxis(weight, (0, 1), (-2, -1))),
        )
    },
    nnx.LayerNorm: {"scale": Layout("weight")},
    nnx.GroupNorm: {"scale": Layout("weight")},
    nnx.RMSNorm: {"scale": Layout("weight")},
    nnx.BatchNorm: {"scale": Layout("weight"), "mean": Layout("running_mean"), "var": Layout("running_var")},
    nnx.Embed: {"embedding": Layout("weight")},
}
# Variables with a rule of their own in any layer. PyTorch counts in 64 bits, JAX in 32.
VARIABLE_LAYOUTS = {
    name: Layout(name, lambda n: n.astype(np.int64), lambda n: n.astype(np.int32))
    for name in ("num_batches_tracked", "select_target_actions_indices")
}
BLOCK = 64  # side of the squares in which matrices are transposed, so that both sides stay in the processor's cache


class Entry(NamedTuple):
    """One array of a PyTorch policy: its keys, and the variable here that holds it (or one layer of it)."""

    keys: tuple[str, ...]  # several if weights are tied; stored under the first
    path: tuple[str | int, ...]
    layer: int | None  # index into the leading axis of a stack of blocks
    layout: Layout
    variable: nnx.Variable

    def torch_form(self, dtype: np.dtype) -> tuple[tuple[int, ...], np.dtype]:
        """Give the shape and type in PyTorch, when the variable here has a type."""
        shape = self.variable.get_value().shape
        zeros = np.broadcast_to(np.zeros((), dtype), shape if self.layer is None else shape[1:])
        converted = self.layout.to_torch(zeros)
        return converted.shape, converted.dtype


def entries(module: nnx.Module) -> list[Entry]:
    """List the arrays that PyTorch's policy has for a module tree (of arrays or of shapes), layers in order."""
    own_paths = {path: i for i, path in enumerate(flatten_dict(nnx.to_pure_dict(nnx.state(module))))}
    found: dict[tuple[int, int | None], Entry] = {}
    for entry in _walk(module):
        same = found.get((id(entry.variable), entry.layer))
        if same is not None:  # one variable under two names: tied weights
            path = entry.path if entry.path in own_paths else same.path
            entry = entry._replace(keys=tuple(sorted(same.keys + entry.keys)), path=path)
        found[id(entry.variable), entry.layer] = entry
    return sorted(found.values(), key=lambda entry: own_paths[entry.path])


class Place(NamedTuple):
    """A module of a tree, or one layer of it."""

    module: nnx.Module
    path: tuple[str | int, ...]
    names: tuple[str | int, ...]  # in PyTorch
    layer: int | None  # index into the leading axis of a stack of blocks


def places(
    module: nnx.Module,
    path: tuple[str | int, ...] = (),
    names: tuple[str | int, ...] = (),
    layer: int | None = None,
) -> Iterator[Place]:
    """Give a module and all within it, a stack's layer by layer, in order."""
    yield Place(module, path, names, layer)
    for name, child in _children(module):
        if isinstance(child, Stack):
            for i in range(child.length):
                yield from places(child.block, (*path, name, "block"), (*names, name, i), i)
        elif isinstance(child, nnx.Module):
            yield from places(child, (*path, name), (*names, name), layer)


def _children(module: nnx.Module) -> Iterator[tuple[str | int, Any]]:
    yield from enumerate(module) if isinstance(module, nnx.List) else vars(module).items()


def _walk(module: nnx.Module) -> Iterator[Entry]:
    for place in places(module):
        layouts = next((rows for kind, rows in LAYOUTS.items() if isinstance(place.module, kind)), {})
        for name, child in _children(place.module):
            if isinstance(child, nnx.Variable) and not isinstance(child, Counter):
                layout = layouts.get(str(name)) or VARIABLE_LAYOUTS.get(str(name), Layout(str(name)))
                key = ".".join(map(str, (*place.names, layout.torch_name)))
                yield Entry((key,), (*place.path, name), place.layer, layout, child)


def to_torch(module: nnx.Module, params: Tree, buffers: Tree, *, widen: bool = False) -> StateDict:
    """Give the PyTorch state dict of a policy whose arrays are in `params` and `buffers`, computed on access.

    Args:
        module: the module tree (shapes are enough).
        params: arrays, on devices or on the host, or `LoraWeight`s, which are merged.
        buffers: arrays.
        widen: whether what is in bfloat16 becomes float32.
    """
    arrays: dict[Any, Any] = {**flatten_dict(params), **flatten_dict(buffers)}
    tensors = {}
    for entry in entries(module):
        array = arrays[entry.path]
        dtype = np.dtype(np.float32) if widen and array.dtype == jnp.bfloat16 else array.dtype
        read = functools.partial(_convert, array, entry, dtype)
        tensors[entry.keys[0]] = Tensor(*entry.torch_form(dtype), read)
    tied = {key: entry.keys[0] for entry in entries(module) for key in entry.keys[1:]}
    return StateDict(tensors, tied)


def _convert(array: Any, entry: Entry, dtype: np.dtype) -> np.ndarray:
    layer = array if entry.layer is None else array[entry.layer]
    layer = sharding.host_view(layer) if isinstance(layer, jax.Array) else np.asarray(layer)
    return contiguous(entry.layout.to_torch(layer.astype(dtype, copy=False)))


def from_torch(
    module: nnx.Module,
    state: StateDict,
    prefix: str = "",
    ignore: str = "",
    put: Callable[[Path, np.ndarray], jax.Array] = lambda path, array: jnp.asarray(array),
) -> tuple[Tree, Tree]:
    """Read the parameters and the buffers of a module from a state dict, one array at a time.

    Args:
        module: the module tree (shapes are enough).
        state: the state dict.
        prefix: what precedes the module's keys in it.
        ignore: a regular expression for keys that may be left unread.
        put: brings an array to the devices, given its path too; on the host it is not kept.

    Raises:
        InputError: listing all keys that are missing from the state dict, unknown to the module, of another shape
            or of a type that JAX does not compute with.
    """
    wanted = check(module, state, prefix, ignore)
    arrays: dict[Path, np.ndarray] = {}
    trees: tuple[dict[Path, jax.Array], dict[Path, jax.Array]] = {}, _counters(module)
    done = compute_ahead([functools.partial(_load, entry, state, arrays) for entry in wanted])
    for path, group in itertools.groupby(wanted, lambda entry: entry.path):
        layers = list(group)
        for _ in layers:
            next(done)
        tree = trees[0 if isinstance(layers[0].variable, nnx.Param) else 1]
        tree[path] = put(path, arrays.pop(path))
    params, buffers = map(unflatten_dict, trees)
    return params, buffers


def stored_types(module: nnx.Module, state: StateDict) -> dict[Path, np.dtype]:
    """Give the type in which a state dict has each array of a module, by the array's path."""
    found = {}
    for entry in entries(module):
        found[entry.path] = next(state.tensors[key].dtype for key in entry.keys if key in state)
    return found


def check(module: nnx.Module, state: StateDict, prefix: str = "", ignore: str = "") -> list[Entry]:
    """Compare a state dict with a module as `from_torch` does, without reading it; give what is to be read."""
    wanted = [entry._replace(keys=tuple(prefix + key for key in entry.keys)) for entry in entries(module)]
    problems = [problem for entry in wanted for problem in _misfits(entry, state)]
    problems += _mixed_types(wanted, state)
    known = {key for entry in wanted for key in entry.keys}
    unknown = [key for key in sorted(state) if key not in known]
    problems += [f"unknown {key}" for key in unknown if not (ignore and re.fullmatch(ignore, key))]
    if problems:
        raise InputError(f"{state.source} does not fit the policy: {'; '.join(problems)}")
    return wanted


def _counters(module: nnx.Module) -> dict[Path, jax.Array]:
    """Give what no state dict has, as it is at the beginning."""
    shapes: dict[Any, Any] = {**flatten_dict(nnx.to_pure_dict(nnx.state(module, Counter)))}
    return {path: jnp.zeros(count.shape, count.dtype) for path, count in shapes.items()}


def _load(entry: Entry, state: StateDict, arrays: dict[Path, np.ndarray]) -> None:
    """Read an entry's array into its place in `arrays`."""
    value = entry.layout.from_torch(state[next(key for key in entry.keys if key in state)])
    if entry.layer is None:
        arrays[entry.path] = contiguous(value)
        return
    stack = arrays.setdefault(entry.path, empty_aligned(entry.variable.get_value().shape, value.dtype))
    copy_blockwise(value, stack[entry.layer])


def _misfits(entry: Entry, state: StateDict) -> Iterator[str]:
    """Say what is wrong with what is stored for an entry."""
    stored = [key for key in entry.keys if key in state]
    if not stored:
        yield f"missing {entry.keys[0]}"
    wanted_dtype = entry.variable.get_value().dtype
    wanted_shape, _ = entry.torch_form(wanted_dtype)
    is_floating = jnp.issubdtype(wanted_dtype, jnp.floating)
    for key in stored:
        shape, dtype, _ = state.tensors[key]
        if shape != wanted_shape:
            yield f"{key} has shape {shape}, the policy needs {wanted_shape}"
        elif jnp.issubdtype(dtype, jnp.floating) != is_floating or (is_floating and dtype.itemsize > 4):
            kind = "floating-point numbers of at most 32 bits" if is_floating else "whole numbers"
            yield f"{key} has type {dtype}, the policy needs {kind}"
        elif key != stored[0] and state[key].tobytes() != state[stored[0]].tobytes():
            yield f"{key} differs from {stored[0]}, but the policy has one array for both"


def _mixed_types(wanted: list[Entry], state: StateDict) -> Iterator[str]:
    """Find the layers of a stack that are stored in another type than its first layer."""
    for _, group in itertools.groupby(wanted, lambda entry: entry.path):
        stored = [key for entry in group for key in entry.keys if key in state]
        for key in stored:
            dtype, first = state.tensors[key].dtype, state.tensors[stored[0]].dtype
            if dtype != first:
                yield f"{key} has type {dtype}, {stored[0]} {first}: the layers of a stack must have one type"


def contiguous(array: np.ndarray) -> np.ndarray:
    """Give the array in C order: itself, or a copy."""
    if array.flags.c_contiguous:
        return array
    copy = empty_aligned(array.shape, array.dtype)
    copy_blockwise(array, copy)
    return copy


def copy_blockwise(source: np.ndarray, target: np.ndarray) -> None:
    """Copy an array that may be transposed; numpy copies large transposed matrices at half the speed."""
    if source.ndim != 2 or source.flags.c_contiguous:
        target[...] = source
        return
    for i in range(0, source.shape[0], BLOCK):
        for j in range(0, source.shape[1], BLOCK):
            target[i : i + BLOCK, j : j + BLOCK] = source[i : i + BLOCK, j : j + BLOCK]


def dotted_names(tree: Tree) -> Tree:
    """Give a tree of the same structure that holds each leaf's dotted name, as used in parameter groups."""
    return jax.tree_util.tree_map_with_path(lambda path, _: ".".join(str(entry.key) for entry in path), tree)
