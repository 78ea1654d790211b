"""The memory that a compiled train step needs on each device, and what it is for."""

import dataclasses
import math
import os
from collections.abc import Mapping
from typing import Any

import jax

from lerobot_jax.planning.units import bytes_text

LABELS = {
    "params": "parameters",
    "frozen": "frozen parameters",
    "buffers": "buffers",
    "opt_state": "optimizer",
    "ema": "EMA",
}


@dataclasses.dataclass(frozen=True)
class StepMemory:
    """Bytes on one device.

    Attributes:
        parts: what lies there between steps, by name: parts of the train state, the batch, padding.
        temporaries: what a step needs besides: activations, gradients, buffers of collectives.
        peak: the most that is used at one time; less than the sum where memory is used again.
        limit: what a program may use; None if unknown.
        is_bound: whether `temporaries` and `peak` are upper bounds (on CPUs, which do not tell more).
    """

    parts: dict[str, int]
    temporaries: int
    peak: int
    limit: int | None
    is_bound: bool

    @property
    def fits(self) -> bool:
        return self.limit is None or self.peak <= self.limit

    def describe(self) -> str:
        """Tell it on one line."""
        parts = [f"{name} {bytes_text(size)}" for name, size in self.parts.items() if size]
        parts.append(f"activations {bytes_text(self.temporaries)}")
        most = "at most " if self.is_bound else ""
        room = f" of {bytes_text(self.limit)} ({self.peak / self.limit:.0%})" if self.limit else ""
        return f"{', '.join(parts)}; {most}{bytes_text(self.peak)}{room} at once"


def step_memory(
    compiled: jax.stages.Compiled,
    state: Mapping[str, Any],
    batch: Any,
    platform: str,
    limit: int | None,
) -> StepMemory:
    """Read what a compiled `step(state, batch, ...)` needs.

    Args:
        compiled: the step; its state is donated.
        state: its train state: arrays or their shapes, with shardings.
        batch: its batch, likewise.
        platform: of the devices: cpu, gpu, cuda or tpu.
        limit: bytes that a program may use on a device.
    """
    stats: Any = compiled.memory_analysis()
    parts = state_parts(state, batch)
    # What layouts add: on TPU the last axis of an array is padded to 128.
    parts["padding"] = max(0, stats.argument_size_in_bytes - sum(parts.values()) - _SMALL)
    if is_bound := platform == "cpu":  # whose peak is only that of the arguments
        kept = stats.output_size_in_bytes - stats.alias_size_in_bytes
        peak = stats.argument_size_in_bytes + stats.temp_size_in_bytes + kept
    else:
        peak = stats.peak_memory_in_bytes
    return StepMemory(parts, stats.temp_size_in_bytes, peak, limit, is_bound)


_SMALL = 1024  # step count and random key


def state_parts(state: Mapping[str, Any], batch: Any) -> dict[str, int]:
    """Count the bytes on one device of each part of the train state, and of the batch."""
    names = [*(name for name in LABELS if name in state), *(set(state) - set(LABELS) - {"step"})]
    parts = {LABELS.get(name, name): device_bytes(state[name]) for name in names}
    return parts | {"batch": device_bytes(batch)}


def device_bytes(tree: Any) -> int:
    """Count the bytes on one device of arrays, or of shapes that have a sharding."""
    return sum(_shard_bytes(x) for x in jax.tree.leaves(tree))


def _shard_bytes(x: Any) -> int:
    sharding = getattr(x, "sharding", None)
    shape = x.shape if sharding is None else sharding.shard_shape(x.shape)
    return math.prod(shape) * x.dtype.itemsize


def present_limit() -> int | None:
    """Give the bytes that a program may use on one of the devices here; None if the device does not tell."""
    device = jax.local_devices()[0]
    if device.platform != "cpu":
        return (device.memory_stats() or {}).get("bytes_limit")
    return host_memory() // jax.local_device_count()


def host_memory() -> int:
    """Give the bytes of memory of this machine."""
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
