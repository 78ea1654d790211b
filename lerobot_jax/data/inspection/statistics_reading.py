"""Compute the statistics of a dataset anew from its files, one feature at a time, so that little is in memory.

Mirrors `lerobot.datasets.dataset_tools.recompute_stats`, which leaves cameras out; their statistics are computed
here as at the recording, from decoded frames.
"""

import io
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import numpy as np
import PIL.Image

from lerobot_jax.data import metadata, tables, video
from lerobot_jax.data.metadata import LeRobotDatasetMetadata
from lerobot_jax.data.statistics import (
    combine_statistics,
    image_statistics,
    sampled_frames,
    shrink_for_statistics,
)
from lerobot_jax.errors import InputError


def read_column(meta: LeRobotDatasetMetadata, key: str) -> np.ndarray:
    """Read a numeric feature of all frames, (n,) or (n, ...), in the order of the files.

    Raises:
        InputError: naming a file that is missing or damaged, or holds empty cells, NaN or infinity.
    """
    return tables.read_table(meta, None, [key], as_stored=True).columns[key]


def _files(meta: LeRobotDatasetMetadata, name_of_episode: Callable[[int], str]) -> dict[Path, list[int]]:
    """Give the files and the episodes that each of them holds."""
    files: dict[Path, list[int]] = {}
    for episode in range(meta.total_episodes):
        files.setdefault(meta.root / name_of_episode(episode), []).append(episode)
    return files


def camera_statistics(
    meta: LeRobotDatasetMetadata, key: str, progress: Callable[[int], object]
) -> dict[str, np.ndarray]:
    """Summarize a camera as LeRobot does: some frames of each episode, subsampled, then their combination.

    Args:
        meta: the dataset.
        key: the camera.
        progress: called with the number of episodes done.

    Raises:
        InputError: naming the file that cannot be read or lacks a frame.
    """
    is_video = key in meta.video_keys
    files = _files(meta, (lambda e: meta.video_file(e, key)) if is_video else meta.data_file)
    parts = []
    for path, episodes in files.items():
        read = _sampled_video_frames if is_video else _sampled_images
        for images in read(meta, key, path, episodes):
            parts.append({key: image_statistics(np.stack(images))})
            progress(1)
    return combine_statistics(parts)[key]


def _sampled_video_frames(
    meta: LeRobotDatasetMetadata, key: str, path: Path, episodes: Sequence[int]
) -> Iterator[list[np.ndarray]]:
    """Decode a file once from its start; yield the sampled frames of each episode."""
    starts = meta.episodes[f"videos/{key}/from_timestamp"]
    frames = iter(video.decode_video(path))
    for episode in sorted(episodes, key=lambda e: starts[e]):
        images = []
        for wanted in starts[episode] + sampled_frames(int(meta.episodes["length"][episode])) / meta.fps:
            image = next((image for time, image in frames if time > wanted - 0.5 / meta.fps), None)
            if image is None:
                raise InputError(f"{path}: no frame at {wanted:.3f} s, which episode {episode} needs")
            images.append(shrink_for_statistics(image))
        yield images


def _sampled_images(
    meta: LeRobotDatasetMetadata, key: str, path: Path, episodes: Sequence[int]
) -> Iterator[list[np.ndarray]]:
    """Decode an image column's sampled frames of each episode."""
    table = metadata.read_parquet(path, [key, "episode_index"])
    episode_index = table["episode_index"].to_numpy()
    for episode in episodes:
        rows = np.flatnonzero(episode_index == episode)
        images = []
        for row in rows[sampled_frames(len(rows))].tolist():
            try:
                image = PIL.Image.open(io.BytesIO(table[key][row]["bytes"].as_py())).convert("RGB")
            except (OSError, SyntaxError, TypeError) as error:
                raise InputError(f"{path}: '{key}' in row {row} cannot be decoded ({error})") from None
            images.append(shrink_for_statistics(np.asarray(image)))
        yield images
