import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import av
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from lerobot_jax.data.inspection.checking import Inspection
from lerobot_jax.data.video import H264, VideoEncoding, VideoWriter
from tests.data.recordings import FEATURES, picture, record

DATA = "data/chunk-000/file-000.parquet"
VIDEO = "videos/observation.images.top/chunk-000/file-000.mp4"
EPISODES = "meta/episodes/chunk-000/file-000.parquet"
SIDE = {"dtype": "image", "shape": (24, 32, 3), "names": ["height", "width", "channels"]}
B_FRAMES = VideoEncoding(vcodec="h264", preset="veryfast", g=8, crf=20)


@pytest.fixture(scope="module")
def healthy(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return record(tmp_path_factory.mktemp("healthy") / "dataset", (5, 8, 4), encoding=H264).root


@pytest.fixture
def root(healthy: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(healthy, tmp_path / "dataset"))


def problems(root: Path, decode: bool = False) -> list[str]:
    """Give all problems, one text each."""
    return [f"{p.place}: {p.what} -> {p.repair}" for p in Inspection(root, decode).run()]


def edit_info(root: Path, change: Callable[[dict], Any]) -> None:
    path = root / "meta/info.json"
    info = json.loads(path.read_text())
    change(info)
    path.write_text(json.dumps(info))


def edit_table(path: Path, change: Callable[[dict[str, list]], Any]) -> None:
    """Change a parquet file's columns, given as lists; types and row groups stay."""
    file = pq.ParquetFile(path)
    schema, sizes = (
        file.schema_arrow,
        [file.metadata.row_group(i).num_rows for i in range(file.num_row_groups)],
    )
    columns = file.read().to_pydict()
    change(columns)
    table = pa.Table.from_pydict(columns, schema=pa.schema([schema.field(name) for name in columns]))
    with pq.ParquetWriter(path, table.schema) as writer:
        for start, size in zip(np.cumsum([0, *sizes[:-1]]).tolist(), sizes, strict=True):
            writer.write_table(table.slice(start, size), row_group_size=max(1, size))


def change_row(path: Path, column: str, row: int, value: Any) -> None:
    edit_table(path, lambda columns: columns[column].__setitem__(row, value))


def move_video(root: Path, episode: int, seconds: float) -> None:
    def shift(columns: dict[str, list]) -> None:
        for name in ("from_timestamp", "to_timestamp"):
            columns[f"videos/observation.images.top/{name}"][episode] += seconds

    edit_table(root / EPISODES, shift)


def swap(columns: dict[str, list], names: list[str]) -> None:
    for name in names:
        columns[name][0], columns[name][1] = columns[name][1], columns[name][0]


def test_healthy_datasets_have_no_problem(healthy: Path, tmp_path: Path):
    features = {
        **FEATURES,
        "observation.images.side": SIDE,
        "note": {"dtype": "string", "shape": (1,), "names": None},
    }
    features["matrix"] = {"dtype": "float64", "shape": (2, 3), "names": None}
    features["counter"] = {"dtype": "int64", "shape": (2,), "names": None}
    settings: dict[str, Any] = {"video_files_size_in_mb": 0, "data_files_size_in_mb": 0}
    roots = [
        healthy,
        record(tmp_path / "av1", (1, 30)).root,
        record(tmp_path / "b_frames", (12, 30, 7), encoding=B_FRAMES).root,
        record(tmp_path / "all", (5, 6), features, encoding=H264).root,
        record(tmp_path / "files", (5, 6, 7), encoding=H264, **settings).root,
    ]
    with av.open(str(roots[2] / VIDEO)) as container:
        stamps = [packet.pts for packet in container.demux() if packet.pts is not None]
    assert stamps != sorted(stamps)  # B-frames are stored in another order than shown
    assert len([*(roots[4] / "data").rglob("*.parquet")]) == 3
    for root in roots:
        assert problems(root) == []
        assert problems(root, decode=True) == []


def truncate(root: Path, name: str) -> None:
    content = (root / name).read_bytes()
    (root / name).write_bytes(content[: len(content) // 2])


def shorten_file(root: Path) -> None:
    """Cut the end off a video whose index is at its front, so that it still opens."""
    content = (root / VIDEO).read_bytes()
    assert content.find(b"moov") < content.find(b"mdat")
    (root / VIDEO).write_bytes(content[: int(len(content) * 0.9)])


def remove_rows(root: Path) -> None:
    table = pq.read_table(root / DATA)
    pq.write_table(pa.concat_tables([table.slice(0, 6), table.slice(8)]), root / DATA)


def drop_column(root: Path) -> None:
    edit_table(root / DATA, lambda columns: columns.pop("action"))


def forget_action(root: Path) -> None:
    edit_info(root, lambda info: info["features"].pop("action"))
    path = root / "meta/stats.json"
    path.write_text(json.dumps({k: v for k, v in json.loads(path.read_text()).items() if k != "action"}))


def corrupt_data(root: Path) -> None:
    """Overwrite one column chunk of the second row group; the footer stays."""
    chunk = pq.ParquetFile(root / DATA).metadata.row_group(1).column(0)
    content = bytearray((root / DATA).read_bytes())
    start = chunk.dictionary_page_offset or chunk.data_page_offset
    content[start : start + chunk.total_compressed_size] = b"\xff" * chunk.total_compressed_size
    (root / DATA).write_bytes(bytes(content))


def add_file(root: Path) -> None:
    shutil.copy(root / DATA, root / "data/chunk-000/file-001.parquet")


def take_other_stats(root: Path) -> None:
    path = root / "meta/stats.json"
    stats = json.loads(path.read_text())
    stats["action"] |= {"min": [-100.0, -100.0], "mean": [-1.0, -1.0], "count": [1234]}
    path.write_text(json.dumps(stats))


VIDEO_SPAN = [f"videos/observation.images.top/{name}_timestamp" for name in ("from", "to")]
FRAME_SPAN = ["length", "dataset_from_index", "dataset_to_index"]

FAULTS: dict[str, tuple[Callable[[Path], Any], list[str]]] = {
    "truncated mp4": (
        lambda root: truncate(root, VIDEO),
        [
            rf"{VIDEO}: is cut off or damaged after frame \d+",
            rf"{VIDEO}: ends at .* the episodes .* want frames until",
        ],
    ),
    "mp4 with its end missing": (
        shorten_file,
        [rf"{VIDEO}: is cut off or damaged after frame 1\d", rf"{VIDEO}: ends at 1\..* the episodes 2 want"],
    ),
    "empty mp4": (
        lambda root: (root / VIDEO).write_bytes(b""),
        [rf"{VIDEO}: damaged or incomplete video file"],
    ),
    "missing mp4": (
        lambda root: (root / VIDEO).unlink(),
        [rf"{VIDEO}: is missing; the episodes 0-2 need it"],
    ),
    "truncated parquet": (
        lambda root: truncate(root, DATA),
        [rf"{DATA}: damaged or incomplete parquet file"],
    ),
    "damaged row group": (corrupt_data, [rf"{DATA}: rows 5 to 12 \(row group 1\) cannot be read"]),
    "extra file": (add_file, [r"data/chunk-000/file-001\.parquet: belongs to no episode -> delete it"]),
    "missing column": (drop_column, [rf"{DATA}: lacks the column 'action' that info\.json declares"]),
    "unknown column": (
        forget_action,
        [rf"{DATA}: has a column 'action' that info\.json does not declare"],
    ),
    "wrong dtype": (
        lambda root: edit_info(root, lambda info: info["features"]["next.reward"].update(dtype="float64")),
        [rf"{DATA}: 'next\.reward' is of type float, info\.json declares \(1,\) float64"],
    ),
    "wrong fps": (
        lambda root: edit_info(root, lambda info: info.update(fps=30)),
        [r"meta/info\.json: fps is 30, but the timestamps in data/ advance at 10 fps -> set fps to 10"],
    ),
    "timestamp shifted by 0.05 s": (
        lambda root: edit_table(
            root / DATA, lambda c: c["timestamp"].__setitem__(7, c["timestamp"][7] + 0.05)
        ),
        [rf"{DATA}: episode 1 has the timestamp 0\.2500 s in row 7 \(frame 2\), not 0\.2000 s"],
    ),
    "video shifted by half a frame": (
        lambda root: move_video(root, 1, 0.05),
        [rf"{VIDEO}: episode 1 has no frame within 0\.0001 s of 8 of its 8 times; the first is 0\.5500 s"],
    ),
    "from_timestamp shifted by a frame": (
        lambda root: change_row(root / EPISODES, VIDEO_SPAN[0], 2, 1.2),
        [r"meta/episodes: episode 2 lies at 1\.2000 to 1\.7000 s in .*mp4, but its 4 frames take 0\.4000 s"],
    ),
    "overlapping episodes": (
        lambda root: move_video(root, 1, -0.2),
        [r"meta/episodes: episode 1 starts at 0\.3000 s in .*mp4, where the one before ends at 0\.5000 s"],
    ),
    "duplicate episode index in meta": (
        lambda root: change_row(root / EPISODES, "episode_index", 2, 1),
        [r"meta/episodes: row 2 has episode_index 1, not 2; twice there: 1"],
    ),
    "duplicate episode index in data": (
        lambda root: edit_table(
            root / DATA, lambda c: c["episode_index"].__setitem__(slice(13, 17), [1] * 4)
        ),
        [
            rf"{DATA}: episode 1 has 12 rows, length in meta/episodes is 8",
            rf"{DATA}: episode 2 has 0 rows, length in meta/episodes is 4; the frames 0-3 are missing",
        ],
    ),
    "episodes in another order": (
        lambda root: edit_table(root / EPISODES, lambda c: swap(c, [*c])),
        [r"meta/episodes: row 0 is episode 1: the rows are not in the order of episode_index"],
    ),
    "two episodes swapped": (
        lambda root: edit_table(root / EPISODES, lambda c: swap(c, [*FRAME_SPAN, *VIDEO_SPAN])),
        [
            r"meta/episodes: episode 0 is said to be frames 5 to 13; .* it would be 0 to 8",
            r"meta/episodes: episode 1 is said to be frames 0 to 5; .* it would be 8 to 13",
            rf"{DATA}: episode 0 has 5 rows, length in meta/episodes is 8; the frames 5-7 are missing",
            rf"{DATA}: episode 1 has 8 rows, length in meta/episodes is 5",
        ],
    ),
    "NaN action": (
        lambda root: edit_table(root / DATA, lambda c: c["action"][9].__setitem__(1, float("nan"))),
        [rf"{DATA}: 'action' is NaN or infinite in row 9 \(episode 1, frame 4\)"],
    ),
    "empty cell": (
        lambda root: change_row(root / DATA, "next.reward", 3, None),
        [rf"{DATA}: 'next\.reward' is empty in row 3 \(episode 0, frame 3\)"],
    ),
    "task_index out of range": (
        lambda root: change_row(root / DATA, "task_index", 6, 7),
        [
            rf"{DATA}: episode 1 has task_index 7 in row 6; there are 2 tasks",
        ],
    ),
    "another task": (
        lambda root: change_row(root / DATA, "task_index", 6, 0),
        [rf"{DATA}: episode 1 has the tasks \['task 0', 'task 1'\], meta/episodes says \['task 1'\]"],
    ),
    "rows missing": (
        remove_rows,
        [rf"{DATA}: episode 1 has 6 rows, length in meta/episodes is 8; the frames 1-2 are missing"],
    ),
    "rows in another order": (
        lambda root: edit_table(root / DATA, lambda c: [swap(c, [name]) for name in c]),
        [
            rf"{DATA}: row 1 \(episode 0, frame 0\) has a smaller index than the row before",
        ],
    ),
    "wrong index": (
        lambda root: change_row(root / DATA, "index", 3, 30),
        [rf"{DATA}: episode 0 has index 30 in row 3, not 3"],
    ),
    "wrong frame_index": (
        lambda root: change_row(root / DATA, "frame_index", 7, 1),
        [rf"{DATA}: episode 1 has frame_index 1 in row 7, not 2"],
    ),
    "wrong size in info.json": (
        lambda root: edit_info(
            root, lambda i: i["features"]["observation.images.top"].update(shape=[48, 48, 3])
        ),
        [r"'observation\.images\.top' has height, width = \(48, 48\), its videos \(1\) have \(32, 48\)"],
    ),
    "wrong codec in info.json": (
        lambda root: edit_info(
            root, lambda i: i["features"]["observation.images.top"]["info"].update({"video.codec": "av1"})
        ),
        [r"info\.json: 'observation\.images\.top' has video\.codec = av1, its videos \(1\) have h264"],
    ),
    "wrong totals": (
        lambda root: edit_info(
            root, lambda info: info.update(total_episodes=4, total_frames=18, total_tasks=1)
        ),
        [
            r"meta/info\.json: total_episodes is 4, meta/ holds 3 -> set it to 3",
            r"meta/info\.json: total_frames is 18, meta/ holds 17",
            r"meta/info\.json: total_tasks is 1, meta/ holds 2",
        ],
    ),
    "statistics of another dataset": (
        take_other_stats,
        [r"stats\.json: 'action': count is 1234, the data's 17; min is \[-100, -100\], the data's .*--write"],
    ),
    "no statistics": (
        lambda root: (root / "meta/stats.json").write_text("{}"),
        [r"stats\.json: there are none of \['observation\.images\.top', 'observation\.state', 'action',"],
    ),
    "no tasks": (lambda root: (root / "meta/tasks.parquet").unlink(), [r"meta/tasks\.parquet: no such file"]),
    "no info.json": (lambda root: (root / "meta/info.json").unlink(), [r"meta/info\.json: no such file"]),
    "no episodes": (lambda root: (root / EPISODES).unlink(), [r"meta/episodes: no parquet file found"]),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_planted_fault_is_found_and_nothing_else(root: Path, fault: str):
    plant, expected = FAULTS[fault]
    plant(root)
    found = problems(root)
    assert len(found) == len(expected), found
    for pattern, text in zip(expected, found, strict=True):
        assert re.search(pattern, text), (pattern, text)


def test_many_faults_are_all_found(root: Path):
    """Also where the dataset cannot be opened; none hides another."""
    for fault in (
        "wrong fps",
        "wrong size in info.json",
        "NaN action",
        "task_index out of range",
        "extra file",
    ):
        FAULTS[fault][0](root)
    found = "\n".join(problems(root))
    for pattern in (
        "fps is 30",
        r"height, width = \(48, 48\)",
        "is NaN",
        "task_index 7",
        "belongs to no episode",
    ):
        assert re.search(pattern, found), found


def test_many_episodes_with_one_fault_are_told_in_one_sentence(tmp_path: Path):
    root = record(tmp_path / "dataset", (3,) * 6, encoding=H264).root
    edit_table(root / DATA, lambda c: c.update(timestamp=[t + 0.01 for t in c["timestamp"]]))
    times = [text for text in problems(root) if "timestamp 0" in text]
    assert len(times) == 1
    assert "3 timestamps are off; likewise in all of the episodes 0-5" in times[0]


def test_only_decoding_finds_damaged_pixels(root: Path):
    path = root / VIDEO
    with av.open(str(path)) as container:
        packets = [(p.pos, p.size) for p in container.demux() if p.pos is not None]
    content = bytearray(path.read_bytes())
    position, size = packets[8]
    content[position + 5 : position + size] = b"\x55" * (size - 5)
    path.write_bytes(bytes(content))
    assert problems(root) == []
    assert re.search(
        r"cannot be decoded after|is damaged|frames can be decoded", "".join(problems(root, decode=True))
    )


def test_images_in_tables_are_looked_at(tmp_path: Path):
    features = {"observation.images.side": SIDE, "action": FEATURES["action"]}
    root = record(tmp_path / "dataset", (3, 4), features).root
    edit_info(root, lambda info: info["features"]["observation.images.side"].update(shape=[24, 24, 3]))
    assert (
        "'observation.images.side' is not 24 x 24, as info.json says, in 7 rows, first row 0"
        in problems(root)[0]
    )
    edit_info(root, lambda info: info["features"]["observation.images.side"].update(shape=[24, 32, 3]))
    change_row(root / DATA, "observation.images.side", 4, {"bytes": b"no image", "path": "x.png"})
    assert "is no image that can be decoded in row 4 (episode 1, frame 1)" in problems(root)[0]


def test_a_video_of_another_size_is_named(tmp_path: Path):
    root = record(tmp_path / "dataset", (3, 4), encoding=H264, video_files_size_in_mb=0).root
    second = root / VIDEO.replace("file-000", "file-001")
    writer = VideoWriter(second, 10, H264)
    for t in range(4):
        writer.write(picture(0, t, (64, 64, 3)))
    writer.close()
    found = problems(root)
    assert any(
        "file-001.mp4: has height, width = (64, 64), info.json says (32, 48)" in text for text in found
    )
    assert not any(text.startswith("meta/info.json") for text in found)
