"""Streaming gives a dataset's samples, from anywhere, within bounds of disk and memory."""

import itertools
import json
import os
import re
import signal
import subprocess
import sys
import threading
import time
import tracemalloc
from collections.abc import Iterator
from contextlib import closing, contextmanager, suppress
from pathlib import Path

import fsspec
import huggingface_hub.constants
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from lerobot_jax import hub
from lerobot_jax.data import download, loader
from lerobot_jax.data.dataset import LeRobotDataset
from lerobot_jax.data.mirror import Mirror
from lerobot_jax.data.streaming import open_stream
from lerobot_jax.errors import InputError
from tests.data.failing_server import COMMIT, FailingServer
from tests.data.recordings import FEATURES, record
from tests.data.streams import (
    CAMERA,
    DELTAS,
    IMPATIENT,
    KEYS,
    LENGTHS,
    ONE_EPISODE_A_FILE,
    assert_equal,
    assert_right,
    budget,
    mirrors,
    streamed,
)
from tests.data.v21 import record_v21


@pytest.mark.parametrize("one_file", [True, False])
def test_samples_are_those_of_the_dataset(tmp_path: Path, root: Path, one_file: bool):
    if one_file:
        root = record(tmp_path / "one", LENGTHS).root
    server = FailingServer(root)
    with closing(server), streamed(server.url) as samples:
        assert len(samples) == 39
        batch = samples.read(np.arange(39))
        assert sorted(batch["index"]) == list(range(39))
        assert_right(batch, root)
        later = samples.read(np.array([200, 3, 77, 4]))  # of four epochs
        assert_right(later, root)
        np.testing.assert_array_equal(later["index"][[1, 3]], batch["index"][3:5])
    fetched = [request for request in server.requests if "bytes" not in request]
    assert len(set(fetched)) == len(fetched)  # there was room for everything: each file came once
    assert mirrors() == []


def test_threads_and_starts_do_not_matter(server: FailingServer):
    def batches(first_step: int, workers: int) -> list[dict]:
        with streamed(server.url, buffer_size=6) as samples:
            found = loader.training_batches(
                samples, 5, first_step=first_step, num_workers=workers, prefetch_factor=3
            )
            return list(itertools.islice(found, 14 - first_step))

    expected = batches(0, 1)
    for first_step, workers in ((0, 4), (7, 3)):
        for a, b in zip(expected[first_step:], batches(first_step, workers), strict=True):
            assert_equal(a, b)


def test_dropped_frames_and_other_episodes_are_never_given(server: FailingServer):
    with streamed(server.url, episodes=[0, 3, 5], drop_n_last_frames=2) as samples:
        found = samples.read(np.arange(2 * len(samples)))["index"].tolist()
    assert sorted(found) == sorted(2 * [*range(3), *range(17, 24), *range(32, 37)])
    fetched = {request.split()[1] for request in server.requests if "/data/" in request}
    assert len(fetched) == 3


def test_held_out_episodes_come_once_in_order(root: Path, server: FailingServer):
    whole = LeRobotDataset("test/recorded", root, delta_timestamps=DELTAS)
    with streamed(server.url, episodes=[0, 3], buffer_size=10) as samples:
        for max_samples in (0, 7):
            rows = whole.first_rows([1, 2, 5, 4], max_samples)
            batches = list(samples.validation_batches([1, 2, 5, 4], 4, max_samples))
            assert [len(batch["index"]) for batch in batches[:-1]] == [4] * (len(batches) - 1)
            assert np.concatenate([batch["index"] for batch in batches]).tolist() == sorted(rows)
            for batch in batches:
                assert_right(batch, root)
        samples.read(np.arange(10))


@pytest.mark.parametrize("place", ["web", "folder", "file", "memory"])
def test_v21_datasets_and_all_kinds_of_places(tmp_path: Path, place: str):
    root = record_v21(tmp_path / "v21", (5, 8, 4))
    server = FailingServer(root)
    memory = fsspec.filesystem("memory")
    memory.put(str(root), "/streamed", recursive=True)
    url = {"web": server.url, "folder": str(root), "file": f"file://{root}", "memory": "memory://streamed"}
    with closing(server), streamed(url[place]) as samples:
        assert_right(samples.read(np.arange(30)), root)
        assert (mirrors() == []) == (place in ("folder", "file"))
    with pytest.raises(download.Closed):
        samples.read(np.arange(30))
    memory.rm("/streamed", recursive=True)


def test_the_hub_is_read_at_one_commit(server: FailingServer, monkeypatch: pytest.MonkeyPatch):
    constants = huggingface_hub.constants
    monkeypatch.setattr(constants, "ENDPOINT", server.hub_url)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(
        constants,
        "HUGGINGFACE_CO_URL_TEMPLATE",
        server.hub_url + "/{repo_id}/resolve/{revision}/{filename}",
    )
    with streamed(None) as samples:
        assert samples.stream.meta.revision == COMMIT
        assert_right(samples.read(np.arange(39)), server.root)
    assert all(COMMIT in request for request in server.requests if "resolve" in request)
    with streamed("hf://datasets/test/recorded@v3.0") as samples:
        assert samples.stream.address == f"hf://datasets/test/recorded@{COMMIT}"
    with pytest.raises(InputError, match=r"dataset 'test/none' .* no such repository"):
        open_stream("test/none", patience=IMPATIENT)
    with streamed("hf://datasets/test/recorded@main", revision=COMMIT) as samples:  # a resumed run's
        assert samples.stream.meta.revision == COMMIT
    with pytest.raises(InputError, match=r"not of the form hf://datasets/USER/NAME"):
        open_stream("test/recorded", "hf://buckets/test/recorded")


@contextmanager
def watched_folders() -> Iterator[list[int]]:
    """Sample the size of all mirrors' data and videos."""
    sizes, stop = [], threading.Event()

    def watch() -> None:
        while not stop.wait(0.001):
            size = 0
            for folder, _, names in (found for m in mirrors() for found in os.walk(m)):
                for name in names if f"{os.sep}meta" not in folder else ():
                    with suppress(FileNotFoundError):
                        size += os.stat(os.path.join(folder, name)).st_size
            sizes.append(size)

    thread = threading.Thread(target=watch)
    thread.start()
    try:
        yield sizes
    finally:
        stop.set()
        thread.join()


def test_disk_is_bounded(tmp_path: Path):
    root = record(tmp_path / "dataset", (4,) * 7, **ONE_EPISODE_A_FILE).root
    server, max_bytes = FailingServer(root), budget(root, 0.5)
    with (
        closing(server),
        watched_folders() as sizes,
        streamed(server.url, max_bytes, buffer_size=4) as samples,
    ):
        for epoch in range(3):
            indices = [
                samples.read(np.arange(i, i + 4))["index"] for i in range(28 * epoch, 28 * epoch + 28, 4)
            ]
            assert sorted(np.concatenate(indices)) == list(range(28))
        for descriptor in Path("/proc/self/fd").glob("*"):  # a removed file takes room while it is open
            with suppress(FileNotFoundError):
                assert not re.search(r"mirror-.*\(deleted\)", os.readlink(descriptor))
    assert 0.7 * max_bytes < max(sizes) <= max_bytes
    fetched = [r for r in server.requests if "bytes" not in r and "/meta/" not in r]
    assert 14 < len(fetched) <= 4 * 14  # a file that had to go came again, once an epoch


def test_a_budget_that_cannot_hold_a_window_is_an_error(server: FailingServer):
    with (
        streamed(server.url, max_bytes=5000) as samples,
        pytest.raises(InputError, match=r"are needed at once, and the stream may keep .* lower buffer_size"),
    ):
        samples.read(np.arange(4))


def test_images_in_parquet_files_are_copied_only_while_their_window_is_open(tmp_path: Path, monkeypatch):
    monkeypatch.setenv("LEROBOT_JAX_CACHE", str(tmp_path / "cache"))
    features = FEATURES | {CAMERA: FEATURES[CAMERA] | {"dtype": "image"}}
    root = record(tmp_path / "dataset", (4,) * 7, features, data_files_size_in_mb=0).root
    server, max_bytes = FailingServer(root), budget(root, 1.2)
    with closing(server), streamed(server.url, max_bytes, episodes=range(6), buffer_size=4) as samples:
        assert isinstance(samples.stream.files, Mirror)
        assert samples.stream.files.max_bytes == max_bytes // 2
        batches = [samples.read(np.arange(i, i + 4)) for i in range(0, 72, 4)]
        batches += samples.validation_batches([6], 3)
        copies = re.findall(r"/streams/\S+ \(deleted\)", Path("/proc/self/maps").read_text())
        assert 0 < len(copies) <= 2
        assert not (hub.cache_home() / "frames").exists()
    for batch in batches:
        assert_right(batch, root)


def test_held_out_episodes_need_no_more_room_than_training(tmp_path: Path):
    root = record(tmp_path / "dataset", (4,) * 7, **ONE_EPISODE_A_FILE).root
    files = sorted(p.stat().st_size for name in ("data", "videos") for p in (root / name).rglob("*.*"))
    max_bytes = sum(files[-2:]) + sum(files[-9:-7])  # of two episodes, that is two windows
    server = FailingServer(root)
    with closing(server), streamed(server.url, max_bytes, episodes=range(5), buffer_size=4) as samples:
        for start in range(0, 40, 8):
            samples.read(np.arange(start, start + 8))
            found = list(samples.validation_batches([5, 6], 3))
            assert np.concatenate([batch["index"] for batch in found]).tolist() == list(range(20, 28))


def widen_actions(root: Path, width: int) -> None:
    """Give each frame an action of so many zeros."""
    info = json.loads((root / "meta/info.json").read_text())
    info["features"]["action"]["shape"] = [width]
    (root / "meta/info.json").write_text(json.dumps(info))
    (root / "meta/stats.json").unlink()
    for path in (root / "data").rglob("*.parquet"):
        table = pq.read_table(path)
        values = pa.FixedSizeListArray.from_arrays(pa.array(np.zeros(len(table) * width, np.float32)), width)
        place = table.column_names.index("action")
        pq.write_table(table.set_column(place, "action", values), path)


def test_memory_is_bounded_by_windows(tmp_path: Path):
    features = {"action": {"dtype": "float32", "shape": (1,), "names": None}}
    root = record(tmp_path / "wide", (20,) * 30, features, **ONE_EPISODE_A_FILE).root
    widen_actions(root, 2000)
    with streamed(root, keys=["action"], delta_timestamps=None, buffer_size=60) as samples:
        assert samples.order.num_windows == 10
        samples.read(np.arange(8))
        tracemalloc.start()
        for start in range(0, 1200, 8):
            samples.read(np.arange(start, start + 8))
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
    window = 60 * 2000 * 4
    assert peak < 4.5 * window  # two are open, and the files of one are read


def test_what_killed_runs_left_is_removed(server: FailingServer):
    folder = hub.cache_home() / "streams"
    left = folder / "mirror-left"
    left.mkdir(parents=True)
    (folder / "mirror-left.lock").touch()
    (left / "half.partial").write_bytes(b"half")
    with streamed(server.url) as first, streamed(server.url) as second:
        assert not left.exists()
        assert len({samples.stream.files.root for samples in (first, second)}) == 2
        assert_equal(first.read(np.arange(9)), second.read(np.arange(9)))
    assert mirrors() == []


def test_a_reader_is_told_when_the_stream_closes(server: FailingServer):
    found = []
    with streamed(server.url) as samples:
        server.hanging = 100

        def read() -> None:
            try:
                samples.read(np.arange(39))
            except download.Closed:
                found.append("closed")

        thread = threading.Thread(target=read)
        thread.start()
        time.sleep(0.1)
    thread.join(2)
    assert found == ["closed"]


SCRIPT = """
import hashlib, sys
from lerobot_jax.data import loader, streaming

stream = streaming.open_stream("test/recorded", sys.argv[1], max_bytes=int(sys.argv[3]))
with streaming.StreamedSamples(
    stream, range(6), {keys!r}, 3, buffer_size=12, max_num_shards=2, delta_timestamps={deltas!r}
) as samples:
    for batch in loader.training_batches(samples, 5, first_step=int(sys.argv[2])):
        content = b"".join(v.tobytes() for v in batch.values() if not isinstance(v, list))
        print(hashlib.sha256(content).hexdigest(), flush=True)
"""


def test_a_killed_process_resumes_bit_equal_and_a_stopped_one_cleans_up(server: FailingServer):
    def start(first_step: int) -> subprocess.Popen:
        script = SCRIPT.format(keys=KEYS, deltas=DELTAS)
        return subprocess.Popen(
            [sys.executable, "-c", script, server.url, str(first_step), str(budget(server.root, 0.9))],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )

    def lines(process: subprocess.Popen, n: int) -> list[str]:
        assert process.stdout is not None
        found = [process.stdout.readline() for _ in range(n)]
        assert all(found), process.stderr and process.stderr.read()
        return found

    uninterrupted, killed = start(0), start(0)
    expected = lines(uninterrupted, 40)
    assert lines(killed, 9) == expected[:9]
    killed.kill()
    killed.communicate()
    uninterrupted.send_signal(signal.SIGINT)
    uninterrupted.communicate(timeout=120)
    assert len(mirrors()) == 2  # a folder and its lock
    resumed = start(9)
    assert lines(resumed, 20) == expected[9:29]
    server.hanging, server.hang_seconds = 10**6, 60.0  # Ctrl-C does not wait for it
    time.sleep(0.5)
    resumed.send_signal(signal.SIGINT)
    resumed.communicate(timeout=20)
    assert resumed.returncode != 0
    assert mirrors() == []
