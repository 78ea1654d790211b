"""Datasets of format v2.1, as LeRobot 0.3.3 lays them out: files for every episode, and JSON lines."""

import json
import shutil
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq

from lerobot_jax.data.dataset import LeRobotDataset
from tests.data.recordings import FEATURES, record

DATA_PATH = "data/chunk-{episode_chunk:03d}/episode_{episode_index:06d}.parquet"
VIDEO_PATH = "videos/chunk-{episode_chunk:03d}/{video_key}/episode_{episode_index:06d}.mp4"
MOMENTS = ("min", "max", "mean", "std", "count")

# A camera of each kind, and numbers of several shapes.
VARIED = FEATURES | {
    "observation.images.side": {
        "dtype": "image",
        "shape": (16, 24, 3),
        "names": ["height", "width", "channels"],
    },
    "observation.wrench": {"dtype": "float64", "shape": (2, 3), "names": None},
    "note": {"dtype": "string", "shape": (1,), "names": None},
}


def record_v21(
    root: Path,
    lengths: tuple[int, ...] = (5, 8, 4),
    features: dict[str, dict[str, Any]] | None = None,
    chunks_size: int = 1000,
    **settings: Any,
) -> Path:
    """Record the episodes of `recordings.record` in format v2.1; give the folder."""
    new = root.with_name(f"{root.name}-v30")
    # Files of at most nothing hold one episode each.
    dataset = record(new, lengths, features, data_files_size_in_mb=0, video_files_size_in_mb=0, **settings)
    write_v21(dataset, root, chunks_size)
    shutil.rmtree(new)
    return root


def write_v21(dataset: LeRobotDataset, root: Path, chunks_size: int = 1000) -> None:
    """Lay out a v3.0 dataset that has a file an episode as v2.1."""
    meta = dataset.meta
    for episode in range(meta.total_episodes):
        place = {"episode_chunk": episode // chunks_size, "episode_index": episode}
        files = {meta.data_file(episode): DATA_PATH.format(**place)}
        for key in meta.video_keys:
            files[meta.video_file(episode, key)] = VIDEO_PATH.format(video_key=key, **place)
        for old, new in files.items():
            (root / new).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(meta.root / old, root / new)
    rows = pq.read_table(meta.root / "meta/episodes").to_pylist()
    write_lines(root / "meta/tasks.jsonl", [{"task_index": i, "task": t} for i, t in enumerate(meta.tasks)])
    names = ("episode_index", "tasks", "length")
    write_lines(root / "meta/episodes.jsonl", [{name: row[name] for name in names} for row in rows])
    write_lines(root / "meta/episodes_stats.jsonl", [_statistics(row, meta.features) for row in rows])
    info = {
        "codebase_version": "v2.1",
        "robot_type": meta.info["robot_type"],
        "total_episodes": meta.total_episodes,
        "total_frames": meta.total_frames,
        "total_tasks": len(meta.tasks),
        "total_videos": meta.total_episodes * len(meta.video_keys),
        "total_chunks": 1 + (meta.total_episodes - 1) // chunks_size,
        "chunks_size": chunks_size,
        "fps": meta.fps,
        "splits": {"train": f"0:{meta.total_episodes}"},
        "data_path": DATA_PATH,
        "video_path": VIDEO_PATH if meta.video_keys else None,
        "features": meta.features,
    }
    (root / "meta/info.json").write_text(json.dumps(info, indent=4))


def write_lines(path: Path, lines: list[dict[str, Any]]) -> None:
    """Write a file of JSON objects, one a line."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))


def read_lines(path: Path) -> list[dict[str, Any]]:
    """Read a file of JSON objects, one a line."""
    return [json.loads(line) for line in path.read_text().splitlines()]


def _statistics(row: dict[str, Any], features: dict[str, dict[str, Any]]) -> dict[str, Any]:
    """Give the statistics of an episode as v2.1 has them: without quantiles, of truth values as truth values."""
    stats: dict[str, dict[str, Any]] = {}
    for column, value in row.items():
        if column.startswith("stats/"):
            _, key, name = column.split("/")
            if name in MOMENTS:
                is_bool = features[key]["dtype"] == "bool" and name in ("min", "max")
                stats.setdefault(key, {})[name] = [bool(v) for v in value] if is_bool else value
    return {"episode_index": row["episode_index"], "stats": stats}
