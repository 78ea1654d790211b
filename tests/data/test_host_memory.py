"""The host-memory budget of docs/data.md, on a dataset that looks like 100 GB: its frames are holes in a file."""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from lerobot_jax.data import info, writer

EPISODES, LENGTH, FPS = 500, 220, 30
FRAMES = EPISODES * LENGTH
CAMERA = "observation.images.top"
FEATURES = {
    CAMERA: {"dtype": "video", "shape": (480, 640, 3), "names": ["height", "width", "channels"]},
    "observation.state": {"dtype": "float32", "shape": (14,), "names": None},
    "action": {"dtype": "float32", "shape": (14,), "names": None},
    **info.DEFAULT_FEATURES,
}

READ = """
import itertools, json, os, sys
from fractions import Fraction
import numpy as np
from lerobot_jax.data import cache_folder, frame_entry, loader, video_decoder
from lerobot_jax.data.dataset import LeRobotDataset
from lerobot_jax.data.samples import ShuffledRows

FRAMES, CAMERA = {frames}, "{camera}"

def anonymous_bytes():
    lines = open("/proc/self/smaps_rollup").read().splitlines()[1:]
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("Anonymous:"))

def index_video(path):
    shown = np.arange(FRAMES)
    return video_decoder.VideoIndex(Fraction(1, {fps}), shown, *[shown[::2]] * 3)

def decode(self, frames):
    for i in frames:
        yield np.full((480, 640, 3), i % 251, np.uint8)

video_decoder.index_video = index_video
video_decoder.VideoFile.decode = decode
mode, root, cache = sys.argv[1:]
if mode == "cache":
    # An entry whose pixels take no room on disk.
    os.posix_fallocate = lambda file, start, size: os.truncate(file, size)
    path = next(__import__("pathlib").Path(root).glob("videos/*/*/*.mp4"))
    cache = __import__("pathlib").Path(cache) / "frames"
    cache_folder.create_cache(cache)
    file = video_decoder.VideoFile(path, (480, 640, 3))
    identity = cache_folder.identity(path)
    (digest,) = cache_folder.digest_sources([identity], cache, video_decoder.decoding_threads())
    name = cache_folder.entry_name(digest, file.key, "480x640")
    layout = frame_entry.FrameLayout(file, identity)
    folder = cache_folder.partial_path(cache, name)
    layout.create(folder)
    black = frame_entry.checksum(np.zeros((1, 480 * 640 * 3), np.uint8))
    np.full(FRAMES, black, np.uint64).tofile(folder / "checksums")
    layout.finish(folder)
    folder.rename(cache_folder.whole_path(cache, name))

before = anonymous_bytes()
dataset = LeRobotDataset("test/large", root, delta_timestamps={{"action": [i / {fps} for i in range(100)]}})
if mode == "cache":
    assert dataset.cache_frames(budget_gb=200)
opened = anonymous_bytes()
samples = ShuffledRows(dataset, np.arange(FRAMES), [CAMERA, "action", "action_is_pad", "observation.state"], 0)
batches = loader.training_batches(samples, 16, num_workers=2, prefetch_factor=4)
peak = 0
for batch in itertools.islice(batches, 40):
    peak = max(peak, anonymous_bytes())
assert batch[CAMERA].shape == (16, 480, 640, 3)
num_bytes = dataset.cameras[CAMERA].num_bytes
print(json.dumps({{"opened": opened - before, "peak": peak - opened, "num_bytes": num_bytes}}))
"""


@pytest.fixture(scope="module")
def root(tmp_path_factory) -> Path:
    """Write the tables of a large dataset at once; its video is a stand-in that nobody decodes."""
    root: Path = tmp_path_factory.mktemp("large") / "dataset"
    recorded = writer.DatasetWriter("test/large", root, FPS, FEATURES)
    declared = recorded.info | {"total_episodes": EPISODES, "total_frames": FRAMES, "total_tasks": 1}
    (root / info.INFO_PATH).write_text(json.dumps(declared))
    frame, episode = np.tile(np.arange(LENGTH), EPISODES), np.repeat(np.arange(EPISODES), LENGTH)
    numbers = pa.array(np.random.default_rng(0).normal(size=FRAMES * 14).astype(np.float32))
    columns = {key: pa.FixedSizeListArray.from_arrays(numbers, 14) for key in ("observation.state", "action")}
    columns |= {"timestamp": (frame / FPS).astype(np.float32), "frame_index": frame, "episode_index": episode}
    columns |= {"index": np.arange(FRAMES), "task_index": np.zeros(FRAMES, np.int64)}
    first = np.arange(EPISODES) * LENGTH
    episodes = {
        "episode_index": np.arange(EPISODES),
        "tasks": [["move"]] * EPISODES,
        "length": [LENGTH] * EPISODES,
    }
    episodes |= {"dataset_from_index": first, "dataset_to_index": first + LENGTH}
    episodes |= {f"videos/{CAMERA}/from_timestamp": first / FPS}
    episodes |= {f"videos/{CAMERA}/to_timestamp": (first + LENGTH) / FPS}
    for part in ("data", f"videos/{CAMERA}"):
        episodes |= {f"{part}/{kind}_index": np.zeros(EPISODES, np.int64) for kind in ("chunk", "file")}
    zero = {"chunk_index": 0, "file_index": 0}
    tasks = {"task_index": [0], "task": ["move"]}
    for name, table in ((info.DATA_PATH, columns), (info.EPISODES_PATH, episodes), (info.TASKS_PATH, tasks)):
        path = root / name.format(**zero)
        path.parent.mkdir(parents=True, exist_ok=True)
        pq.write_table(pa.table(table), path)
    video = root / info.VIDEO_PATH.format(video_key=CAMERA, **zero)
    video.parent.mkdir(parents=True)
    video.write_bytes(b"stands for 100 GB of frames")
    return root


@pytest.mark.parametrize("mode", ["cache", "decode"])
def test_reading_100_gb_takes_little_memory(root: Path, mode: str, tmp_path: Path):
    code = READ.format(frames=FRAMES, camera=CAMERA, fps=FPS)
    environment = os.environ | {"LEROBOT_JAX_CACHE": str(tmp_path), "JAX_PLATFORMS": "cpu"}
    done = subprocess.run(
        [sys.executable, "-c", code, mode, str(root), str(tmp_path)],
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout.splitlines()[-1])
    assert found["num_bytes"] > 100e9
    per_frame = 28 * 4 + 4 + 4 * 8 + 20 + 40  # numbers, timestamp, indices, bookkeeping, of the camera
    reading_the_table = 60e6
    assert found["opened"] < FRAMES * per_frame + reading_the_table
    batches = 2 * 4 + 2 + 2  # ahead, being read, in hand
    assert found["peak"] < batches * 16 * 480 * 640 * 3 + 40e6
