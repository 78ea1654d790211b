import itertools
from pathlib import Path

import numpy as np
import pytest

from lerobot_jax.data.metadata import LeRobotDatasetMetadata
from lerobot_jax.data.stream_order import StreamOrder
from lerobot_jax.errors import InputError


def large_meta(files: int = 8, episodes_a_file: int = 50) -> LeRobotDatasetMetadata:
    """Describe a dataset whose second camera's files end elsewhere than the other files."""
    n = files * episodes_a_file
    lengths = np.random.default_rng(0).integers(20, 60, n)
    ends = np.cumsum(lengths)
    video = {"dtype": "video", "shape": (4, 4, 3), "names": ["height", "width", "channels"]}
    episodes = {
        "episode_index": np.arange(n),
        "length": lengths,
        "dataset_from_index": ends - lengths,
        "dataset_to_index": ends,
        "data/chunk_index": np.zeros(n, int),
        "data/file_index": np.arange(n) // (4 * episodes_a_file),
    }
    for key, shift in (("a", 0), ("b", 7)):
        episodes[f"videos/{key}/chunk_index"] = np.zeros(n, int)
        episodes[f"videos/{key}/file_index"] = (np.arange(n) + shift) // episodes_a_file
    info = {
        "codebase_version": "v3.0",
        "fps": 10,
        "features": {"a": video, "b": video},
        "total_episodes": n,
        "total_frames": int(ends[-1]),
        "data_path": "data/{chunk_index}/{file_index}",
        "video_path": "{video_key}/{chunk_index}/{file_index}",
    }
    return LeRobotDatasetMetadata("test/large", Path("nowhere"), None, info, {}, ["task"], episodes)


def test_every_epoch_is_another_permutation_of_the_allowed_frames():
    meta = large_meta()
    episodes = [e for e in range(400) if e % 3]
    order = StreamOrder(meta, episodes, 5, 2000, 4, drop_n_last_frames=30)
    start, end = meta.episodes["dataset_from_index"], meta.episodes["dataset_to_index"]
    allowed = np.concatenate([np.arange(start[e], end[e] - 30) for e in episodes if end[e] - start[e] > 30])
    epochs = [order.locate(np.arange(order.num_frames) + i * order.num_frames)[1] for i in range(3)]
    for epoch in epochs:
        np.testing.assert_array_equal(np.sort(epoch), allowed)
    assert all(np.mean(a == b) < 0.01 for a, b in itertools.combinations(epochs, 2))
    with pytest.raises(InputError, match="drop_n_last_frames=60"):
        StreamOrder(meta, episodes, 5, 2000, 4, drop_n_last_frames=60)


def test_a_position_has_the_same_frame_wherever_one_starts():
    order = StreamOrder(large_meta(), range(400), 5, 1000, 4)
    windows, frames = order.locate(np.arange(3 * order.num_frames))
    positions = np.random.default_rng(0).permutation(3 * order.num_frames)[:500]
    again = StreamOrder(large_meta(), list(range(400))[::-1], 5, 1000, 4)
    for some in np.split(positions, 10):
        np.testing.assert_array_equal(again.locate(some), (windows[some], frames[some]))
    other = StreamOrder(large_meta(), range(400), 6, 1000, 4).locate(np.arange(1000))[1]
    assert np.mean(other == frames[:1000]) < 0.01


def test_files_come_in_another_order_every_epoch():
    order = StreamOrder(large_meta(files=32), range(1600), 5, 2000, 1)
    places = np.arange(order.num_frames)
    epochs = [order.locate(places + i * order.num_frames)[1] for i in range(20)]
    correlations = [np.corrcoef(places, frames)[0, 1] for frames in epochs]
    assert abs(np.mean(correlations)) < 0.25  # of 20 permutations of 8 data files: 0 +- 0.08


@pytest.mark.parametrize(("buffer_size", "max_num_shards"), [(500, 1), (500, 4), (4000, 4), (10**9, 1)])
def test_windows_are_of_equal_size_and_mix_episodes_of_several_files(buffer_size: int, max_num_shards: int):
    meta = large_meta()
    order = StreamOrder(meta, range(400), 5, buffer_size, max_num_shards)
    windows, frames = order.locate(np.arange(order.num_frames))
    assert np.all(np.diff(windows) >= 0)
    sizes = np.bincount(windows)
    assert np.abs(sizes - sizes.mean()).max() <= 60
    assert sizes.mean() == pytest.approx(min(buffer_size, order.num_frames), rel=0.1)
    of_window = [frames[windows == window] for window in range(len(sizes))]
    inside = [np.corrcoef(np.arange(len(some)), some)[0, 1] for some in of_window]
    assert np.mean(np.abs(inside)) < 1.5 / np.sqrt(sizes.mean())  # of a random permutation: 0.8 / sqrt(n)
    episodes = [order.episodes_of(window) for window in range(len(sizes))]
    assert min(map(len, episodes)) > sizes.min() / 60
    places = [len({meta.video_file(e, "a") for e in some}) for some in episodes]
    assert np.mean(places) >= min(max_num_shards, 3)


@pytest.mark.parametrize("max_num_shards", [1, 4])
def test_a_file_is_needed_for_one_short_time_in_an_epoch(max_num_shards: int):
    meta = large_meta()
    order = StreamOrder(meta, range(400), 5, 500, max_num_shards)
    windows_of_file: dict[str, list[int]] = {}
    for window in range(order.num_windows):
        for name in meta.episode_files(order.episodes_of(window)):
            windows_of_file.setdefault(name, []).append(window)
    runs = {name: 1 + int(np.sum(np.diff(found) > 1)) for name, found in windows_of_file.items()}
    # A file is begun anew where it crosses the border of two parts, or of two files of the first camera.
    assert sum(runs[name] for name in runs if name.startswith("data")) <= 2 + max_num_shards
    assert sum(runs[name] for name in runs if name.startswith("a/")) <= 8 + max_num_shards
    assert max(runs.values()) <= 3
