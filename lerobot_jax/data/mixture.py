"""Several datasets as one: samples drawn by weight, under the names and widths of one policy.

Of every `BLOCK` positions each dataset has its share, in random order; its samples come in epochs, as they would
without the others. So what stands at a position is a pure function of (datasets, weights, seed).
"""

import dataclasses
import functools
import threading
from collections.abc import Mapping, Sequence

import numpy as np
from jaxtyping import Int

from lerobot_jax.data.samples import Batch, Samples
from lerobot_jax.errors import InputError
from lerobot_jax.features import TASK, FeatureType, PolicyFeature

BLOCK = 10_000
DATASET_INDEX = "dataset_index"  # LeRobot's name
NEUTRAL = {"mean": 0.0, "std": 1.0, "min": -1.0, "max": 1.0}
NEUTRAL |= {"q01": -1.0, "q10": -1.0, "q50": 0.0, "q90": 1.0, "q99": 1.0}
FIRST_BLOCK = 2**62  # the random numbers of blocks are none that `Shuffle` uses for epochs


@dataclasses.dataclass(frozen=True)
class FeatureMap:
    """How a dataset's samples become a policy's: renamed, padded with zeros, missing cameras black and marked.

    Attributes:
        features: the policy's inputs and outputs.
        steps: feature -> how many time steps it has, for those that have a time axis.
        rename_map: the dataset's key -> the policy's.
    """

    features: Mapping[str, PolicyFeature]
    steps: Mapping[str, int]
    rename_map: Mapping[str, str]

    def __call__(self, batch: Batch) -> Batch:
        renamed = {self._renamed(key): value for key, value in batch.items()}
        size = len(next(iter(batch.values())))
        result = {key: value for key, value in renamed.items() if key not in self.features}
        for key, feature in self.features.items():
            steps = (self.steps[key],) if key in self.steps else ()
            if feature.type != FeatureType.VISUAL:
                value = renamed[key].reshape(size, *steps, -1)  # LeRobot drops the axis of a single number
                value = value.astype(np.float32)  # one type, whatever dataset comes first in a batch
                widths = [(0, 0)] * (value.ndim - 1) + [(0, feature.shape[-1] - value.shape[-1])]
                result[key] = np.pad(value, widths)
                continue
            channels, height, width = feature.shape
            is_missing = key not in renamed
            shape = (size, *steps, height, width, channels)
            result[key] = np.zeros(shape, np.uint8) if is_missing else renamed[key]
            if is_missing or f"{key}_is_pad" not in renamed:
                result[f"{key}_is_pad"] = np.full((size, *steps), is_missing)
        return result

    def _renamed(self, key: str) -> str:
        stem = key.removesuffix("_is_pad")
        return self.rename_map.get(stem, stem) + key[len(stem) :]


class Assignment:
    """Tells which dataset a position belongs to, and the how manieth sample of that dataset it is."""

    def __init__(self, weights: Sequence[float], seed: int):
        """Raise `InputError` if a weight is so small that its dataset would never be drawn."""
        exact = np.asarray(weights, np.float64) / np.sum(weights) * BLOCK
        self.counts = np.floor(exact).astype(np.int64)
        largest_rest = np.argsort(self.counts - exact, kind="stable")
        self.counts[largest_rest[: BLOCK - self.counts.sum()]] += 1
        if self.counts.min() == 0:
            raise InputError(
                f"dataset.mixture: weight {weights[int(self.counts.argmin())]} is less than 1/{BLOCK} of the sum"
            )
        self.seed = seed
        self._lock = threading.Lock()
        self._block = functools.lru_cache(maxsize=2)(self._draw)

    def at(self, positions: Int[np.ndarray, " b"]) -> tuple[Int[np.ndarray, " b"], Int[np.ndarray, " b"]]:
        """Give (dataset, number of the sample in it) for some positions."""
        blocks, places = np.divmod(positions, BLOCK)
        which, number = np.empty_like(positions), np.empty_like(positions)
        for block in np.unique(blocks):
            with self._lock:
                order, rank = self._block(int(block))
            here = blocks == block
            which[here] = order[places[here]]
            number[here] = rank[places[here]] + block * self.counts[which[here]]
        return which, number

    def _draw(self, block: int) -> tuple[np.ndarray, np.ndarray]:
        """Give each place's dataset, and how often that dataset came before in the block."""
        key = np.array([self.seed, FIRST_BLOCK + block], np.uint64)
        shuffled = np.argsort(np.random.Philox(key=key).random_raw(BLOCK), kind="stable")
        order = np.repeat(np.arange(len(self.counts)), self.counts)[shuffled]
        rank = np.empty(BLOCK, np.int64)
        for dataset, count in enumerate(self.counts):
            rank[order == dataset] = np.arange(count)
        return order, rank


class MixedSamples:
    """Samples of several datasets; the entry `dataset_index` tells which a sample is from."""

    def __init__(self, parts: Sequence[Samples], weights: Sequence[float], seed: int):
        """Args:
        parts: the samples of each dataset, under the names and in the widths of the policy.
        weights: how often each is drawn, relative to the others.
        seed: of the order.
        """
        self.parts = list(parts)
        self._assignment = Assignment(weights, seed)

    def read(self, positions: Int[np.ndarray, " b"]) -> Batch:
        which, number = self._assignment.at(positions)
        batch: Batch = {DATASET_INDEX: which}
        for dataset in np.unique(which):
            chosen = np.flatnonzero(which == dataset)
            part = self.parts[dataset].read(number[chosen])
            for key, value in part.items():
                if key == TASK:
                    value = np.array(value, object)
                if key not in batch:
                    batch[key] = np.empty((len(positions), *value.shape[1:]), value.dtype)
                batch[key][chosen] = value
        if TASK in batch:
            batch[TASK] = batch[TASK].tolist()
        return batch


def neutral_statistics(shape: tuple[int, ...]) -> dict[str, np.ndarray]:
    """Give statistics with which every normalization leaves numbers as they are."""
    return {name: np.full(shape, value) for name, value in NEUTRAL.items()}


def pad_statistics(
    stats: Mapping[str, Mapping[str, np.ndarray]], features: Mapping[str, PolicyFeature]
) -> dict[str, dict[str, np.ndarray]]:
    """Complete a dataset's statistics for a policy that is wider than it, so that zeros stay zeros.

    Args:
        stats: feature -> its statistics, under the policy's names.
        features: the policy's inputs and outputs.
    """
    result = {key: dict(values) for key, values in stats.items()}
    for key, feature in features.items():
        if feature.type == FeatureType.VISUAL:
            channels = feature.shape[0]
            result[key] = neutral_statistics((channels, 1, 1)) | result.get(key, {})
            continue
        for name, value in result.get(key, {}).items():
            if name in NEUTRAL and value.shape[-1] < feature.shape[-1]:
                widths = [(0, 0)] * (value.ndim - 1) + [(0, feature.shape[-1] - value.shape[-1])]
                result[key][name] = np.pad(value, widths, constant_values=NEUTRAL[name])
    return result
