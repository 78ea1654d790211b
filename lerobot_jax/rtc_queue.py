"""Chunks that arrive while others are executed: the queue between what predicts and what acts, and its latency.

Mirrors `lerobot.policies.rtc.action_queue` and `lerobot.policies.rtc.latency_tracker`, with NumPy arrays.
"""

import threading
from collections import deque

import numpy as np
from jaxtyping import Float

from lerobot_jax.errors import InputError
from lerobot_jax.policies.config import PolicyConfig

Actions = Float[np.ndarray, "steps act"]


class RTCQueue:
    """Holds actions twice: as the policy gave them (original) and as the robot takes them (processed).

    A new chunk takes the place of the old one. One thread may take actions while another merges chunks. LeRobot's
    `ActionQueue` with RTC enabled.
    """

    def __init__(self):
        self._lock = threading.Lock()
        self.clear()

    def clear(self) -> None:
        """Forget all chunks."""
        with self._lock:
            self._original: Actions | None = None
            self._processed: Actions | None = None
            self._index = 0  # of the next action

    def get(self) -> Float[np.ndarray, " act"] | None:
        """Take the next processed action; None: there is none."""
        with self._lock:
            if self._processed is None or self._index >= len(self._processed):
                return None
            self._index += 1
            return self._processed[self._index - 1].copy()

    def qsize(self) -> int:
        """Count the actions that are left."""
        with self._lock:
            return 0 if self._processed is None else len(self._processed) - self._index

    def empty(self) -> bool:
        return self.qsize() == 0

    def get_left_over(self) -> Actions | None:
        """Give the original actions that are left: `prev_chunk_left_over`; None before the first chunk."""
        with self._lock:
            return None if self._original is None else self._original[self._index :].copy()

    def get_processed_left_over(self) -> Actions | None:
        """Give the processed actions that are left; None before the first chunk."""
        with self._lock:
            return None if self._processed is None else self._processed[self._index :].copy()

    def merge(self, original_actions: Actions, processed_actions: Actions, real_delay: int) -> None:
        """Take a new chunk in.

        Args:
            original_actions: as the policy gave them.
            processed_actions: as the robot takes them.
            real_delay: the steps that passed while they were predicted; so many actions are left out, at most all.
        """
        with self._lock:
            delay = max(0, min(real_delay, len(original_actions), len(processed_actions)))
            self._original, self._processed = (
                original_actions[delay:].copy(),
                processed_actions[delay:].copy(),
            )
            self._index = 0


class DelayedQueue:
    """Executes the old chunk while the new one is predicted, and then the new one from where it is.

    A chunk is asked for when `n_action_steps` actions were executed since the last was, or, where a chunk is too
    short for that, when as many are left as the delay takes. So of each chunk, the actions between the delay and
    the next chunk's arrival are executed; without a delay, the first `n_action_steps`. Chunks are predicted one
    after another, and the first one is waited for.
    """

    def __init__(self, n_action_steps: int, delay: int):
        self._n_action_steps, self._delay = n_action_steps, delay
        self._queue = RTCQueue()
        self._threshold = 0
        self._coming: tuple[Actions, Actions] | None = None
        self._steps_left = 0  # before it comes

    def needs_chunk(self) -> bool:
        return self._coming is None and self._queue.qsize() <= self._threshold

    def add(self, chunk: Actions, original: Actions | None = None) -> None:
        """Take what is predicted now and comes later; `original` is what the policy gave, if that will be asked."""
        original = chunk if original is None else original
        self._threshold = max(len(chunk) - self._n_action_steps, self._delay)
        if self._queue.empty() or self._delay == 0:
            self._queue.merge(original, chunk, 0)
        else:
            self._coming, self._steps_left = (original, chunk), self._delay

    def next_action(self) -> Float[np.ndarray, " act"]:
        action = self._queue.get()
        assert action is not None
        if self._coming is not None:
            self._steps_left -= 1
            if self._steps_left == 0:
                self._queue.merge(*self._coming, self._delay)
                self._coming = None
        return action

    def left_over(self, *, processed: bool) -> Actions | None:
        """Give what is left of the chunk, in the robot's units or as the policy gave it; None: there was none."""
        return self._queue.get_processed_left_over() if processed else self._queue.get_left_over()


def check_delay(config: PolicyConfig, inference_delay: int) -> None:
    """Raise `InputError` unless a policy can act while it predicts for so many steps."""
    if inference_delay == 0:
        return
    if getattr(config, "temporal_ensemble_coeff", None) is not None:
        raise InputError(
            f"inference_delay={inference_delay}: temporal ensembling predicts a chunk at every step and waits for "
            "it; set policy.temporal_ensemble_coeff=None, or inference_delay=0"
        )
    chunk = len(config.sampled_delta_indices or [0])
    if chunk < 2 * inference_delay:
        raise InputError(
            f"inference_delay={inference_delay} is more than half of the {chunk} actions that the policy predicts "
            f"at once: the first {inference_delay} come too late, and as many must be left for the next delay; at "
            f"most {chunk // 2} is possible"
        )


class LatencyTracker:
    """Remembers the last latencies, in seconds, and the greatest of all."""

    def __init__(self, maxlen: int | None = 100):
        self._values: deque[float] = deque(maxlen=maxlen)
        self.reset()

    def reset(self) -> None:
        """Forget all latencies."""
        self._values.clear()
        self.max_latency = 0.0

    def add(self, latency: float) -> None:
        """Remember one; negative ones are not."""
        if latency < 0:
            return
        self._values.append(float(latency))
        self.max_latency = max(self.max_latency, float(latency))

    def __len__(self) -> int:
        return len(self._values)

    def max(self) -> float:
        """Give the greatest since the last reset, also if it is not among the last any more; 0 if there is none."""
        return self.max_latency

    def percentile(self, q: float) -> float:
        """Give the q-quantile of the last latencies, q in [0, 1]; 0 if there are none. For q = 1, it is `max`."""
        if not self._values:
            return 0.0
        if q <= 0.0:
            return min(self._values)
        if q >= 1.0:
            return self.max_latency
        return float(np.quantile(np.array(self._values, np.float32), q))

    def p95(self) -> float:
        return self.percentile(0.95)
