"""Write a LeRobotDataset v3.0 with LeRobot's verbs: add_frame, save_episode, finalize.

Mirrors `lerobot.datasets.dataset_writer.DatasetWriter`. Two differences, both invisible in the files: frames are
encoded as they come instead of through PNG files, and an episode's video is appended to an open file instead of
copying that file again for every episode.
"""

import copy
import io
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import PIL.Image
import pyarrow as pa

from lerobot_jax.data import dataset_files, metadata, statistics, video
from lerobot_jax.data.remux import SourceVideo
from lerobot_jax.errors import InputError


class DatasetWriter:
    """Records episodes into a new folder. Call `finalize` at the end, or the files stay unreadable."""

    def __init__(
        self,
        repo_id: str,
        root: Path,
        fps: int,
        features: Mapping[str, Mapping[str, Any]],
        robot_type: str | None = None,
        encoding: video.VideoEncoding | None = None,
        chunks_size: int = 1000,
        data_files_size_in_mb: int = 100,
        video_files_size_in_mb: int = 200,
    ):
        """Create the folder `root`, which must not exist yet.

        Args:
            repo_id: the dataset's name, `user/dataset`.
            root: the folder to create.
            fps: frames a second.
            features: name -> {"dtype", "shape", "names"}; dtype is a numpy dtype, "string", "image" or "video".
            robot_type: a free description of the robot.
            encoding: how "video" features are encoded; stock LeRobot's AV1 settings by default.
            chunks_size: files a folder.
            data_files_size_in_mb: a parquet file is closed when it would grow beyond this.
            video_files_size_in_mb: likewise for a video file.
        """
        if root.exists():
            raise InputError(f"{root}: already exists; datasets are created in a new folder")
        self.repo_id = repo_id
        self.root = root
        self.encoding = encoding or video.VideoEncoding()
        self.features = {
            **copy.deepcopy({k: dict(f) for k, f in features.items()}),
            **metadata.DEFAULT_FEATURES,
        }
        _check_features(self.features)
        root.mkdir(parents=True)
        self.info = dataset_files.new_info(
            fps, self.features, robot_type, chunks_size, data_files_size_in_mb, video_files_size_in_mb
        )
        self._files = dataset_files.DatasetFiles(root, self.info)
        self._schema = dataset_files.arrow_schema(self.features)
        self._start_episode()
        self._files.write_info()

    def _start_episode(self) -> None:
        self._length = 0
        self._frames: dict[str, list[Any]] = {
            k: [] for k in self.features if k not in metadata.DEFAULT_FEATURES
        }
        self._frame_tasks: list[str] = []
        self._video_writers: dict[str, video.VideoWriter] = {}

    def add_frame(self, frame: Mapping[str, Any]) -> None:
        """Add one frame: every feature as a numpy array of its dtype and shape, and "task" as a string.

        Images are (h, w, 3) or (3, h, w), uint8 or float in 0..1, or PIL images.
        """
        _check_names(set(frame), {*self._frames, "task"})
        self._frame_tasks.append(str(frame["task"]))
        for key, values in self._frames.items():
            feature = self.features[key]
            if feature["dtype"] in ("image", "video"):
                image = _rgb_image(key, frame[key], feature["shape"])
                if feature["dtype"] == "video":
                    if self._length == 0:
                        path = self._recording_folder(key) / f"episode-{self.info['total_episodes']:06d}.mp4"
                        path.parent.mkdir(parents=True, exist_ok=True)
                        self._video_writers[key] = video.VideoWriter(path, self.info["fps"], self.encoding)
                    self._video_writers[key].write(image)
                    # Only what the statistics may look at is kept; the frame itself is encoded by now.
                    values.append(statistics.shrink_for_statistics(image).copy())
                else:
                    values.append(image.copy())
            else:
                values.append(_checked_value(key, frame[key], feature))
        self._length += 1

    def save_episode(self) -> None:
        """Write the frames added since the last call as one episode."""
        if self._length == 0:
            raise InputError("save_episode: add at least one frame with add_frame before")
        columns: dict[str, Any] = {
            "timestamp": np.arange(self._length)
            / self.info["fps"],  # float64 in the statistics, as in LeRobot
            "frame_index": np.arange(self._length),
            **self._files.number(self._frame_tasks),
        }
        for key, values in self._frames.items():
            dtype = self.features[key]["dtype"]
            columns[key] = values if dtype in ("image", "video", "string") else np.stack(values)
        stats = self._episode_statistics(columns)
        videos = {}
        for key, writer in self._video_writers.items():
            writer.close()
            videos[key] = (SourceVideo(writer.path), 0.0)
            if self.info["total_episodes"] == 0:
                self.features[key]["info"] = video.video_info(writer.path, self.encoding)
        table = _arrow_table(columns, self.features, self._schema)
        self._files.add_episode(table, list(dict.fromkeys(self._frame_tasks)), stats, videos)
        self._files.combine(stats)
        self._files.write_info()
        for writer in self._video_writers.values():
            writer.path.unlink()
        self._start_episode()

    def clear_episode_buffer(self) -> None:
        """Drop the frames added since the last `save_episode`."""
        for writer in self._video_writers.values():
            writer.close()
            writer.path.unlink()
        self._start_episode()

    def finalize(self) -> None:
        """Complete all files. Frames of an unsaved episode are dropped."""
        self.clear_episode_buffer()
        for folder in map(self._recording_folder, self.features):
            if folder.exists():
                shutil.rmtree(folder)
        self._files.close()

    def _recording_folder(self, key: str) -> Path:
        return self.root / "videos" / key / "recording"

    def _episode_statistics(self, columns: Mapping[str, Any]) -> metadata.Stats:
        stats: metadata.Stats = {}
        for key, feature in self.features.items():
            if feature["dtype"] == "string":
                continue
            if feature["dtype"] in ("image", "video"):
                chosen = [columns[key][i] for i in statistics.sampled_frames(self._length)]
                images = np.stack([statistics.shrink_for_statistics(image) for image in chosen])
                stats[key] = statistics.image_statistics(images)
            else:
                values = columns[key]
                if np.issubdtype(values.dtype, np.floating) and not np.isfinite(values).all():
                    frame = int(np.argwhere(~np.isfinite(values))[0][0])
                    episode = self.info["total_episodes"]
                    raise InputError(f"'{key}' is NaN or infinite in frame {frame} of episode {episode}")
                if feature["shape"] == (1,):
                    values = values.reshape(-1)
                stats[key] = statistics.vector_statistics(values)
        return stats


def _check_features(features: Mapping[str, dict[str, Any]]) -> None:
    for key, feature in features.items():
        if "/" in key:
            raise InputError(f"feature '{key}': names must not contain '/'")
        if "dtype" not in feature or "shape" not in feature:
            raise InputError(f"feature '{key}': needs 'dtype' and 'shape'")
        feature["shape"] = tuple(feature["shape"])
        feature.setdefault("names", None)
        if feature["dtype"] in ("image", "video") and len(feature["shape"]) != 3:
            raise InputError(f"feature '{key}': images are (height, width, channels), not {feature['shape']}")


def _check_names(given: set[str], expected: set[str]) -> None:
    if given != expected:
        missing, extra = sorted(expected - given), sorted(given - expected)
        parts = [f"missing {missing}"] * bool(missing) + [f"unknown {extra}"] * bool(extra)
        raise InputError(f"add_frame: {', '.join(parts)}")


def _checked_value(key: str, value: Any, feature: Mapping[str, Any]) -> Any:
    if feature["dtype"] == "string":
        if not isinstance(value, str):
            raise InputError(f"add_frame: '{key}' must be a string, not {type(value).__name__}")
        return value
    if not isinstance(value, np.ndarray):
        raise InputError(f"add_frame: '{key}' must be a numpy array, not {type(value).__name__}")
    if value.dtype != np.dtype(feature["dtype"]) or value.shape != feature["shape"]:
        raise InputError(
            f"add_frame: '{key}' must be {feature['dtype']} of shape {feature['shape']}, "
            f"not {value.dtype} of shape {value.shape}"
        )
    return value.copy()


def _rgb_image(key: str, value: Any, shape: tuple[int, ...]) -> np.ndarray:
    image = np.asarray(value.convert("RGB")) if isinstance(value, PIL.Image.Image) else np.asarray(value)
    if image.ndim == 3 and image.shape[0] == 3 and image.shape[-1] != 3:
        image = np.moveaxis(image, 0, -1)
    if image.shape != shape and (image.shape[2:] + image.shape[:2]) != shape:
        raise InputError(f"add_frame: '{key}' must have shape {shape}, it has {image.shape}")
    if image.dtype != np.uint8:
        if not (image.min() >= 0 and image.max() <= 1):  # nor NaN
            raise InputError(f"add_frame: '{key}' is {image.dtype}, so it must lie in 0..1 (or be uint8)")
        image = (image * 255).astype(np.uint8)
    return image


def _arrow_table(
    columns: Mapping[str, Any], features: Mapping[str, Mapping[str, Any]], schema: pa.Schema
) -> pa.Table:
    arrays = []
    for field in schema:
        values = columns[field.name]
        shape = features[field.name]["shape"]
        if features[field.name]["dtype"] == "image":
            values = [{"bytes": _png(image), "path": f"frame-{i:06d}.png"} for i, image in enumerate(values)]
            arrays.append(pa.array(values, field.type))
        elif isinstance(values, list) or len(shape) > 1:
            arrays.append(pa.array(values if isinstance(values, list) else values.tolist(), field.type))
        elif shape == (1,):
            arrays.append(pa.array(values.reshape(-1).astype(features[field.name]["dtype"])))
        else:
            arrays.append(pa.FixedSizeListArray.from_arrays(pa.array(values.reshape(-1)), shape[0]))
    return pa.Table.from_arrays(arrays, schema=schema)


def _png(image: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    PIL.Image.fromarray(image).save(buffer, format="PNG", compress_level=6)
    return buffer.getvalue()
