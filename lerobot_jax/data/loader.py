"""Batches for training: a pure function of (dataset, seed, step), prepared ahead by threads."""

from collections import deque
from collections.abc import Collection, Iterator
from typing import Any

import grain
import jax
import numpy as np

from lerobot_jax.data.dataset import LeRobotDataset

Batch = dict[str, Any]


def training_batches(
    dataset: LeRobotDataset,
    rows: np.ndarray,
    keys: Collection[str],
    batch_size: int,
    *,
    seed: int,
    first_step: int = 0,
    num_workers: int = 2,
    prefetch_factor: int = 4,
) -> Iterator[Batch]:
    """Yield the batches of step `first_step`, `first_step` + 1, ... without end.

    Every epoch is a new permutation of `rows`; a batch may reach from one epoch into the next.

    Args:
        dataset: where the frames are.
        rows: the frames to draw from.
        keys: the entries that a batch has.
        batch_size: samples a batch.
        seed: of the permutations.
        first_step: where to begin.
        num_workers: threads that read.
        prefetch_factor: batches that each of them reads ahead.
    """
    # Positions are batched before anything is read, so that a whole batch is read at once.
    positions = grain.MapDataset.range(len(rows)).seed(seed).shuffle().repeat().batch(batch_size)
    batches = positions.map(lambda chosen: dataset.read(rows[np.asarray(chosen)], keys))
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
