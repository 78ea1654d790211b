"""What a policy predicts of its actions, and how they become absolute again.

| representation | what is predicted for step k of a chunk                                    |
|----------------|----------------------------------------------------------------------------|
| absolute       | the action                                                                 |
| relative       | the action minus the state at the chunk's observation                      |
| delta          | the action minus that of step k - 1; of the first step, minus the state    |

Relative actions are LeRobot's (`use_relative_actions`, `lerobot.processor.relative_action_processor`) and are
saved as its steps, so that stock LeRobot runs them. It has no deltas and no statistics for each step of a chunk;
these are saved as steps of ours, and stock LeRobot refuses to load what it does not know.

Three differences, on purpose. LeRobot's absolute step reads the state that its partner saw last; here the state is
an entry of the batch, so that both are pure functions, and it is that of the chunk's observation (see `rollout`).
Where LeRobot passes actions through when the state is missing, this is an error. Of several observation steps, the
last one is the state.
"""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, Literal

import numpy as np
from jaxtyping import Array, Float

from lerobot_jax.errors import InputError
from lerobot_jax.features import ACTION, OBS_STATE, PolicyFeature
from lerobot_jax.processors.steps import UNSAVED, Batch, Step

Representation = Literal["absolute", "relative", "delta"]
Floats = Array | np.ndarray


@dataclasses.dataclass(frozen=True)
class ActionTarget:
    """What the policy predicts, and how that is normalized. A checkpoint keeps it in its processors."""

    representation: Representation = "absolute"
    """absolute; relative: minus the state; delta: minus the action before, the first of a chunk minus the state."""
    exclude_joints: tuple[str, ...] = ()
    """Joints that stay absolute: all whose name contains one of these, whatever the case."""
    statistics_per_step: bool = False
    """Normalize each step of a chunk with statistics of its own instead of those of all steps together."""
    action_names: tuple[str, ...] | None = None
    """The name of each action dimension; None: what the dataset says."""

    @property
    def is_transformed(self) -> bool:
        """Whether the statistics in a dataset's stats.json are not those of what the policy predicts."""
        return self.representation != "absolute" or self.statistics_per_step

    def moving(self, width: int) -> np.ndarray:
        """Tell which of `width` action dimensions do not stay absolute, (act,) bool."""
        moving = np.full(width, self.representation != "absolute")
        excluded = [name.lower() for name in self.exclude_joints if name]
        for i, name in enumerate((self.action_names or ())[:width]):
            moving[i] &= not any(part in name.lower() for part in excluded)
        return moving


ABSOLUTE = ActionTarget()


def to_target(
    actions: Float[Floats, "b *chunk act"], state: Float[Floats, "b *t state"], target: ActionTarget
) -> Float[Floats, "b *chunk act"]:
    """Turn absolute actions into what the policy predicts.

    Args:
        actions: a chunk of them, or a single one.
        state: at the observation; its first `act` dimensions are the actions' joints.
        target: what is predicted.

    Raises:
        InputError: when the state is too small, or deltas of a single action are wanted.
    """
    if target.representation == "absolute":
        return actions
    start = _start(actions, state, target)
    if target.representation == "relative":
        return actions - start
    moving = target.moving(actions.shape[-1])[None, None].astype(actions.dtype)
    steps = actions[:, 1:] - actions[:, :-1] * moving
    return actions.__array_namespace__().concat([actions[:, :1] - start, steps], axis=1)


def from_target(
    predicted: Float[Floats, "b *chunk act"], state: Float[Floats, "b *t state"], target: ActionTarget
) -> Float[Floats, "b *chunk act"]:
    """Turn what the policy predicts into absolute actions; undoes `to_target`."""
    if target.representation == "absolute":
        return predicted
    start = _start(predicted, state, target)
    if target.representation == "relative":
        return predicted + start
    xp = predicted.__array_namespace__()
    moving = target.moving(predicted.shape[-1])[None, None]
    return xp.where(moving, xp.cumulative_sum(predicted, axis=1) + start, predicted)


def _start(actions: Any, state: Any, target: ActionTarget) -> Any:
    """Give the state in the moving dimensions and 0 elsewhere, in the actions' type, to broadcast with them."""
    width = actions.shape[-1]
    if target.representation == "delta" and actions.ndim != 3:
        raise InputError(f"delta actions need a whole chunk (b, chunk, {width}), not {actions.shape}")
    if state.ndim == 3:
        state = state[:, -1]
    state = state[:, :width].astype(actions.dtype)
    if state.shape[-1] not in (width, 1):
        raise InputError(
            f"{target.representation} actions need a state with at least the {width} dimensions of '{ACTION}'; "
            f"'{OBS_STATE}' has {state.shape[-1]}"
        )
    start = state * target.moving(width)[None].astype(actions.dtype)  # b act
    return start[:, None] if actions.ndim == 3 else start


@dataclasses.dataclass(frozen=True, eq=False)
class RelativeActions(Step):
    """Subtracts the state from the actions, except in the joints that stay absolute.

    Attributes:
        enabled: whether to do it at all.
        exclude_joints: joints that stay absolute: all whose name contains one of these, whatever the case.
        action_names: the name of each action dimension; None: nothing stays absolute.
    """

    registry_name: ClassVar[str] = "relative_actions_processor"
    representation: ClassVar[Representation] = "relative"
    enabled: bool = False
    exclude_joints: Sequence[str] = ()
    action_names: Sequence[str] | None = None

    @property
    def target(self) -> ActionTarget:
        """What the step makes of actions when it is enabled."""
        names = None if self.action_names is None else tuple(self.action_names)
        return ActionTarget(self.representation, tuple(self.exclude_joints), action_names=names)

    def __call__(self, batch: Batch) -> Batch:
        if not self.enabled or ACTION not in batch:
            return batch
        return batch | {ACTION: to_target(batch[ACTION], _state(batch, self.target), self.target)}


@dataclasses.dataclass(frozen=True, eq=False)
class AbsoluteActions(Step):
    """Adds the state back to relative actions. The batch needs the raw state beside the actions.

    Attributes:
        enabled: whether to do it at all.
        relative: the preprocessor's step that is undone; it knows the dimensions.
    """

    registry_name: ClassVar[str] = "absolute_actions_processor"
    partner: ClassVar[type[RelativeActions]] = RelativeActions
    enabled: bool = False
    relative: RelativeActions | None = dataclasses.field(default=None, metadata=UNSAVED)

    def __call__(self, batch: Batch) -> Batch:
        if not self.enabled or ACTION not in batch:
            return batch
        if self.relative is None or self.relative.registry_name != self.partner.registry_name:
            raise InputError(
                f"'{self.registry_name}' is enabled, but the preprocessor has no "
                f"'{self.partner.registry_name}' step that it could undo"
            )
        target = self.relative.target
        return batch | {ACTION: from_target(batch[ACTION], _state(batch, target), target)}


@dataclasses.dataclass(frozen=True, eq=False)
class DeltaActions(RelativeActions):
    """Subtracts from each action of a chunk the one before it, and the state from the first."""

    registry_name: ClassVar[str] = "lerobot_jax_delta_actions"
    representation: ClassVar[Representation] = "delta"


@dataclasses.dataclass(frozen=True, eq=False)
class SummedActions(AbsoluteActions):
    """Sums the delta actions of a chunk up, beginning with the state."""

    registry_name: ClassVar[str] = "lerobot_jax_summed_actions"
    partner: ClassVar[type[RelativeActions]] = DeltaActions


def make_action_steps(
    target: ActionTarget,
    inputs: Mapping[str, PolicyFeature],
    outputs: Mapping[str, PolicyFeature],
    disabled: RelativeActions | None = None,
) -> tuple[list[Step], list[Step]]:
    """Build the steps before normalizing and after unnormalizing; none for absolute actions, or disabled ones.

    Raises:
        InputError: when the policy's inputs have no state that actions could be relative to.
    """
    if target.representation == "absolute":
        return ([disabled], [AbsoluteActions(False, disabled)]) if disabled else ([], [])
    width = outputs[ACTION].shape[-1]
    if OBS_STATE not in inputs or inputs[OBS_STATE].shape[-1] < width:
        has = f"'{OBS_STATE}' of {inputs[OBS_STATE].shape[-1]}" if OBS_STATE in inputs else sorted(inputs)
        raise InputError(
            f"action_target.representation={target.representation} needs '{OBS_STATE}' of at least {width} "
            f"dimensions among the policy's inputs, which have {has}"
        )
    absolute = SummedActions if target.representation == "delta" else AbsoluteActions
    before = absolute.partner(True, target.exclude_joints, target.action_names)
    return [before], [absolute(True, before)]


def _state(batch: Batch, target: ActionTarget) -> Any:
    if OBS_STATE not in batch:
        raise InputError(
            f"{target.representation} actions need '{OBS_STATE}' in the batch; it has {sorted(batch)}"
        )
    return batch[OBS_STATE]
