import errno
import os
import resource
import shutil
import time
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from lerobot_jax.data import cache_folder, frame_cache, frame_entry, video
from lerobot_jax.data.frame_cache import cached_frames
from lerobot_jax.data.frames import ImageFrames, VideoFrames
from lerobot_jax.data.video_decoder import NUM_THREADS, VideoFile
from lerobot_jax.errors import InputError
from tests.data.cameras import KEY, SHAPE, film, image_camera, image_table, pictures, video_camera

FRAME_BYTES = 32 * 48 * 3
ENTRY_GB = 40 * (FRAME_BYTES + 8) / 1e9


@pytest.fixture(autouse=True)
def small_segments(monkeypatch) -> None:
    monkeypatch.setattr(frame_entry, "SEGMENT_BYTES", 8 * FRAME_BYTES)  # five segments a film


@pytest.fixture
def cache(tmp_path: Path) -> Path:
    return tmp_path / "cache"


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return film(tmp_path / "a.mp4", seed=1)


def whole(path: Path) -> np.ndarray:
    return np.stack([frame for _, frame in video.decode_video(path)])


def counted(monkeypatch) -> list[int]:
    """List the first frame of each segment that is decoded from now on."""
    decoded: list[int] = []
    original = VideoFile.decode

    def decode(self, frames):
        decoded.append(frames[0])
        return original(self, frames)

    monkeypatch.setattr(VideoFile, "decode", decode)
    return decoded


def test_frames_are_decoded_once(path: Path, cache: Path, tmp_path: Path, monkeypatch):
    other = film(tmp_path / "b.mp4", seed=2)
    frames = np.concatenate([whole(path), whole(other)])
    decoded = counted(monkeypatch)
    first = video_camera(path, other)
    assert cached_frames([first], cache, 1)
    assert sorted(decoded) == [0, 0, 8, 8, 16, 16, 24, 24, 32, 32]
    again = video_camera(path, other)
    assert cached_frames([again], cache, 1)
    for camera in (first, again):
        for rows in (np.arange(80), np.array([79, 3, 3, 40]), np.array([50, 41])):
            np.testing.assert_array_equal(camera.read(rows), frames[rows])
    assert len(decoded) == 10


def test_a_copy_of_a_file_finds_its_frames_and_a_changed_one_does_not(path: Path, cache: Path, monkeypatch):
    cached_frames([video_camera(path)], cache, 1)
    decoded = counted(monkeypatch)
    copy = path.with_name("copy.mp4")
    shutil.copy2(path, copy)
    cached_frames([video_camera(copy)], cache, 1)
    assert decoded == []
    stat = path.stat()
    content = bytearray(film(path.with_name("other.mp4"), seed=3).read_bytes())
    path.write_bytes(content + bytes(max(0, stat.st_size - len(content))))
    os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    camera = video_camera(path)
    cached_frames([camera], cache, 1)
    assert len(decoded) == 5
    np.testing.assert_array_equal(camera.read(np.arange(40)), whole(path))


def test_a_digest_is_remembered_by_what_cannot_change_unseen(path: Path, cache: Path, monkeypatch):
    digested = []
    original = cache_folder._digest
    monkeypatch.setattr(cache_folder, "_digest", lambda file: digested.append(file) or original(file))
    cached_frames([video_camera(path)], cache, 1)
    cached_frames([video_camera(path)], cache, 1)
    assert len(digested) == 2  # it is too young: it could have changed within the clock's resolution
    later = time.time_ns() + 10**10
    monkeypatch.setattr(time, "time_ns", lambda: later)
    for _ in range(3):
        cached_frames([video_camera(path)], cache, 1)
    assert len(digested) == 3
    with open(cache / "digests.jsonl", "a") as file:
        file.write('{"torn": \n5\n')
    cached_frames([video_camera(path)], cache, 1)
    path.touch()
    cached_frames([video_camera(path)], cache, 1)
    assert len(digested) == 4


def test_sizes_and_columns_have_entries_of_their_own(path: Path, cache: Path, tmp_path: Path):
    table = image_table(tmp_path / "a.parquet")
    cameras = [
        video_camera(path),
        video_camera(path, size=(16, 20)),
        image_camera(table),
        image_camera(table),
    ]
    plain = [camera.read(np.arange(40)) for camera in (cameras[0], video_camera(path, size=(16, 20)))]
    assert cached_frames(cameras, cache, 1)
    np.testing.assert_array_equal(cameras[0].read(np.arange(40)), plain[0])
    np.testing.assert_array_equal(cameras[1].read(np.arange(40)), plain[1])
    np.testing.assert_array_equal(cameras[2].read(np.arange(40)), pictures(40))
    np.testing.assert_array_equal(cameras[3].read(np.array([7])), pictures(40)[[7]])
    assert len(cache_folder.list_entries(cache)) == 3


def test_an_interrupted_build_goes_on_where_it_was(path: Path, cache: Path, monkeypatch):
    decoded = counted(monkeypatch)
    original = frame_cache._Builder.keep

    def keep(self, segments):
        kept = original(self, segments)
        if os.path.getsize(self._folder / "done") and (self._folder / "done").read_bytes().count(1) >= 2:
            raise KeyboardInterrupt
        return kept

    with monkeypatch.context() as interrupted:
        interrupted.setattr(frame_cache._Builder, "keep", keep)
        with pytest.raises(KeyboardInterrupt):
            cached_frames([video_camera(path)], cache, 1)
    (entry,) = cache_folder.list_entries(cache)
    assert (entry.is_whole, entry.in_use) == (False, False)
    kept = next(cache.glob("entries/*/done")).read_bytes().count(1)
    decoded.clear()
    camera = video_camera(path)
    assert cached_frames([camera], cache, 1)
    assert len(decoded) == 5 - kept < 4
    np.testing.assert_array_equal(camera.read(np.arange(40)), whole(path))


def test_what_was_not_used_for_longest_is_removed_first(cache: Path, tmp_path: Path):
    paths = [film(tmp_path / f"{i}.mp4", seed=i) for i in range(3)]
    for path in (paths[0], paths[1], paths[0]):
        cached_frames([video_camera(path)], cache, 1)
        time.sleep(0.02)
    cached_frames([video_camera(paths[2])], cache, 2.5 * ENTRY_GB)
    assert {entry.source for entry in cache_folder.list_entries(cache)} == {str(paths[0]), str(paths[2])}


def test_frames_that_do_not_fit_stay_where_they_are(path: Path, cache: Path, caplog):
    camera = video_camera(path)
    for budget in (1e-6, ENTRY_GB - 1e-8):
        with caplog.at_level("INFO"):
            assert not cached_frames([camera], cache, budget)
        assert "dataset.frame_cache_gb is" in caplog.messages[-1]
    assert cache_folder.list_entries(cache) == []
    np.testing.assert_array_equal(camera.read(np.arange(40)), whole(path))


@pytest.mark.parametrize("name", ["checksums", "times.npy", "entry.json", "pixels"])
@pytest.mark.parametrize("how", ["cut", "gone"])
def test_an_entry_whose_files_are_cut_or_gone_is_rebuilt(
    path: Path, cache: Path, name: str, how: str, caplog
):
    cached_frames([video_camera(path)], cache, 1)
    (file,) = cache.glob(f"entries/*/{name}")
    if how == "cut":
        os.truncate(file, file.stat().st_size - 3)
    else:
        file.unlink()
    camera = video_camera(path)
    assert cached_frames([camera], cache, 1)
    assert any("damaged frames of" in message for message in caplog.messages)
    np.testing.assert_array_equal(camera.read(np.arange(40)), whole(path))


@pytest.mark.parametrize("content", [b"", b"PK\x03\x04aaaa", b"\x93NUMPY\x01\x00v\x00{'descr': ("])
def test_an_entry_with_garbled_times_is_rebuilt(path: Path, cache: Path, content: bytes):
    cached_frames([video_camera(path)], cache, 1)
    next(cache.glob("entries/*/times.npy")).write_bytes(content)
    camera = video_camera(path)
    assert cached_frames([camera], cache, 1)
    np.testing.assert_array_equal(camera.read(np.arange(40)), whole(path))


@pytest.mark.parametrize("name", ["checksums", "times.npy", "entry.json"])
def test_an_entry_with_a_flipped_byte_beside_its_pixels_is_rebuilt(path: Path, cache: Path, name: str):
    cached_frames([video_camera(path)], cache, 1)
    (file,) = cache.glob(f"entries/*/{name}")
    content = bytearray(file.read_bytes())
    content[len(content) - 9] ^= 64
    file.write_bytes(content)
    camera = video_camera(path)
    assert cached_frames([camera], cache, 1)
    np.testing.assert_array_equal(camera.read(np.arange(40)), whole(path))


def test_a_flipped_byte_in_a_frame_is_reported_and_the_entry_removed(path: Path, cache: Path):
    cached_frames([video_camera(path)], cache, 1)
    (file,) = cache.glob("entries/*/pixels")
    with open(file, "r+b") as pixels:
        pixels.seek(17 * FRAME_BYTES + 5)
        byte = pixels.read(1)[0]
        pixels.seek(-1, os.SEEK_CUR)
        pixels.write(bytes([byte ^ 1]))
    camera = video_camera(path)
    cached_frames([camera], cache, 1)
    camera.read(np.array([16, 18]))
    with pytest.raises(
        InputError, match=r"entries/.*: frame 17 of .*a\.mp4 is damaged in the cache.*start again"
    ):
        camera.read(np.array([18, 17]))
    assert cache_folder.list_entries(cache) == []
    again = video_camera(path)
    cached_frames([again], cache, 1)
    np.testing.assert_array_equal(again.read(np.arange(40)), whole(path))


def test_a_damaged_half_built_entry_is_begun_again(path: Path, cache: Path):
    with pytest.MonkeyPatch.context() as interrupted:
        interrupted.setattr(
            frame_cache._Builder, "finish", lambda self: (_ for _ in ()).throw(KeyboardInterrupt)
        )
        with pytest.raises(KeyboardInterrupt):
            cached_frames([video_camera(path)], cache, 1)
    (file,) = cache.glob("entries/*.partial/entry.json")
    file.write_text("{")
    camera = video_camera(path)
    assert cached_frames([camera], cache, 1)
    np.testing.assert_array_equal(camera.read(np.arange(40)), whole(path))


@pytest.mark.parametrize(
    ("where", "after"),
    [("pwrite", 0), ("pwrite", 40), ("fsync", 0), ("posix_fallocate", 1), ("disk_usage", 0)],
)
def test_a_full_disk_is_reported_and_leaves_nothing(
    path: Path, cache: Path, where: str, after: int, monkeypatch
):
    original, calls = getattr(os, where, None), []

    def no_space(*arguments):
        calls.append(where)
        if len(calls) > after:
            raise OSError(errno.ENOSPC, "No space left on device")
        return original(*arguments) if original else None

    with monkeypatch.context() as full:
        if where == "disk_usage":
            full.setattr(shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(10**9, 10**9, 100))
        else:
            full.setattr(os, where, no_space)
        with pytest.raises(InputError, match=r"cache: no room .* needed, .* free; .*dataset\.frame_cache_gb"):
            cached_frames([video_camera(path)], cache, 1)
    assert list((cache / "entries").iterdir()) == []
    camera = video_camera(path)
    assert cached_frames([camera], cache, 1)
    np.testing.assert_array_equal(camera.read(np.arange(40)), whole(path))


def test_on_a_full_disk_what_is_there_is_read(path: Path, cache: Path, monkeypatch):
    cached_frames([video_camera(path)], cache, 1)
    (cache / "digests.jsonl").unlink(missing_ok=True)
    (cache / "digests.jsonl").mkdir()  # nothing can be appended
    assert cached_frames([video_camera(path)], cache, 1)

    def no_space(path, text):
        raise OSError(errno.EDQUOT, "Disk quota exceeded")

    with monkeypatch.context() as full:
        full.setattr(Path, "write_text", no_space)
        with pytest.raises(InputError, match=r"cache: no room .*Disk quota exceeded"):
            cached_frames([video_camera(path)], cache, 1)
    assert [entry.is_whole for entry in cache_folder.list_entries(cache)] == [True]


def test_what_cannot_be_opened_is_not_damaged(path: Path, cache: Path, monkeypatch):
    def too_many(path):
        raise OSError(errno.EMFILE, "Too many open files")

    def cannot_begin(folder):
        raise OSError(errno.EMFILE, "Too many open files")

    cached_frames([video_camera(path)], cache, 1)
    with monkeypatch.context() as limited:
        limited.setattr(cache_folder, "mapped", too_many)
        with pytest.raises(InputError, match=r"entries.*: cannot be read .*Too many open files"):
            cached_frames([video_camera(path)], cache, 1)
    assert [entry.is_whole for entry in cache_folder.list_entries(cache)] == [True]
    with monkeypatch.context() as limited:
        limited.setattr(os, "fsync", cannot_begin)
        with pytest.raises(InputError, match=r"cache: decoded frames cannot be kept .*Too many open files"):
            cached_frames([video_camera(path, size=(16, 20))], cache, 1)


def test_more_files_are_cached_than_may_be_open(tmp_path: Path, cache: Path, caplog, monkeypatch):
    spare = 40 + 2 * NUM_THREADS
    n = spare + 10
    tables = [image_table(tmp_path / f"{i}.parquet", n=1, seed=i) for i in range(n)]
    monkeypatch.setattr(frame_cache, "MAX_OPEN", 4)
    monkeypatch.setenv("LEROBOT_JAX_CACHE", str(tmp_path / "copies"))
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    try:
        resource.setrlimit(resource.RLIMIT_NOFILE, (len(os.listdir("/dev/fd")) + spare, hard))
        copied, built, opened = (image_camera(*tables, n=1) for _ in range(3))
        assert copied.read(np.arange(n)).shape == (n, *SHAPE)
        assert cached_frames([built], cache, 1)
        assert cached_frames([opened], cache, 1)
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    np.testing.assert_array_equal(opened.read(np.arange(n)), copied.read(np.arange(n)))
    assert caplog.messages == []


def test_an_entry_that_is_claimed_is_not_removed_before_it_is_begun(path: Path, cache: Path, monkeypatch):
    original = frame_cache._Build.run

    def run(self):
        assert [(e.is_whole, e.in_use) for e in cache_folder.list_entries(cache)] == [(False, True)]
        assert cache_folder.remove_entries(cache) == []
        original(self)

    monkeypatch.setattr(frame_cache._Build, "run", run)
    assert cached_frames([video_camera(path)], cache, 1)


def test_entries_are_finished_while_nobody_lists_them(path: Path, cache: Path, monkeypatch):
    original, locked = frame_entry.FrameLayout.finish, []

    def finish(self, folder):
        locked.append(cache_folder.is_locked(cache / "lock"))
        original(self, folder)

    monkeypatch.setattr(frame_entry.FrameLayout, "finish", finish)
    assert cached_frames([video_camera(path)], cache, 1)
    assert locked == [True]


def test_stray_files_are_no_entries(path: Path, cache: Path):
    cached_frames([video_camera(path)], cache, 1)
    (cache / "entries" / ".DS_Store").write_text("")
    assert cached_frames([video_camera(path, size=(16, 20))], cache, 1)
    assert len(cache_folder.list_entries(cache)) == 2


def test_a_folder_that_cannot_be_written_is_reported(path: Path, tmp_path: Path):
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match=r"file/cache: cannot keep frames here .*LEROBOT_JAX_CACHE"):
        cached_frames([video_camera(path)], tmp_path / "file" / "cache", 1)


def test_faults_of_the_source_are_reported_and_leave_nothing(path: Path, cache: Path, tmp_path: Path):
    late = VideoFrames([path], np.zeros(41, int), np.arange(41) / 10, SHAPE, 1e-4)
    with pytest.raises(InputError, match=r"a\.mp4: no frame within"):
        cached_frames([late], cache, 1)
    with pytest.raises(InputError, match=r"a\.mp4: frames are \(32, 48, 3\), info.json says \(48, 32, 3\)"):
        cached_frames([VideoFrames([path], np.zeros(1, int), np.zeros(1), (48, 32, 3), 1e-4)], cache, 1)
    with pytest.raises(InputError, match=r"b\.mp4: no such file"):
        cached_frames([video_camera(tmp_path / "b.mp4")], cache, 1)
    cell = pa.array(
        [{"bytes": b"no image", "path": None}], pa.struct({"bytes": pa.binary(), "path": pa.string()})
    )
    pq.write_table(pa.table({KEY: cell}), tmp_path / "a.parquet")
    with pytest.raises(InputError, match=rf"a\.parquet: '{KEY}' in row 0 cannot be decoded"):
        cached_frames([image_camera(tmp_path / "a.parquet", n=1)], cache, 1)
    short = ImageFrames(
        [image_table(tmp_path / "b.parquet", n=8)], np.zeros(1, int), np.array([8]), KEY, SHAPE
    )
    with pytest.raises(InputError, match=r"b\.parquet: has 8 rows, row 8 is wanted"):
        cached_frames([short], cache, 1)
    assert [e for e in cache_folder.list_entries(cache) if not e.is_whole] == []


def test_a_source_that_changes_while_it_is_decoded_is_reported(path: Path, cache: Path, monkeypatch):
    original = VideoFile.decode

    def decode(self, frames):
        path.touch()
        return original(self, frames)

    monkeypatch.setattr(VideoFile, "decode", decode)
    with pytest.raises(InputError, match=r"a\.mp4: changed while it was (read|decoded)"):
        cached_frames([video_camera(path)], cache, 1)


def test_nothing_of_a_changed_source_is_kept(path: Path, cache: Path, tmp_path: Path, monkeypatch):
    other, expected = film(tmp_path / "b.mp4", seed=2), whole(path)
    aside = shutil.copy2(path, tmp_path / "aside.mp4")
    original = cache_folder.digest_sources

    def digest_sources(*arguments):
        digests = original(*arguments)
        shutil.copyfile(other, path)
        return digests

    with monkeypatch.context() as replaced:
        replaced.setattr(cache_folder, "digest_sources", digest_sources)
        with pytest.raises(InputError, match=r"a\.mp4: changed while it was decoded"):
            cached_frames([video_camera(path)], cache, 1)
    shutil.copy2(aside, path)
    camera = video_camera(path)
    assert cached_frames([camera], cache, 1)
    np.testing.assert_array_equal(camera.read(np.arange(40)), expected)


def test_a_checksum_tells_any_single_change_and_zeros(monkeypatch):
    frames = np.random.default_rng(0).integers(0, 256, (3, 35), np.uint8)
    sums = frame_entry.checksum(frames)
    assert len(set(sums.tolist())) == 3
    for byte in range(35):
        for change in (1, 128, 255):
            changed = frames.copy()
            changed[1, byte] ^= change
            assert (frame_entry.checksum(changed) != sums).tolist() == [False, True, False]
    swapped = frames.copy()
    swapped[0, :8], swapped[0, 8:16] = frames[0, 8:16], frames[0, :8]
    assert frame_entry.checksum(swapped)[0] != sums[0]
    assert frame_entry.checksum(np.zeros((1, 35), np.uint8))[0] != 0
