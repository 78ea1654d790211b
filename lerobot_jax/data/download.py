"""Files of a folder elsewhere (`hf://`, `http(s)://`, `s3://`, ...), fetched one at a time, whole or not at all.

A file is written to FILE.partial and renamed when it has exactly the announced size. A dropped connection, a
timeout, a short answer and the states that pass (429, 5xx, ...) are tried again, each time after a longer wait,
from the byte where it stopped; from the first byte where the server knows no ranges. A file that is not the one of
before (another size, ETag or date) is an error. Web servers are read with Python's own client, since fsspec's needs
aiohttp; everything else is read through fsspec, the Hub with huggingface_hub's tokens.
"""

import dataclasses
import datetime
import email.message
import email.utils
import http.client
import random
import re
import threading
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import BinaryIO, cast

import fsspec
import huggingface_hub.errors
from absl import logging

from lerobot_jax import hub
from lerobot_jax.errors import InputError, writing

RANGE_BYTES = 8_000_000  # what is asked for at once where answers are not read piece by piece
PIECE_BYTES = 1 << 20
PASSING_STATES = (408, 425, 429)  # and 5xx


class Interruption(Exception):
    """A failure that may pass; `wait` is how many seconds the server asks for before the next attempt."""

    def __init__(self, problem: str, wait: float = 0.0):
        super().__init__(problem)
        self.wait = wait


class Closed(Exception):
    """The reading was stopped."""


class AbsentError(InputError):
    """There is no such file."""


@dataclasses.dataclass(frozen=True)
class Patience:
    """How long a slow or failing server is borne with.

    Attributes:
        timeout: seconds without a byte before a connection counts as dropped (the Hub's: $HF_HUB_DOWNLOAD_TIMEOUT).
        attempts: in a row without a new byte; after that it is an error.
        first_wait: seconds before the second attempt; doubled before each further one.
        longest_wait: in seconds, also where the server asks for more (Retry-After).
    """

    timeout: float = 30.0
    attempts: int = 8
    first_wait: float = 1.0
    longest_wait: float = 60.0


@dataclasses.dataclass(frozen=True)
class Version:
    """Which file it is: its size in bytes, and what changes when the file does."""

    size: int
    tag: str


@dataclasses.dataclass(frozen=True)
class Answer:
    """The bytes of a file from `start` on."""

    version: Version
    start: int
    pieces: Iterator[bytes]


class WebFolder:
    """A folder of a web server. What fails raises `Interruption` or `InputError`, `AbsentError` among them."""

    def __init__(self, url: str, timeout: float):
        self._url, self._timeout = url.rstrip("/"), timeout

    def address(self, name: str) -> str:
        return f"{self._url}/{urllib.parse.quote(name)}"

    def look(self, name: str) -> Version:
        """Ask which file it is now."""
        with self._answer(name, "bytes=0-0") as answer:
            return answer.version

    def open(self, name: str, start: int) -> AbstractContextManager[Answer]:
        """Ask for the bytes from `start` on."""
        return self._answer(name, f"bytes={start}-" if start else None)

    @contextmanager
    def _answer(self, name: str, wanted: str | None) -> Iterator[Answer]:
        headers = {} if wanted is None else {"Range": wanted}
        try:
            with urllib.request.urlopen(
                urllib.request.Request(self.address(name), headers=headers), timeout=self._timeout
            ) as response:
                version, start = _described(self.address(name), response.status, response.headers)
                yield Answer(version, start, iter(lambda: response.read1(PIECE_BYTES), b""))
        except urllib.error.HTTPError as error:
            with error:
                raise _refusal(self.address(name), error.code, error.reason, error.headers) from None
        except (OSError, http.client.HTTPException) as error:
            reason = getattr(error, "reason", error)
            raise Interruption(str(reason) or type(reason).__name__) from None


class FsspecFolder:
    """The same in any file system that fsspec knows."""

    def __init__(self, fs: fsspec.AbstractFileSystem, path: str):
        self._fs, self._path = fs, path

    def address(self, name: str) -> str:
        return self._fs.unstrip_protocol(f"{self._path}/{name}")

    def look(self, name: str) -> Version:
        path = f"{self._path}/{name}"
        with self._explained(name):
            if not isinstance(self._fs, huggingface_hub.HfFileSystem):  # there, a commit cannot change
                self._fs.invalidate_cache(path)
            size = self._fs.info(path)["size"]
            if size is None:
                raise InputError(f"{self.address(name)}: its size is not known")
            return Version(size, self._fs.ukey(path))

    @contextmanager
    def open(self, name: str, start: int) -> Iterator[Answer]:
        version = self.look(name)
        with self._explained(name), self._fs.open(f"{self._path}/{name}", "rb", **_IN_RANGES) as opened:
            file = cast(BinaryIO, opened)
            file.seek(start)
            yield Answer(version, start, iter(lambda: file.read(RANGE_BYTES), b""))

    @contextmanager
    def _explained(self, name: str) -> Iterator[None]:
        where = self.address(name)
        try:
            yield
        except (InputError, Closed, Interruption):
            raise
        except FileNotFoundError:
            raise AbsentError(f"{where}: no such file") from None
        except huggingface_hub.errors.HfHubHTTPError as error:
            status = error.response.status_code
            if status in PASSING_STATES or status >= 500:
                raise Interruption(
                    f"the Hub answered {status}", _retry_after(error.response.headers)
                ) from None
            raise InputError(f"{where}: {'; '.join(filter(None, hub.explain(error)))}") from None
        except (PermissionError, ImportError) as error:
            raise InputError(f"{where}: {error}") from None
        except Exception as error:  # each file system has errors of its own for the same failures
            raise Interruption(str(error) or type(error).__name__) from None


_IN_RANGES = {"block_size": RANGE_BYTES, "cache_type": "none"}
RemoteFolder = WebFolder | FsspecFolder


class Attempts:
    """Counts failures in a row, waits after each, and gives up with an `InputError`."""

    def __init__(self, where: str, patience: Patience, stopped: threading.Event):
        self._where, self._patience, self._stopped = where, patience, stopped
        self._failures = self._furthest = 0

    def wait_after(self, problem: Interruption, num_bytes: int = 0) -> None:
        """Wait before the next attempt.

        Args:
            problem: what failed.
            num_bytes: how far the file has come; further than ever makes the failure the first in a row.

        Raises:
            InputError: when it failed too often.
            Closed: when the reading was stopped.
        """
        if num_bytes > self._furthest:
            self._furthest, self._failures = num_bytes, 0
        self._failures += 1
        if self._failures >= self._patience.attempts:
            raise InputError(
                f"{self._where}: {problem}; gave up after {self._failures} attempts in a row without a new byte "
                f"({self._furthest} bytes came before)"
            )
        wait = self._patience.first_wait * 2 ** (self._failures - 1)
        # By chance, so that many readers do not come back at once.
        wait = max(problem.wait, min(wait, self._patience.longest_wait) * random.uniform(0.5, 1.0))
        wait = min(wait, self._patience.longest_wait)
        logging.warning(
            "%s: %s; attempt %d of %d in %.1f s",
            *(self._where, problem, self._failures + 1, self._patience.attempts, wait),
        )
        if self._stopped.wait(wait):
            raise Closed


def look(folder: RemoteFolder, name: str, patience: Patience, stopped: threading.Event) -> Version:
    """Ask which file it is, again and again if need be."""
    attempts = Attempts(folder.address(name), patience, stopped)
    while True:
        try:
            return folder.look(name)
        except Interruption as problem:
            attempts.wait_after(problem)


def download(
    folder: RemoteFolder,
    name: str,
    target: Path,
    version: Version,
    patience: Patience,
    stopped: threading.Event,
) -> None:
    """Fetch a file.

    Args:
        folder: where it is.
        name: its path in there.
        target: where it goes.
        version: which file it must be.
        patience: how long to try.
        stopped: set to make this raise `Closed`.

    Raises:
        InputError: naming the URL, what happened and how often it was tried.
        UnwritableError: naming the target.
    """
    partial = target.with_name(f"{target.name}.partial")
    with writing(target):  # what the server's side raises is no `OSError` any more
        target.parent.mkdir(parents=True, exist_ok=True)
        try:
            _download(folder, name, partial, version, patience, stopped)
            partial.replace(target)
        finally:
            partial.unlink(missing_ok=True)


def _download(
    folder: RemoteFolder,
    name: str,
    partial: Path,
    version: Version,
    patience: Patience,
    stopped: threading.Event,
) -> None:
    where = folder.address(name)
    attempts = Attempts(where, patience, stopped)
    with partial.open("wb", buffering=0) as file:
        while file.tell() < version.size:
            try:
                with folder.open(name, file.tell()) as answer:
                    _check_same(where, version, answer.version)
                    if answer.start > file.tell():
                        raise InputError(f"{where}: byte {answer.start} came instead of {file.tell()}")
                    file.seek(answer.start)
                    file.truncate()
                    for piece in answer.pieces:
                        _write(file, piece)
                        if stopped.is_set():
                            raise Closed
                if file.tell() < version.size:
                    raise Interruption(f"the answer ended at byte {file.tell()} of {version.size}")
            except Interruption as problem:
                attempts.wait_after(problem, file.tell())
        if file.tell() > version.size:
            raise InputError(f"{where}: more than the announced {version.size} bytes came")


def _write(file: BinaryIO, piece: bytes) -> None:
    left = memoryview(piece)
    with writing(Path(file.name)):  # here, since the reader of an answer takes an `OSError` for the server's
        while left:  # a disk that is nearly full takes a part
            left = left[file.write(left) :]


def _described(where: str, status: int, headers: email.message.Message) -> tuple[Version, int]:
    """Read from an answer which file it is part of, and where that part begins."""
    tag = headers.get("ETag") or headers.get("Last-Modified") or ""
    if status == 206:
        found = re.fullmatch(r"bytes (\d+)-\d+/(\d+)", headers.get("Content-Range", ""))
        if found is None:
            raise InputError(f"{where}: the server sent a part without saying of what (Content-Range)")
        return Version(int(found[2]), tag), int(found[1])
    size = headers.get("Content-Length")
    if size is None:
        raise InputError(f"{where}: the server does not announce the file's size (Content-Length)")
    return Version(int(size), tag), 0


def _refusal(
    where: str, status: int, reason: str, headers: Mapping[str, str] | email.message.Message
) -> Exception:
    said = f"the server answered {status} {reason}"
    if status in PASSING_STATES or status >= 500:
        return Interruption(said, _retry_after(headers))
    if status == 416:
        return InputError(f"{where}: it is empty, or became shorter while it was read")
    return (AbsentError if status in (404, 410) else InputError)(f"{where}: {said}")


def _retry_after(headers: Mapping[str, str] | email.message.Message) -> float:
    """Read how many seconds a server asks to wait: it says so in seconds or with a date; 0 if it does not."""
    text = headers.get("Retry-After", "").strip()
    if text.isdecimal():
        return float(text)
    try:
        date = email.utils.parsedate_to_datetime(text)
        return max(0.0, (date - datetime.datetime.now(datetime.UTC)).total_seconds())
    except (TypeError, ValueError):  # neither; or a date without a zone
        return 0.0


def _check_same(where: str, version: Version, found: Version) -> None:
    if found != version:
        raise InputError(
            f"{where}: it changed while it was read ({version.size} bytes, {version.tag or 'no tag'} before; now "
            f"{found.size} bytes, {found.tag or 'no tag'}); start anew when nobody writes to it"
        )
