"""Which parameters a run trains; the others have no gradient, no moments and no average."""

import re
from collections.abc import Collection
from typing import Any

import jax
import jax.numpy as jnp
from flax.traverse_util import flatten_dict, unflatten_dict

from lerobot_jax import lora
from lerobot_jax.config import TrainConfig
from lerobot_jax.errors import InputError
from lerobot_jax.nn.weights import cast_paths
from lerobot_jax.peft_targets import Path
from lerobot_jax.policy_weights import PolicyWeights

Tree = dict[str, Any]


def split(config: TrainConfig, params: Tree, whole: Collection[Path] | None = None) -> tuple[Tree, Tree]:
    """Divide a policy's parameters (arrays or shapes) into those that are trained and those that are not.

    With LoRA, the adapters are trained; a `LoraWeight` becomes dicts of what is in it.

    Args:
        config: the run's.
        params: the policy's parameters.
        whole: with LoRA, the paths of what is trained beside the adapters.

    Raises:
        InputError: when a pattern of `freeze` is no name's beginning, or nothing is left to train.
    """
    trained, frozen = {}, {}
    arrays = flatten_dict(lora.as_dicts(params))
    names = {path: ".".join(map(str, path)) for path in arrays}
    for pattern in config.freeze:
        if not any(re.match(pattern, name) for name in names.values()):
            raise InputError(
                f"freeze: no parameter's name begins like '{pattern}'; there is {min(names.values())}"
            )
    # As in LeRobot, adapters on what the policy freezes are trained; the rest is frozen with adapters anyway.
    patterns = config.freeze if whole is not None else (*config.freeze, *config.policy.frozen_params)
    for path, array in arrays.items():
        is_frozen = any(re.match(pattern, names[path]) for pattern in patterns)
        is_frozen |= whole is not None and not lora.is_trained(path, whole)
        (frozen if is_frozen else trained)[path] = array
    if not trained:
        raise InputError(f"freeze={config.freeze} leaves no parameter to train")
    return unflatten_dict(trained), unflatten_dict(frozen)


def halve(frozen: Tree, pretrained: PolicyWeights | None, adapters: lora.Lora | None) -> Tree:
    """Give the shapes of what is not trained with the types in which it is kept: in bfloat16 where that is enough.

    That is where it comes in bfloat16 and its layer casts it anyway: nothing is lost, it is exported as it came.
    With LoRA, whose small changes are what counts, also where its layer computes in bfloat16, however it comes.
    """
    bfloat16 = jnp.dtype(jnp.bfloat16)
    kept = frozenset() if adapters is None else adapters.halved
    if pretrained is not None:
        types = pretrained.types
        kept |= {path for path in cast_paths(pretrained.module) if types[path] == bfloat16}
    arrays: dict[Any, Any] = {**flatten_dict(frozen)}
    for path, x in arrays.items():
        if (path[:-1] if path[-1] == "base" else path) in kept:
            arrays[path] = jax.ShapeDtypeStruct(x.shape, bfloat16)
    return unflatten_dict(arrays)


def combine(trained: Tree, frozen: Tree) -> Tree:
    """Put together what `split` divided."""
    return lora.from_dicts(unflatten_dict(flatten_dict(frozen) | flatten_dict(trained)))


def weights_of(state: Tree) -> Tree:
    """Give the `params` and `buffers` to evaluate and save: the averaged ones if there are any."""
    weights = state.get("ema") or {"params": state["params"], "buffers": state["buffers"]}
    return weights | {"params": combine(weights["params"], state.get("frozen", {}))}
