import dataclasses
import datetime
import errno
import itertools
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
import tracemalloc
from collections.abc import Iterator
from contextlib import closing, contextmanager, suppress
from email.utils import format_datetime
from pathlib import Path
from typing import Any

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
from lerobot_jax.data.streaming import StreamedSamples, open_stream
from lerobot_jax.errors import InputError
from tests.data.failing_server import COMMIT, FailingServer
from tests.data.recordings import FEATURES, record
from tests.data.v21 import record_v21

LENGTHS = (5, 8, 4, 9, 6, 7)
CAMERA = "observation.images.top"
KEYS = ["index", "action", "action_is_pad", CAMERA, "task"]
DELTAS = {"action": [0.0, 0.1], CAMERA: [-0.1, 0.0]}
ONE_EPISODE_A_FILE: dict[str, Any] = {"data_files_size_in_mb": 0, "video_files_size_in_mb": 0}
IMPATIENT = download.Patience(timeout=0.4, attempts=4, first_wait=0.01, longest_wait=0.02)


@pytest.fixture(scope="module")
def root(tmp_path_factory) -> Path:
    return record(tmp_path_factory.mktemp("data") / "dataset", LENGTHS, **ONE_EPISODE_A_FILE).root


@pytest.fixture
def server(root: Path, tmp_path: Path) -> Iterator[FailingServer]:
    server = FailingServer(Path(shutil.copytree(root, tmp_path / "served")))
    yield server
    server.close()


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


# Reading


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


# Failures


@pytest.mark.parametrize(
    "fault",
    [{"drop_every": 2}, {"unavailable": 3}, {"short": 20}, {"hanging": 2}, {"drop_every": 3, "short": 9}],
)
@pytest.mark.parametrize("ignores_ranges", [False, True])
def test_failures_that_pass_change_nothing(server: FailingServer, fault: dict, ignores_ranges: bool):
    patience = IMPATIENT
    server.ignores_ranges = ignores_ranges
    if ignores_ranges:  # then a failure in the middle is no progress, and one file may meet many
        fault = dict.fromkeys(fault, 5)
        patience = dataclasses.replace(IMPATIENT, attempts=12)
    for name, value in fault.items():
        setattr(server, name, value)
    with streamed(server.url, patience=patience) as samples:
        assert_right(samples.read(np.arange(39)), server.root)
    assert mirrors() == []


def test_a_broken_transfer_goes_on_where_it_stopped(server: FailingServer, tmp_path: Path):
    content = np.random.default_rng(0).bytes(3_000_000)
    (server.root / "large").write_bytes(content)
    folder = download.WebFolder(server.url, 0.4)
    version = folder.look("large")
    server.short, server.num_bytes = 7, 0
    download.download(folder, "large", tmp_path / "large", version, IMPATIENT, threading.Event())
    assert (tmp_path / "large").read_bytes() == content
    assert server.num_bytes == len(content)  # none came twice
    assert len(server.requests) == 9  # though there were more failures than attempts


def test_a_short_write_is_completed(server: FailingServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """A disk that is nearly full takes only a part of what it is given."""
    content = np.random.default_rng(0).bytes(100_000)
    (server.root / "large").write_bytes(content)
    open_file = Path.open

    class Slow:
        def __init__(self, file: Any):
            self._file = file

        def __getattr__(self, name: str) -> Any:
            return getattr(self._file, name)

        def write(self, piece: Any) -> int:
            return self._file.write(piece[:7000])

    @contextmanager
    def opened(path: Path, *args: Any, **kwargs: Any) -> Iterator[Any]:
        with open_file(path, *args, **kwargs) as file:
            yield Slow(file)

    folder = download.WebFolder(server.url, 0.4)
    version = folder.look("large")
    with monkeypatch.context() as patch:
        patch.setattr(Path, "open", opened)
        download.download(folder, "large", tmp_path / "large", version, IMPATIENT, threading.Event())
    assert (tmp_path / "large").read_bytes() == content


def test_a_disk_that_cannot_be_written_is_named_and_nothing_is_left(
    server: FailingServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    def fail(*_: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patch:
        patch.setattr(Path, "replace", fail)
        with pytest.raises(InputError, match=r"^/.*/meta/info.json: cannot be written \(No space left on"):
            open_stream("test/recorded", server.url, patience=IMPATIENT)
    assert mirrors() == []
    (tmp_path / "file").touch()
    monkeypatch.setenv("LEROBOT_JAX_CACHE", str(tmp_path / "file"))
    with pytest.raises(InputError, match=r"file/streams: cannot be written \(Not a directory\)"):
        open_stream("test/recorded", server.url, patience=IMPATIENT)


def test_waits_are_told_and_as_long_as_the_server_asks(
    caplog: pytest.LogCaptureFixture, server: FailingServer, tmp_path: Path
):
    patience = dataclasses.replace(IMPATIENT, longest_wait=0.3)
    server.unavailable, server.retry_after = 1, "100"
    started = time.monotonic()
    with caplog.at_level("WARNING"):
        download.look(download.WebFolder(server.url, 0.4), "meta/info.json", patience, threading.Event())
    assert time.monotonic() - started >= 0.3  # up to the patience
    assert "meta/info.json: the server answered 503" in caplog.text
    assert "attempt 2 of 4 in 0.3 s" in caplog.text


def test_servers_ask_for_seconds_or_a_date():
    in_an_hour = datetime.datetime.now(datetime.UTC) + datetime.timedelta(hours=1)
    cases = {"7": 7, "Wed, 21 Oct 2015 07:28:00 GMT": 0, "soon": 0, "": 0, format_datetime(in_an_hour): 3600}
    for text, seconds in cases.items():
        assert download._retry_after({"Retry-After": text}) == pytest.approx(seconds, abs=60), text


def test_no_file_is_mixed_from_two(server: FailingServer, tmp_path: Path):
    path = server.root / "large"
    path.write_bytes(b"a" * 100_000)
    folder = download.WebFolder(server.url, 0.4)
    version = folder.look("large")
    for content in (b"b" * 100_000, b"b" * 50_000):
        path.write_bytes(content)
        with pytest.raises(InputError, match=r"/files/large: it changed while it was read \(100000 bytes"):
            download.download(folder, "large", tmp_path / "large", version, IMPATIENT, threading.Event())
        assert not (tmp_path / "large").exists()


def test_a_file_that_changes_between_epochs_is_an_error(server: FailingServer):
    with streamed(server.url, budget(server.root, 0.7), buffer_size=6, max_num_shards=1) as samples:
        samples.read(np.arange(39))
        for path in (server.root / "videos").rglob("*.mp4"):
            os.utime(path, ns=(1, 1))
        with pytest.raises(InputError, match="it changed while it was read"):
            samples.read(np.arange(39, 3 * 39))


def test_a_server_that_goes_away_for_good_is_named(server: FailingServer):
    with streamed(server.url, buffer_size=6) as samples:
        server.close()
        started = time.monotonic()
        with pytest.raises(InputError) as error:
            samples.read(np.arange(39))
        assert time.monotonic() - started < 3
        assert server.url in str(error.value)
        assert "Connection refused" in str(error.value)
        assert "gave up after 4 attempts" in str(error.value)


def test_what_is_absent_or_forbidden_is_not_asked_for_again(server: FailingServer):
    with pytest.raises(InputError, match=r"/none/meta/info.json: the server answered 404 Not Found"):
        open_stream("test/recorded", f"{server.url}/none", patience=IMPATIENT)
    assert len(server.requests) == 1
    (next((server.root / "data").rglob("*.parquet"))).unlink()
    with streamed(server.url) as samples, pytest.raises(InputError, match=r"parquet: .* 404"):
        samples.read(np.arange(39))
    with pytest.raises(InputError, match="gopher"):
        open_stream("test/recorded", "gopher://somewhere")
    assert mirrors() == []


def test_damaged_files_are_named_by_their_source(server: FailingServer):
    (server.root / "meta/tasks.parquet").write_bytes(b"PAR1 and no more")
    with pytest.raises(InputError, match=rf"^{server.url}/meta/tasks.parquet: damaged"):
        open_stream("test/recorded", server.url, patience=IMPATIENT)
    assert mirrors() == []


def test_a_passing_failure_of_a_file_fetched_ahead_is_forgotten(server: FailingServer):
    with streamed(server.url, buffer_size=6, max_num_shards=1) as samples:
        files = samples.stream.files
        assert isinstance(files, Mirror)
        later = samples.stream.files_of([5])
        server.unavailable = 10**6
        files.expect(later)
        while not files._failed:
            time.sleep(0.01)
        server.unavailable = 0
        files.expect([])
        assert_right(samples.read(np.arange(39)), server.root)


def test_files_that_somebody_removes_come_again(server: FailingServer):
    with streamed(server.url, budget(server.root, 0.7), buffer_size=6, max_num_shards=1) as samples:
        samples.read(np.arange(39))
        files = samples.stream.files
        assert isinstance(files, Mirror)
        next_window = samples.stream.files_of(samples.order.episodes_of(samples.order.num_windows))
        with files._changed:  # while no file comes or goes
            for name in set(files._present) - set(next_window):
                (files.root / name).unlink()
        assert_right(samples.read(np.arange(39, 78)), server.root)


def test_who_waits_is_told_when_a_thread_fails(server: FailingServer, monkeypatch: pytest.MonkeyPatch):
    def fail(*_: object) -> None:
        raise RuntimeError("a mistake of ours")

    with streamed(server.url) as samples:
        monkeypatch.setattr(Mirror, "_choose", fail)
        with pytest.raises(RuntimeError, match="a mistake of ours"):
            samples.read(np.arange(39))


# Bounds


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


# Ends


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
