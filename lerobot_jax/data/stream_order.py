"""The order of a stream: which frame stands at a position, computed from `meta/` and a seed alone.

In an epoch, data files are shuffled, inside each its video files, inside each its episodes, so that a file is
needed for a short time only. This row of episodes is cut into `max_num_shards` equal parts, which are read side by
side. What is read together is a window of about `buffer_size` frames; all of them are shuffled.
"""

import dataclasses
import functools
import threading
from collections.abc import Sequence

import numpy as np
from jaxtyping import Int

from lerobot_jax.data import metadata
from lerobot_jax.errors import InputError

CACHED_EPOCHS, CACHED_WINDOWS = 3, 4


@dataclasses.dataclass(frozen=True)
class _Epoch:
    """An epoch's episodes in order, the frames before each of them, and the first episode of each window."""

    episodes: Int[np.ndarray, " n"]
    starts: Int[np.ndarray, " n_and_end"]
    firsts: Int[np.ndarray, " w_and_end"]


class StreamOrder:
    """Tells which frame stands at a position, and in which window it is read; windows count through all epochs."""

    def __init__(
        self,
        meta: metadata.LeRobotDatasetMetadata,
        episodes: Sequence[int],
        seed: int,
        buffer_size: int,
        max_num_shards: int,
        drop_n_last_frames: int = 0,
    ):
        """Args:
        meta: of the dataset.
        episodes: those to draw from.
        seed: of the order.
        buffer_size: about how many frames are shuffled together.
        max_num_shards: at how many places of the dataset they are taken.
        drop_n_last_frames: how many frames at the end of an episode are left out.
        """
        chosen = np.sort(np.asarray(episodes, np.int64))
        lengths = np.asarray(meta.episodes["length"])[chosen] - drop_n_last_frames
        chosen, self._lengths = chosen[lengths > 0], lengths[lengths > 0]
        if len(chosen) == 0:
            raise InputError(
                f"{meta.repo_id}: no episode is longer than drop_n_last_frames={drop_n_last_frames}"
            )
        self._episodes, self.seed, self._num_shards = chosen, seed, max_num_shards
        self._from = np.asarray(meta.episodes["dataset_from_index"])[chosen]
        self._files = _files_of_episodes(meta, chosen)
        self.num_frames = int(self._lengths.sum())
        # No window is empty if each could take the longest episode.
        most = self.num_frames // int(self._lengths.max())
        self.num_windows = max(1, min(most, round(self.num_frames / buffer_size)))
        self._lock = threading.Lock()
        self._epoch = functools.lru_cache(maxsize=CACHED_EPOCHS)(self._draw_epoch)
        self._frames = functools.lru_cache(maxsize=CACHED_WINDOWS)(self._draw_window)

    def locate(self, positions: Int[np.ndarray, " b"]) -> tuple[Int[np.ndarray, " b"], Int[np.ndarray, " b"]]:
        """Give the window of each position, and the number of its frame in the dataset ("index")."""
        epochs, offsets = np.divmod(positions, self.num_frames)
        windows, frames = np.empty(len(positions), np.int64), np.empty(len(positions), np.int64)
        with self._lock:
            for number in np.unique(epochs):
                epoch = self._epoch(int(number))
                bounds = epoch.starts[epoch.firsts]
                here = np.flatnonzero(epochs == number)
                inside = np.searchsorted(bounds, offsets[here], side="right") - 1
                windows[here] = number * self.num_windows + inside
                for window in np.unique(inside):
                    these = here[inside == window]
                    order = self._frames(int(number * self.num_windows + window))
                    frames[these] = order[offsets[these] - bounds[window]]
        return windows, frames

    def episodes_of(self, window: int) -> list[int]:
        """List the episodes that a window takes frames from, in ascending order."""
        with self._lock:
            return self._episodes[self._places_of(window)].tolist()

    def _places_of(self, window: int) -> Int[np.ndarray, " n"]:
        number, inside = divmod(window, self.num_windows)
        epoch = self._epoch(number)
        return np.sort(epoch.episodes[epoch.firsts[inside] : epoch.firsts[inside + 1]])

    def _draw_epoch(self, number: int) -> _Epoch:
        sizes = [len(self._episodes), *(int(files.max()) + 1 for files in self._files)]
        of_episode, *of_files = np.split(self._bits(number, 0, sum(sizes)), np.cumsum(sizes)[:-1])
        ranks = [bits[files] for bits, files in zip(of_files, self._files, strict=True)]
        order = np.lexsort((of_episode, *reversed(ranks)))
        before = np.cumsum(self._lengths[order]) - self._lengths[order]
        # Reading side by side: by how far an episode is from the beginning of its part.
        parts = before * self._num_shards // self.num_frames
        order = order[np.argsort(before * self._num_shards - parts * self.num_frames, kind="stable")]
        starts = np.concatenate([[0], np.cumsum(self._lengths[order])])
        windows = np.arange(self.num_windows + 1) * self.num_frames
        return _Epoch(order, starts, np.searchsorted(starts[:-1] * self.num_windows, windows))

    def _draw_window(self, window: int) -> Int[np.ndarray, " n"]:
        """Give the frames of a window in random order."""
        number, inside = divmod(window, self.num_windows)
        places = self._places_of(window)
        parts = [
            first + np.arange(n) for first, n in zip(self._from[places], self._lengths[places], strict=True)
        ]
        frames = np.concatenate(parts)
        return frames[np.argsort(self._bits(number, 1 + inside, len(frames)), kind="stable")]

    def _bits(self, epoch: int, stream: int, n: int) -> np.ndarray:
        # The raw stream of Philox is the same in every version of numpy; `permutation` need not be.
        key = np.array([self.seed, epoch], np.uint64)
        return np.random.Philox(key=key, counter=np.array([0, 0, 0, stream + 1], np.uint64)).random_raw(n)


def _files_of_episodes(
    meta: metadata.LeRobotDatasetMetadata, episodes: Int[np.ndarray, " n"]
) -> list[Int[np.ndarray, " n"]]:
    """Number the files of the episodes, kind by kind (data, cameras), the kind with the fewest files first."""
    names = [[meta.data_file(e) for e in episodes.tolist()]]
    names += [[meta.video_file(e, key) for e in episodes.tolist()] for key in meta.video_keys]
    numbers = []
    for kind in names:
        number = {name: i for i, name in enumerate(dict.fromkeys(kind))}
        numbers.append(np.array([number[name] for name in kind]))
    return sorted(numbers, key=lambda files: int(files.max()))
