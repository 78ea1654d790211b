"""From a policy that predicts chunks to one action a step: history, queue, temporal ensembling, real-time chunking.

Host-side objects beside the policies. Mirrors `lerobot.policies.act.modeling_act` (`select_action`,
`ACTTemporalEnsembler`), with one difference, on purpose: a whole chunk becomes actions in the environment's units,
with the state of the observation that it was predicted from, before its actions are queued or averaged. LeRobot's
`select_action` queues what the policy predicts, and the postprocessor adds the state at the time of execution, so
relative actions drift from the second of a chunk on (in `lerobot-eval`, unless n_action_steps is 1); therefore
`lerobot-rollout` refuses them unless it runs whole chunks (`--inference.type=rtc`, of policies that can).

A simulation can also be told how many steps a prediction takes (`inference_delay`); this mirrors
`lerobot.rollout.inference.rtc` in simulated time. The policy's `rtc_config` says whether a new chunk is predicted
along the old one (real-time chunking, also without a delay) or on its own. Differences, on purpose: the policy is
told the delay that it will have, not the greatest so far; what is left of the old chunk is padded to a whole one,
and the horizon ends with it, where LeRobot pulls towards zeros behind its end; the first chunk is waited for, where
LeRobot leaves the actions of the delay out there too; and a chunk is asked for by `n_action_steps`, where LeRobot
has a threshold for the actions that are left.
"""

import math
import time
from collections import deque
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import jax
import numpy as np
from jaxtyping import Float

from lerobot_jax.certificate import make_observations
from lerobot_jax.compilation import compiling
from lerobot_jax.errors import InputError
from lerobot_jax.features import ACTION, TASK, FeatureType
from lerobot_jax.nn.weights import as_computed, cast_types
from lerobot_jax.processors.text import tasks_of
from lerobot_jax.rtc_queue import DelayedQueue, LatencyTracker, check_delay

if TYPE_CHECKING:
    from lerobot_jax.policies.base import FunctionalPolicy

_LEFT = "prev_chunk_left_over"


class ActionQueue:
    """Executes the first `n_action_steps` actions of a chunk, then asks for the next chunk."""

    def __init__(self, n_action_steps: int):
        self._n_action_steps = n_action_steps
        self._queue: deque[np.ndarray] = deque()

    def needs_chunk(self) -> bool:
        return not self._queue

    def add(self, chunk: Float[np.ndarray, "chunk act"]) -> None:
        self._queue.extend(chunk[: self._n_action_steps])

    def next_action(self) -> Float[np.ndarray, " act"]:
        return self._queue.popleft()


class TemporalEnsembler:
    """Averages what successive chunks predict for the same step, with weights exp(-coeff * i), i = 0 the oldest.

    ACT, algorithm 2; computed online in float32, in the order of LeRobot's `ACTTemporalEnsembler`.
    """

    def __init__(self, coeff: float, chunk_size: int):
        self._weights = np.exp(-np.float32(coeff) * np.arange(chunk_size, dtype=np.float32))
        self._sums = np.cumsum(self._weights)
        self._actions = np.zeros((0, 0), np.float32)  # the running averages of the coming steps
        self._counts = np.zeros((0, 1), np.int64)  # how many chunks went into each

    def needs_chunk(self) -> bool:
        return True

    def add(self, chunk: Float[np.ndarray, "chunk act"]) -> None:
        if len(self._counts) == 0:
            self._actions, self._counts = chunk.copy(), np.ones((len(chunk), 1), np.int64)
            return
        count = self._counts
        averages = self._actions * self._sums[count - 1] + chunk[:-1] * self._weights[count]
        averages = averages / self._sums[count]
        self._actions = np.concatenate([averages, chunk[-1:]])
        self._counts = np.concatenate([np.minimum(count + 1, len(chunk)), np.ones((1, 1), np.int64)])

    def next_action(self) -> Float[np.ndarray, " act"]:
        action = self._actions[0]
        self._actions, self._counts = self._actions[1:], self._counts[1:]
        return action


class Runner:
    """Turns observations into actions for `batch_size` independent episodes, each in its own slot.

    Every episode is computed by itself, by the same compiled function whatever the batch size, and its noise
    depends on the seed, the episode and the step only. So an episode does not depend on its neighbours, and an
    evaluation computes exactly what a robot will run.

    Attributes:
        latency: how long chunks took, from the observation to the actions; a share each of those computed together.
    """

    def __init__(
        self, policy: "FunctionalPolicy", batch_size: int = 1, seed: int = 0, inference_delay: int = 0
    ):
        check_delay(policy.config, inference_delay)
        self.policy = policy
        self.inference_delay = inference_delay
        rtc = getattr(policy.config, "rtc_config", None)
        self._rtc = rtc if rtc is not None and rtc.enabled else None
        self.load(policy.params, policy.buffers, seed)
        self._predict = jax.jit(self._predict_chunk if self._rtc is None else self._predict_along)
        self._execution = [self._new_execution() for _ in range(batch_size)]
        self._history = [self._new_history() for _ in range(batch_size)]
        self._episode = list(range(batch_size))
        self._step = [0] * batch_size
        self._has_begun = False
        self.latency = LatencyTracker()

    def load(self, params: dict[str, Any], buffers: dict[str, Any], seed: int) -> None:
        """Run with other weights, and noise of this seed, from now on."""
        params, buffers = jax.tree.map(jax.numpy.asarray, (params, buffers))
        self._arrays = as_computed(params, cast_types(self.policy.module)), buffers
        self._seed_key = jax.random.key(seed)

    def compile(self) -> None:
        """Compile what predicts a chunk, so that the first action does not wait for it.

        That is for images of the size in the settings, from all cameras; with the first others, that are possible
        with some policies, the first action waits again.
        """
        made = self.policy.tokenize(make_observations(self.policy))
        observation = {key: np.asarray(value[:1]) for key, value in made.items()}
        with compiling("the policy"):
            jax.block_until_ready(
                self._predict(
                    *self._arrays, observation, self._seed_key, 0, 0, *self._old(self._new_execution())
                )
            )

    def reset(self, slot: int | None = None, episode: int | None = None) -> None:
        """Forget the past of one slot (None: of all) because an episode begins; its number seeds the noise."""
        for i in range(len(self._execution)) if slot is None else [slot]:
            self._execution[i] = self._new_execution()
            self._history[i] = self._new_history()
            self._episode[i] = i if episode is None else episode
            self._step[i] = 0

    def select_action(
        self, observation: Mapping[str, Any], slots: Sequence[int] | None = None
    ) -> Float[np.ndarray, "b act"]:
        """Give the next action of each slot, in the environment's units.

        Args:
            observation: raw observations with a leading axis, one row a slot; images uint8 channel-last; `task`, a
                list of texts, for a policy that is told what to do.
            slots: the slots that want an action, by default all; row i belongs to slot i in any case, and the
                rows of other slots come back as zeros.

        Raises:
            InputError: when an input of the policy is missing or has another shape.
        """
        inputs, tasks = self._inputs(observation), self._tasks(observation)
        wanted = range(len(self._execution)) if slots is None else slots
        chunks, started = {}, time.monotonic()
        for i in wanted:
            # Copies: environments and cameras may write the next observation into the same arrays.
            self._history[i].append({key: value[i : i + 1].copy() for key, value in inputs.items()})
            if self._execution[i].needs_chunk():
                told = {TASK: tasks[i : i + 1]} if tasks else {}
                seen, old = self.policy.tokenize(self._seen(i) | told), self._old(self._execution[i])
                chunk = self._predict(
                    *self._arrays, seen, self._seed_key, self._episode[i], self._step[i], *old
                )
                chunks[i] = (chunk,) if self._rtc is None else chunk
        for i, chunk in chunks.items():  # after all have been started
            self._execution[i].add(*(np.asarray(actions)[0] for actions in chunk))
        if chunks:
            self.latency.add((time.monotonic() - started) / len(chunks))
        result = np.zeros((len(self._execution), *self.policy.config.action_feature.shape), np.float32)
        for i in wanted:
            result[i] = self._execution[i].next_action()
            self._step[i] += 1
        return result

    def _predict_chunk(self, params, buffers, observation, seed_key, episode, step):
        key = jax.random.fold_in(jax.random.fold_in(seed_key, episode), step)
        chunk = self.policy.sample_actions(params, buffers, self.policy.preprocess(observation), key)
        return self.policy.postprocess(chunk, observation)

    def _predict_along(self, params, buffers, observation, seed_key, episode, step, old):
        """Predict a chunk along what is left of the old one; give it in the robot's units, and as predicted."""
        key = jax.random.fold_in(jax.random.fold_in(seed_key, episode), step)
        if self._is_reanchored:
            old = old | {_LEFT: self.policy.preprocess({**observation, ACTION: old[_LEFT]})[ACTION]}
        inputs = self.policy.preprocess(observation)
        chunk = self.policy.sample_actions(params, buffers, inputs, key, **old)
        return self.policy.postprocess(chunk, observation), chunk

    @property
    def _is_reanchored(self) -> bool:
        """Whether the same action is another number for the policy when it is seen from a later step."""
        return self.policy.preprocessor.action_target.is_transformed

    def _old(self, execution: Any) -> tuple[dict[str, Any], ...]:
        """Give what a policy with real-time chunking is told of the old chunk, padded, since shapes are static."""
        if self._rtc is None:
            return ()
        config = self.policy.config
        padded = np.zeros((len(config.sampled_delta_indices or []), *config.action_feature.shape), np.float32)
        left = execution.left_over(processed=self._is_reanchored)
        steps = 0 if left is None else len(left)
        padded[:steps] = left
        horizon = min(self._rtc.execution_horizon, steps)  # 0 before the first chunk: no guidance
        return ({_LEFT: padded[None], "inference_delay": self.inference_delay, "execution_horizon": horizon},)

    def _seen(self, slot: int) -> dict[str, np.ndarray]:
        """Give what the policy sees of an episode: the last steps, with a time axis if the policy wants one.

        Before the first step, everything was as it was then.
        """
        history, config = list(self._history[slot]), self.policy.config
        if config.observation_delta_indices is None:
            return history[-1]
        steps = history[:1] * (config.n_obs_steps - len(history)) + history
        return {key: np.stack([step[key] for step in steps], axis=1) for key in history[-1]}

    def _outside(self, name: str) -> str:
        """Give an input's name among the raw observations."""
        renamed = self.policy.preprocessor.rename_map
        return next((old for old, new in renamed.items() if new == name), name)

    def _new_history(self) -> deque[dict[str, np.ndarray]]:
        return deque(maxlen=self.policy.config.n_obs_steps)

    def _new_execution(self) -> ActionQueue | TemporalEnsembler | DelayedQueue:
        config: Any = self.policy.config
        if self.inference_delay or self._rtc is not None:
            return DelayedQueue(config.n_action_steps, self.inference_delay)
        if getattr(config, "temporal_ensemble_coeff", None) is not None:
            return TemporalEnsembler(config.temporal_ensemble_coeff, config.chunk_size)
        return ActionQueue(config.n_action_steps)

    def _inputs(self, observation: Mapping[str, Any]) -> dict[str, np.ndarray]:
        config, inputs = self.policy.config, {}
        renamed = self.policy.preprocessor.rename_map
        needed = config.needed_inputs({renamed.get(key, key) for key in observation})
        for name in needed:
            key, feature = self._outside(name), config.input_features[name]
            if key not in observation:
                raise InputError(f"the policy needs '{key}', the observation has {sorted(observation)}")
            value = np.asarray(observation[key], None if feature.type == FeatureType.VISUAL else np.float32)
            fits = value.size == len(value) * math.prod(feature.shape)
            if feature.type == FeatureType.VISUAL and self.policy.resizes_images:
                fits = value.ndim == 4  # of any height and width
            if len(value) != len(self._execution) or not fits:
                wanted = (len(self._execution), *feature.shape)
                raise InputError(f"the policy needs '{key}' of shape {wanted}, it has {value.shape}")
            inputs[key] = value
        if not self._has_begun:
            config.log_missing_cameras("the observation", needed)
            self._has_begun = True
        return inputs

    def _tasks(self, observation: Mapping[str, Any]) -> list[str]:
        """Give what each slot is told to do, if the policy wants to be told."""
        if not self.policy.preprocessor.has_text:
            return []
        tasks = tasks_of(dict(observation), TASK)
        if len(tasks) != len(self._execution):
            raise InputError(
                f"the policy needs {len(self._execution)} texts in '{TASK}', one a slot: {tasks}"
            )
        return tasks
