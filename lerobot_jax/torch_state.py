"""A policy's parameters and buffers <-> the PyTorch state dict of the same policy in LeRobot.

The module tree is the mapping: attribute names equal LeRobot's, so the dotted path of a variable is its key, and
one layout rule per layer type turns arrays from one framework's order into the other's. No policy has a table of
its own, and no value is cast.
"""

import re
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
import safetensors
import safetensors.numpy
from flax import nnx
from flax.traverse_util import flatten_dict, unflatten_dict

from lerobot_jax.errors import InputError

Tree = dict[str, Any]


class Layout(NamedTuple):
    """How one array of a layer is called and laid out in PyTorch."""

    torch_name: str
    to_torch: Callable[[np.ndarray], np.ndarray] = np.asarray
    from_torch: Callable[[np.ndarray], np.ndarray] = np.asarray


def _out_in_first(kernel: np.ndarray) -> np.ndarray:
    return np.moveaxis(kernel, (-1, -2), (0, 1))  # (*space, in, out) -> (out, in, *space)


def _out_in_last(weight: np.ndarray) -> np.ndarray:
    return np.moveaxis(weight, (0, 1), (-1, -2))


# Variables that are not listed are stored as PyTorch stores them, under the same name.
LAYOUTS: dict[type[nnx.Module], dict[str, Layout]] = {
    nnx.Linear: {"kernel": Layout("weight", _out_in_first, _out_in_last)},
    nnx.Conv: {"kernel": Layout("weight", _out_in_first, _out_in_last)},
    nnx.LayerNorm: {"scale": Layout("weight")},
    nnx.Embed: {"embedding": Layout("weight")},
}


class Entry(NamedTuple):
    """One variable of a policy: its path in the tree of arrays, its PyTorch key, and how to convert it."""

    path: tuple[str | int, ...]
    key: str
    layout: Layout
    variable: nnx.Variable


def entries(module: nnx.Module, path: tuple[str | int, ...] = ()) -> Iterator[Entry]:
    """List the variables of a module tree (of arrays or of shapes)."""
    children = enumerate(module) if isinstance(module, nnx.List) else vars(module).items()
    layouts = next((rows for kind, rows in LAYOUTS.items() if isinstance(module, kind)), {})
    for name, child in children:
        if isinstance(child, nnx.Module):
            yield from entries(child, (*path, name))
        elif isinstance(child, nnx.Variable):
            layout = layouts.get(str(name), Layout(str(name)))
            yield Entry((*path, name), ".".join(map(str, (*path, layout.torch_name))), layout, child)


def to_torch(module: nnx.Module, params: Tree, buffers: Tree) -> dict[str, np.ndarray]:
    """Give the PyTorch state dict of a policy whose arrays are in `params` and `buffers`."""
    arrays = flatten_dict(params) | flatten_dict(buffers)
    return {
        entry.key: np.ascontiguousarray(entry.layout.to_torch(np.asarray(arrays[entry.path])))
        for entry in entries(module)
    }


def from_torch(module: nnx.Module, path: Path, prefix: str = "", ignore: str = "") -> tuple[Tree, Tree]:
    """Read the parameters and the buffers of a module from a safetensors file.

    Args:
        module: the module tree (shapes are enough).
        path: the safetensors file.
        prefix: what precedes the module's keys in the file.
        ignore: a regular expression for keys of the file that may be left unread.

    Raises:
        InputError: listing all keys that are missing from the file, unknown to the module, or of another shape.
    """
    params, buffers, problems = {}, {}, []
    with _open_safetensors(path) as file:
        unused = set(file.keys())
        for entry in entries(module):
            key = prefix + entry.key
            if key not in unused:
                problems.append(f"missing {key}")
                continue
            unused.remove(key)
            value = np.ascontiguousarray(entry.layout.from_torch(file.get_tensor(key)))
            shape = entry.variable.get_value().shape
            if value.shape != shape:
                wanted = entry.layout.to_torch(np.broadcast_to(0, shape)).shape
                stored = tuple(file.get_slice(key).get_shape())
                problems.append(f"{key} has shape {stored}, the policy needs {wanted}")
                continue
            (params if isinstance(entry.variable, nnx.Param) else buffers)[entry.path] = value
    problems += [f"unknown {key}" for key in sorted(unused) if not (ignore and re.fullmatch(ignore, key))]
    if problems:
        raise InputError(f"{path} does not fit the policy: {'; '.join(problems)}")
    return unflatten_dict(params), unflatten_dict(buffers)


def save(state: Mapping[str, np.ndarray], path: Path) -> None:
    """Write a state dict as safetensors, marked as PyTorch's like `safetensors.torch.save_model` does."""
    safetensors.numpy.save_file(dict(state), path, metadata={"format": "pt"})


def dotted_names(tree: Tree) -> Tree:
    """Give a tree of the same structure that holds each leaf's dotted name, as used in parameter groups."""
    return jax.tree_util.tree_map_with_path(lambda path, _: ".".join(str(entry.key) for entry in path), tree)


def _open_safetensors(path: Path) -> Any:
    try:
        return safetensors.safe_open(path, framework="numpy")
    except FileNotFoundError:
        raise InputError(f"{path}: no such file") from None
    except safetensors.SafetensorError as error:
        raise InputError(f"{path}: damaged or incomplete safetensors file ({error})") from None
