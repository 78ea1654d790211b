"""Which modules of a policy get LoRA adapters, by PEFT's rules and in its names.

Mirrors `lerobot.policies.pretrained.PreTrainedPolicy.wrap_with_peft`, and how `peft` (0.21) chooses modules. Unlike
there, what would get an adapter that has no effect is refused.
"""

import dataclasses
import difflib
import math
import re
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

import jax
from flax import nnx

from lerobot_jax.errors import InputError
from lerobot_jax.nn.attention import MultiheadAttention
from lerobot_jax.nn.conv import Conv2d
from lerobot_jax.nn.linear import WholeEmbedding
from lerobot_jax.policies.config import PolicyConfig
from lerobot_jax.torch_state import Place, entries, places

Path = tuple[str | int, ...]

ALL_LINEAR = "all-linear"
PEFT_ALPHA = 8  # PEFT's lora_alpha unless one is given
PLAIN_LORA = {  # the fields of PEFT's LoraConfig that LeRobot leaves as they are
    "peft_type": "LORA",
    "task_type": None,
    "inference_mode": True,
    "bias": "none",
    "lora_dropout": 0.0,
    "fan_in_fan_out": False,
    "use_rslora": False,
    "use_dora": False,
    "rank_pattern": {},
    "alpha_pattern": {},
}
KERNELS = (nnx.Linear, nnx.Conv)


@dataclasses.dataclass(frozen=True)
class PeftConfig:
    """Fine-tuning of a pretrained policy with adapters, as LeRobot's `PeftConfig`."""

    target_modules: str | tuple[str, ...] | None = None
    """Which modules get adapters: a regular expression that matches all of a dotted name, all-linear, one of the
    policy's presets, or several names or ends of names. None: the policy's default, if it has one."""
    full_training_modules: tuple[str, ...] | None = None
    """Ends of the names of modules that are trained wholly; None: the policy's default."""
    method_type: str = "LORA"
    """Only LORA."""
    init_type: str | None = None
    """How adapters begin: None for the Kaiming-uniform of LoRA's authors, or gaussian."""
    r: int = 16
    """Rank of the adapters."""
    lora_alpha: int | None = None
    """The change of a weight is scaled by lora_alpha / r; None: 8, as in PEFT."""

    def __post_init__(self):
        if self.method_type.upper() != "LORA":
            raise ValueError(f"peft.method_type: only LORA is supported, not '{self.method_type}'")
        if self.init_type is not None and self.init_type.lower() != "gaussian":
            raise ValueError(
                f"peft.init_type: None and gaussian are supported, not '{self.init_type}' (PEFT's other kinds "
                "change the base weights, or need data)"
            )
        if self.r < 1 or (self.lora_alpha is not None and self.lora_alpha < 1):
            raise ValueError(f"peft.r and peft.lora_alpha must be positive: {self.r}, {self.lora_alpha}")
        if isinstance(self.target_modules, str):
            try:
                re.compile(self.target_modules)
            except re.error as error:
                raise ValueError(f"peft.target_modules is no regular expression: {error}") from None


class Target(NamedTuple):
    """A weight with an adapter (one layer's, in a stack)."""

    name: str  # of the module that holds the adapter in PEFT
    path: Path  # of the weight in the tree of parameters
    layer: int | None
    kind: type[nnx.Module]  # which layout PEFT's A and B have
    r: int
    scale: float
    is_doubled: bool = False
    """Whether PEFT adds the change twice: its MultiheadAttention merges that of the output projection itself, and
    calls the projection's own merge, which adds it past the gradient."""


def lora_settings(peft: PeftConfig, policy: PolicyConfig) -> dict[str, Any]:
    """Give the fields of PEFT's `LoraConfig` that LeRobot would make of `peft` for this policy.

    Raises:
        InputError: if neither `peft` nor the policy says what to adapt.
    """
    defaults = policy.default_peft_targets or {}
    target_modules = peft.target_modules or defaults.get("target_modules")
    if not target_modules:
        presets = "".join(f", {name}" for name in policy.peft_presets)
        raise InputError(
            f"peft.target_modules: a {policy.type} policy has no default; give a regular expression, ends of "
            f"module names, or {ALL_LINEAR}{presets}"
        )
    if isinstance(target_modules, str):
        target_modules = policy.peft_presets.get(target_modules, target_modules)
    whole = peft.full_training_modules
    return {
        "target_modules": target_modules if isinstance(target_modules, str) else list(target_modules),
        "modules_to_save": list(defaults.get("modules_to_save") or ()) if whole is None else list(whole),
        "r": peft.r,
        "lora_alpha": PEFT_ALPHA if peft.lora_alpha is None else peft.lora_alpha,
        "init_lora_weights": True if peft.init_type is None else peft.init_type,
        **PLAIN_LORA,
    }


def find_targets(module: nnx.Module, settings: Mapping[str, Any]) -> tuple[Target, ...]:
    """List the weights that get adapters, by PEFT's rules.

    Args:
        module: the policy (shapes are enough).
        settings: fields of PEFT's `LoraConfig`.

    Raises:
        InputError: if nothing matches, naming what is near; or if what matches cannot have adapters.
    """
    wanted, found, known = settings["target_modules"], [], []
    is_all_linear = isinstance(wanted, str) and wanted.lower() == ALL_LINEAR
    for place, name, adapters in candidates(module):
        known += [name] if adapters and not is_frozen(place) else []
        if any(re.match(rf"(^|.*\.){part}($|\..*)", name) for part in settings["modules_to_save"]):
            continue
        if is_all_linear:
            matches = adapters and isinstance(place.module, nnx.Linear)
        elif isinstance(wanted, str):
            matches = re.fullmatch(wanted, name)
        else:
            matches = any(name == part or name.endswith(f".{part}") for part in wanted)
        if matches and not adapters:
            raise InputError(f"peft.target_modules: '{name}' {_why_not(place.module)}")
        if matches and not is_frozen(place):
            r, scale = rank_and_scale(name, settings)
            found += [adapter.target(place, r, scale) for adapter in adapters]
    if not found:
        raise InputError(
            f"peft.target_modules: {wanted} matches no module that is trained; {_near(str(wanted), known)}"
        )
    return tuple(found)


class Adapter(NamedTuple):
    """An adapter that a module can have."""

    name: str  # of the module that holds it in PEFT
    variable: Path  # from the module to the weight
    kind: type[nnx.Module]
    is_doubled: bool = False

    def target(self, place: Place, r: int, scale: float) -> Target:
        path = (*place.path, *self.variable)
        return Target(self.name, path, place.layer, self.kind, r, scale, self.is_doubled)


def candidates(module: nnx.Module) -> Iterator[tuple[Place, str, list[Adapter]]]:
    """Give each module of a policy once, its name in PyTorch, and the adapters that it can have, if any."""
    seen: set[tuple[int, int | None]] = set()
    inside: set[str] = set()
    for place in places(module):
        name = ".".join(map(str, place.names))
        if isinstance(place.module, MultiheadAttention):
            inside.add(f"{name}.out_proj")  # PyTorch's attention reads its weight instead of calling it
        if name and (id(place.module), place.layer) not in seen:
            seen.add((id(place.module), place.layer))
            yield place, name, [] if name in inside else _adapters(place.module, name)


def _adapters(module: nnx.Module, name: str) -> list[Adapter]:
    if isinstance(module, MultiheadAttention):
        out = Adapter(f"{name}.base_layer.out_proj", ("out_proj", "kernel"), nnx.Linear, is_doubled=True)
        return [Adapter(name, ("in_proj_weight",), MultiheadAttention), out]
    if isinstance(module, nnx.Embed):
        return [] if isinstance(module, WholeEmbedding) else [Adapter(name, ("embedding",), nnx.Embed)]
    kind = next((kind for kind in KERNELS if isinstance(module, kind)), None)
    return [Adapter(name, ("kernel",), kind)] if kind and not _is_dilated(module) else []


def is_frozen(place: Place) -> bool:
    """Tell whether the policy never trains a module: LeRobot runs it without gradients, adapters too."""
    return not jax.tree.leaves(nnx.state(place.module, nnx.Param))


def _is_dilated(module: nnx.Module) -> bool:
    return isinstance(module, Conv2d) and module.settings[2] > 1


def rank_and_scale(name: str, settings: Mapping[str, Any]) -> tuple[int, float]:
    """Give an adapter's rank and the factor on its change, as PEFT's patterns say."""

    def chosen(kind: str, default: int) -> int:
        patterns = settings.get(kind) or {}
        return next((v for key, v in patterns.items() if re.match(rf"(.*\.)?({key})$", name)), default)

    r, alpha = chosen("rank_pattern", settings["r"]), chosen("alpha_pattern", settings["lora_alpha"])
    return r, alpha / (math.sqrt(r) if settings.get("use_rslora") else r)


def _why_not(module: nnx.Module) -> str:
    if isinstance(module, nnx.Linear):
        return (
            "cannot have an adapter of its own: PyTorch's attention does not call it; name the attention, which "
            "adapts its input and output projections"
        )
    if isinstance(module, WholeEmbedding):
        return "cannot have an adapter: PyTorch's policy reads its weight past it"
    if _is_dilated(module):
        return "cannot have an adapter: it is dilated, and PEFT's adapters are not"
    kinds = "Linear, Conv1d, Conv2d, Embedding and MultiheadAttention"
    return f"is a {type(module).__name__}; adapters are for {kinds}"


def _near(wanted: str, known: list[str]) -> str:
    ends = sorted({name.rpartition(".")[2] for name in known})
    close = difflib.get_close_matches(wanted, known, 3) + difflib.get_close_matches(wanted, ends, 3)
    if close:
        return f"near are {', '.join(close)}"
    shown = ", ".join(name for name in ends if not name.isdigit())
    return f"names are such as {known[0]}, and end with {shown}"


def is_whole(key: str, settings: Mapping[str, Any]) -> bool:
    """Tell whether an array is in a module that is trained wholly: for PEFT, if its name ends with one of those."""
    names = key.split(".")[:-1]
    prefixes = [".".join(names[: i + 1]) for i in range(len(names))]
    return any(name.endswith(end) for end in settings["modules_to_save"] for name in prefixes)


def whole_paths(module: nnx.Module, settings: Mapping[str, Any]) -> frozenset[Path]:
    """Give the paths of the variables that are trained wholly.

    Raises:
        InputError: if a name matches nothing, or only some layers of a stack.
    """
    found: dict[Path, set[bool]] = {}
    for entry in entries(module):
        found.setdefault(entry.path, set()).add(is_whole(entry.keys[0], settings))
    for end in settings["modules_to_save"]:
        if not any(is_whole(entry.keys[0], {"modules_to_save": [end]}) for entry in entries(module)):
            raise InputError(f"peft.full_training_modules: no module's name ends with '{end}'")
    if parts := [path for path, answers in found.items() if len(answers) > 1]:
        raise InputError(
            f"peft.full_training_modules: {'.'.join(map(str, parts[0]))} is of a stack of layers; all of them or "
            "none can be trained wholly"
        )
    return frozenset(path for path, answers in found.items() if True in answers)
