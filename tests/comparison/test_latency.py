from typing import Any

import numpy as np
import pytest

from lerobot_jax.comparison import latency
from lerobot_jax.comparison.latency import Variant


class FakeRunner:
    """Takes a known time."""

    def __init__(self, name: str, clock: "FakeClock", seconds: float):
        self.name, self.clock, self.seconds = name, clock, seconds

    def reset(self, slot: int, episode: int) -> None:
        self.clock.order.append(self.name)

    def select_action(self, observation: Any) -> None:
        first = self.clock.order.count(self.name) == 1
        self.clock.now += 1000 if first else self.seconds  # the first call compiles


class FakeClock:
    def __init__(self) -> None:
        self.now, self.order = 0.0, []

    def perf_counter(self) -> float:
        return self.now


def test_policies_take_turns_after_compilation(monkeypatch: pytest.MonkeyPatch):
    clock = FakeClock()
    monkeypatch.setattr(latency, "time", clock)
    names = ["a", "b", "c"]
    runners: Any = [FakeRunner(name, clock, 0.001 * (i + 1)) for i, name in enumerate(names)]
    variants = [Variant(name, None, True, runner, {}) for name, runner in zip(names, runners, strict=True)]
    found = latency.measure(variants, rounds=4)
    np.testing.assert_allclose([x["p50_ms"] for x in found], [1, 2, 3], rtol=1e-6)
    np.testing.assert_allclose([x["p99_ms"] for x in found], [1, 2, 3], rtol=1e-6)
    turns = ["".join(clock.order[i : i + 3]) for i in range(0, 18, 3)]
    assert all(sorted(turn) == names for turn in turns)
    assert turns[2:] == ["abc", "bca", "cab", "abc"]
