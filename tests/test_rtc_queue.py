import numpy as np
import pytest

from lerobot_jax.config import EvalConfig
from lerobot_jax.errors import InputError
from lerobot_jax.policies.act import ACTConfig
from lerobot_jax.policies.diffusion import DiffusionConfig
from lerobot_jax.rtc_queue import DelayedQueue, LatencyTracker, RTCQueue, check_delay


def chunk(start: int, steps: int = 6) -> np.ndarray:
    return np.arange(start, start + steps, dtype=np.float32)[:, None]


# The original actions that LeRobot's ActionQueue had left after the same calls.
LEFT = [
    None,
    [0, 1, 2, 3, 4, 5],
    [2, 3, 4, 5],
    [102, 103, 104, 105],
    [103, 104, 105],
    [203, 204, 205],
    [300, 301, 302, 303, 304, 305],
    [],
    None,
]


def test_the_queue_is_lerobots():
    queue, states = RTCQueue(), []

    def merge(start: int, delay: int) -> None:
        queue.merge(chunk(start), 10 * chunk(start), delay)

    def note() -> None:
        original, processed = queue.get_left_over(), queue.get_processed_left_over()
        assert (original is None) == (processed is None)
        if original is not None and processed is not None:
            np.testing.assert_array_equal(processed, 10 * original)
        left = None if original is None else original[:, 0].tolist()
        assert (queue.qsize(), queue.empty()) == (len(left or []), not left)
        states.append(left)

    note()
    assert queue.get() is None
    merge(0, 0)
    note()
    assert [queue.get(), queue.get()] == [[0], [10]]
    note()
    merge(100, 2)
    note()
    queue.get()
    note()
    merge(200, 3)
    note()
    queue.get()
    merge(300, -1)
    note()
    merge(400, 9)
    note()
    assert queue.get() is None
    queue.clear()
    note()
    assert states == LEFT


def test_the_latencies_are_lerobots():
    """The greatest is of all since the reset, the quantiles are of the last 4."""
    tracker = LatencyTracker(4)
    assert (len(tracker), tracker.max(), tracker.p95()) == (0, 0.0, 0.0)
    for latency in (0.1, 0.5, -1, 0.2, 0.3, 0.25):
        tracker.add(latency)
    assert (len(tracker), tracker.max()) == (4, 0.5)
    found = [tracker.p95(), *(tracker.percentile(q) for q in (0.5, 0, 1, -1))]
    np.testing.assert_allclose(found, [0.4699999690055847, 0.2750000059604645, 0.2, 0.5, 0.2], rtol=1e-7)
    tracker.add(0.05)
    tracker.add(0.06)
    np.testing.assert_allclose([tracker.max(), tracker.p95(), tracker.percentile(1)], [0.5, 0.2925, 0.5])
    tracker.reset()
    assert (len(tracker), tracker.max(), tracker.p95()) == (0, 0.0, 0.0)


@pytest.mark.parametrize(
    ("n_action_steps", "delay", "expected"),
    [
        (3, 0, [0, 1, 2, 100, 101, 102, 200, 201]),
        (4, 2, [0, 1, 2, 3, 4, 5, 102, 103, 104, 105, 202, 203, 204, 205, 302]),
        # The chunk would be over before the next one comes, so that is asked for earlier.
        (8, 2, [*range(8), *range(102, 108), *range(202, 208), 302]),
        # The next one is asked for as soon as the last one came.
        (1, 3, [0, 1, 2, 3, 103, 104, 105, 203, 204, 205]),
        (8, 4, [*range(8), *range(104, 108), *range(204, 208), 304]),
    ],
)
def test_what_is_executed_with_a_delay(n_action_steps: int, delay: int, expected: list[int]):
    """Action j of the k-th chunk is 100 k + j."""
    queue, actions, num_chunks = DelayedQueue(n_action_steps, delay), [], 0
    for _ in expected:
        if queue.needs_chunk():
            queue.add(chunk(100 * num_chunks, 8))
            num_chunks += 1
        actions.append(int(queue.next_action()[0]))
    assert actions == expected


def test_delays_that_cannot_be_are_reported():
    check_delay(ACTConfig(chunk_size=10, n_action_steps=10), 5)
    with pytest.raises(
        InputError, match=r"inference_delay=6 is more than half of the 10 actions.*most 5 is possible"
    ):
        check_delay(ACTConfig(chunk_size=10, n_action_steps=10), 6)
    check_delay(DiffusionConfig(horizon=16, n_action_steps=8), 4)
    with pytest.raises(InputError, match=r"of the 8 actions that the policy predicts at once"):
        check_delay(DiffusionConfig(horizon=16, n_action_steps=8), 5)
    ensembling = ACTConfig(n_action_steps=1, temporal_ensemble_coeff=0.01)
    check_delay(ensembling, 0)
    with pytest.raises(InputError, match=r"set policy.temporal_ensemble_coeff=None, or inference_delay=0"):
        check_delay(ensembling, 1)
    with pytest.raises(ValueError, match=r"eval.inference_delay must not be negative, it is -1"):
        EvalConfig(inference_delay=-1)
