"""Streams of a small recorded dataset, and what they must give."""

from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any

import numpy as np

from lerobot_jax import hub
from lerobot_jax.data import download
from lerobot_jax.data.dataset import LeRobotDataset
from lerobot_jax.data.streaming import StreamedSamples, open_stream

LENGTHS = (5, 8, 4, 9, 6, 7)


CAMERA = "observation.images.top"


KEYS = ["index", "action", "action_is_pad", CAMERA, "task"]


DELTAS = {"action": [0.0, 0.1], CAMERA: [-0.1, 0.0]}


ONE_EPISODE_A_FILE: dict[str, Any] = {"data_files_size_in_mb": 0, "video_files_size_in_mb": 0}


IMPATIENT = download.Patience(timeout=0.4, attempts=4, first_wait=0.01, longest_wait=0.02)


@contextmanager
def streamed(
    url: str | Path | None,
    max_bytes: int = 10**9,
    patience: download.Patience = IMPATIENT,
    revision: str | None = None,
    **changes,
) -> Iterator[StreamedSamples]:
    settings = {"seed": 3, "buffer_size": 12, "max_num_shards": 2, "delta_timestamps": DELTAS} | changes
    stream = open_stream("test/recorded", url, revision, max_bytes=max_bytes, patience=patience)
    episodes = settings.pop("episodes", range(stream.meta.total_episodes))
    keys = settings.pop("keys", KEYS)
    with closing(stream), StreamedSamples(stream, episodes, keys, **settings) as samples:
        yield samples


def mirrors() -> list[Path]:
    return list((hub.cache_home() / "streams").glob("mirror-*"))


def budget(root: Path, part: float) -> int:
    """Give a part of the bytes that a dataset's data and videos have."""
    return int(
        part * sum(p.stat().st_size for name in ("data", "videos") for p in (root / name).rglob("*.*"))
    )


def assert_equal(a: dict, b: dict) -> None:
    assert set(a) == set(b)
    for key in a:
        np.testing.assert_array_equal(a[key], b[key])


def assert_right(batch: dict, root: Path) -> None:
    """Compare a batch with what `LeRobotDataset` gives for its frames."""
    dataset = LeRobotDataset("test/recorded", root, delta_timestamps=DELTAS)
    assert_equal(batch, dataset.read(batch["index"], batch))
