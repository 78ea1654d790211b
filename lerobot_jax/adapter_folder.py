"""Adapter folders as PEFT and stock LeRobot write and read them, beside the policy that they change.

    adapter_config.json         PEFT's LoraConfig, with the name of the base policy
    adapter_model.safetensors   base_model.model.<module>.lora_A.weight ..., and modules that were trained wholly
    config.json                 the policy's settings, with use_peft
    policy_preprocessor.json ...

Mirrors what `peft.PeftModel.save_pretrained` and `lerobot.common.train_utils.save_checkpoint` write. As there, what
training changes without training it (statistics of batch norm) is not in it, unless its module is trained wholly.
"""

from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from absl import logging
from flax import nnx

from lerobot_jax import state_dict, torch_state
from lerobot_jax.errors import InputError
from lerobot_jax.files import read_json, write_json
from lerobot_jax.lora import Lora, factors_of
from lerobot_jax.nn.attention import MultiheadAttention
from lerobot_jax.peft_targets import Target, candidates, is_frozen, is_whole, rank_and_scale
from lerobot_jax.state_dict import ADAPTER_NAME, StateDict

Tree = dict[str, Any]

ADAPTER_CONFIG_NAME = "adapter_config.json"
PREFIX = "base_model.model."
# Fields of PEFT's LoraConfig that ask for another method than LoRA when they are set.
OTHER_METHODS = (
    *("use_dora", "use_qalora", "use_bdlora", "lora_bias", "fan_in_fan_out", "layer_replication"),
    *("target_parameters", "trainable_token_indices", "alora_invocation_tokens", "arrow_config"),
    *("velora_config", "kasa_config", "monteclora_config"),
)
# Initializations that leave the base weights as they are.
HARMLESS_INITS = (True, False, "gaussian", "eva", "orthogonal")


class Adapters(NamedTuple):
    """What an adapter folder holds."""

    settings: dict[str, Any]  # of PEFT's LoraConfig
    factors: dict[Target, tuple[np.ndarray, np.ndarray]]  # (left, right) as in `LoraWeight`
    whole: StateDict  # the weights of modules that were trained wholly, under the policy's keys

    @property
    def targets(self) -> tuple[Target, ...]:
        return tuple(self.factors)


def read_settings(folder: Path) -> dict[str, Any]:
    """Read adapter_config.json.

    Raises:
        InputError: if it is no LoRA, or a kind that is not supported, naming the field.
    """
    path = folder / ADAPTER_CONFIG_NAME
    settings = read_json(path)
    if not isinstance(settings, dict) or settings.get("peft_type") != "LORA":
        raise InputError(f"{path}: peft_type must be LORA; other adapters are not supported")
    for name, kind in (("r", int), ("lora_alpha", int | float), ("base_model_name_or_path", str)):
        if not isinstance(settings.get(name), kind):
            raise InputError(f"{path}: {name} is missing, or not {kind}")
    set_fields = [name for name in OTHER_METHODS if settings.get(name)]
    if settings.get("bias", "none") != "none":
        set_fields.append("bias")
    if settings.get("init_lora_weights", True) not in HARMLESS_INITS:
        set_fields.append("init_lora_weights")
    if set_fields:
        values = ", ".join(f"{name}={settings[name]!r}" for name in set_fields)
        raise InputError(f"{path}: {values} is not supported, only plain LoRA is")
    return settings | {"modules_to_save": settings.get("modules_to_save") or []}


def read(folder: Path, module: nnx.Module) -> Adapters:
    """Read an adapter folder for a policy (shapes are enough).

    Raises:
        InputError: naming the file, and what in it is unknown to the policy, incomplete or of another shape.
    """
    settings = read_settings(folder)
    stored = state_dict.read(folder / ADAPTER_NAME)
    factors, used, problems = {}, set(), []
    for place, name, adapters in candidates(module):
        for adapter in adapters:
            stem = PREFIX + adapter.name
            keys = _keys(stem, adapter.kind)
            present = [key for key in keys if key in stored]
            used |= set(present)
            if len(present) == 1:
                problems.append(f"missing {(set(keys) - set(present)).pop()}")
            if len(present) < 2:
                continue
            _, scale = rank_and_scale(name, settings)
            left, right = _from_peft(adapter.kind, *(np.asarray(stored[key], np.float32) for key in keys))
            if _changed_shape(left, right) != (shape := _shape_at(place, adapter.variable)):
                problems.append(f"{stem} is for a weight of shape {_changed_shape(left, right)}, not {shape}")
            elif not is_frozen(place):
                factors[adapter.target(place, right.shape[0], scale)] = left, right
            elif left.any() and right.any():
                problems.append(f"{stem} changes a module that the policy never trains")
    names = {PREFIX + key: key for entry in torch_state.entries(module) for key in entry.keys}
    whole = {key: name for key, name in names.items() if key in stored}
    for key in stored:
        if key not in used and key not in whole:
            problems += [] if _is_idle(key, stored, module) else [f"unknown {key}"]
    if problems or not (factors or whole):
        raise InputError(
            f"{stored.source} does not fit the policy: {'; '.join(problems) or 'there are no adapters in it'}"
        )
    return Adapters(settings, factors, stored.renamed(whole))


def _shape_at(place: torch_state.Place, variable: tuple[Any, ...]) -> tuple[int, ...]:
    owner: Any = place.module
    for name in variable:
        owner = getattr(owner, name)
    shape = owner.get_value().shape
    return shape if place.layer is None else shape[1:]


def _changed_shape(left: np.ndarray, right: np.ndarray) -> tuple[int, ...]:
    return (*left.shape[:-1], right.shape[-1])


def _is_idle(key: str, stored: StateDict, module: nnx.Module) -> bool:
    """Tell whether a key is of an adapter on an attention's output projection, which PyTorch does not call."""
    owners = [place for place in torch_state.places(module) if isinstance(place.module, MultiheadAttention)]
    stems = [f"{PREFIX}{'.'.join(map(str, place.names))}.out_proj.lora_" for place in owners]
    if not key.startswith(tuple(stems)):
        return False
    if key.endswith("lora_A.weight"):
        logging.warning("%s: %s is left out: PyTorch does not use it", stored.source, key)
    return True


def write(folder: Path, module: nnx.Module, lora: Lora, params: Tree, buffers: Tree) -> None:
    """Write adapter_config.json and adapter_model.safetensors.

    Args:
        folder: where to.
        module: the policy (shapes are enough).
        lora: which weights have adapters, and PEFT's settings.
        params: its parameters, with a `LoraWeight` for each adapter.
        buffers: its buffers; those of modules that were trained wholly are written too.
    """
    folder.mkdir(parents=True, exist_ok=True)
    state = torch_state.to_torch(module, params, buffers)
    keys = [entry.keys[0] for entry in torch_state.entries(module)]
    arrays = {PREFIX + key: state[key] for key in keys if is_whole(key, lora.settings)}
    for target in lora.targets:
        names = _keys(PREFIX + target.name, target.kind)
        arrays |= dict(zip(names, _to_peft(target.kind, *factors_of(target, params)), strict=True))
    state_dict.write({key: np.ascontiguousarray(x) for key, x in arrays.items()}, folder / ADAPTER_NAME)
    write_json(dict(sorted(lora.settings.items())), folder / ADAPTER_CONFIG_NAME, indent=2)


def _keys(stem: str, kind: type[nnx.Module]) -> tuple[str, str]:
    if kind is nnx.Embed:
        return f"{stem}.lora_embedding_A", f"{stem}.lora_embedding_B"
    return f"{stem}.lora_A.weight", f"{stem}.lora_B.weight"


def _to_peft(kind: type[nnx.Module], left: np.ndarray, right: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Give PEFT's A and B, (r, in, *space) and (out, r, *ones); a packed projection is as PyTorch stores it."""
    if kind is MultiheadAttention:
        return right, left
    ones = (1,) * (left.ndim - 2)
    return np.moveaxis(left, (-1, -2), (0, 1)), right.T.reshape(*right.T.shape, *ones)


def _from_peft(kind: type[nnx.Module], a: np.ndarray, b: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    if kind is MultiheadAttention:
        return b, a
    return np.moveaxis(a, (0, 1), (-1, -2)), b.reshape(b.shape[:2]).T
