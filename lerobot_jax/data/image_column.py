"""PNG or JPEG images in a column of a parquet file, of struct {bytes, path} as Hugging Face datasets keeps them.

Parquet gives a row only with its whole row group. For random access the encoded images are therefore copied once,
row group by row group, into a flat file in the cache folder, which is memory-mapped.

    entries/NAME/bytes     the images, one after another
    entries/NAME/places    where each one ends, and its CRC-32; only what is in `bytes` for good is in here
    entries/NAME/entry.json
"""

import hashlib
import io
import math
import os
import threading
import zlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import PIL.Image
import pyarrow as pa
import pyarrow.parquet as pq
from absl import logging
from jaxtyping import Int, UInt8

from lerobot_jax.data import cache_folder
from lerobot_jax.data.video_decoder import decoding_threads, resize
from lerobot_jax.errors import InputError
from lerobot_jax.files import read_json, write_json
from lerobot_jax.progress import progress_bar

ROWS_AT_ONCE = 16
PLACE = np.dtype([("end", "<i8"), ("crc32", "<u4")])
VERSION = 1

# A page of parquet can be a whole row group, which a reader holds twice: compressed and not.
_readers = threading.BoundedSemaphore(4)


class ImageColumn:
    """The images of one parquet file, numbered by row."""

    times = None

    def __init__(self, path: Path, key: str, shape: tuple[int, ...], size: tuple[int, int] | None = None):
        """Open nothing yet.

        Args:
            path: the file.
            key: the column.
            shape: that the images must have, (h, w, 3).
            size: (h, w) to resize them to.
        """
        self.path, self.key, self.size = path, key, size
        self.decoded_shape = shape
        self.shape = shape if size is None else (*size, 3)

    @property
    def num_frames(self) -> int:
        with self._open() as file:
            return file.metadata.num_rows

    @property
    def num_encoded_bytes(self) -> int:
        """Give what the column takes without parquet's compression."""
        with self._open() as file:
            metadata = file.metadata
            groups = (metadata.row_group(i) for i in range(metadata.num_row_groups))
            columns = (group.column(i) for group in groups for i in range(group.num_columns))
            return sum(
                c.total_uncompressed_size for c in columns if c.path_in_schema.startswith(f"{self.key}.")
            )

    @property
    def starts(self) -> Int[np.ndarray, " k"]:
        """Give the first row of each row group."""
        with self._open() as file:
            sizes = [file.metadata.row_group(i).num_rows for i in range(file.metadata.num_row_groups)]
        return np.cumsum([0, *sizes[:-1]])

    def decode(self, frames: Sequence[int]) -> Iterator[UInt8[np.ndarray, "h w 3"]]:
        """Yield a run of images in RGB, from the parquet file.

        Raises:
            InputError: when one cannot be decoded or has another size.
        """
        for row, data in enumerate(self.encoded(frames[0], frames[-1] + 1), start=frames[0]):
            yield self.decode_image(data, row)

    def encoded(self, first: int, end: int) -> Iterator[bytes]:
        """Yield the encoded images of the rows from `first` to before `end`."""
        with _readers:
            yield from self._read(first, end)
            pa.default_memory_pool().release_unused()

    def _read(self, first: int, end: int) -> Iterator[bytes]:
        starts = self.starts
        groups = np.unique(np.searchsorted(starts, np.arange(first, end), side="right") - 1)
        row = int(starts[groups[0]])
        with self._open() as file:
            batches = file.iter_batches(ROWS_AT_ONCE, groups.tolist(), [self.key], use_threads=False)
            while row < end and (batch := self._next_batch(batches)) is not None:
                for data in batch.column(0).field("bytes"):
                    if first <= row < end:
                        if not data.is_valid:
                            raise InputError(f"{self._where(row)} holds a path instead of an image")
                        yield data.as_py()
                    row += 1

    def decode_image(self, data: Any, row: int) -> UInt8[np.ndarray, "h w 3"]:
        """Decode one image, to its final size."""
        try:
            image = np.asarray(PIL.Image.open(io.BytesIO(data)).convert("RGB"))
        except (OSError, SyntaxError, ValueError, PIL.Image.DecompressionBombError) as error:
            raise InputError(f"{self._where(row)} cannot be decoded ({error})") from None
        if image.shape != self.decoded_shape:
            raise InputError(f"{self._where(row)} is {image.shape}, info.json says {self.decoded_shape}")
        return image if self.size is None else resize(image, self.size)

    def _where(self, row: int) -> str:
        return f"{self.path}: '{self.key}' in row {row}"

    def _open(self) -> pq.ParquetFile:
        try:
            file = pq.ParquetFile(self.path, buffer_size=1 << 20, pre_buffer=False)
            schema = file.schema_arrow
        except FileNotFoundError:
            raise InputError(f"{self.path}: no such file") from None
        except (pa.ArrowException, OSError) as error:
            raise InputError(f"{self.path}: damaged or incomplete parquet file ({error})") from None
        kind = schema.field(self.key).type if self.key in schema.names else "missing"
        if not _holds_images(kind):
            file.close()
            raise InputError(f"{self.path}: column '{self.key}' is {kind}, images need struct<bytes, path>")
        return file

    def _next_batch(self, batches: Iterator[pa.RecordBatch]) -> pa.RecordBatch | None:
        try:
            return next(batches, None)
        except (pa.ArrowException, OSError) as error:
            raise InputError(f"{self.path}: damaged or incomplete parquet file ({error})") from None


def _holds_images(kind: Any) -> bool:
    if not isinstance(kind, pa.StructType) or kind.get_field_index("bytes") < 0:
        return False
    data = kind.field("bytes").type
    return pa.types.is_binary(data) or pa.types.is_large_binary(data)


class EncodedImages:
    """The copy of a column, memory-mapped."""

    def __init__(self, column: ImageColumn, cache: Path, name: str, lease: cache_folder.Lease):
        self._column, self._cache, self._name, self._lease = column, cache, name, lease
        folder = cache_folder.whole_path(cache, name)
        self._places = np.fromfile(folder / "places", PLACE)
        self._bytes = cache_folder.mapped(folder / "bytes")

    def decode(self, row: int) -> UInt8[np.ndarray, "h w 3"]:
        """Decode the image of one row."""
        if row >= len(self._places):
            raise InputError(f"{self._column.path}: has {len(self._places)} rows, row {row} is wanted")
        start = int(self._places["end"][row - 1]) if row else 0
        data = self._bytes[start : int(self._places["end"][row])]
        if zlib.crc32(data.data) != self._places["crc32"][row]:
            with cache_folder.folder_lock(self._cache):
                cache_folder.remove_entry(self._cache, self._name)
            raise InputError(
                f"{cache_folder.whole_path(self._cache, self._name)}: damaged copy of {self._column.path}; "
                "it is removed: start again and it is made anew"
            )
        return self._column.decode_image(data, row)


def copy_columns(columns: Sequence[ImageColumn], cache: Path) -> list[EncodedImages]:
    """Copy columns into the cache unless they are there; files side by side.

    Raises:
        InputError: when the disk is full, a cell holds no image, or a parquet file is damaged.
    """
    cache_folder.create_cache(cache)
    identities = [cache_folder.identity(column.path) for column in columns]
    digests = cache_folder.digest_sources(identities, cache, decoding_threads())
    names = [cache_folder.entry_name(d, c.key, "encoded") for c, d in zip(columns, digests, strict=True)]
    by_name = dict(zip(names, columns, strict=True))
    identity_of = dict(zip(names, identities, strict=True))
    with cache_folder.folder_lock(cache):
        lease = cache_folder.Lease(cache, names)
        sizes = {n: c.num_encoded_bytes for n, c in by_name.items() if not _copy_is_whole(cache, n)}
        cache_folder.make_room(cache, sum(sizes.values()), math.inf, names)
    with progress_bar("copying images (once)", sum(sizes.values()), "B", unit_scale=True, delay=1) as bar:
        copies = decoding_threads().map(
            lambda name: _copy_column(by_name[name], identity_of[name], cache, name), sizes
        )
        for size, _ in zip(sizes.values(), copies, strict=True):
            bar.update(size)
    return [EncodedImages(c, cache, n, lease) for c, n in zip(columns, names, strict=True)]


def _copy_is_whole(cache: Path, name: str) -> bool:
    """Tell whether a copy is there and undamaged; a damaged one is removed. Call it under `folder_lock`."""
    folder = cache_folder.whole_path(cache, name)
    if not folder.exists():
        return False
    try:
        description = read_json(folder / cache_folder.DESCRIPTION)
        places = (folder / "places").read_bytes()
        if (
            description["version"] == VERSION
            and hashlib.sha256(places).hexdigest() == description["places_sha256"]
            and (folder / "bytes").stat().st_size == np.frombuffer(places, PLACE)["end"][-1]
        ):
            return True
    except (InputError, FileNotFoundError, ValueError, LookupError, TypeError):
        pass
    except OSError as error:  # it may be whole: the fault is elsewhere
        raise InputError(f"{folder}: cannot be read ({error})") from None
    logging.warning("%s: damaged; it is made anew", folder)
    cache_folder.remove_entry(cache, name)
    return False


def _copy_column(column: ImageColumn, identity: cache_folder.Identity, cache: Path, name: str) -> None:
    """Copy a column, or finish what was begun, unless another process does."""
    lock = cache_folder.wait_for_lock(cache / "locks" / name, f"copies the images of {column.path}")
    try:
        folder = cache_folder.partial_path(cache, name)
        if not cache_folder.whole_path(cache, name).exists():
            with cache_folder.folder_lock(cache):
                folder.mkdir(exist_ok=True)
                write_json({"source": str(column.path)}, folder / cache_folder.DESCRIPTION)
            _copy_rows(column, identity, folder)
            places = (folder / "places").read_bytes()
            description = {
                "version": VERSION,
                "source": str(column.path),
                "key": column.key,
                "places_sha256": hashlib.sha256(places).hexdigest(),
            }
            with cache_folder.folder_lock(cache):
                write_json(description, folder / cache_folder.DESCRIPTION)
                folder.rename(cache_folder.whole_path(cache, name))
    except OSError as error:
        if error.errno in cache_folder.DISK_IS_FULL:
            with cache_folder.folder_lock(cache):
                cache_folder.remove_entry(cache, name)
        raise cache_folder.cannot_write(cache, error, column.num_encoded_bytes) from None
    finally:
        os.close(lock)


def _copy_rows(column: ImageColumn, identity: cache_folder.Identity, folder: Path) -> None:
    """Copy what is not there yet, and see that it is all of the file that was digested."""
    (folder / "places").touch()
    places = np.fromfile(folder / "places", PLACE, (folder / "places").stat().st_size // PLACE.itemsize)
    end = int(places["end"][-1]) if len(places) else 0
    (folder / "bytes").touch()
    if (folder / "bytes").stat().st_size < end:  # by hand: begin again
        places, end = places[:0], 0
    num_rows = column.num_frames
    next_starts = {*column.starts.tolist(), num_rows}
    with open(folder / "bytes", "r+b") as data_file, open(folder / "places", "r+b") as place_file:
        data_file.truncate(end)
        data_file.seek(end)
        place_file.truncate(places.nbytes)
        place_file.seek(places.nbytes)
        waiting: list[tuple[int, int]] = []
        images = column.encoded(len(places), num_rows) if len(places) < num_rows else iter(())
        for row, data in enumerate(images, start=len(places)):
            data_file.write(data)
            end += len(data)
            waiting.append((end, zlib.crc32(data)))
            if row + 1 in next_starts:
                cache_folder.check_unchanged(column.path, identity, "copied")
                data_file.flush()
                os.fsync(data_file.fileno())
                place_file.write(np.array(waiting, PLACE).tobytes())
                place_file.flush()
                os.fsync(place_file.fileno())
                waiting = []
    cache_folder.check_unchanged(column.path, identity, "copied")  # what told how many rows there are, too
