"""The part of a remote dataset that is needed now, in a local folder of bounded size.

Readers hold the files that they need; those that will be needed next are fetched meanwhile, as many as there is
room for. When room is wanted, the files go that are needed last. A mirror belongs to one process: it is locked
while the process lives and removed when it ends; what a killed one left behind is removed by the next. So every
file in it was fetched completely by its own process, and is the same file for as long as the run lasts.
"""

import atexit
import contextlib
import shutil
import threading
import time
import uuid
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import filelock

from lerobot_jax.data.download import Closed, Patience, RemoteFolder, Version, download, look
from lerobot_jax.errors import InputError, writing

TRANSFERS_AT_ONCE = 8
JOIN_SECONDS = 1.0  # a thread that waits for a server longer is left to itself


class FilesInPlace:
    """What `Mirror` is, for a folder on this machine: its files are all there already."""

    def __init__(self, root: Path):
        self.root = root

    def hold(self, names: Sequence[str]) -> None: ...

    def wait_for(self, names: Sequence[str]) -> None: ...

    def release(self, names: Sequence[str]) -> None: ...

    def expect(self, names: Sequence[str]) -> None: ...

    def close(self) -> None: ...


class Mirror:
    """Files of a remote folder, fetched by background threads into `root`, at most `max_bytes` at any time."""

    def __init__(self, remote: RemoteFolder, parent: Path, max_bytes: int, patience: Patience):
        """Args:
        remote: where the files are.
        parent: where mirrors are made.
        max_bytes: how much `hold` and `expect` may keep on disk, partial files included.
        patience: how long to try.
        """
        self._remote, self.max_bytes, self._patience = remote, max_bytes, patience
        with writing(parent):
            self.root, self._lock = _make_locked_folder(parent)
        self._stopped = threading.Event()
        self._changed = threading.Condition()
        self._versions: dict[str, Version] = {}
        self._present: dict[str, int] = {}  # name -> bytes, in the order of their last use
        self._coming: dict[str, int] = {}  # name -> bytes that it will have, 0 while only asked about
        self._failed: dict[str, Exception] = {}
        self._broken: BaseException | None = None  # what ended a thread before its time
        self._held: Counter[str] = Counter()
        self._expected: dict[str, int] = {}  # name -> its place in the order of need
        self._threads = [
            threading.Thread(target=self._run, name="mirror", daemon=True) for _ in range(TRANSFERS_AT_ONCE)
        ]
        for thread in self._threads:
            thread.start()
        atexit.register(self.close)

    def fetch_now(self, name: str) -> Path:
        """Fetch a file that stays and does not count."""
        version = look(self._remote, name, self._patience, self._stopped)
        download(self._remote, name, self.root / name, version, self._patience, self._stopped)
        return self.root / name

    def hold(self, names: Sequence[str]) -> None:
        """Keep files, and fetch them before all others."""
        with self._changed:
            for name in names:
                if self._held[name] == 0:
                    self._failed.pop(name, None)  # it may have been fetched ahead while the network was away
                self._held[name] += 1
                if name in self._present:
                    size = self._present.pop(name)
                    if (self.root / name).is_file():  # else somebody removed it, and it comes again
                        self._present[name] = size
            self._changed.notify_all()

    def wait_for(self, names: Sequence[str]) -> None:
        """Wait until files that are held are there; raise what kept one from coming."""
        with self._changed:
            while any(name not in self._present for name in names):
                if self._stopped.is_set():
                    raise Closed
                if self._broken is not None:
                    raise self._broken
                for name in names:
                    if name in self._failed:
                        raise self._failed[name]
                self._changed.wait()

    def release(self, names: Sequence[str]) -> None:
        """Undo `hold`."""
        with self._changed:
            self._held.subtract(names)
            self._held = +self._held
            self._changed.notify_all()

    def expect(self, names: Sequence[str]) -> None:
        """Say which files are wanted next, in that order."""
        with self._changed:
            self._expected = {name: place for place, name in enumerate(dict.fromkeys(names))}
            self._changed.notify_all()

    def close(self) -> None:
        """Stop the threads and remove the folder; who waits for a file gets `Closed`."""
        atexit.unregister(self.close)
        self._stopped.set()
        with self._changed:
            self._changed.notify_all()
        deadline = time.monotonic() + JOIN_SECONDS
        for thread in self._threads:
            thread.join(max(0.0, deadline - time.monotonic()))
        shutil.rmtree(self.root, ignore_errors=True)
        self._lock.release()
        Path(self._lock.lock_file).unlink(missing_ok=True)

    def _run(self) -> None:
        try:
            self._work()
        except BaseException as error:  # whoever waits gets it, instead of waiting for ever
            with self._changed:
                self._broken = error
                self._changed.notify_all()

    def _work(self) -> None:
        while (name := self._next()) is not None:
            version = self._versions.get(name)
            try:
                if version is None:
                    self._versions[name] = look(self._remote, name, self._patience, self._stopped)
                else:
                    download(self._remote, name, self.root / name, version, self._patience, self._stopped)
                    with self._changed:
                        self._present[name] = version.size
            except Closed:
                return
            except Exception as error:  # whoever needs the file gets it
                if self._stopped.is_set():  # the folder is gone
                    return
                with self._changed:
                    self._failed[name] = error
            with self._changed:
                del self._coming[name]
                self._changed.notify_all()

    def _next(self) -> str | None:
        """Wait for a file to ask about or to fetch; None at the end."""
        with self._changed:
            while not self._stopped.is_set():
                name = self._choose()
                if name is not None:
                    version = self._versions.get(name)
                    self._coming[name] = 0 if version is None else version.size
                    return name
                self._changed.wait()
        return None

    def _choose(self) -> str | None:
        """Choose the file that is needed first of those that fit, and make room for it."""
        for name in (*self._held, *self._expected):
            if name in self._present or name in self._coming or name in self._failed:
                continue
            if name not in self._versions or self._make_room(name):
                return name
            if name not in self._held or any(other not in self._held for other in self._coming):
                return None  # until room is made: not for smaller files that are needed later
            self._failed[name] = self._too_much(name)
            self._changed.notify_all()
        return None

    def _make_room(self, name: str) -> bool:
        """Remove files that are needed later than this one, if that makes enough room."""
        never = len(self._expected)
        place = -1 if name in self._held else self._expected[name]
        others = [other for other in self._present if other not in self._held]
        # Of those that are not expected at all, the first are the least recently used.
        others.sort(key=lambda other: -self._expected.get(other, never))
        removable = [other for other in others if self._expected.get(other, never) > place]
        used = sum(self._present.values()) + sum(self._coming.values())
        excess = used + self._versions[name].size - self.max_bytes
        if excess > sum(self._present[other] for other in removable):
            return False
        for other in removable:
            if excess <= 0:
                break
            excess -= self._present.pop(other)
            (self.root / other).unlink(missing_ok=True)
        return True

    def _too_much(self, name: str) -> InputError:
        needed = sum(self._versions[held].size for held in {*self._held, name} if held in self._versions)
        return InputError(
            f"{self._remote.address(name)}: files of at least {needed / 1e9:.3g} GB are needed at once, and the "
            f"stream may keep {self.max_bytes / 1e9:.3g} GB; let it keep more, or lower buffer_size"
        )


DatasetFiles = Mirror | FilesInPlace


def _make_locked_folder(parent: Path) -> tuple[Path, filelock.FileLock]:
    """Make a folder, and remove those beside it whose process has ended."""
    parent.mkdir(parents=True, exist_ok=True)
    with filelock.FileLock(parent / "all.lock"):
        for left in parent.glob("mirror-*.lock"):
            lock = filelock.FileLock(left, timeout=0)
            with contextlib.suppress(filelock.Timeout), lock:
                shutil.rmtree(left.with_suffix(""), ignore_errors=True)
                left.unlink(missing_ok=True)
        root = parent / f"mirror-{uuid.uuid4().hex}"
        lock = filelock.FileLock(root.with_suffix(".lock"), thread_local=False)
        lock.acquire()
        root.mkdir()
        return root, lock
