"""Batches for training: that of a step is a pure function of (dataset, seed, step), prepared ahead by threads."""

from collections import deque
from collections.abc import Collection, Iterator

import grain
import jax
import numpy as np

from lerobot_jax.data.dataset import LeRobotDataset
from lerobot_jax.data.samples import Batch, Samples


def training_batches(
    samples: Samples, batch_size: int, *, first_step: int = 0, num_workers: int = 2, prefetch_factor: int = 4
) -> Iterator[Batch]:
    """Yield the batches of step `first_step`, `first_step` + 1, ... without end.

    Step i has the samples from position i * batch_size on. A batch may reach from one epoch into the next.

    Args:
        samples: what stands at a position.
        batch_size: samples a batch.
        first_step: where to begin.
        num_workers: threads that read.
        prefetch_factor: batches that each of them reads ahead.
    """
    steps = grain.MapDataset.range(2**62 // batch_size)
    batches = steps.map(lambda step: samples.read(int(step) * batch_size + np.arange(batch_size)))
    options = grain.ReadOptions(num_threads=num_workers, prefetch_buffer_size=num_workers * prefetch_factor)
    iterator = iter(batches.to_iter_dataset(options))
    iterator.set_state({"next_index": first_step})  # type: ignore[attr-defined]
    return iterator


def validation_batches(
    dataset: LeRobotDataset, rows: np.ndarray, keys: Collection[str], batch_size: int
) -> Iterator[Batch]:
    """Yield rows once, in order; the last batch may be smaller."""
    for start in range(0, len(rows), batch_size):
        yield dataset.read(rows[start : start + batch_size], keys)


def prefetch_to_device(
    batches: Iterator[Batch], sharding: jax.sharding.Sharding, size: int = 2
) -> Iterator[Batch]:
    """Start copying `size` batches to the devices before they are asked for."""
    queue: deque[Batch] = deque()
    for batch in batches:
        queue.append(jax.device_put(batch, sharding))
        if len(queue) == size:
            yield queue.popleft()
    yield from queue
