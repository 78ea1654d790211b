"""Videos and image columns that tests of frames make for themselves."""

import io
from pathlib import Path

import numpy as np
import PIL.Image
import pyarrow as pa
import pyarrow.parquet as pq

from lerobot_jax.data import video
from lerobot_jax.data.frames import ImageFrames, VideoFrames

SHAPE = (32, 48, 3)
KEY = "observation.images.top"


def pictures(n: int, seed: int = 0) -> np.ndarray:
    """Draw n pictures that all differ: (n, h, w, 3)."""
    coarse = np.random.default_rng(seed).integers(0, 255, (n, 8, 12, 3), np.uint8)
    return coarse.repeat(4, axis=1).repeat(4, axis=2)


def film(path: Path, n: int = 40, seed: int = 0, encoding: video.VideoEncoding | None = None) -> Path:
    """Write pictures as a video of 10 frames a second."""
    writer = video.VideoWriter(path, 10, encoding or video.VideoEncoding())
    for picture in pictures(n, seed):
        writer.write(picture)
    writer.close()
    return path


def video_camera(*paths: Path, n: int = 40, size: tuple[int, int] | None = None) -> VideoFrames:
    """Open videos of n frames each as a camera."""
    rows = np.arange(n * len(paths))
    return VideoFrames(paths, rows // n, rows % n / 10, SHAPE, 1e-4, size)


def image_table(path: Path, n: int = 40, seed: int = 0, group: int = 8) -> Path:
    """Write pictures as PNGs into a parquet file with row groups of `group`."""
    cells = [{"bytes": encoded(picture), "path": f"{i}.png"} for i, picture in enumerate(pictures(n, seed))]
    column = pa.array(cells, pa.struct({"bytes": pa.binary(), "path": pa.string()}))
    pq.write_table(pa.table({"index": range(n), KEY: column}), path, row_group_size=group)
    return path


def image_camera(*paths: Path, n: int = 40, size: tuple[int, int] | None = None) -> ImageFrames:
    """Open tables of n images each as a camera."""
    rows = np.arange(n * len(paths))
    return ImageFrames(paths, rows // n, rows % n, KEY, SHAPE, size)


def encoded(picture: np.ndarray) -> bytes:
    """Encode as PNG."""
    buffer = io.BytesIO()
    PIL.Image.fromarray(picture).save(buffer, "png")
    return buffer.getvalue()
