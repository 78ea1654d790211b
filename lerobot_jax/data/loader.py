"""Batches for training: that of a step is a pure function of (dataset, seed, step), prepared ahead by threads."""

from collections import deque
from collections.abc import Callable, Collection, Iterator

import grain
import numpy as np

from lerobot_jax.data.dataset import LeRobotDataset
from lerobot_jax.data.samples import Batch, Samples
from lerobot_jax.sharding import BatchPlacement


def training_batches(
    samples: Samples,
    batch_size: int,
    *,
    rows: np.ndarray | None = None,
    first_step: int = 0,
    num_workers: int = 2,
    prefetch_factor: int = 4,
) -> Iterator[Batch]:
    """Yield the batches of step `first_step`, `first_step` + 1, ... without end.

    Step i has the samples from position i * batch_size on. A batch may reach from one epoch into the next.

    Args:
        samples: what stands at a position.
        batch_size: samples a batch.
        rows: which of a batch's samples to read, by default all.
        first_step: where to begin.
        num_workers: threads that read.
        prefetch_factor: batches that each of them reads ahead.
    """
    steps = grain.MapDataset.range(2**62 // batch_size)
    rows = np.arange(batch_size) if rows is None else rows
    batches = steps.map(lambda step: samples.read(int(step) * batch_size + rows))
    options = grain.ReadOptions(num_threads=num_workers, prefetch_buffer_size=num_workers * prefetch_factor)
    iterator = iter(batches.to_iter_dataset(options))
    iterator.set_state({"next_index": first_step})  # type: ignore[attr-defined]
    return iterator


def validation_batches(
    dataset: LeRobotDataset,
    rows: np.ndarray,
    keys: Collection[str],
    batch_size: int,
    place: Callable[[int], BatchPlacement],
) -> Iterator[tuple[BatchPlacement, Batch]]:
    """Yield rows once, in order; the last batch may be smaller.

    Args:
        dataset: where the rows are.
        rows: which of them.
        keys: the entries to read.
        batch_size: samples a batch.
        place: tells where a batch of so many samples lies; what this process needs of it is read.
    """
    for start in range(0, len(rows), batch_size):
        some = rows[start : start + batch_size]
        placement = place(len(some))
        yield placement, dataset.read(some[placement.rows], keys)


def prefetch_to_device(batches: Iterator[Batch], placement: BatchPlacement, size: int = 2) -> Iterator[Batch]:
    """Start copying `size` batches to the devices before they are asked for."""
    queue: deque[Batch] = deque()
    for batch in batches:
        queue.append(placement.put(batch))
        if len(queue) == size:
            yield queue.popleft()
    yield from queue
