"""Train on a dataset that lies elsewhere, or is too big for the disk: only the files needed now are here.

Mirrors `lerobot.datasets.streaming_dataset.StreamingLeRobotDataset` in what it is for. Differences: what stands at
a position is a pure function of (dataset, episodes, seed, buffer_size, max_num_shards), so a run resumes exactly,
with no state to save; an epoch has every frame once; any `delta_timestamps` is exact. `stream_order` explains the
order.

Files are fetched whole: a v3.0 file is needed by many windows and is kept while it is (see `mirror`). A file that
crosses the border of two others (a second camera's, which is cut elsewhere) may be fetched twice in an epoch.

What it takes. On disk: `max_bytes` and `meta/`; the files of two windows must fit, each of which is spread over
`max_num_shards` files of each kind; while held-out episodes are read, one of the two is theirs. In memory: the
numbers of two windows (`tables.bytes_per_frame`), those of the parquet files of one as they are read, the episodes
of `meta/`, 64 MB for transfers through fsspec, and the batches. `buffer_size` should be more than the loader reads
ahead, or windows are opened again and again. Images in parquet files are copied window by window to where each can
be had alone; half of `max_bytes` is left for that.
"""

import contextlib
import dataclasses
import re
import tempfile
import threading
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import fsspec
import huggingface_hub
import numpy as np
from fsspec.implementations.local import LocalFileSystem
from jaxtyping import Int, UInt8

from lerobot_jax import hub
from lerobot_jax.data import info, metadata, metadata_v21
from lerobot_jax.data.dataset import LeRobotDataset
from lerobot_jax.data.download import AbsentError, Closed, FsspecFolder, Patience, RemoteFolder, WebFolder
from lerobot_jax.data.frames import ImageFrames, VideoFrames, rows_by_file
from lerobot_jax.data.mirror import DatasetFiles, FilesInPlace, Mirror
from lerobot_jax.data.samples import Batch
from lerobot_jax.data.stream_order import StreamOrder
from lerobot_jax.data.video_decoder import close_decoders, decoding_threads
from lerobot_jax.errors import InputError, UnwritableError, writing

MAX_BYTES = 50_000_000_000
WINDOWS_OPEN = 2
WINDOWS_EXPECTED = 64  # files are fetched this far ahead, if there is room


@dataclasses.dataclass
class Stream:
    """A dataset elsewhere: what it says of itself, and its files, as far as they are here."""

    address: str
    meta: metadata.LeRobotDatasetMetadata
    files: DatasetFiles

    @contextlib.contextmanager
    def errors_name_the_source(self) -> Iterator[None]:
        """Let an `InputError` name the file where it comes from, and not the copy here."""
        with _source_named(self.files.root, self.address):
            yield

    def files_of(self, episodes: Sequence[int]) -> list[str]:
        return self.meta.episode_files(list(episodes))

    def close(self) -> None:
        """Stop fetching and remove what is here; a process that ends does so by itself."""
        self.files.close()


def open_stream(
    repo_id: str,
    root: str | Path | None = None,
    revision: str | None = None,
    *,
    max_bytes: int = MAX_BYTES,
    patience: Patience | None = None,
) -> Stream:
    """Fetch `meta/` of a dataset, and get ready to fetch the rest as it is needed.

    Args:
        repo_id: the dataset's name, `user/dataset`.
        root: its folder, or any URL of it that fsspec knows; without one it is on the Hub. A folder on this machine
            is read where it is.
        revision: a branch, tag or commit on the Hub, by default the one in the URL, or else the tag of the newest
            format. It is resolved to a commit, `meta.revision`.
        max_bytes: how much may be kept on disk.
        patience: how long to try.

    Raises:
        InputError: saying what was looked for and what happened.
    """
    patience = patience or Patience()
    address, commit = str(root), None
    if root is None or address.startswith("hf://"):
        address, commit = _pinned(repo_id, None if root is None else address, revision)
    remote = _remote_folder(address, patience)
    if isinstance(remote, Path):
        return Stream(
            address, metadata.LeRobotDatasetMetadata.find(repo_id, remote, None), FilesInPlace(remote)
        )
    mirror = Mirror(remote, hub.cache_home() / "streams", max_bytes, patience)
    try:
        with _source_named(mirror.root, address):
            _fetch_meta(mirror)
            meta = metadata.LeRobotDatasetMetadata.load(repo_id, mirror.root, commit)
        if meta.image_keys:
            mirror.max_bytes = (
                max_bytes // 2
            )  # `_WindowImages` takes no more than the files of the open windows
    except BaseException:
        mirror.close()
        raise
    return Stream(address, meta, mirror)


@contextlib.contextmanager
def _source_named(copy: Path, address: str) -> Iterator[None]:
    """Let an `InputError` name the source, unless it is the copy that cannot be written."""
    try:
        yield
    except UnwritableError:
        raise
    except InputError as error:
        raise InputError(str(error).replace(str(copy), address)) from None


def _pinned(repo_id: str, url: str | None, revision: str | None) -> tuple[str, str]:
    """Give the URL of a dataset on the Hub with its commit, and the commit."""
    folder = ""
    if url is not None:
        found = re.fullmatch(r"hf://datasets/([^/@]+/[^/@]+)(?:@([^/]+))?(/.*)?", url.rstrip("/"))
        if found is None:
            raise InputError(f"dataset.root: {url} is not of the form hf://datasets/USER/NAME@REVISION")
        repo_id, revision, folder = found[1], revision or found[2] or "main", found[3] or ""
    revision = revision or metadata.newest_tag(repo_id)
    try:
        commit = huggingface_hub.HfApi().dataset_info(repo_id, revision=revision).sha
    except hub.CALL_ERRORS as error:
        reason, remedy = hub.explain(error)
        raise InputError(
            f"dataset '{repo_id}' (revision {revision}) cannot be streamed from the Hugging Face Hub: {reason}; "
            f"{remedy or 'check the name'}"
        ) from None
    assert commit is not None
    return f"hf://datasets/{repo_id}@{commit}{folder}", commit


def _remote_folder(address: str, patience: Patience) -> RemoteFolder | Path:
    if address.startswith(("http://", "https://")):
        return WebFolder(address, patience.timeout)
    fresh = {"skip_instance_cache": True} if address.startswith("hf://") else {}
    try:
        fs, path = fsspec.core.url_to_fs(address, **fresh)
    except (ImportError, ValueError) as error:
        raise InputError(f"dataset.root: {address} cannot be opened: {error}") from None
    return Path(path) if isinstance(fs, LocalFileSystem) else FsspecFolder(fs, path)


def _fetch_meta(mirror: Mirror) -> None:
    """Fetch what `LeRobotDatasetMetadata.load` reads; no server needs to list its files for that."""
    mirror.fetch_now(info.INFO_PATH)
    declared = info.load_info(mirror.root)
    if declared["codebase_version"] == info.V21:
        for name in (info.TASKS_IN[info.V21], info.EPISODES_IN[info.V21], metadata_v21.STATS_PATH):
            mirror.fetch_now(name)
        return
    mirror.fetch_now(info.TASKS_PATH)
    with contextlib.suppress(AbsentError):
        mirror.fetch_now(info.STATS_PATH)
    chunk = file = found = 0
    while found < declared["total_episodes"]:
        try:
            path = mirror.fetch_now(info.EPISODES_PATH.format(chunk_index=chunk, file_index=file))
        except AbsentError:
            if file == 0:
                raise
            chunk, file = chunk + 1, 0
        else:
            found += len(metadata.read_parquet(path, ["episode_index"]))
            file += 1


class _Window:
    """Some episodes of a stream, to be read at any frame."""

    def __init__(self, stream: Stream, episodes: list[int]):
        self.episodes, self.files = episodes, stream.files_of(episodes)
        self.readers = 0
        self.lock = threading.Lock()
        self.dataset: LeRobotDataset | None = None

    def open(self, stream: Stream, settings: Mapping[str, Any]) -> None:
        stream.files.wait_for(self.files)
        dataset = LeRobotDataset(stream.meta.repo_id, episodes=self.episodes, meta=stream.meta, **settings)
        for camera in dataset.cameras.values():
            if isinstance(camera, ImageFrames):
                camera.read_from(_WindowImages(camera, hub.cache_home() / "streams"))
        index = dataset.columns["index"]
        self._rows = np.argsort(index)
        self._index = index[self._rows]
        self.dataset = dataset

    def close(self) -> None:
        """Close its files, so that they take no room once they are removed."""
        for camera in self.dataset.cameras.values() if self.dataset else ():
            if isinstance(camera, VideoFrames):
                close_decoders(camera.files)

    def read(self, frames: Int[np.ndarray, " b"], keys: Collection[str]) -> Batch:
        assert self.dataset is not None
        return self.dataset.read(self._rows[np.searchsorted(self._index, frames)], keys)


class _WindowImages:
    """A window's images, still encoded, in a file without a name that is gone with the window."""

    def __init__(self, camera: ImageFrames, folder: Path):
        self._columns, self._file_of_row = camera.files, camera.file_of_row
        self._places, self._shape = camera.places(camera.files), camera.shape
        self._spans = np.zeros((len(self._places), 2), np.int64)
        with writing(folder):
            folder.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryFile(dir=folder) as file:
                for number, rows in rows_by_file(self._file_of_row):
                    row_of_place = dict(zip(self._places[rows].tolist(), rows.tolist(), strict=True))
                    first, last = min(row_of_place), max(row_of_place)
                    for place, data in enumerate(self._columns[number].encoded(first, last + 1), start=first):
                        if place in row_of_place:
                            self._spans[row_of_place[place]] = file.tell(), file.tell() + len(data)
                            file.write(data)
                file.flush()
                self._bytes = np.memmap(file, np.uint8, "r")

    def read(self, rows: Int[np.ndarray, " b"]) -> UInt8[np.ndarray, "b h w c"]:
        frames = np.empty((len(rows), *self._shape), np.uint8)

        def decode(i: int) -> None:
            start, end = self._spans[rows[i]]
            column = self._columns[self._file_of_row[rows[i]]]
            frames[i] = column.decode_image(self._bytes[start:end], int(self._places[rows[i]]))

        list(decoding_threads().map(decode, range(len(rows))))
        return frames


class StreamedSamples:
    """Frames of a stream, shuffled; a context manager that closes the stream."""

    def __init__(
        self,
        stream: Stream,
        episodes: Sequence[int],
        keys: Collection[str],
        seed: int,
        *,
        buffer_size: int = 10_000,
        max_num_shards: int = 4,
        drop_n_last_frames: int = 0,
        finish: Callable[[Batch], Batch] = lambda batch: batch,
        **settings: Any,
    ):
        """Args:
        stream: where the samples are.
        episodes, seed, buffer_size, max_num_shards, drop_n_last_frames: see `StreamOrder`.
        keys: the entries that a sample has.
        finish: changes a batch that was read in training order.
        settings: `delta_timestamps`, `tolerance_s`, `cameras`, `image_size`, `added_columns` of `LeRobotDataset`.
        """
        for name, value in (("buffer_size", buffer_size), ("max_num_shards", max_num_shards)):
            if value < 1:
                raise InputError(f"dataset.{name} must be at least 1, it is {value}")
        self.stream, self.keys, self._settings, self._finish = stream, keys, settings, finish
        self._buffer_size = buffer_size
        self.order = StreamOrder(stream.meta, episodes, seed, buffer_size, max_num_shards, drop_n_last_frames)
        self._changed = threading.Condition()
        self._windows: dict[int, _Window] = {}  # in the order of their last use
        self._num_validating = 0  # windows of held-out episodes that are open
        self._wanted = -1  # the window to open ahead
        self._is_closed = False
        self._thread = threading.Thread(target=self._open_ahead, name="stream", daemon=True)
        self._thread.start()

    def __enter__(self) -> "StreamedSamples":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def __len__(self) -> int:
        """The number of frames in an epoch."""
        return self.order.num_frames

    def close(self) -> None:
        """Close the stream; a thread that is reading gets `Closed`."""
        with self._changed:
            self._is_closed = True
            self._changed.notify_all()
        self.stream.close()
        self._thread.join(1.0)
        for window in self._windows.values():
            window.close()

    def read(self, positions: Int[np.ndarray, " b"]) -> Batch:
        windows, frames = self.order.locate(positions)
        parts, places = [], []
        for number in np.unique(windows):
            here = np.flatnonzero(windows == number)
            with self._reading(int(number)) as window:
                self._look_ahead(int(number))
                parts.append(window.read(frames[here], self.keys))
            places.append(here)
        batch = parts[0] if len(parts) == 1 else _joined(parts, np.argsort(np.concatenate(places)))
        return self._finish(batch)

    def validation_batches(
        self, episodes: Sequence[int], batch_size: int, max_samples: int = 0
    ) -> Iterator[Batch]:
        """Yield frames of some episodes once, in order, at most `max_samples` (0: all), as many of each task.

        The last batch may be smaller. The frames of an episode count for its first task; where episodes have one
        task each, these are the frames of `LeRobotDataset.first_rows`.
        """
        parts: list[Batch] = []
        missing = batch_size
        for some, frames in _in_order(self.stream.meta, episodes, max_samples, self._buffer_size):
            window = _Window(self.stream, some)
            with self._changed:
                while len(self._windows) + self._num_validating >= WINDOWS_OPEN:
                    self._close_one(None)
                self._num_validating += 1
            self.stream.files.hold(window.files)
            try:
                with self.stream.errors_name_the_source():
                    window.open(self.stream, self._settings)
                while len(frames):
                    with self.stream.errors_name_the_source():
                        parts.append(window.read(frames[:missing], self.keys))
                    missing, frames = missing - len(frames[:missing]), frames[missing:]
                    if missing == 0:
                        yield _joined(parts)
                        parts, missing = [], batch_size
            finally:
                window.close()
                self.stream.files.release(window.files)
                with self._changed:
                    self._num_validating -= 1
                    self._changed.notify_all()
        if parts:
            yield _joined(parts)

    @contextlib.contextmanager
    def _reading(self, number: int, keep: int | None = None) -> Iterator[_Window]:
        """Open a window if it is not open yet, and keep it open meanwhile; not at the cost of the window `keep`."""
        with self._changed:
            while number not in self._windows and len(self._windows) + self._num_validating >= WINDOWS_OPEN:
                self._close_one(keep)
            if self._is_closed:
                raise Closed
            window = self._windows.pop(number, None)
            if window is None:
                window = _Window(self.stream, self.order.episodes_of(number))
                self.stream.files.hold(window.files)
            self._windows[number] = window
            window.readers += 1
        try:
            with self.stream.errors_name_the_source():
                with window.lock:
                    if window.dataset is None:
                        window.open(self.stream, self._settings)
                yield window
        finally:
            with self._changed:
                window.readers -= 1
                self._changed.notify_all()

    def _close_one(self, keep: int | None) -> None:
        """Close the window that was not used for longest, or wait until one may be closed."""
        idle = [number for number, window in self._windows.items() if window.readers == 0 and number != keep]
        if not idle:
            self._changed.wait()
            if self._is_closed:
                raise Closed
            return
        window = self._windows.pop(idle[0])
        window.close()
        self.stream.files.release(window.files)

    def _look_ahead(self, number: int) -> None:
        """Have the next window opened, and the files of those after it fetched."""
        with self._changed:
            if number < max(self._windows) or number + 1 == self._wanted:
                return
            self._wanted = number + 1
            self._changed.notify_all()
        coming = range(number + 1, number + 1 + WINDOWS_EXPECTED)
        self.stream.files.expect(
            [name for later in coming for name in self.stream.files_of(self.order.episodes_of(later))]
        )

    def _open_ahead(self) -> None:
        done = -1
        while True:
            with self._changed:
                while self._wanted == done and not self._is_closed:
                    self._changed.wait()
                if self._is_closed:
                    return
                done = self._wanted
            try:
                with self._reading(done, keep=done - 1):
                    pass
            except Closed:
                return
            except Exception:  # the thread that needs the window will meet it again
                continue


def _joined(parts: Sequence[Batch], order: Int[np.ndarray, " b"] | None = None) -> Batch:
    """Make one batch of several, and put its samples in order."""
    batch = {}
    for key in parts[0]:
        values = [part[key] for part in parts]
        if isinstance(values[0], list):
            flat = [value for part in values for value in part]
            batch[key] = flat if order is None else [flat[i] for i in order]
        else:
            flat = values[0] if len(values) == 1 else np.concatenate(values)
            batch[key] = flat if order is None else flat[order]
    return batch


def _in_order(
    meta: metadata.LeRobotDatasetMetadata, episodes: Sequence[int], max_samples: int, buffer_size: int
) -> Iterator[tuple[list[int], Int[np.ndarray, " n"]]]:
    """Yield groups of episodes of about `buffer_size` frames, and the frames to read of them."""
    tasks = {_first_task(meta, episode) for episode in episodes}
    left = dict.fromkeys(
        tasks, max(1, max_samples // max(1, len(tasks))) if max_samples else meta.total_frames
    )
    group: list[int] = []
    frames: list[np.ndarray] = []
    for episode in sorted(episodes):
        task = _first_task(meta, episode)
        first = int(meta.episodes["dataset_from_index"][episode])
        length = min(int(meta.episodes["length"][episode]), left[task])
        left[task] -= length
        if length:
            group.append(episode)
            frames.append(first + np.arange(length))
        if sum(map(len, frames)) >= buffer_size:
            yield group, np.concatenate(frames)
            group, frames = [], []
    if group:
        yield group, np.concatenate(frames)


def _first_task(meta: metadata.LeRobotDatasetMetadata, episode: int) -> str:
    tasks = meta.episodes["tasks"][episode] if "tasks" in meta.episodes else []
    return tasks[0] if len(tasks) else ""
