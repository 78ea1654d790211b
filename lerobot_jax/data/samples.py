"""Training samples in an endless, shuffled order: that at a position is a pure function of (dataset, seed).

`ShuffledRows` reads samples on the host; `DeviceRows` gathers them on the devices, which hold the whole dataset.
`mixture.MixedSamples` and `streaming.StreamedSamples` are of the same kind. For several seeds at once, batches have
a leading axis of seeds.
"""

import functools
import threading
from collections.abc import Callable, Collection, Sequence
from typing import Any, Protocol, runtime_checkable

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Int

from lerobot_jax.data.dataset import LeRobotDataset
from lerobot_jax.features import TASK
from lerobot_jax.progress import progress_bar
from lerobot_jax.sharding import BatchPlacement, place

Batch = dict[str, Any]
UPLOAD_BYTES = 64_000_000  # frames travel to the devices in pieces of about this size


@runtime_checkable
class Samples(Protocol):
    """Samples in an endless order."""

    def read(self, positions: Int[np.ndarray, " b"]) -> Batch:
        """Give the samples at some positions as one batch; called by several threads at once."""
        ...


class Shuffle:
    """Counts through 0 .. n - 1 without end, every epoch in another order.

    It depends on the seed, the epoch and the stream: the number of a dataset in a mixture, below 2**22.
    """

    def __init__(self, n: int, seed: int, stream: int = 0):
        self.n, self.seed, self.stream = n, seed, stream
        self._lock = threading.Lock()
        # A batch can reach from one epoch into the next, and threads run ahead.
        self._permutation = functools.lru_cache(maxsize=2)(self._draw)

    def at(self, positions: Int[np.ndarray, " b"]) -> Int[np.ndarray, " b"]:
        """Give the numbers that stand at some positions."""
        epochs, places = np.divmod(positions, self.n)
        chosen = np.empty(len(positions), np.int64)
        for epoch in np.unique(epochs):
            with self._lock:
                permutation = self._permutation(int(epoch))
            here = epochs == epoch
            chosen[here] = permutation[places[here]]
        return chosen

    def _draw(self, epoch: int) -> Int[np.ndarray, " n"]:
        # The raw stream of Philox is the same in every version of numpy; `permutation` need not be.
        key = np.array([self.seed, self.stream * 2**40 + epoch], np.uint64)
        bits = np.random.Philox(key=key).random_raw(self.n)
        dtype = np.int32 if self.n <= np.iinfo(np.int32).max else np.int64
        return np.argsort(bits, kind="stable").astype(dtype)


class ShuffledRows:
    """Rows of a dataset, shuffled, read on the host."""

    def __init__(
        self,
        dataset: LeRobotDataset,
        rows: np.ndarray,
        keys: Collection[str],
        seed: int,
        stream: int = 0,
        finish: Callable[[Batch], Batch] = lambda batch: batch,
    ):
        """Args:
        dataset: where the samples are.
        rows: those to draw from.
        keys: the entries that a sample has.
        seed: of the order.
        stream: the number of the dataset in a mixture.
        finish: changes a batch that was read.
        """
        self.dataset, self.rows, self.keys, self._finish = dataset, rows, keys, finish
        self._shuffle = Shuffle(len(rows), seed, stream)

    def read(self, positions: Int[np.ndarray, " b"]) -> Batch:
        return self._finish(self.dataset.read(self.rows[self._shuffle.at(positions)], self.keys))


class SeedSamples:
    """Samples in the orders of several seeds; each batch is that of every seed, stacked."""

    def __init__(self, parts: Sequence[Samples]):
        self.parts = list(parts)

    def read(self, positions: Int[np.ndarray, " b"]) -> Batch:
        batches = [part.read(positions) for part in self.parts]
        return {key: np.stack([batch[key] for batch in batches]) for key in batches[0]}


class DeviceRows:
    """Rows of a dataset, shuffled, gathered on the devices; each of them holds the whole dataset.

    Only the numbers of the rows go from the host to the devices with a batch. "task" is not among the entries.
    """

    def __init__(
        self,
        dataset: LeRobotDataset,
        rows: np.ndarray,
        keys: Collection[str],
        seed: int | Sequence[int],
        whole: jax.sharding.Sharding,
        split: jax.sharding.NamedSharding,
        tokenize: Callable[[Batch], Batch] | None = None,
    ):
        """Copy the dataset to the devices.

        Args:
            dataset: where the samples are.
            rows: those to draw from.
            keys: the entries that a sample has.
            seed: of the order; several seeds: a batch has that of each, stacked.
            whole: keeps a copy of an array on every device.
            split: how a batch lies on the devices.
            tokenize: makes tokens of samples without images, if there are to be any.
        """
        self.dataset, self.rows, self._split, self._tokenize = dataset, rows, split, tokenize
        self._keys_on_host = [key for key in keys if key not in dataset.cameras]
        self._is_stacked = not isinstance(seed, int)
        self._shuffles = [Shuffle(len(rows), each) for each in ([seed] if isinstance(seed, int) else seed)]
        self._arrays = _copy_to_devices(dataset, keys, whole)
        deltas = {key: jnp.asarray(delta) for key, delta in dataset.deltas.items()}
        wanted = [key for key in keys if key != TASK]
        gather = functools.partial(_gather, deltas, wanted)
        if self._is_stacked:
            gather = jax.vmap(gather, (None, 0))
        self._gather = jax.jit(gather, out_shardings=split)

    def read(self, positions: Int[np.ndarray, " b"]) -> Batch:
        rows = [self.rows[shuffle.at(positions)].astype(np.int32) for shuffle in self._shuffles]
        batch = self._gather(self._arrays, np.stack(rows) if self._is_stacked else rows[0])
        return batch if self._tokenize is None else batch | self._tokens(rows, self._tokenize)

    def _tokens(
        self, rows: Sequence[Int[np.ndarray, " b"]], tokenize: Callable[[Batch], Batch]
    ) -> dict[str, jax.Array]:
        """Make tokens on the host, of the samples that devices of this process need."""
        placement = BatchPlacement.of(self._split, len(rows[0]))
        numbers = [self.dataset.read(some[placement.rows], self._keys_on_host) for some in rows]
        told = [tokenize(batch) for batch in numbers]
        names = told[0].keys() - numbers[0].keys()
        return placement.put(
            {
                key: np.stack([each[key] for each in told]) if self._is_stacked else told[0][key]
                for key in names
            }
        )


def device_bytes(dataset: LeRobotDataset) -> int:
    """Tell how many bytes of each device `DeviceRows` would take."""
    frames = sum(camera.num_bytes for camera in dataset.cameras.values())
    return frames + sum(column.nbytes for column in dataset.columns.values() if column.dtype != object)


def _copy_to_devices(
    dataset: LeRobotDataset, keys: Collection[str], whole: jax.sharding.Sharding
) -> dict[str, dict[str, jax.Array]]:
    episode = dataset.columns["episode_index"]
    start = dataset.first_place[episode]
    bounds = {
        "place": start + dataset.columns["frame_index"],
        "start": start,
        "end": start + dataset.meta.episodes["length"][episode],
    }
    values = {key: column for key, column in dataset.columns.items() if key in keys}
    arrays = {
        "bounds": {name: place(x.astype(np.int32), whole) for name, x in bounds.items()},
        "row_of": {"place": place(dataset.row_of_place.astype(np.int32), whole)},
        "values": {key: place(column, whole) for key, column in values.items()},
    }
    cameras = {key: camera for key, camera in dataset.cameras.items() if key in keys}
    with progress_bar("frames to the device", len(dataset) * len(cameras), "frame", delay=1) as bar:
        for key, camera in cameras.items():
            write = jax.jit(jax.lax.dynamic_update_slice_in_dim, static_argnames="axis", donate_argnums=0)
            frames = jax.jit(
                lambda shape=camera.shape: jnp.zeros((len(dataset), *shape), jnp.uint8), out_shardings=whole
            )()
            step = max(1, UPLOAD_BYTES // int(np.prod(camera.shape)))
            for first in range(0, len(dataset), step):
                some = camera.read(np.arange(first, min(first + step, len(dataset))))
                frames = write(frames, place(some, whole), first, axis=0)
                bar.update(len(some))
            arrays["values"][key] = frames
    return arrays


def _gather(
    deltas: dict[str, jax.Array],
    keys: Collection[str],
    arrays: dict[str, dict[str, jax.Array]],
    rows: Int[jax.Array, " b"],
) -> Batch:
    """Do what `LeRobotDataset.read` does, with arrays on the devices."""
    bounds = arrays["bounds"]
    place, start, end = (_take(bounds[name], rows)[:, None] for name in ("place", "start", "end"))
    batch = {}
    for key, delta in deltas.items():
        wanted = place + delta[None]  # b t
        if f"{key}_is_pad" in keys:
            batch[f"{key}_is_pad"] = (wanted < start) | (wanted >= end)
        if key in keys:
            inside = _take(arrays["row_of"]["place"], jnp.clip(wanted, start, end - 1))
            batch[key] = _take(arrays["values"][key], inside)
    for key in keys:
        if key in arrays["values"] and key not in deltas:
            batch[key] = _take(arrays["values"][key], rows)
    return batch


def _take(array: jax.Array, rows: Int[jax.Array, "..."]) -> jax.Array:
    # Rows are within bounds by construction; checking them takes four times as long on CPUs.
    return array.at[rows].get(mode="promise_in_bounds")
