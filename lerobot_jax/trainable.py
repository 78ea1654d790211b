"""Which parameters a run trains; the others have no gradient, no moments and no average."""

import re
from typing import Any

from flax.traverse_util import flatten_dict, unflatten_dict

from lerobot_jax.config import TrainConfig
from lerobot_jax.errors import InputError

Tree = dict[str, Any]


def split(config: TrainConfig, params: Tree) -> tuple[Tree, Tree]:
    """Divide a policy's parameters (arrays or shapes) into those that are trained and those that are not.

    Raises:
        InputError: when a pattern of `freeze` is no name's beginning, or nothing is left to train.
    """
    trained, frozen = {}, {}
    names = {path: ".".join(map(str, path)) for path in flatten_dict(params)}
    for pattern in config.freeze:
        if not any(re.match(pattern, name) for name in names.values()):
            raise InputError(
                f"freeze: no parameter's name begins like '{pattern}'; there is {min(names.values())}"
            )
    for path, array in flatten_dict(params).items():
        is_frozen = any(re.match(pattern, names[path]) for pattern in config.freeze)
        (frozen if is_frozen else trained)[path] = array
    if not trained:
        raise InputError(f"freeze={config.freeze} leaves no parameter to train")
    return unflatten_dict(trained), unflatten_dict(frozen)


def combine(trained: Tree, frozen: Tree) -> Tree:
    """Put together what `split` divided."""
    return unflatten_dict(flatten_dict(frozen) | flatten_dict(trained))


def weights_of(state: Tree) -> Tree:
    """Give the `params` and `buffers` to evaluate and save: the averaged ones if there are any."""
    weights = state.get("ema") or {"params": state["params"], "buffers": state["buffers"]}
    return weights | {"params": combine(weights["params"], state.get("frozen", {}))}
