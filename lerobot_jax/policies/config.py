"""`PolicyConfig`: the settings that every policy has, and LeRobot's config.json.

Mirrors `lerobot.configs.policies.PreTrainedConfig`: the same fields under the same names.
"""

import abc
import dataclasses
import re
import typing
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any, ClassVar, NamedTuple

import jax.numpy as jnp
from absl import logging

from lerobot_jax.errors import InputError
from lerobot_jax.features import (
    ACTION,
    EMPTY_CAMERA,
    OBS_STATE,
    FeatureType,
    NormalizationMode,
    PolicyFeature,
)
from lerobot_jax.files import read_json, write_json
from lerobot_jax.nn.execution import TensorAxis
from lerobot_jax.processors.actions import ABSOLUTE, ActionTarget, RelativeActions
from lerobot_jax.processors.text import TextStep
from lerobot_jax.settings import check_settings

CONFIG_NAME = "config.json"


class ParamGroup(NamedTuple):
    """Parameters that are optimized in their own way; `None` means as the optimizer says."""

    pattern: str  # a regular expression, matched at the start of dotted parameter names
    lr: float | None = None
    weight_decay: float | None = None
    layer: int | None = None  # of a stack, only this one; negative: counted from the last


@dataclasses.dataclass(frozen=True)
class PolicyConfig(abc.ABC):
    """Settings of a policy. Sub-classes add LeRobot's fields of that policy and check them."""

    type: ClassVar[str]

    n_obs_steps: int = 1
    """How many observation steps the policy sees: the current one and those before."""
    input_features: dict[str, PolicyFeature] = dataclasses.field(default_factory=dict, hash=False)
    """The observations the policy takes; empty: all that the dataset has."""
    output_features: dict[str, PolicyFeature] = dataclasses.field(default_factory=dict, hash=False)
    """What the policy gives; empty: the dataset's action."""
    normalization_mapping: dict[str, NormalizationMode] = dataclasses.field(default_factory=dict, hash=False)
    """Feature type -> how it is normalized; a type that is not listed is left as it is."""
    action_target: ActionTarget = dataclasses.field(default=ABSOLUTE, metadata={"in_lerobot": False})
    """What the policy predicts; a checkpoint has it in its processors, not in config.json."""
    device: str | None = None
    """Where stock LeRobot puts the policy: cuda, cpu or mps. None: cuda if trained on a GPU, else cpu."""
    use_amp: bool = False
    """Compute in bfloat16; parameters, losses and softmax stay float32."""
    use_peft: bool = False
    """Whether the weights are PEFT adapters on those of another policy."""
    push_to_hub: bool = False
    """Upload the last checkpoint to repo_id on the Hub after training; stock LeRobot does so by default."""
    repo_id: str | None = None
    """Name of the policy on the Hub, USER/NAME."""
    private: bool | None = None
    """Whether a new repository there is private; None: as the account's settings say."""
    tags: tuple[str, ...] | None = None
    """More tags for its page on the Hub."""
    license: str | None = None
    """Its license, for its page on the Hub, e.g. apache-2.0; None: none is stated."""
    pretrained_path: str | None = None
    """Start from this policy: a folder, or a name on the Hub."""
    pretrained_revision: str | None = None
    """Branch, tag or commit of `pretrained_path` on the Hub."""

    def __post_init__(self):
        if self.n_obs_steps < 1:
            raise ValueError(f"n_obs_steps must be at least 1, not {self.n_obs_steps}")

    # What a policy tells the data pipeline: offsets in frames, or None for the current frame without a time axis.
    @property
    @abc.abstractmethod
    def observation_delta_indices(self) -> list[int] | None: ...

    @property
    @abc.abstractmethod
    def action_delta_indices(self) -> list[int] | None: ...

    @property
    def sampled_delta_indices(self) -> list[int] | None:
        """Which actions `sample_actions` gives, as offsets in frames: by default, all that it is trained on."""
        return self.action_delta_indices

    @property
    def reward_delta_indices(self) -> list[int] | None:
        return None

    @property
    def denoising_steps(self) -> tuple[str, int] | None:
        """The setting that says in how many steps noise becomes actions, and its value; None: there is none."""
        return None

    @property
    def drop_n_last_frames(self) -> int | None:
        """How many frames at the end of an episode are not trained on; None: as many as suit the policy."""
        return 0

    @property
    def num_dropped_frames(self) -> int:
        """How many that is."""
        return self.drop_n_last_frames or 0

    @property
    def text_steps(self) -> tuple[TextStep, ...]:
        """How a new policy's preprocessor turns the task into tokens."""
        return ()

    @property
    def disabled_relative_step(self) -> RelativeActions | None:
        """What the processors of absolute actions have in the place of the step that makes actions relative."""
        return None

    @property
    def resizes_images(self) -> bool:
        """Whether the policy itself makes images of any height and width as it needs them."""
        return False

    @property
    def pads_vectors(self) -> bool:
        """Whether states and actions of any width up to a maximum suit the same weights."""
        return False

    @property
    def optional_cameras(self) -> bool:
        """Whether the policy does without cameras that a batch does not have, as long as it has one."""
        return False

    @property
    def added_inputs(self) -> Mapping[str, PolicyFeature]:
        """The inputs of a new policy besides those that a dataset has: cameras that are never there."""
        return {}

    @property
    def param_groups(self) -> tuple[ParamGroup, ...]:
        """Parameters with their own learning rate or weight decay; the first match counts."""
        return ()

    @property
    def param_phases(self) -> tuple[str, ...]:
        """Patterns of the parameters that each phase of training has to itself; the first match counts.

        Those of other phases have gradients of 0 then, and the optimizer leaves them alone, their decay and its
        step count included, as PyTorch's does with parameters that have no gradient. Empty: there is one phase.
        """
        return ()

    @property
    def frozen_params(self) -> tuple[str, ...]:
        """Patterns of parameters that are never trained, as in `freeze`, but they may match nothing."""
        return ()

    @property
    def layer_order(self) -> tuple[str, ...]:
        """Patterns of all parameters' names from the input to the output, for `optimizer.layer_decay`.

        They are matched at the start of dotted names; the first match counts. What one pattern matches is one
        layer; with a group that matches a number, one layer for each number, in order. The layers of a `Stack` are
        counted by themselves. Parts that are side by side share a pattern. Empty: the policy does not say.
        """
        return ()

    @property
    def default_peft_targets(self) -> Mapping[str, Any] | None:
        """What LeRobot adapts if nothing else is said: `target_modules`, `modules_to_save`; None: no default."""
        return None

    @property
    def peft_presets(self) -> Mapping[str, str]:
        """Short names for `peft.target_modules` -> regular expressions on dotted names."""
        return {}

    @property
    def tensor_axes(self) -> tuple[TensorAxis, ...]:
        """The axes of weights that tensor parallelism splits (`mesh.tensor`); the first match counts."""
        return ()

    @property
    @abc.abstractmethod
    def optimizer_preset(self) -> Mapping[str, Any]:
        """LeRobot's optimizer for this policy, as fields of `OptimizerConfig`."""

    @property
    def scheduler_preset(self) -> Mapping[str, Any] | None:
        """LeRobot's learning-rate schedule for this policy, as fields of `SchedulerConfig`."""
        return None

    @classmethod
    @abc.abstractmethod
    def tiny(cls) -> "PolicyConfig":
        """Give a very small configuration with features, for tests."""

    @abc.abstractmethod
    def check_features(self) -> None:
        """Raise `InputError` unless the features suit the policy; called when they are known."""

    @property
    def compute_dtype(self) -> jnp.dtype:
        """The type of activations."""
        return jnp.dtype(jnp.bfloat16 if self.use_amp else jnp.float32)

    @property
    def robot_state_feature(self) -> PolicyFeature | None:
        feature = self.input_features.get(OBS_STATE)
        return feature if feature is not None and feature.type == FeatureType.STATE else None

    @property
    def env_state_feature(self) -> PolicyFeature | None:
        return next((f for f in self.input_features.values() if f.type == FeatureType.ENV), None)

    @property
    def image_features(self) -> dict[str, PolicyFeature]:
        return {key: f for key, f in self.input_features.items() if f.type == FeatureType.VISUAL}

    def needed_inputs(self, given: Collection[str]) -> list[str]:
        """List the inputs that are needed where some are given; cameras may be optional, but not all of them."""
        cameras = self.image_features
        if not self.optional_cameras or not any(key in given for key in cameras):
            return list(self.input_features)
        return [key for key in self.input_features if key in given or key not in cameras]

    def log_missing_cameras(self, where: str, given: Collection[str]) -> None:
        """Say which cameras are not among the given inputs, except those that never are."""
        missing = [
            key for key in self.image_features if key not in given and not key.startswith(EMPTY_CAMERA)
        ]
        if missing:
            logging.warning("%s lacks %s, which will be masked", where, ", ".join(missing))

    @property
    def action_feature(self) -> PolicyFeature:
        if ACTION not in self.output_features:
            raise InputError("output_features: the policy needs an 'action'")
        return self.output_features[ACTION]

    def exported(self) -> "PolicyConfig":
        """Give the settings as stock LeRobot can read them: without what only makes sense here."""
        return self

    def to_dict(self) -> dict[str, Any]:
        """Give the content of LeRobot's config.json: all fields that LeRobot has."""
        return {"type": self.type} | _to_json(self)

    def own_settings(self) -> dict[str, Any]:
        """Give the fields that LeRobot does not have, or not all of, for train_config.json."""
        data: dict[str, Any] = dataclasses.asdict(self)
        return {f.name: data[f.name] for f in dataclasses.fields(self) if not self._is_lerobots(f)}

    def _is_lerobots(self, field: dataclasses.Field) -> bool:
        """Tell whether LeRobot has a field, and all that is in it."""
        value = getattr(self, field.name)
        parts = dataclasses.fields(value) if dataclasses.is_dataclass(value) else ()
        return all(map(_is_in_lerobot, (field, *parts)))

    @classmethod
    def from_dict(cls, data: Mapping[str, Any], where: str = CONFIG_NAME) -> "PolicyConfig":
        """Build a config from the content of config.json.

        Raises:
            InputError: naming a field that this policy does not have, or a value that cannot be.
        """
        hints = typing.get_type_hints(cls)
        types = {field.name: hints[field.name] for field in dataclasses.fields(cls)}
        try:
            values = {
                name: _from_json(name, value, types.get(name))
                for name, value in data.items()
                if name != "type"
            }
            check_settings(values, types)
            return cls(**values)
        except ValueError as error:
            raise InputError(f"{where}, a policy of type {cls.type}: {error}") from None

    def save(self, folder: Path) -> None:
        write_json(self.to_dict(), folder / CONFIG_NAME)


def read_config(folder: Path) -> dict[str, Any]:
    """Read a policy folder's config.json."""
    path = folder / CONFIG_NAME
    data = read_json(path)
    if not isinstance(data, dict) or not isinstance(data.get("type"), str):
        raise InputError(f"{path}: must be an object with a text 'type', such as \"act\"")
    return data


def group_of(
    name: str, groups: tuple[ParamGroup, ...], layer: int | None = None, num_layers: int = 0
) -> ParamGroup:
    """Give the first group that a parameter belongs to.

    Args:
        name: its dotted name.
        groups: the policy's.
        layer: of a parameter of a stack, which layer is meant.
        num_layers: of how many.
    """

    def has_layer(group: ParamGroup) -> bool:
        return group.layer is None or (layer is not None and group.layer % num_layers == layer)

    found = (group for group in groups if re.match(group.pattern, name) and has_layer(group))
    return next(found, ParamGroup(""))


def _is_in_lerobot(field: dataclasses.Field) -> bool:
    return field.metadata.get("in_lerobot", True)


def _to_json(value: Any) -> Any:
    if isinstance(value, PolicyFeature):
        return value.to_dict()
    if dataclasses.is_dataclass(value):
        return {
            f.name: _to_json(getattr(value, f.name)) for f in dataclasses.fields(value) if _is_in_lerobot(f)
        }
    if isinstance(value, Mapping):
        return {key: _to_json(item) for key, item in value.items()}
    if isinstance(value, tuple):
        return [_to_json(item) for item in value]
    return value


def _from_json(name: str, value: Any, wanted: Any = None) -> Any:
    """Undo `_to_json` for a setting whose type is wanted."""
    kinds = {"input_features": PolicyFeature.from_dict, "output_features": PolicyFeature.from_dict}
    kind = {**kinds, "normalization_mapping": NormalizationMode}.get(name)
    if kind is not None:
        try:
            return {key: kind(item) for key, item in (value or {}).items()}
        except (AttributeError, KeyError, TypeError, ValueError) as error:
            raise ValueError(f"{name} is {value!r}: {error}") from None
    if isinstance(value, list):
        return tuple(_from_json("", item) for item in value)
    part = next((each for each in (wanted, *typing.get_args(wanted)) if dataclasses.is_dataclass(each)), None)
    if part is not None and isinstance(value, Mapping):
        hints = typing.get_type_hints(part)
        values = {key: _from_json("", item, hints.get(key)) for key, item in value.items()}
        try:
            check_settings(values, hints)
        except InputError as error:
            raise InputError(f"{name}: {error}") from None
        return typing.cast(type, part)(**values)
    return value
