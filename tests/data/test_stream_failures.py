"""What becomes of a stream when servers, transfers, files or disks fail."""

import dataclasses
import datetime
import errno
import os
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from email.utils import format_datetime
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from lerobot_jax.data import download
from lerobot_jax.data.mirror import Mirror
from lerobot_jax.data.streaming import open_stream
from lerobot_jax.errors import InputError
from tests.data.failing_server import FailingServer
from tests.data.streams import (
    IMPATIENT,
    assert_right,
    budget,
    mirrors,
    streamed,
)


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
