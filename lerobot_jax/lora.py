"""LoRA for any policy (Hu et al., arXiv:2106.09685): adapters of its weights, and what is trained of it.

An adapter is a `LoraWeight` that stands in the tree of parameters where the weight stood. Layers never see it:
`nn.weights.ready` merges it first. How adapters begin is PEFT's, which LeRobot uses.
"""

import dataclasses
import math
import zlib
from collections.abc import Collection, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from flax.traverse_util import flatten_dict, unflatten_dict
from jaxtyping import PRNGKeyArray

from lerobot_jax.errors import InputError
from lerobot_jax.nn.weights import LoraWeight, is_adapted
from lerobot_jax.peft_targets import (
    KERNELS,
    Path,
    PeftConfig,
    Target,
    candidates,
    find_targets,
    lora_settings,
    whole_paths,
)
from lerobot_jax.policies.config import PolicyConfig

Tree = dict[str, Any]


@dataclasses.dataclass(frozen=True)
class Lora:
    """What a run trains of a policy: adapters of some weights, and some modules wholly.

    Attributes:
        settings: fields of PEFT's `LoraConfig`, the base's name among them.
        targets: the weights with adapters.
        whole: the paths of the variables that are trained wholly.
        halved: those that are kept in bfloat16 unless trained, because their layers cast them to it anyway.
    """

    settings: dict[str, Any]
    targets: tuple[Target, ...]
    whole: frozenset[Path]
    halved: frozenset[Path]

    @classmethod
    def of(cls, module: nnx.Module, settings: dict[str, Any], targets: tuple[Target, ...]) -> "Lora":
        whole = whole_paths(module, settings)
        if twice := sorted(target.name for target in targets if target.path in whole):
            raise InputError(f"peft.full_training_modules: {twice[0]} has an adapter already")
        return cls(settings, targets, whole, _halved(module))

    def attach(self, params: Tree, key: PRNGKeyArray) -> Tree:
        """Give the weights new adapters, unless they came with some."""
        if any(map(is_adapted, jax.tree.leaves(params, is_leaf=is_adapted))):
            return params
        return attach(self.targets, params, key, self.settings.get("init_lora_weights", True))


def plan(peft: PeftConfig, policy: PolicyConfig, module: nnx.Module) -> Lora:
    """Find what `peft` trains of a pretrained policy.

    Raises:
        InputError: naming the field that does not suit the policy.
    """
    if policy.use_peft:
        raise InputError(
            f"peft: {policy.pretrained_path} has adapters already, which are trained on as they are; leave peft out"
        )
    if policy.pretrained_path is None:
        raise InputError("peft: adapters are for a trained policy; give one with policy.pretrained_path")
    settings = lora_settings(peft, policy) | {
        "base_model_name_or_path": policy.pretrained_path,
        "revision": policy.pretrained_revision,
    }
    targets = find_targets(module, settings)
    # Names instead of a pattern: this one may match parts without arrays, which only PyTorch's policy has.
    owners = {target.name.removesuffix(".base_layer.out_proj") for target in targets}
    return Lora.of(module, settings | {"target_modules": sorted(owners)}, targets)


def _halved(module: nnx.Module) -> frozenset[Path]:
    """Give the paths of the weights that layers of type bfloat16 have in another type."""
    found = set()
    for place, _, adapters in candidates(module):
        if getattr(place.module, "dtype", None) == jnp.bfloat16:
            found |= {
                (*place.path, *adapter.variable) for adapter in adapters if adapter.kind is not nnx.Embed
            }
    return frozenset(found)


def attach(targets: tuple[Target, ...], params: Tree, key: PRNGKeyArray, init: bool | str = True) -> Tree:
    """Give new adapters, which change nothing yet, to the weights of the targets; pure.

    A is Kaiming-uniform as in LoRA's code, or gaussian with deviation 1 / r; B is 0. Of an embedding, A is 0 and
    B standard normal. Each depends on the key and its name only.
    """
    factors = {}
    shapes: dict[Any, Any] = {**flatten_dict(params)}
    for target in targets:
        shape = shapes[target.path].shape[int(target.layer is not None) :]
        own_key = jax.random.fold_in(key, zlib.crc32(target.name.encode()))
        factors[target] = _fresh(target, shape, own_key, init)
    return with_factors(factors, params)


def _fresh(
    target: Target, shape: tuple[int, ...], key: PRNGKeyArray, init: bool | str
) -> tuple[jax.Array, jax.Array]:
    left, right = (*shape[:-1], target.r), (target.r, shape[-1])
    if target.kind is nnx.Embed:
        return jnp.zeros(left), jax.random.normal(key, right)
    a, fan_in = (left, math.prod(shape[:-1])) if target.kind in KERNELS else (right, shape[-1])
    if init is True:
        bound = 1 / math.sqrt(fan_in)
        random = jax.random.uniform(key, a, minval=-bound, maxval=bound)
    else:
        random = jax.random.normal(key, a) / target.r
    return (random, jnp.zeros(right)) if a is left else (jnp.zeros(left), random)


def with_factors(factors: Mapping[Target, tuple[Any, Any]], params: Tree) -> Tree:
    """Put (left, right) of each target into `LoraWeight`s; in a stack, layers without one get scale 0."""
    arrays: dict[Any, Any] = dict(flatten_dict(params))
    by_path: dict[Path, dict[int | None, Target]] = {}
    for target in factors:
        by_path.setdefault(target.path, {})[target.layer] = target
    for path, by_layer in by_path.items():
        base = arrays[path]
        if None in by_layer:
            target = by_layer[None]
            scale = jnp.float32(target.scale)
            arrays[path] = LoraWeight(base, *factors[target], scale, scale if target.is_doubled else None)
            continue
        r = max(target.r for target in by_layer.values())
        shape = base.shape[1:]
        left, right = jnp.zeros((base.shape[0], *shape[:-1], r)), jnp.zeros((base.shape[0], r, shape[-1]))
        scale = np.zeros(base.shape[0], np.float32)
        for layer, target in by_layer.items():
            one_left, one_right = factors[target]
            left = left.at[layer, ..., : target.r].set(one_left)
            right = right.at[layer, : target.r].set(one_right)
            scale[layer] = target.scale
        is_doubled = next(iter(by_layer.values())).is_doubled
        scale = jnp.asarray(scale)
        arrays[path] = LoraWeight(base, left, right, scale, scale if is_doubled else None)
    return unflatten_dict(arrays)


def factors_of(target: Target, params: Tree) -> tuple[np.ndarray, np.ndarray]:
    """Give (left, right) of a target."""
    weights: dict[Any, Any] = {**flatten_dict(params)}
    weight: LoraWeight = weights[target.path]
    weight = weight if target.layer is None else weight[target.layer]
    return np.asarray(weight.left)[..., : target.r], np.asarray(weight.right)[: target.r]


def merged(params: Tree) -> Tree:
    """Give the weights of a run with LoRA with their adapters merged, all in float32; of another run, as they are.

    Computed on the host, one array after the other; those that the caller does not keep are freed on the way.
    """
    arrays: dict[Any, Any] = flatten_dict(params)
    del params
    if any(map(is_adapted, arrays.values())):
        for path, x in arrays.items():
            arrays[path] = np.asarray(x, np.float32)
    return unflatten_dict(arrays)


def as_dicts(params: Tree) -> Tree:
    """Give plain nested dicts: base, left, right, scale (and echo) in the place of each `LoraWeight`."""

    def parts(x: Any) -> Any:
        return {name: v for name, v in vars(x).items() if v is not None} if is_adapted(x) else x

    return jax.tree.map(parts, params, is_leaf=is_adapted)


def from_dicts(tree: Any) -> Any:
    """Undo `as_dicts`."""
    if tree.keys() >= {"base", "left", "right", "scale"}:
        return LoraWeight(**tree)
    return {key: from_dicts(value) if isinstance(value, dict) else value for key, value in tree.items()}


def is_trained(path: Path, whole: Collection[Path]) -> bool:
    """Tell whether an array of `as_dicts` is trained: an adapter's, or of a module that is trained wholly."""
    return path[-1] in ("left", "right") or path in whole
