"""What a dataset is, in words: its size, tasks, features and cameras, and what it costs to use."""

import pkgutil
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from lerobot_jax import policies
from lerobot_jax.data import tables, video
from lerobot_jax.data.info import image_shape
from lerobot_jax.data.metadata import LeRobotDatasetMetadata
from lerobot_jax.errors import InputError
from lerobot_jax.features import FeatureType, dataset_to_policy_features
from lerobot_jax.policies.base import config_class

PACKETS_LOOKED_AT = 2000
NAMES_WIDTH = 60


def describe(meta: LeRobotDatasetMetadata) -> str:
    """Describe a dataset in a page of text; nothing but `meta/` and one video a camera is opened."""
    lengths, fps = meta.episodes["length"], meta.fps
    span = (
        f"{lengths.min()} to {lengths.max()} frames, median {np.median(lengths):.0f}" if len(lengths) else ""
    )
    facts = [
        ["format", f"LeRobotDataset {meta.info['codebase_version']}"],
        ["folder", str(meta.root)],
        ["robot", str(meta.info.get("robot_type") or "not stated")],
        ["frames", f"{meta.total_frames:,} at {fps:g} fps: {_duration(meta.total_frames / fps)}"],
        ["episodes", f"{meta.total_episodes:,} of {span}"],
        *_tasks(meta),
        *_costs(meta),
        *_policies(meta),
    ]
    features = [["features", "dtype", "shape", "names"], *_features(meta)]
    sections = [[meta.repo_id], align(facts), align(features)]
    if meta.camera_keys:
        header = ["cameras", "height x width", "codec", "keyframe every", "decoded"]
        sections.append(align([header, *_cameras(meta)]))
    return "\n\n".join("\n".join(lines) for lines in sections)


def align(rows: Sequence[Sequence[str]]) -> list[str]:
    """Put the cells of a table under each other."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return ["  ".join(c.ljust(w) for c, w in zip(row, widths, strict=True)).rstrip() for row in rows]


def size(num_bytes: float) -> str:
    """Write a number of bytes with three digits: 8.60 MB."""
    for unit in ("B", "kB", "MB", "GB"):
        if num_bytes < 999.5:
            return f"{num_bytes:.0f} B" if unit == "B" else f"{num_bytes:#.3g} {unit}".replace(". ", " ")
        num_bytes /= 1000
    return f"{num_bytes:,.2f} TB"


def _duration(seconds: float) -> str:
    hours, rest = divmod(round(seconds), 3600)
    parts = [f"{hours} h"] * bool(hours) + [f"{rest // 60} min"] * (rest >= 60 or hours > 0)
    return " ".join([*parts, f"{rest % 60} s"])


def _tasks(meta: LeRobotDatasetMetadata) -> Iterator[list[str]]:
    counts = Counter(task for tasks in meta.episodes["tasks"] for task in set(tasks or []))
    for i, (task, count) in enumerate(counts.most_common()):
        yield [
            f"tasks: {len(meta.tasks)}" if i == 0 else "",
            f"{count:5,} episode{'s' * (count != 1)}: {task}",
        ]


def _costs(meta: LeRobotDatasetMetadata) -> Iterator[list[str]]:
    sizes = Counter()
    for path in meta.root.rglob("*"):
        if path.is_file():
            parts = path.relative_to(meta.root).parts
            sizes[f"{parts[0]}/" if len(parts) > 1 else "other"] += path.stat().st_size
    listed = ", ".join(f"{name} {size(num)}" for name, num in sizes.most_common())
    missing = sum(not (meta.root / name).exists() for name in meta.episode_files(None))
    here = f"; {missing} files of data/ and videos/ are not here" if missing else ""
    yield ["on disk", f"{size(sizes.total())} ({listed}{here})"]
    frames = sum(map(_frame_bytes, (meta.features[key] for key in meta.camera_keys))) * meta.total_frames
    if frames:
        yield ["decoded", f"{size(frames)}: what the frame cache needs for all cameras"]
    yield ["in memory", f"{size(tables.bytes_per_frame(meta.features) * meta.total_frames)} of numbers"]


def _policies(meta: LeRobotDatasetMetadata) -> Iterator[list[str]]:
    """Tell for each policy of this package whether it can be trained on the dataset."""
    available = dataset_to_policy_features(meta.features)
    outputs = {key: f for key, f in available.items() if f.type == FeatureType.ACTION}
    inputs = {key: f for key, f in available.items() if key not in outputs}
    for i, module in enumerate(m for m in pkgutil.iter_modules(policies.__path__) if m.ispkg):
        try:
            config_class(module.name)(input_features=inputs, output_features=outputs).check_features()
            verdict = f"takes {', '.join(inputs)}; gives {', '.join(outputs)}"
        except (InputError, ValueError) as error:
            verdict = f"no: {error}"
        yield ["policies" if i == 0 else "", f"{module.name}: {verdict}"]


def _features(meta: LeRobotDatasetMetadata) -> Iterator[list[str]]:
    for key, feature in meta.features.items():
        names = feature.get("names")
        if isinstance(names, dict):
            names = [
                name for group in names.values() for name in (group if isinstance(group, list) else [group])
            ]
        text = ", ".join(map(str, names or []))
        text = text if len(text) <= NAMES_WIDTH else f"{text[: NAMES_WIDTH - 4]} ..."
        yield [key, feature["dtype"], " x ".join(map(str, feature["shape"])), text]


def _cameras(meta: LeRobotDatasetMetadata) -> Iterator[list[str]]:
    for key in meta.camera_keys:
        feature = meta.features[key]
        height, width, _ = image_shape(feature)
        decoded = size(_frame_bytes(feature) * meta.total_frames)
        codec, spacing = "images in the tables", "every frame"
        if key in meta.video_keys:
            codec, spacing = _encoding(meta.root / meta.video_file(0, key))
        yield [key, f"{height} x {width}", codec, spacing, decoded]


def _encoding(path: Path) -> tuple[str, str]:
    """Tell a video's codec and pixel format, and how many frames apart its keyframes are."""
    if not path.exists():
        return "not here", "not here"
    with video.open_video(path) as container:
        stream = container.streams.video[0]
        packets = (packet for packet in container.demux(stream) if packet.pts is not None)
        flags = [packet.is_keyframe for packet, _ in zip(packets, range(PACKETS_LOOKED_AT), strict=False)]
        codec = f"{stream.codec.canonical_name}, {stream.pix_fmt}"
    gaps = np.diff(np.flatnonzero(flags))
    return codec, f"{np.median(gaps):.0f} frames" if len(gaps) else "only the first"


def _frame_bytes(feature: dict[str, Any]) -> int:
    return int(np.prod(feature["shape"]))
