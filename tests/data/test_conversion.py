"""v2.1 becomes v3.0: the same frames in few large files, whole or not at all."""

import errno
import json
import os
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from lerobot_jax.data import conversion, video
from lerobot_jax.data.conversion import convert_to_v30
from lerobot_jax.data.dataset import LeRobotDataset
from lerobot_jax.data.metadata import LeRobotDatasetMetadata
from lerobot_jax.data.remux import SourceVideo, VideoFiles
from lerobot_jax.errors import InputError
from tests.data.recordings import FEATURES, picture
from tests.data.v21 import VARIED, read_lines, record_v21, write_lines, write_v21

LENGTHS = (5, 8, 4, 6)
TOP = "observation.images.top"


@pytest.fixture(scope="module")
def root(tmp_path_factory) -> Path:
    return record_v21(tmp_path_factory.mktemp("data") / "v21", LENGTHS, VARIED, chunks_size=3)


@pytest.fixture
def copy(root: Path, tmp_path: Path) -> Path:
    """A copy to damage."""
    return Path(shutil.copytree(root, tmp_path / "copy"))


def load(root: Path) -> LeRobotDatasetMetadata:
    return LeRobotDatasetMetadata.load("test/recorded", root)


def contents(root: Path) -> dict[str, bytes]:
    return {str(path.relative_to(root)): path.read_bytes() for path in root.rglob("*") if path.is_file()}


def assert_equal_items(old: Path, new: Path) -> None:
    read = [LeRobotDataset("test/recorded", root).read(np.arange(sum(LENGTHS))) for root in (old, new)]
    assert read[0].keys() == read[1].keys()
    for key, values in read[0].items():
        np.testing.assert_array_equal(values, read[1][key], err_msg=key)


@pytest.mark.parametrize("sizes_in_mb", [(100, 200), (0.008, 0.003), (0, 0)])
def test_items_and_statistics_are_equal(root: Path, tmp_path: Path, sizes_in_mb: tuple[float, float]):
    before = contents(root)
    meta = convert_to_v30(load(root), tmp_path / "new", *sizes_in_mb)
    assert contents(root) == before
    assert_equal_items(root, meta.root)
    old = load(root)
    for key, values in old.stats.items():
        assert meta.stats[key].keys() == values.keys()
        for name, value in values.items():
            np.testing.assert_array_equal(meta.stats[key][name], value, err_msg=f"{key} {name}")
    for place in ("data/*/*", f"videos/{TOP}/*/*"):
        assert (len(list(meta.root.glob(place))) > 1) == (sizes_in_mb != (100, 200))


def test_a_row_group_holds_an_episode(root: Path, tmp_path: Path):
    meta = convert_to_v30(load(root), tmp_path / "new")
    about = pq.read_metadata(meta.root / meta.data_file(0))
    assert [about.row_group(i).num_rows for i in range(about.num_row_groups)] == list(LENGTHS)


def test_files_are_closed_before_they_are_too_large(root: Path, tmp_path: Path):
    sizes = [path.stat().st_size for path in sorted(root.glob(f"videos/*/{TOP}/*"))]
    limit = (sizes[0] + sizes[1] + 1) / 1024**2  # the first two fit, by a byte
    meta = convert_to_v30(load(root), tmp_path / "new", 100, limit)
    part = f"videos/{TOP}"
    np.testing.assert_array_equal(meta.episodes[f"{part}/file_index"], [0, 0, 1, 1])
    np.testing.assert_allclose(meta.episodes[f"{part}/from_timestamp"], [0, 0.5, 0, 0.4])
    np.testing.assert_allclose(meta.episodes[f"{part}/to_timestamp"], [0.5, 1.3, 0.4, 1.0])
    meta = convert_to_v30(load(root), tmp_path / "smaller", 100, limit - 1 / 1024**2)
    np.testing.assert_array_equal(meta.episodes[f"{part}/file_index"][:2], [0, 1])


def test_every_folder_holds_a_thousand_files(root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(conversion, "FILES_PER_FOLDER", 3)
    meta = convert_to_v30(load(root), tmp_path / "new", 0, 0)
    assert meta.data_file(2) == "data/chunk-000/file-002.parquet"
    assert meta.data_file(3) == "data/chunk-001/file-000.parquet"
    assert meta.video_file(3, TOP) == f"videos/{TOP}/chunk-001/file-000.mp4"
    assert_equal_items(root, meta.root)


def test_what_the_format_does_not_know_is_kept(copy: Path, tmp_path: Path):
    edit_info(copy, fps=10.0, comment="mine")
    lines = [json.loads(line) for line in (copy / "meta/episodes.jsonl").read_text().splitlines()]
    write_lines(copy / "meta/episodes.jsonl", [line | {"success": True} for line in lines])
    meta = convert_to_v30(load(copy), tmp_path / "new")
    assert meta.info["comment"] == "mine"
    assert meta.episodes["success"] == [True] * 4
    assert not {"total_chunks", "total_videos"} & meta.info.keys()


def test_videos_of_another_codec_get_a_file_of_their_own(copy: Path, tmp_path: Path):
    meta = load(copy)
    writer = video.VideoWriter(copy / meta.video_file(1, TOP), 10, video.H264)
    for t in range(8):
        writer.write(picture(1, t))
    writer.close()
    new = convert_to_v30(meta, tmp_path / "new")
    np.testing.assert_array_equal(new.episodes[f"videos/{TOP}/file_index"], [0, 1, 2, 2])
    assert_equal_items(copy, new.root)


def test_times_do_not_drift_over_many_episodes(tmp_path: Path):
    """Seven thirtieths of a second are no whole number of microseconds, which ffmpeg joins videos by."""
    old = record_alike(tmp_path / "old", 150, 7, fps=30)
    meta = convert_to_v30(load(old), tmp_path / "new")
    assert len(list(meta.root.glob(f"videos/{TOP}/*/*"))) == 1
    source = SourceVideo(meta.root / meta.video_file(0, TOP))
    times = np.sort(source.pts) * float(source.time_base)
    frames = np.arange(1050)
    np.testing.assert_array_equal(video.nearest_frames(source.path, times, frames / 30, 1e-5), frames)
    places = {"from": frames[::7], "to": frames[::7] + 7}
    for name, numbers in places.items():
        column = meta.episodes[f"videos/{TOP}/{name}_timestamp"]
        np.testing.assert_allclose(column, numbers / 30, rtol=0, atol=1e-5)
    indices = np.array([3, 600, 1049])  # of the first, a middle and the last episode
    read = [LeRobotDataset("test/recorded", root).read(indices)[TOP] for root in (old, meta.root)]
    np.testing.assert_array_equal(*read)


def record_alike(root: Path, num_episodes: int, length: int, fps: int) -> Path:
    """Record one episode in format v2.1, and copy it; give the folder."""
    features = {TOP: FEATURES[TOP], "action": FEATURES["action"]}
    dataset = LeRobotDataset.create(
        "test/recorded", fps, features, root=root.with_name("one"), encoding=video.H264
    )
    for t in range(length):
        dataset.add_frame({"task": "copy", TOP: picture(0, t), "action": np.array([t, 0], np.float32)})
    dataset.save_episode()
    dataset.finalize()
    write_v21(LeRobotDataset("test/recorded", root=root.with_name("one")), root)
    meta = load(root)
    first = pq.read_table(root / meta.data_file(0))
    for episode in range(1, num_episodes):
        columns = {name: first[name] for name in first.column_names}
        columns["episode_index"] = pa.array([episode] * length)
        columns["index"] = pa.array(range(episode * length, (episode + 1) * length))
        pq.write_table(pa.table(columns), root / meta.data_file(0).replace("000000", f"{episode:06d}"))
        path = root / meta.video_file(0, TOP)
        shutil.copy(path, path.with_name(path.name.replace("000000", f"{episode:06d}")))
    for name in ("episodes", "episodes_stats"):
        (line,) = read_lines(root / f"meta/{name}.jsonl")
        lines = [line | {"episode_index": episode} for episode in range(num_episodes)]
        write_lines(root / f"meta/{name}.jsonl", lines)
    edit_info(
        root, total_episodes=num_episodes, total_videos=num_episodes, total_frames=num_episodes * length
    )
    return root


# Faults


def edit_info(root: Path, **fields: Any) -> None:
    path = root / "meta/info.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | fields))


def shorten_video(path: Path) -> None:
    writer = video.VideoWriter(path, 10, video.VideoEncoding())
    for t in range(7):
        writer.write(picture(1, t))
    writer.close()


def edit_table(path: Path, name: str, values: list[Any]) -> None:
    table = pq.read_table(path)
    pq.write_table(table.set_column(table.column_names.index(name), name, pa.array(values)), path)


DATA = "data/chunk-000/episode_000001.parquet"
VIDEO = f"videos/chunk-000/{TOP}/episode_000001.mp4"
FAULTS = {
    "no table": (lambda r: (r / DATA).unlink(), f"{DATA}: no such file"),
    "half a table": (lambda r: (r / DATA).write_bytes((r / DATA).read_bytes()[:999]), f"{DATA}: damaged"),
    "no video": (lambda r: (r / VIDEO).unlink(), f"{VIDEO}: no such file"),
    "half a video": (
        lambda r: (r / VIDEO).write_bytes((r / VIDEO).read_bytes()[:999]),
        rf"{VIDEO}: no frame within 0.05 s of 0.7000 s \(nearest is at 0.1000 s\)",
    ),
    "a short video": (
        lambda r: shorten_video(r / VIDEO),
        rf"{VIDEO}: no frame within 0.05 s of 0.7000 s \(nearest is at 0.6000 s\)",
    ),
    "another episode": (
        lambda r: shutil.copy(r / DATA.replace("1.p", "0.p"), r / DATA),
        f"{DATA}: episode_index must be 1 to 1 in 8 rows",
    ),
    "indices from 0": (
        lambda r: edit_table(r / DATA, "index", list(range(8))),
        f"{DATA}: index must be 5 to 12 in 8 rows",
    ),
    "another shape": (
        lambda r: edit_table(r / DATA, "action", [[1.0, 2.0, 3.0]] * 8),
        f"{DATA}: does not hold what info.json declares",
    ),
    "no column": (
        lambda r: pq.write_table(pq.read_table(r / DATA).drop_columns(["action"]), r / DATA),
        rf"{DATA}: lacks the columns \['action'\]",
    ),
    "another column": (
        lambda r: pq.write_table(pq.read_table(r / DATA).append_column("x", pa.array(range(8))), r / DATA),
        rf"{DATA}: .*has \['x'\] that info.json does not declare",
    ),
    "mixed extras": (
        lambda r: (r / "meta/episodes.jsonl").write_text(
            (r / "meta/episodes.jsonl")
            .read_text()
            .replace('"episode_index": 1,', '"episode_index": 1, "x": "a",')
            .replace('"episode_index": 2,', '"episode_index": 2, "x": 5,')
        ),
        "episodes.jsonl: 'x' holds values that do not fit in one column",
    ),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_faults_are_reported_and_leave_nothing(copy: Path, tmp_path: Path, fault: str):
    damage, message = FAULTS[fault]
    damage(copy)
    with pytest.raises(InputError, match=message):
        convert_to_v30(load(copy), tmp_path / "new")
    assert [path.name for path in tmp_path.iterdir()] == ["copy"]


def test_an_interrupted_conversion_can_be_repeated(
    root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(VideoFiles, "add", interrupt)
        with pytest.raises(KeyboardInterrupt):
            convert_to_v30(load(root), tmp_path / "new")
    assert list(tmp_path.iterdir()) == []
    meta = convert_to_v30(load(root), tmp_path / "new")
    assert [path.name for path in tmp_path.iterdir()] == ["new"]
    assert_equal_items(root, meta.root)


def test_two_conversions_into_one_folder_do_not_mix(
    root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    write_meta = conversion._write_meta

    def convert_again(*args: Any) -> None:
        """Write what is last, after another conversion began and ended."""
        with monkeypatch.context() as patch:
            patch.setattr(conversion, "_write_meta", write_meta)
            convert_to_v30(load(root), tmp_path / "new")
        write_meta(*args)

    monkeypatch.setattr(conversion, "_write_meta", convert_again)
    with pytest.raises(InputError, match="new: already exists"):
        convert_to_v30(load(root), tmp_path / "new")
    assert [path.name for path in tmp_path.iterdir()] == ["new"]
    assert_equal_items(root, tmp_path / "new")


@pytest.mark.parametrize("where", ["_join_tables", "_join_videos", "_write_meta"])
def test_a_full_disk_is_named_and_nothing_is_left(
    root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, where: str
):
    def fail(*_: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(conversion, where, fail)
    with pytest.raises(InputError, match=r"new: cannot be written \(No space left on device\)"):
        convert_to_v30(load(root), tmp_path / "new")
    assert list(tmp_path.iterdir()) == []


def test_unsuitable_folders_are_refused(root: Path, tmp_path: Path):
    meta = convert_to_v30(load(root), tmp_path / "new")
    with pytest.raises(InputError, match=r"new: only v2.1 is converted, this is v3.0"):
        convert_to_v30(meta, tmp_path / "newer")
    before = contents(meta.root)
    with pytest.raises(InputError, match=r"new: already exists"):
        convert_to_v30(load(root), tmp_path / "new")
    assert contents(meta.root) == before
    (tmp_path / "file").touch()
    with pytest.raises(InputError, match=r"file/new: cannot be written \(Not a directory|File exists\)"):
        convert_to_v30(load(root), tmp_path / "file/new")


def test_images_are_converted(tmp_path: Path):
    features = FEATURES | {TOP: FEATURES[TOP] | {"dtype": "image"}}
    old = record_v21(tmp_path / "old", LENGTHS, features)
    meta = convert_to_v30(load(old), tmp_path / "new")
    assert meta.info["video_path"] is None
    assert_equal_items(old, meta.root)
