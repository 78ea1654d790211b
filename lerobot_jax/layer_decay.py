"""Layer-wise decay of the learning rate: the nearer a layer is to the input, the smaller its steps.

As in BEiT (arXiv:2106.08254) and MAE's fine-tuning: layer i of n has decay ** (n - 1 - i) times the learning rate.
The policy's config says the order of its layers: `PolicyConfig.layer_order`.
"""

import re
from typing import Any, NamedTuple

import jax
import numpy as np

from lerobot_jax.errors import InputError
from lerobot_jax.nn.weights import is_stacked
from lerobot_jax.policies.config import PolicyConfig
from lerobot_jax.torch_state import dotted_names

Tree = dict[str, Any]


class Place(NamedTuple):
    """Where a parameter is in a policy's order of layers."""

    pattern: int
    numbers: tuple[int, ...]  # its layer among those of the pattern; of a stack, all of them
    label: str  # what the pattern matched


def layer_factors(decay: float, config: PolicyConfig, params: Tree, all_params: Tree | None = None) -> Tree:
    """Give each parameter's factor on its learning rate; for a stack an array with a leading axis of layers.

    Args:
        decay: the factor from each layer to the one before.
        config: the policy's, which says the order.
        params: the parameters (or their shapes) that are trained.
        all_params: all of the policy's, if others are not trained; they count as layers, too.

    Raises:
        InputError: if the config says no order, or it leaves a parameter out.
    """
    steps = _distances(config, params if all_params is None else all_params)

    def factor(name: str, x: Any) -> Any:
        place = _find(config, name, x.shape)
        values = [decay ** steps[place.pattern, number] for number in place.numbers]
        if not is_stacked(name):
            return values[0]
        return np.array(values, np.float32).reshape(-1, *[1] * (len(x.shape) - 1))

    return jax.tree.map(factor, dotted_names(params), params)


def describe_layers(decay: float, config: PolicyConfig, params: Tree) -> str:
    """Give a table of layers, from the input to the output, and of the factors on their learning rates."""
    labels: dict[tuple[int, int], set[str]] = {}
    for name, x in _flat(params):
        place = _find(config, name, x.shape)
        for number in place.numbers:
            label = f"{place.label}[{number}]" if len(place.numbers) > 1 else place.label
            labels.setdefault((place.pattern, number), set()).add(label)
    steps = _distances(config, params)
    lines = [f"{decay ** steps[layer]:10.4g}  {', '.join(sorted(labels[layer]))}" for layer in sorted(labels)]
    return "\n".join(["factors on the learning rates of the layers:", *lines])


def _distances(config: PolicyConfig, params: Tree) -> dict[tuple[int, int], int]:
    """Give how far each layer is from the last one."""
    places = [_find(config, name, x.shape) for name, x in _flat(params)]
    layers = sorted({(place.pattern, number) for place in places for number in place.numbers}, reverse=True)
    return {layer: distance for distance, layer in enumerate(layers)}


def _find(config: PolicyConfig, name: str, shape: tuple[int, ...]) -> Place:
    if not config.layer_order:
        raise InputError(
            f"optimizer.layer_decay: {type(config).__name__} does not say the order of its layers; give it the "
            "property layer_order"
        )
    for i, pattern in enumerate(config.layer_order):
        match = re.match(pattern, name)
        if match is None:
            continue
        label = match.group().rstrip(".")
        number = match.group(1) if match.re.groups else None
        if number is not None:
            return Place(i, (int(number),) * (shape[0] if is_stacked(name) else 1), label)
        return Place(i, tuple(range(shape[0])) if is_stacked(name) else (0,), label)
    raise InputError(f"optimizer.layer_decay: {type(config).__name__}.layer_order leaves out {name}")


def _flat(params: Tree) -> list[tuple[str, Any]]:
    return list(zip(jax.tree.leaves(dotted_names(params)), jax.tree.leaves(params), strict=True))
