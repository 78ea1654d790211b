"""`meta/` of both formats: what is read, and what is said of what is wrong."""

import json
import math
import random
import re
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from lerobot_jax.data.metadata import LeRobotDatasetMetadata
from lerobot_jax.errors import InputError
from tests import fake_hub
from tests.data.mutations import mutate
from tests.data.recordings import record
from tests.data.v21 import VARIED, read_lines, record_v21, write_lines

LENGTHS = (5, 8, 4, 6)
TOP = "observation.images.top"
EPISODES = "meta/episodes/chunk-000/file-000.parquet"


@pytest.fixture(scope="module")
def recorded(tmp_path_factory) -> Path:
    """A folder with the same episodes as "v3.0" and as "v2.1"."""
    folder = tmp_path_factory.mktemp("recorded")
    record(folder / "v3.0", LENGTHS, VARIED)
    record_v21(folder / "v2.1", LENGTHS, VARIED, chunks_size=3)
    return folder


@pytest.fixture
def copy(recorded: Path, tmp_path: Path) -> Path:
    """The `meta/` folders, to damage."""
    for version in ("v3.0", "v2.1"):
        shutil.copytree(recorded / version / "meta", tmp_path / version / "meta")
    return tmp_path


def load(root: Path) -> LeRobotDatasetMetadata:
    return LeRobotDatasetMetadata.load("test/recorded", root)


def test_v21_gives_what_v30_gives(recorded: Path):
    old, new = load(recorded / "v2.1"), load(recorded / "v3.0")
    assert (old.tasks, old.features, old.fps) == (new.tasks, new.features, new.fps)
    assert (old.total_episodes, old.total_frames) == (4, 23)
    for name in ("episode_index", "length", "dataset_from_index", "dataset_to_index", "tasks"):
        np.testing.assert_array_equal(old.episodes[name], new.episodes[name], err_msg=name)
    np.testing.assert_array_equal(old.episodes[f"videos/{TOP}/from_timestamp"], np.zeros(4))
    np.testing.assert_allclose(old.episodes[f"videos/{TOP}/to_timestamp"], np.array(LENGTHS) / 10)
    assert old.stats.keys() == new.stats.keys()
    for key, values in new.stats.items():
        assert set(values) - set(old.stats[key]) == {"q01", "q10", "q50", "q90", "q99"}
        for name, value in old.stats[key].items():
            # v3.0 was combined as it was recorded, an episode at a time.
            np.testing.assert_allclose(value, values[name], rtol=1e-7, atol=1e-12, err_msg=f"{key} {name}")


def test_v21_has_a_file_an_episode(recorded: Path):
    meta = load(recorded / "v2.1")
    assert meta.data_file(2) == "data/chunk-000/episode_000002.parquet"
    assert meta.data_file(3) == "data/chunk-001/episode_000003.parquet"
    assert meta.video_file(3, TOP) == f"videos/chunk-001/{TOP}/episode_000003.mp4"
    files = meta.episode_files(None)
    assert len(files) == 8
    assert all((meta.root / name).exists() for name in files)


def test_v21_as_others_wrote_it(copy: Path, recorded: Path):
    """Blank lines, lines in another order, columns of one's own, a fps that is no int, old names: all are read."""
    root = copy / "v2.1"
    for name in ("tasks", "episodes", "episodes_stats"):
        path = root / f"meta/{name}.jsonl"
        path.write_text("\n \n".join(reversed(path.read_text().splitlines())) + "\n\n")
    lines = [line | {"success": line["episode_index"] > 1} for line in read_lines_of(root, "episodes")]
    write_lines(root / "meta/episodes.jsonl", lines)
    edit_json(root / "meta/info.json", lambda info: info.update(fps=10.0) or info.pop("total_videos"))
    edit_json(
        root / "meta/info.json", lambda info: info["features"][TOP].update(video_info={"video.fps": 10.0})
    )
    meta, plain = load(root), load(recorded / "v2.1")
    assert type(meta.fps) is int
    assert meta.episodes["success"] == [False, False, True, True]
    np.testing.assert_array_equal(meta.episodes["length"], LENGTHS)
    assert meta.tasks == plain.tasks
    np.testing.assert_array_equal(meta.stats["action"]["std"], plain.stats["action"]["std"])


def test_matrices_may_keep_their_axes_in_v21_statistics(copy: Path):
    def widen(line: dict[str, Any]) -> None:
        for name in ("min", "max", "mean", "std"):
            line["stats"]["observation.wrench"][name] = [line["stats"]["observation.wrench"][name]] * 2

    edit_lines(copy / "v2.1/meta/episodes_stats.jsonl", lambda lines: [widen(line) for line in lines])
    assert load(copy / "v2.1").stats["observation.wrench"]["mean"].shape == (2, 3)


def test_tasks_are_ordered_by_their_index(copy: Path):
    edit_table(copy / "v3.0/meta/tasks.parquet", lambda t: t.take([1, 0]))
    assert load(copy / "v3.0").tasks == ["task 0", "task 1"]


# Faults

Edit = Callable[[Any], object]


def edit_json(path: Path, change: Edit) -> None:
    data = json.loads(path.read_text())
    change(data)
    path.write_text(json.dumps(data))


def edit_lines(path: Path, change: Edit) -> None:
    lines = read_lines(path)
    change(lines)
    write_lines(path, lines)


def read_lines_of(root: Path, name: str) -> list[dict[str, Any]]:
    text = (root / f"meta/{name}.jsonl").read_text()
    return [json.loads(line) for line in text.splitlines() if line.strip()]


def edit_table(path: Path, change: Callable[[pa.Table], pa.Table]) -> None:
    pq.write_table(change(pq.read_table(path)), path)


def cells(name: str, change: Edit, kind: pa.DataType | None = None) -> Callable[[pa.Table], pa.Table]:
    """Change the cells of a column as a list."""

    def edit(table: pa.Table) -> pa.Table:
        values = table[name].to_pylist()
        change(values)
        column = pa.array(values, kind or table[name].type)
        return table.set_column(table.column_names.index(name), name, column)

    return edit


def put(*place: Any, to: Any) -> Edit:
    """Set an entry of nested lists and dicts."""

    def change(tree: Any) -> None:
        *upper, key = place
        for name in upper:
            tree = tree[name]
        tree[key] = to

    return change


def pop(*place: Any) -> Edit:
    return lambda tree: [tree := tree[name] for name in place[:-1]] + [tree.pop(place[-1])]


INFO_FAULTS: dict[str, tuple[Edit, str]] = {
    "fps NaN": (put("fps", to=math.nan), "fps must be a number from 0"),
    "fps zero": (put("fps", to=0), "fps must be positive"),
    "fps true": (put("fps", to=True), "fps must be a number"),
    "fps huge": (put("fps", to=1e300), "fps must be a number"),
    "total negative": (put("total_frames", to=-1), "total_frames must be a whole number from 0, it is -1"),
    "total wrong": (put("total_episodes", to=5), "(total_episodes is|info.json declares) 5"),
    "tasks wrong": (put("total_tasks", to=3), "total_tasks is 3, .*meta/tasks.* has 2"),
    "features a list": (put("features", to=[]), "features must map names to descriptions"),
    "no dtype": (pop("features", "action", "dtype"), "feature 'action' needs dtype and shape"),
    "odd dtype": (
        put("features", "action", "dtype", to="float31"),
        "'action' has dtype 'float31'; there are",
    ),
    "zero shape": (put("features", "action", "shape", to=[0]), r"'action': shape must be .* it is \[0\]"),
    "huge shape": (put("features", "note", "shape", to=[2**40]), "'note': shape must be"),
    "other shape": (
        put("features", "action", "shape", to=[5]),
        r"'action' have the shapes \[\(2,\)\]; by its shape",
    ),
    "no index": (pop("features", "index"), "every dataset has the feature 'index' of dtype int64"),
    "small index": (put("features", "index", "dtype", to="int8"), "every dataset has the feature 'index'"),
    "camera names": (put("features", TOP, "names", to=None), f"feature '{TOP}': names must be"),
    "depth": (put("features", TOP, "info", to={"is_depth_map": True}), "is a depth map"),
    "slash": (lambda info: info["features"].update({"a/b": info["features"]["note"]}), "without '/'"),
    "undeclared": (pop("features", "action"), "has statistics of 'action', which info.json does not declare"),
    "path leaves": (
        put("data_path", to="../{chunk_index}/{file_index}"),
        "data_path must be a path",
    ),
    "path constant": (
        put("data_path", to="data/file.parquet"),
        "data_path must be a path inside the dataset with",
    ),
    "path huge": (put("video_path", to="{video_key:999999999}"), "video_path must be a path"),
    "no video path": (put("video_path", to=None), "video_path must be a path .* it is None"),
    "next version": (put("codebase_version", to="v4.0"), "format v4.0 .*bring lerobot_jax up to date"),
    "v2.0": (
        put("codebase_version", to="v2.0"),
        "format v2.0 .*reads v3.0 and v2.1; convert it with LeRobot 0.3.3",
    ),
    "v1.6": (put("codebase_version", to="v1.6"), "format v1.6 .*convert_dataset_v1_to_v2"),
    "version 3": (put("codebase_version", to=3), "no such format is known"),
}


@pytest.mark.parametrize("version", ["v3.0", "v2.1"])
@pytest.mark.parametrize("fault", INFO_FAULTS)
def test_faults_of_info_are_reported(copy: Path, fault: str, version: str):
    change, message = INFO_FAULTS[fault]
    edit_json(copy / version / "meta/info.json", change)
    with pytest.raises(InputError, match=message):
        load(copy / version)


V30_FAULTS: dict[str, tuple[str, Callable[[Path], object], str]] = {
    "task twice": (
        "meta/tasks.parquet",
        lambda p: edit_table(p, cells("task_index", put(1, to=0))),
        "task_index must count",
    ),
    "task gap": (
        "meta/tasks.parquet",
        lambda p: edit_table(p, cells("task_index", put(1, to=2))),
        "must count",
    ),
    "task null": (
        "meta/tasks.parquet",
        lambda p: edit_table(p, cells("task", put(1, to=None))),
        "empty cells",
    ),
    "another task": (
        "meta/tasks.parquet",
        lambda p: edit_table(p, cells("task", put(1, to="x"))),
        "'task 1'.*not",
    ),
    "column missing": (
        EPISODES,
        lambda p: edit_table(p, lambda t: t.drop_columns(["length"])),
        "columns length",
    ),
    "column of texts": (
        EPISODES,
        lambda p: edit_table(p, cells("length", put(slice(None), to=["5", "8", "4", "6"]), pa.string())),
        "'length' must hold int64 in every cell, it holds string",
    ),
    "empty cell": (EPISODES, lambda p: edit_table(p, cells("length", put(0, to=None))), "1 empty cells"),
    "no tasks": (EPISODES, lambda p: edit_table(p, cells("tasks", put(0, to=None))), "tasks of episode 0"),
    "rows overlap": (
        EPISODES,
        lambda p: edit_table(p, cells("dataset_from_index", put(1, to=4))),
        "episode 1 has length 8 but spans frames 4 to 13",
    ),
    "negative file": (
        EPISODES,
        lambda p: edit_table(p, cells("data/file_index", put(1, to=-1))),
        "data/file_index of episode 1 is -1",
    ),
    "time NaN": (
        EPISODES,
        lambda p: edit_table(p, cells(f"videos/{TOP}/from_timestamp", put(1, to=math.nan))),
        "from_timestamp of episode 1 is nan",
    ),
    "time too late": (
        EPISODES,
        lambda p: edit_table(p, cells(f"videos/{TOP}/from_timestamp", put(1, to=0.6))),
        "episode 1 has 8 frames, too many for 0.600 s to 1.300 s at 10 frames a second",
    ),
    "times overlap": (
        EPISODES,
        lambda p: edit_table(p, cells(f"videos/{TOP}/from_timestamp", put(1, to=0.4))),
        "episodes 0 and 1 overlap: the first ends at 0.500 s, the second begins at 0.400 s",
    ),
    "half an episodes file": (
        EPISODES,
        lambda p: p.write_bytes(p.read_bytes()[:900]),
        "damaged or incomplete",
    ),
    "std negative": (
        "meta/stats.json",
        lambda p: edit_json(p, put("action", "std", 0, to=-1)),
        "std is negative",
    ),
    "stat NaN": (
        "meta/stats.json",
        lambda p: edit_json(p, put("action", "mean", 0, to=math.nan)),
        "mean is NaN",
    ),
    "min > max": (
        "meta/stats.json",
        lambda p: edit_json(p, put("action", "min", 0, to=1e3)),
        "'action': min is greater than max",
    ),
    "count zero": (
        "meta/stats.json",
        lambda p: edit_json(p, put("action", "count", to=[0])),
        "must be positive",
    ),
    "image statistics": (
        "meta/stats.json",
        lambda p: edit_json(p, put(TOP, "mean", to=[1, 2, 3])),
        r"have the shapes \[\(3,\), \(3, 1, 1\)\]",
    ),
    "ragged": (
        "meta/stats.json",
        lambda p: edit_json(p, put("action", "mean", to=[[1], 2])),
        "array of numbers",
    ),
    "text": ("meta/stats.json", lambda p: edit_json(p, put("action", to="x")), "must map features to"),
}


@pytest.mark.parametrize("fault", V30_FAULTS)
def test_faults_of_v30_are_reported(copy: Path, fault: str):
    name, damage, message = V30_FAULTS[fault]
    damage(copy / "v3.0" / name)
    with pytest.raises(InputError, match=message):
        load(copy / "v3.0")


V21_FAULTS: dict[str, tuple[str, Edit, str]] = {
    "task twice": ("tasks", put(1, "task_index", to=0), "tasks.jsonl: line 2 repeats task_index 0"),
    "task gap": ("tasks", put(1, "task_index", to=2), "tasks.jsonl: task_index must count .*1 is missing"),
    "task a number": ("tasks", put(0, "task", to=5), "task of task_index 0 must be a text, it is 5"),
    "episode twice": ("episodes", put(3, "episode_index", to=2), "episodes.jsonl: line 4 repeats"),
    "episode missing": ("episodes", pop(0), "episodes.jsonl: episode_index must count .*0 is missing"),
    "length negative": (
        "episodes",
        put(1, "length", to=-8),
        "length of episode 1 must be a whole number from 1",
    ),
    "length wrong": (
        "episodes",
        put(1, "length", to=9),
        "info.json: total_frames is 23, .*episodes.jsonl has 24",
    ),
    "unknown task": ("episodes", put(1, "tasks", to=["x"]), "episode 1 has the task 'x', .*tasks.jsonl"),
    "one task": ("episodes", put(1, "tasks", to="task 1"), "tasks of episode 1 must be a list of texts"),
    "no statistics": ("episodes_stats", put(2, "stats", to=None), "episode 2: statistics must map"),
    "statistics of fewer": ("episodes_stats", pop(3), "has 3 episodes, info.json declares 4"),
    "std missing": ("episodes_stats", pop(2, "stats", "action", "std"), "episode 2: .*'action' lack std"),
    "feature missing": (
        "episodes_stats",
        pop(2, "stats", "action"),
        "episode 2: has statistics of .*must agree",
    ),
    "overflow": ("episodes_stats", put(0, "stats", "action", "std", to=[1e300, 1]), "std is NaN or infinite"),
}


@pytest.mark.parametrize("fault", V21_FAULTS)
def test_faults_of_v21_are_reported(copy: Path, fault: str):
    name, change, message = V21_FAULTS[fault]
    edit_lines(copy / f"v2.1/meta/{name}.jsonl", change)
    with pytest.raises(InputError, match=message):
        load(copy / "v2.1")


def test_missing_and_broken_lines_are_reported(copy: Path):
    path = copy / "v2.1/meta/episodes.jsonl"
    path.write_text(path.read_text()[:-9])
    with pytest.raises(InputError, match=r"episodes.jsonl: line 4 is not valid JSON"):
        load(copy / "v2.1")
    (copy / "v2.1/meta/episodes_stats.jsonl").unlink()
    path.unlink()
    with pytest.raises(InputError, match=r"episodes.jsonl: no such file"):
        load(copy / "v2.1")


# Random faults. A damaged file is refused, or is loaded as what it says: only what is named here may differ then,
# because nothing else in `meta/` tells that it is wrong. Tables are compared with shapes and dtypes later.
DECLARED = r"(fps|files|feature/(note.*|.*/names|(?!timestamp|frame_index|episode_index|index|task_index).*))"
PLACES = r"episodes/(data|videos/.*)/(chunk_index|file_index|to_timestamp)"
MAY_DIFFER = {
    "meta/info.json": f"{DECLARED}|{PLACES}",
    "meta/stats.json": "stats/.*",
    "meta/tasks.parquet": "tasks",
    "meta/tasks.jsonl": "tasks",
    EPISODES: f"files|{PLACES}|episodes/tasks",
    "meta/episodes.jsonl": "episodes/tasks",
    "meta/episodes_stats.jsonl": "stats/.*",
}
NEEDED_COLUMNS = r"(tasks|length|.*_index|.*_timestamp)"


def essence(meta: LeRobotDatasetMetadata) -> dict[str, Any]:
    """Give all that training may depend on."""
    result: dict[str, Any] = {
        "fps": meta.fps,
        "tasks": meta.tasks,
        "files": meta.episode_files(None),
        "totals": (meta.total_episodes, meta.total_frames),
        "measured features": sorted(k for k in meta.features if not k.startswith("note") and k in meta.stats),
    }
    for key, feature in meta.features.items():
        result |= {f"feature/{key}/{name}": feature[name] for name in ("dtype", "shape", "names")}
    for name, column in meta.episodes.items():
        if re.fullmatch(NEEDED_COLUMNS, name) and not name.startswith("meta/"):
            is_time = name.endswith("_timestamp")
            values = np.round(column, 4) if is_time else np.asarray(column, object)  # float32 will do
            result[f"episodes/{name}"] = values.tolist()
    for key, values in meta.stats.items():
        result |= {f"stats/{key}/{name}": value.tolist() for name, value in values.items()}
    return result


@pytest.mark.parametrize(
    ("version", "name"),
    [("v3.0", name) for name in ("meta/info.json", "meta/stats.json", "meta/tasks.parquet", EPISODES)]
    + [
        ("v2.1", f"meta/{name}")
        for name in ("info.json", "tasks.jsonl", "episodes.jsonl", "episodes_stats.jsonl")
    ],
)
def test_random_faults_are_reported_or_harmless(copy: Path, version: str, name: str):
    rng = random.Random(f"{version} {name}")
    expected = essence(load(copy / version))
    path = copy / version / name
    intact = path.read_bytes()
    refused = 0
    for _ in range(200):
        what = mutate(rng, path)
        try:
            found = essence(load(copy / version))
        except InputError:
            refused += 1
        else:
            differing = [k for k in expected.keys() | found.keys() if expected.get(k) != found.get(k)]
            wrong = [key for key in differing if not re.fullmatch(MAY_DIFFER[name], key)]
            assert not wrong, f"{what}: {wrong}"
        path.write_bytes(intact)
    assert refused > 60


# The Hub


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[fake_hub.FakeHub]:
    """The Hub, which also answers for datasets."""

    def refs(handler: fake_hub.Handler, repo_id: str) -> None:
        repository = handler._readable(repo_id)
        found = [
            {"name": name, "ref": f"refs/{name}", "targetCommit": commit}
            for name, commit in repository.refs.items()
        ]
        is_branch = [entry["name"] == "main" for entry in found]
        branches = [entry for entry, branch in zip(found, is_branch, strict=True) if branch]
        tags = [entry for entry, branch in zip(found, is_branch, strict=True) if not branch]
        handler._send({"branches": branches, "tags": tags, "converts": []})

    monkeypatch.setattr(fake_hub.Handler, "refs", refs, raising=False)
    for route, method in (
        (r"GET /api/datasets/([^/]+/[^/]+)/refs", "refs"),
        (r"GET /api/datasets/([^/]+/[^/]+)/revision/([^/]+)", "info"),
        (r"GET /api/datasets/([^/]+/[^/]+)/tree/([^/]+)", "tree"),
        (r"(?:GET|HEAD) /datasets/([^/]+/[^/]+)/resolve/([^/]+)/(.+)", "resolve"),
    ):
        monkeypatch.setitem(fake_hub.ROUTES, route, method)
    monkeypatch.setenv("HF_LEROBOT_HOME", str(tmp_path / "lerobot"))
    with fake_hub.connected(tmp_path) as server:
        yield server


def meta_files(root: Path) -> fake_hub.Files:
    return {str(p.relative_to(root)): p.read_bytes() for p in (root / "meta").rglob("*") if p.is_file()}


def test_the_newest_format_on_the_hub_is_taken(hub: fake_hub.FakeHub, recorded: Path, monkeypatch):
    repository = hub.repositories["alice/arm"] = fake_hub.Repository()
    old = repository.commit(meta_files(recorded / "v2.1"))
    find = LeRobotDatasetMetadata.find
    with pytest.raises(
        InputError, match=r"'alice/arm' on the Hub has neither the tag v3.0 nor v2.1, only main;"
    ):
        find("alice/arm", None, None)
    assert find("alice/arm", None, "main").info["codebase_version"] == "v2.1"
    repository.refs["v2.1"] = old
    assert find("alice/arm", None, None).revision == old
    new = repository.commit(meta_files(recorded / "v3.0"))
    repository.refs["v3.0"] = new
    assert find("alice/arm", None, None).revision == new
    assert find("alice/arm", None, "v2.1").revision == old
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    assert find("alice/arm", None, None).revision == new  # from the cache
    with pytest.raises(
        InputError, match=r"'alice/leg' \(revision v3.0\) was not found .*HF_HUB_OFFLINE is set"
    ):
        find("alice/leg", None, None)


def test_a_dataset_that_is_not_on_the_hub(hub: fake_hub.FakeHub):
    with pytest.raises(InputError, match=r"'nobody/nothing' .*there is no such repository"):
        LeRobotDatasetMetadata.find("nobody/nothing", None, None)
