"""The steps without parameters: renaming, adding a batch axis, moving to a device.

A step is a frozen dataclass of LeRobot's settings. `step(batch)` returns a new batch and works on numpy and JAX
arrays, inside jit too. Mirrors `lerobot.processor.{rename,batch,device}_processor`.
"""

import dataclasses
import typing
from collections.abc import Mapping
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np

from lerobot_jax.errors import InputError
from lerobot_jax.features import ACTION, OBS_ENV_STATE, OBS_IMAGE, OBS_IMAGES, OBS_STATE, TASK
from lerobot_jax.settings import check_settings

Batch = dict[str, Any]
State = dict[str, np.ndarray]

# LeRobot's names of floating-point types.
FLOAT_DTYPES = {
    "float16": "float16",
    "half": "float16",
    "bfloat16": "bfloat16",
    "float32": "float32",
    "float": "float32",
    "float64": "float64",
    "double": "float64",
}


@dataclasses.dataclass(frozen=True, eq=False)
class Step:
    """One step of a pipeline. Its fields are LeRobot's settings, except those marked `metadata=UNSAVED`."""

    registry_name: ClassVar[str]

    def __call__(self, batch: Batch) -> Batch:
        raise NotImplementedError

    def to_config(self) -> dict[str, Any]:
        """Give what LeRobot writes into the pipeline's JSON file."""
        return {name: getattr(self, name) for name in setting_types(type(self))}

    @classmethod
    def from_config(cls, config: Mapping[str, Any], state: State) -> "Step":
        """Build the step from its JSON entry and its state file.

        Raises:
            InputError: for a setting that the step does not have, or of the wrong type.
        """
        check_settings(config, setting_types(cls))
        if state:
            raise InputError("it has a state file, but a step of this kind has no state")
        return cls(**config)

    @property
    def state(self) -> State:
        """The arrays that LeRobot keeps in a safetensors file beside the JSON."""
        return {}


UNSAVED = {"saved": False}


def setting_types(step: type[Step]) -> dict[str, Any]:
    """Give the type of each setting of a step that is saved."""
    hints = typing.get_type_hints(step)
    return {f.name: hints[f.name] for f in dataclasses.fields(step) if f.metadata.get("saved", True)}


@dataclasses.dataclass(frozen=True, eq=False)
class RenameObservations(Step):
    """Renames observation keys."""

    registry_name: ClassVar[str] = "rename_observations_processor"
    rename_map: Mapping[str, str] = dataclasses.field(default_factory=dict)

    def __call__(self, batch: Batch) -> Batch:
        return {self.rename_map.get(key, key): value for key, value in batch.items()}


@dataclasses.dataclass(frozen=True, eq=False)
class AddBatchDimension(Step):
    """Gives a single observation (or action, or task) a batch axis of 1; batches pass unchanged."""

    registry_name: ClassVar[str] = "to_batch_processor"

    def __call__(self, batch: Batch) -> Batch:
        return {key: self._batched(key, value) for key, value in batch.items()}

    def _batched(self, key: str, value: Any) -> Any:
        if key == TASK:
            return [value] if isinstance(value, str) else value
        unbatched_ndim = {OBS_STATE: 1, OBS_ENV_STATE: 1, ACTION: 1, "index": 0, "task_index": 0}.get(key)
        if key == OBS_IMAGE or key.startswith(OBS_IMAGES + "."):
            unbatched_ndim = 3
        return value[None] if unbatched_ndim is not None and np.ndim(value) == unbatched_ndim else value


@dataclasses.dataclass(frozen=True, eq=False)
class Device(Step):
    """LeRobot moves tensors here; in JAX they are where they are, so only `float_dtype` has an effect.

    One difference, on purpose: JAX has no float64 unless it is switched on, so "float64" and "double" give float32.
    """

    registry_name: ClassVar[str] = "device_processor"
    device: str | None = "cpu"
    float_dtype: str | None = None

    def __post_init__(self):
        if self.float_dtype is not None and self.float_dtype not in FLOAT_DTYPES:
            raise InputError(
                f"float_dtype must be one of {', '.join(FLOAT_DTYPES)}, not '{self.float_dtype}'"
            )

    def __call__(self, batch: Batch) -> Batch:
        if self.float_dtype is None:
            return batch
        dtype = jax.dtypes.canonicalize_dtype(jnp.dtype(FLOAT_DTYPES[self.float_dtype]))
        return {key: value.astype(dtype) if _is_floating(value) else value for key, value in batch.items()}


def _is_floating(value: Any) -> bool:
    return hasattr(value, "dtype") and jnp.issubdtype(value.dtype, jnp.floating)
