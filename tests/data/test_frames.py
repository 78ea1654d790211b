import re
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import PIL.Image
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from lerobot_jax.data import cache_folder, image_column, video, video_decoder
from lerobot_jax.data import frames as frames_module
from lerobot_jax.data.frames import ImageFrames, VideoFrames
from lerobot_jax.data.video_decoder import VideoFile
from lerobot_jax.errors import InputError
from tests.data.cameras import KEY, SHAPE, film, image_camera, image_table, pictures, video_camera


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch) -> Path:
    monkeypatch.setenv("LEROBOT_JAX_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache" / "frames"


@pytest.fixture
def films(tmp_path: Path) -> list[Path]:
    long = video.VideoEncoding(vcodec="h264", g=250, preset=None)
    return [film(tmp_path / "a.mp4", seed=1), film(tmp_path / "b.mp4", seed=2, encoding=long)]


def whole(*paths: Path) -> np.ndarray:
    return np.stack([frame for path in paths for _, frame in video.decode_video(path)])


def test_rows_of_several_videos_come_in_the_order_asked_for(films: list[Path]):
    camera, frames = video_camera(*films), whole(*films)
    assert camera.num_bytes == frames.nbytes
    for rows in (np.array([70]), np.array([3, 79, 3, 0, 41, 40, 39, 2]), np.arange(80)):
        np.testing.assert_array_equal(camera.read(rows), frames[rows])


def test_what_needs_the_same_keyframe_is_decoded_together(films: list[Path], monkeypatch):
    decoded = []
    original = VideoFile.decode

    def decode(self, frames):
        decoded.append((self, list(frames)))
        return original(self, frames)

    monkeypatch.setattr(frames_module, "NUM_THREADS", 4)
    monkeypatch.setattr(VideoFile, "decode", decode)
    rows = np.random.default_rng(0).permutation(80)[:60]
    video_camera(*films).read(rows)
    assert len(decoded) == 4
    assert all(frames == sorted(frames) for _, frames in decoded)
    groups = [(file, group) for file, frames in decoded for group in set(file.index.group(frames).tolist())]
    assert len(groups) == len(set(groups))


def test_threads_may_read_at_once(films: list[Path]):
    camera, frames = video_camera(*films), whole(*films)
    rows = [np.random.default_rng(i).integers(0, 80, 9) for i in range(12)]
    with ThreadPoolExecutor(6) as threads:
        for wanted, got in zip(rows, threads.map(camera.read, rows), strict=True):
            np.testing.assert_array_equal(got, frames[wanted])


def test_frames_are_resized_with_antialiasing(films: list[Path], tmp_path: Path):
    frames = whole(films[0])
    resized = [
        np.asarray(PIL.Image.fromarray(f).resize((20, 16), PIL.Image.Resampling.BILINEAR)) for f in frames
    ]
    camera = video_camera(films[0], size=(16, 20))
    assert camera.shape == (16, 20, 3)
    assert camera.num_bytes == 40 * 16 * 20 * 3
    np.testing.assert_array_equal(camera.read(np.arange(40)), resized)
    camera = image_camera(image_table(tmp_path / "images.parquet"), size=(16, 20))
    assert camera.read(np.array([5])).shape == (1, 16, 20, 3)


def test_a_frame_too_far_from_its_time_is_reported_before_decoding(films: list[Path], monkeypatch):
    monkeypatch.setattr(video_decoder, "_borrowed_decoder", None)
    late = VideoFrames(films[:1], np.zeros(3, int), np.array([0.0, 0.13, 0.2]), SHAPE, 1e-2)
    with pytest.raises(
        InputError, match=r"a\.mp4: no frame within 0\.01 s of 0\.1300 s \(nearest is at 0\.1"
    ):
        late.read(np.arange(3))
    beyond = VideoFrames(films[:1], np.zeros(41, int), np.arange(41) / 10, SHAPE, 1e-4)
    with pytest.raises(InputError, match=r"a\.mp4: no frame within 0\.0001 s of 4\.0000 s .* incomplete"):
        beyond.read(np.array([40]))


def test_images_are_decoded_from_a_copy_that_is_made_once(tmp_path: Path, cache: Path, monkeypatch):
    paths = [
        image_table(tmp_path / "a.parquet", seed=1),
        image_table(tmp_path / "b.parquet", seed=2, group=100),
    ]
    expected = np.concatenate([pictures(40, 1), pictures(40, 2)])
    camera = image_camera(*paths)
    rows = np.array([79, 0, 39, 40, 5, 5])
    np.testing.assert_array_equal(camera.read(rows), expected[rows])
    monkeypatch.setattr(image_column, "_copy_column", None)
    np.testing.assert_array_equal(image_camera(*paths).read(np.arange(80)), expected)
    entries = cache_folder.list_entries(cache)
    assert sorted(entry.source for entry in entries) == sorted(map(str, paths))
    assert all(entry.is_whole for entry in entries)


def test_a_copy_that_was_interrupted_goes_on_where_it_was(tmp_path: Path, cache: Path, monkeypatch):
    path = image_table(tmp_path / "a.parquet")
    original = image_column.ImageColumn.encoded
    read = []

    def encoded(self, first, end):
        for row, data in enumerate(original(self, first, end), start=first):
            read.append(row)
            if row == 21 and read.count(row) == 1:
                raise KeyboardInterrupt
            yield data

    monkeypatch.setattr(image_column.ImageColumn, "encoded", encoded)
    with pytest.raises(KeyboardInterrupt):
        image_camera(path).read(np.array([0]))
    assert [entry.is_whole for entry in cache_folder.list_entries(cache)] == [False]
    np.testing.assert_array_equal(image_camera(path).read(np.arange(40)), pictures(40))
    assert read == [*range(22), *range(16, 40)]  # two row groups of 8 were there


def test_nothing_of_a_changed_file_is_copied(tmp_path: Path, monkeypatch):
    path, other = image_table(tmp_path / "a.parquet"), image_table(tmp_path / "b.parquet", seed=2)
    aside = path.read_bytes()
    original = cache_folder.digest_sources

    def digest_sources(*arguments):
        digests = original(*arguments)
        path.write_bytes(other.read_bytes())
        return digests

    with monkeypatch.context() as replaced:
        replaced.setattr(cache_folder, "digest_sources", digest_sources)
        with pytest.raises(InputError, match=r"a\.parquet: changed while it was copied; start again"):
            image_camera(path).read(np.array([0]))
    path.write_bytes(aside)
    np.testing.assert_array_equal(image_camera(path).read(np.arange(40)), pictures(40))


def test_a_copy_is_finished_while_nobody_lists_it(tmp_path: Path, cache: Path, monkeypatch):
    original, locked = image_column.write_json, []

    def write_json(data, path):
        locked.append(cache_folder.is_locked(cache / "lock"))
        original(data, path)

    monkeypatch.setattr(image_column, "write_json", write_json)
    image_camera(image_table(tmp_path / "a.parquet")).read(np.array([0]))
    assert locked == [True, True]


@pytest.mark.parametrize("name", ["bytes", "places", "entry.json"])
def test_a_damaged_copy_is_noticed(tmp_path: Path, cache: Path, name: str):
    path = image_table(tmp_path / "a.parquet")
    image_camera(path).read(np.array([0]))
    (file,) = cache.glob(f"entries/*/{name}")
    content = bytearray(file.read_bytes())
    content[40] ^= 255
    file.write_bytes(content)
    if name == "bytes":
        with pytest.raises(InputError, match=r"entries.*damaged copy of .*a\.parquet.*start again"):
            image_camera(path).read(np.arange(40))
    np.testing.assert_array_equal(image_camera(path).read(np.arange(40)), pictures(40))


def test_bad_images_are_reported(tmp_path: Path):
    cells = [{"bytes": b"no image", "path": None}, {"bytes": None, "path": "a.png"}]
    for cell, message in zip(cells, ("cannot be decoded", "holds a path instead of an image"), strict=True):
        column = pa.array([cell], pa.struct({"bytes": pa.binary(), "path": pa.string()}))
        pq.write_table(pa.table({KEY: column}), tmp_path / "a.parquet")
        with pytest.raises(InputError, match=rf"a\.parquet: '{KEY}' in row 0 {message}"):
            image_camera(tmp_path / "a.parquet", n=1).read(np.array([0]))
    camera = ImageFrames(
        [image_table(tmp_path / "b.parquet")], np.zeros(1, int), np.array([3]), KEY, (48, 32, 3)
    )
    with pytest.raises(InputError, match=r"row 3 is \(32, 48, 3\), info.json says \(48, 32, 3\)"):
        camera.read(np.array([0]))
    camera = image_camera(image_table(tmp_path / "c.parquet", n=8))
    with pytest.raises(InputError, match=r"c\.parquet: has 8 rows, row 30 is wanted"):
        camera.read(np.array([30]))


@pytest.mark.parametrize(
    ("column", "kind"),
    [
        (pa.array([b"png"]), "binary"),
        (pa.array([{"path": "a.png"}]), "struct<path: string>"),
        (pa.array([{"bytes": "png"}]), "struct<bytes: string>"),
        (None, "missing"),
    ],
)
def test_columns_of_another_type_are_reported(tmp_path: Path, column: pa.Array | None, kind: str):
    columns = {"index": [0]} if column is None else {KEY: column}
    pq.write_table(pa.table(columns), tmp_path / "a.parquet")
    message = re.escape(f"a.parquet: column '{KEY}' is {kind}, images need struct<bytes, path>")
    with pytest.raises(InputError, match=message):
        image_camera(tmp_path / "a.parquet", n=1).read(np.array([0]))
