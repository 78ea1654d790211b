"""A folder of things that were computed from files once: what is there, who uses it, how much it may take.

    entries/NAME           a whole entry; it appears by one rename
    entries/NAME.partial   one that is being built, or whose builder died: the next builder goes on from there
    locks/NAME             locked (flock) by the process that builds the entry; holds its process id
    users/ID               locked by a process as long as it uses the entries that are listed in it
    digests.jsonl          which file had which SHA-256
    removed/               what is just being removed
    lock                   held for moments, while entries are counted, claimed, finished or removed

A name begins with the digest of the source's content, so a copied or moved source finds its entries again and
a changed one never does. Locks end with their process, however it ends.
"""

import contextlib
import dataclasses
import errno
import fcntl
import hashlib
import json
import os
import shutil
import time
import uuid
import weakref
from collections.abc import Collection, Iterator, Sequence
from concurrent.futures import Executor
from pathlib import Path

import numpy as np
import pyarrow as pa
from absl import logging
from jaxtyping import UInt8

from lerobot_jax.errors import InputError
from lerobot_jax.files import read_json
from lerobot_jax.progress import progress_bar

DESCRIPTION = "entry.json"
PARTIAL = ".partial"
DISK_IS_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


@dataclasses.dataclass(frozen=True)
class CacheEntry:
    """One entry as it is on disk.

    Attributes:
        name: its own.
        source: the file that it was made from, as it was called then; "" if that cannot be read.
        num_bytes: what it takes on disk.
        last_use: seconds since 1970.
        is_whole: whether it can be used; otherwise the next run completes it.
        in_use: whether a process uses it, builds it or is about to.
    """

    name: str
    source: str
    num_bytes: int
    last_use: float
    is_whole: bool
    in_use: bool


def create_cache(cache: Path) -> None:
    """Create the folder; raise `InputError` when it cannot be written, or its file system has no locks."""
    try:
        for name in ("entries", "locks", "users", "removed"):
            (cache / name).mkdir(parents=True, exist_ok=True)
        with folder_lock(cache):
            pass
    except OSError as error:
        raise InputError(
            f"{cache}: cannot keep frames here ({error}); let LEROBOT_JAX_CACHE name another folder"
        ) from None


def entry_name(digest: str, key: str, form: str) -> str:
    """Name what is made in some form from a file, or from one of its columns."""
    column = f"-{hashlib.sha256(key.encode()).hexdigest()[:16]}" if key else ""
    return f"{digest}{column}-{form}"


def whole_path(cache: Path, name: str) -> Path:
    return cache / "entries" / name


def partial_path(cache: Path, name: str) -> Path:
    return cache / "entries" / f"{name}{PARTIAL}"


def mapped(path: Path) -> UInt8[np.ndarray, " n"]:
    """Map a file into memory. Unlike those of `np.memmap`, maps keep no file open: there may be thousands."""
    with pa.memory_map(str(path)) as file:
        return np.frombuffer(file.read_buffer(), np.uint8)


def try_lock(path: Path) -> int | None:
    """Take a lock unless another process or thread has it; closing the returned file ends it."""
    try:
        return _lock(path, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return None


def wait_for_lock(path: Path, what: str) -> int:
    """Take a lock as soon as it is free, and say for whom it waits; closing the returned file ends it."""
    file = try_lock(path)
    if file is None:
        logging.info("waiting for process %s, which %s", _lock_holder(path), what)
        file = _lock(path, fcntl.LOCK_EX)
    with contextlib.suppress(OSError):  # on a full disk, who waits is not told for whom
        os.ftruncate(file, 0)
        os.write(file, str(os.getpid()).encode())
    return file


def is_locked(path: Path) -> bool:
    """Tell whether another process or thread has a lock."""
    if not path.exists():
        return False
    file = try_lock(path)
    if file is not None:
        os.close(file)
    return file is None


@contextlib.contextmanager
def folder_lock(cache: Path) -> Iterator[None]:
    """Keep all others from counting, claiming, finishing or removing entries."""
    file = _lock(cache / "lock", fcntl.LOCK_EX)
    try:
        yield
    finally:
        os.close(file)


class Lease:
    """Keeps entries from being removed, as long as it lives and its process runs."""

    def __init__(self, cache: Path, names: Collection[str]):
        """Call it under `folder_lock`; raise `InputError` when the disk is full."""
        path = cache / "users" / f"{os.getpid()}-{uuid.uuid4().hex}"
        try:
            path.write_text(json.dumps(sorted(names)))
            file = _lock(path, fcntl.LOCK_EX)
        except OSError as error:
            path.unlink(missing_ok=True)
            raise cannot_write(cache, error) from None
        self.end = weakref.finalize(self, _end_lease, file, path)
        for name in names:
            with contextlib.suppress(FileNotFoundError):
                os.utime(whole_path(cache, name))


Identity = tuple[str, int, int, int]


def identity(path: Path) -> Identity:
    """Give what tells whether a file is the one of last time: path, size, times of modification and change (ns)."""
    try:
        stat = path.stat()
    except FileNotFoundError:
        raise InputError(f"{path}: no such file") from None
    return str(path.resolve()), stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns


def check_unchanged(path: Path, known: Identity, done: str) -> None:
    """Raise `InputError` when a file is not the one that it was before something was done with it."""
    if identity(path) != known:
        raise InputError(f"{path}: changed while it was {done}; start again")


def digest_sources(identities: Sequence[Identity], cache: Path, threads: Executor) -> list[str]:
    """Give the SHA-256 of each file, from memory where the identity is that of last time."""
    known = _read_digests(cache)
    unknown = sorted({i for i in identities if i not in known})
    with progress_bar(
        "reading files (once)", sum(i[1] for i in unknown), "B", unit_scale=True, delay=1
    ) as bar:
        for source, digest in zip(unknown, threads.map(_digest, [i[0] for i in unknown]), strict=True):
            known[source] = digest
            bar.update(source[1])
            # Within the clock's resolution a file can change without looking changed: such ones are read again.
            if time.time_ns() - max(source[2:]) > 2e9 and source == identity(Path(source[0])):
                _remember_digest(source, digest, cache)
    return [known[source] for source in identities]


def list_entries(cache: Path) -> list[CacheEntry]:
    """List what is in the cache, whole or not."""
    if not (cache / "entries").exists():
        return []
    with folder_lock(cache):
        return read_entries(cache)


def read_entries(cache: Path) -> list[CacheEntry]:
    """List what is in the cache; call it under `folder_lock`."""
    used = _names_in_use(cache)
    entries = []
    for folder in sorted(path for path in (cache / "entries").iterdir() if path.is_dir()):
        name = folder.name.removesuffix(PARTIAL)
        is_whole = name == folder.name
        try:
            source = str(read_json(folder / DESCRIPTION)["source"])
        except (InputError, KeyError, TypeError):
            source = ""
        num_bytes = sum(file.stat().st_size for file in folder.iterdir())
        in_use = name in used or (not is_whole and is_locked(cache / "locks" / name))
        entries.append(CacheEntry(name, source, num_bytes, folder.stat().st_mtime, is_whole, in_use))
    return entries


def remove_entries(cache: Path, even_in_use: bool = False) -> list[CacheEntry]:
    """Remove the entries that no process uses, or all but those that are being built; return them.

    Who uses an entry that is removed may go on; its room is free when the last one ends.
    """
    if not (cache / "entries").exists():
        return []
    with folder_lock(cache):
        chosen = [e for e in read_entries(cache) if not e.in_use or (even_in_use and e.is_whole)]
        for entry in chosen:
            remove_entry(cache, entry.name)
    return chosen


def make_room(cache: Path, needed: int, budget: float, keep: Collection[str]) -> bool:
    """Remove what was not used for longest until `needed` bytes more fit; call it under `folder_lock`.

    Entries that are in use or named in `keep` stay. If that does not leave enough, nothing is removed.

    Returns:
        Whether the cache may hold that much.

    Raises:
        InputError: when the disk cannot.
    """
    entries = read_entries(cache)
    removable = [entry for entry in entries if not entry.in_use and entry.name not in keep]
    removable.sort(key=lambda entry: entry.last_use)
    possible = sum(entry.num_bytes for entry in removable)
    over_budget = sum(entry.num_bytes for entry in entries) + needed - budget
    if over_budget > possible:
        return False
    over_disk = needed - shutil.disk_usage(cache).free
    if over_disk > possible:
        raise disk_is_full(cache, needed)
    excess = max(over_budget, over_disk)
    for entry in removable:
        if excess > 0:
            logging.info("removing the frames of %s, last used longest ago", entry.source or entry.name)
            remove_entry(cache, entry.name)
            excess -= entry.num_bytes
    return True


def remove_entry(cache: Path, name: str) -> None:
    """Remove an entry at once, whole or partial; call it under `folder_lock`. Who reads it may go on."""
    rubbish = cache / "removed"
    rubbish.mkdir(exist_ok=True)  # it stays: on a full disk there may be no room for a new one
    for folder in (whole_path(cache, name), partial_path(cache, name)):
        with contextlib.suppress(FileNotFoundError):
            folder.rename(rubbish / uuid.uuid4().hex)
    for folder in rubbish.iterdir():
        shutil.rmtree(folder, ignore_errors=True)
    (cache / "locks" / name).unlink(missing_ok=True)


def cannot_write(cache: Path, error: OSError, needed: int = 0) -> InputError:
    """Say why something could not be written; `needed` bytes were to be."""
    if error.errno in DISK_IS_FULL:
        return disk_is_full(cache, needed, f" ({error.strerror})")
    return InputError(f"{cache}: decoded frames cannot be kept ({error})")


def disk_is_full(cache: Path, needed: int, detail: str = "") -> InputError:
    """Say how much is missing, and what can be done."""
    free = shutil.disk_usage(cache).free
    return InputError(
        f"{cache}: no room to keep decoded frames{detail}: {needed / 1e9:.2f} GB are needed, {free / 1e9:.2f} GB "
        "are free; make room, lower dataset.frame_cache_gb, or let LEROBOT_JAX_CACHE name a folder on another disk"
    )


def _lock(path: Path, how: int) -> int:
    while True:
        file = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
        try:
            fcntl.flock(file, how)
            with contextlib.suppress(FileNotFoundError):
                if os.stat(path).st_ino == os.fstat(file).st_ino:
                    return file
        except BaseException:
            os.close(file)
            raise
        os.close(file)  # it was removed with its entry in between


def _lock_holder(path: Path) -> str:
    with contextlib.suppress(OSError):
        return path.read_text() or "unknown"
    return "unknown"


def _end_lease(file: int, path: Path) -> None:
    path.unlink(missing_ok=True)
    os.close(file)


def _names_in_use(cache: Path) -> set[str]:
    names: set[str] = set()
    for path in (cache / "users").iterdir():
        if is_locked(path):
            with contextlib.suppress(FileNotFoundError):  # it ended just now
                names |= set(json.loads(path.read_text()))
        else:
            path.unlink(missing_ok=True)
    return names


def _read_digests(cache: Path) -> dict[Identity, str]:
    known = {}
    with contextlib.suppress(OSError):
        for line in (cache / "digests.jsonl").read_text(encoding="utf-8", errors="replace").splitlines():
            try:
                path, size, modified, changed, digest = json.loads(line)
                known[(path, size, modified, changed)] = digest
            except (ValueError, TypeError):  # a damaged line: its file is read again
                continue
    return known


def _remember_digest(source: Identity, digest: str, cache: Path) -> None:
    # On a full disk it is forgotten: the next run reads the file again.
    with contextlib.suppress(OSError), open(cache / "digests.jsonl", "a", encoding="utf-8") as file:
        file.write(json.dumps([*source, digest]) + "\n")


def _digest(path: str) -> str:
    try:
        with open(path, "rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        raise InputError(f"{path}: {error.strerror}") from None
