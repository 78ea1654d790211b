"""Actions relative to the robot's state, and back. Mirrors `lerobot.processor.relative_action_processor`.

Two differences, on purpose. LeRobot's absolute step reads the state that its partner saw last; here the state is an
entry of the batch, so that both are pure functions. And where LeRobot passes actions through when the state is
missing, this is an error.
"""

import dataclasses
from collections.abc import Sequence
from typing import Any, ClassVar

import numpy as np
from jaxtyping import Array, Float

from lerobot_jax.errors import InputError
from lerobot_jax.features import ACTION, OBS_STATE
from lerobot_jax.processors.steps import UNSAVED, Batch, Step


@dataclasses.dataclass(frozen=True, eq=False)
class RelativeActions(Step):
    """Subtracts the state from the actions, except in the joints that stay absolute.

    Attributes:
        enabled: whether to do it at all.
        exclude_joints: joints that stay absolute: all whose name contains one of these, whatever the case.
        action_names: the name of each action dimension; None: nothing stays absolute.
    """

    registry_name: ClassVar[str] = "relative_actions_processor"
    enabled: bool = False
    exclude_joints: Sequence[str] = ()
    action_names: Sequence[str] | None = None

    def __call__(self, batch: Batch) -> Batch:
        if not self.enabled or ACTION not in batch:
            return batch
        action = batch[ACTION]
        return batch | {ACTION: action - self.offset(batch, action)}

    def offset(self, batch: Batch, action: Any) -> Float[Array | np.ndarray, "..."]:
        """Give what is subtracted: the state in the relative dimensions, 0 elsewhere.

        Args:
            batch: has the state as `b state`; its first `act` dimensions are the actions' joints.
            action: `b act` or `b chunk act`.
        """
        if OBS_STATE not in batch:
            raise InputError(f"relative actions need '{OBS_STATE}' in the batch; it has {sorted(batch)}")
        width = action.shape[-1]
        state = batch[OBS_STATE][..., :width].astype(action.dtype)
        if state.shape[-1] not in (width, 1):
            raise InputError(
                f"relative actions need a state with at least the {width} dimensions of '{ACTION}'; "
                f"'{OBS_STATE}' has {state.shape[-1]}"
            )
        relative = self._relative_dimensions(width).reshape((1,) * (state.ndim - 1) + (width,))
        offset = state * relative.astype(action.dtype)  # b act
        return offset[..., None, :] if action.ndim == 3 else offset

    def _relative_dimensions(self, width: int) -> np.ndarray:
        relative = np.ones(width, bool)
        excluded = [name.lower() for name in self.exclude_joints if name]
        for i, name in enumerate((self.action_names or ())[:width]):
            relative[i] = not any(part in name.lower() for part in excluded)
        return relative


@dataclasses.dataclass(frozen=True, eq=False)
class AbsoluteActions(Step):
    """Adds the state back to relative actions. The batch needs the raw state beside the actions.

    Attributes:
        enabled: whether to do it at all.
        relative: the preprocessor's step that is undone; it knows the dimensions.
    """

    registry_name: ClassVar[str] = "absolute_actions_processor"
    enabled: bool = False
    relative: RelativeActions | None = dataclasses.field(default=None, metadata=UNSAVED)

    def __call__(self, batch: Batch) -> Batch:
        if not self.enabled or ACTION not in batch:
            return batch
        if self.relative is None:
            raise InputError(
                f"'{self.registry_name}' is enabled, but the preprocessor has no "
                f"'{RelativeActions.registry_name}' step that it could undo"
            )
        action = batch[ACTION]
        return batch | {ACTION: action + self.relative.offset(batch, action)}
