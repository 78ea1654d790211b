"""The steps without parameters: renaming, adding a batch axis, moving to a device.

A step is a frozen dataclass of LeRobot's settings. `step(batch)` returns a new batch and works on numpy and JAX
arrays, inside jit too. Mirrors `lerobot.processor.{rename,batch,device}_processor`.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any, ClassVar

import jax.numpy as jnp
import numpy as np

from lerobot_jax.features import ACTION, OBS_ENV_STATE, OBS_IMAGE, OBS_IMAGES, OBS_STATE, TASK

Batch = dict[str, Any]
State = dict[str, np.ndarray]


@dataclasses.dataclass(frozen=True, eq=False)
class Step:
    """One step of a pipeline."""

    registry_name: ClassVar[str]

    def __call__(self, batch: Batch) -> Batch:
        raise NotImplementedError

    def to_config(self) -> dict[str, Any]:
        """Give what LeRobot writes into the pipeline's JSON file."""
        return dataclasses.asdict(self)

    @classmethod
    def from_config(cls, config: Mapping[str, Any], state: State) -> "Step":
        """Build the step from its JSON entry and its state file.

        Raises:
            TypeError: for a setting that the step does not have.
        """
        return cls(**config)

    @property
    def state(self) -> State:
        """The arrays that LeRobot keeps in a safetensors file beside the JSON."""
        return {}


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
    """LeRobot moves tensors here; in JAX they are where they are, so only `float_dtype` has an effect."""

    registry_name: ClassVar[str] = "device_processor"
    device: str | None = "cpu"
    float_dtype: str | None = None

    def __call__(self, batch: Batch) -> Batch:
        if self.float_dtype is None:
            return batch
        dtype = jnp.dtype(self.float_dtype)
        return {key: value.astype(dtype) if _is_floating(value) else value for key, value in batch.items()}


def _is_floating(value: Any) -> bool:
    return hasattr(value, "dtype") and jnp.issubdtype(value.dtype, jnp.floating)
