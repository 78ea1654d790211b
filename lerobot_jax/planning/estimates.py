"""How long a step takes at the least: the roofline of its operations, its memory traffic and its collectives."""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

from lerobot_jax.planning.collectives import BETWEEN_SLICES
from lerobot_jax.planning.hardware import Chip


@dataclasses.dataclass(frozen=True)
class Roofline:
    """Lower bounds, with every part of the hardware at its peak and all of them at work at the same time.

    Attributes:
        seconds: by part: `compute`, `memory`, `links` (inside a slice or host), `network`.
        samples_per_second: of all devices, at most.
        mfu: model FLOPs utilization, at most: the share of the peak that goes into operations which are not
            repeated.
    """

    seconds: dict[str, float]
    samples_per_second: float
    mfu: float

    @property
    def bound(self) -> str:
        """The part that takes longest."""
        return max(self.seconds, key=lambda part: self.seconds[part])

    @property
    def step(self) -> float:
        """Seconds that a step takes at least."""
        return self.seconds[self.bound]


def roofline(
    chip: Chip,
    num_devices: int,
    flops: Mapping[str, int],
    flops_once: Mapping[str, int],
    bytes_accessed: int,
    collectives: Sequence[Mapping[str, Any]],
    samples_per_step: int,
) -> Roofline:
    """Estimate a step.

    Args:
        chip: the hardware of a device.
        num_devices: how many there are.
        flops: operations of all devices, by type of number.
        flops_once: those that would be left if nothing were computed again.
        bytes_accessed: of a device.
        collectives: `link` and bytes `sent` by a device.
        samples_per_step: of all devices.
    """
    network = sum(each["sent"] for each in collectives if each["link"] == BETWEEN_SLICES)
    links = sum(each["sent"] for each in collectives) - network
    seconds = {
        "compute": sum(count / chip.speed(kind) for kind, count in flops.items()) / num_devices,
        "memory": bytes_accessed / chip.bandwidth,
        "links": links / chip.link,
        "network": network / chip.network,
    }
    step = max(seconds.values())
    useful = sum(flops_once.values()) / num_devices / chip.flops
    return Roofline(seconds, samples_per_step / step, useful / step)
