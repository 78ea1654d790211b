import json
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from lerobot_jax.data.dataset import LeRobotDataset, split_episodes
from lerobot_jax.errors import InputError
from tests.data.recordings import FEATURES, picture, record


@pytest.fixture(scope="module")
def root(tmp_path_factory) -> Path:
    return record(tmp_path_factory.mktemp("data") / "dataset").root


@pytest.fixture
def copy(root: Path, tmp_path: Path) -> Path:
    """A copy to damage."""
    import shutil

    return Path(shutil.copytree(root, tmp_path / "copy"))


def test_indices_timestamps_and_tasks(root: Path):
    dataset = LeRobotDataset("test/recorded", root=root)
    assert (len(dataset), dataset.num_episodes, dataset.fps) == (17, 3, 10)
    frame = dataset[6]
    assert {k: frame[k] for k in ("index", "episode_index", "frame_index", "task_index", "task")} == {
        "index": 6,
        "episode_index": 1,
        "frame_index": 1,
        "task_index": 1,
        "task": "task 1",
    }
    np.testing.assert_allclose(frame["timestamp"], 0.1)
    assert frame["observation.state"].shape == (3,)
    assert frame["next.reward"].shape == ()
    assert dataset[-1]["index"] == 16
    with pytest.raises(IndexError):
        dataset[17]


@pytest.mark.parametrize("is_cached", [False, True])
def test_frames_are_those_of_their_episode_and_time(root: Path, is_cached: bool):
    dataset = LeRobotDataset("test/recorded", root=root)
    if is_cached:
        assert dataset.cache_frames(budget_gb=1)
    for row in (0, 4, 5, 12, 13, 16):
        frame = dataset[row]
        expected = picture(int(frame["episode_index"]), int(frame["frame_index"]))
        error = np.abs(frame["observation.images.top"].astype(int) - expected)
        assert (
            error.mean() < 6
        )  # the video is lossy; a frame off by one step or episode differs by more than 9


def test_windows_stop_at_the_episode(root: Path):
    deltas = {"action": [0.0, 0.1, 0.2], "observation.images.top": [-0.1, 0.0], "next.reward": [0.3]}
    dataset = LeRobotDataset("test/recorded", root=root, delta_timestamps=deltas)
    plain = LeRobotDataset("test/recorded", root=root)
    last, first = dataset[4], dataset[5]
    np.testing.assert_array_equal(last["action"], np.stack([plain[4]["action"]] * 3))
    np.testing.assert_array_equal(last["action_is_pad"], [False, True, True])
    np.testing.assert_array_equal(first["action"], [plain[i]["action"] for i in (5, 6, 7)])
    assert not first["action_is_pad"].any()
    np.testing.assert_array_equal(first["observation.images.top_is_pad"], [True, False])
    np.testing.assert_array_equal(*first["observation.images.top"])
    np.testing.assert_array_equal(first["next.reward"], [plain[8]["next.reward"]])
    assert "observation.state_is_pad" not in first


def test_chosen_episodes_keep_the_order_of_the_files(root: Path):
    dataset = LeRobotDataset(
        "test/recorded", root=root, episodes=[2, 0], delta_timestamps={"action": [0.0, 0.1]}
    )
    whole = LeRobotDataset("test/recorded", root=root, delta_timestamps={"action": [0.0, 0.1]})
    assert [int(dataset[i]["index"]) for i in range(len(dataset))] == [*range(5), *range(13, 17)]
    np.testing.assert_array_equal(dataset[5]["action"], whole[13]["action"])
    np.testing.assert_array_equal(dataset[4]["action_is_pad"], [False, True])
    image = "observation.images.top"
    np.testing.assert_array_equal(dataset[6][image], whole[14][image])


def test_rows_to_train_on(root: Path):
    dataset = LeRobotDataset("test/recorded", root=root)
    np.testing.assert_array_equal(dataset.rows_of([0, 2], drop_n_last_frames=3), [0, 1, 13])
    with pytest.raises(InputError, match="drop_n_last_frames=8"):
        dataset.rows_of([0, 1, 2], drop_n_last_frames=8)


def test_held_out_rows_are_spread_over_tasks(root: Path):
    dataset = LeRobotDataset("test/recorded", root=root)
    np.testing.assert_array_equal(dataset.first_rows([0, 1, 2], max_samples=4), [0, 1, 5, 6])
    assert len(dataset.first_rows([0, 1, 2], max_samples=0)) == 17


def test_split_holds_out_the_last_episodes_of_every_task(root: Path):
    meta = LeRobotDataset("test/recorded", root=root).meta
    assert split_episodes(meta, None, 0.0) == ([0, 2, 1], [])  # grouped by task
    assert split_episodes(meta, [0, 2], 0.5) == ([0], [2])
    with pytest.raises(InputError, match="leaves no episode"):
        split_episodes(meta, [0], 0.9)


def test_only_needed_entries_are_read(root: Path):
    dataset = LeRobotDataset("test/recorded", root=root, delta_timestamps={"action": [0.0]})
    assert set(dataset.read(np.arange(2), ["action", "action_is_pad"])) == {"action", "action_is_pad"}


def test_image_columns(tmp_path: Path):
    features = FEATURES | {"observation.images.top": FEATURES["observation.images.top"] | {"dtype": "image"}}
    root = record(tmp_path / "images", features=features).root
    dataset = LeRobotDataset("test/recorded", root=root)
    for is_cached in (False, True):
        if is_cached:
            assert dataset.cache_frames(budget_gb=1)
        np.testing.assert_array_equal(dataset[6]["observation.images.top"], picture(1, 1))


def test_string_integer_and_matrix_features(tmp_path: Path):
    features = {
        "observation.state": {"dtype": "float64", "shape": (1,), "names": None},
        "action": {"dtype": "float32", "shape": (2, 3), "names": None},
        "note": {"dtype": "string", "shape": (1,), "names": None},
        "count": {"dtype": "int32", "shape": (2,), "names": None},
    }
    dataset = record(tmp_path / "other", features=features)
    frame = dataset[5]
    assert frame["action"].shape == (2, 3)
    assert frame["note"] == "episode 1, frame 0"
    assert (frame["observation.state"].dtype, frame["count"].dtype) == (np.float32, np.int64)


def test_integers_that_do_not_fit_their_type_are_reported(tmp_path: Path):
    features = {"count": {"dtype": "int32", "shape": (1,), "names": None}}
    root = record(tmp_path / "small", features=features).root
    edit_info(root, lambda info: info["features"]["count"].update(dtype="uint8"))
    rewrite(root / DATA, set_column("count", lambda c: pa.array([300, *[1] * 16])))
    with pytest.raises(InputError, match="'count' has values that are no uint8"):
        LeRobotDataset("test/recorded", root)


def test_several_files(tmp_path: Path):
    """Files are closed when they are full; the rows and frames of all of them are found."""
    dataset = record(tmp_path / "many", data_files_size_in_mb=0, video_files_size_in_mb=0, chunks_size=2)
    assert len(list(dataset.root.glob("data/*/*.parquet"))) == 3
    assert len(list(dataset.root.glob("videos/*/*/*.mp4"))) == 3
    assert (dataset.root / "data/chunk-001/file-000.parquet").exists()
    frame = dataset[14]
    error = np.abs(frame["observation.images.top"].astype(int) - picture(2, 1))
    assert error.mean() < 6


# Faults


def rewrite(path: Path, change) -> None:
    pq.write_table(change(pq.read_table(path)), path)


def edit_info(root: Path, change) -> None:
    info = json.loads((root / "meta/info.json").read_text())
    change(info)
    (root / "meta/info.json").write_text(json.dumps(info))


def set_column(name: str, values) -> object:
    def change(table: pa.Table) -> pa.Table:
        return table.set_column(table.column_names.index(name), name, values(table[name]))

    return change


DATA, EPISODES = "data/chunk-000/file-000.parquet", "meta/episodes/chunk-000/file-000.parquet"
VIDEO = "videos/observation.images.top/chunk-000/file-000.mp4"
FAULTS = {
    "no data": (lambda r: (r / DATA).unlink(), "file-000.parquet: no such file"),
    "half a data file": (
        lambda r: (r / DATA).write_bytes((r / DATA).read_bytes()[:900]),
        "damaged or incomplete",
    ),
    "half an episodes file": (
        lambda r: (r / EPISODES).write_bytes(b"PAR1 no"),
        "episodes.*damaged or incomplete",
    ),
    "no episodes": (lambda r: (r / EPISODES).unlink(), "meta/episodes: no parquet file"),
    "no tasks": (lambda r: (r / "meta/tasks.parquet").unlink(), "tasks.parquet: no such file"),
    "broken info": (lambda r: (r / "meta/info.json").write_text("{"), "info.json: not valid JSON"),
    "info lacks fps": (lambda r: edit_info(r, lambda i: i.pop("fps")), "info.json: missing fps"),
    "fps is 0": (lambda r: edit_info(r, lambda i: i.update(fps=0)), "fps must be positive"),
    "old format": (lambda r: edit_info(r, lambda i: i.update(codebase_version="v2.0")), "v2.0"),
    "wrong total": (lambda r: edit_info(r, lambda i: i.update(total_frames=99)), "total_frames is 99"),
    "column missing": (
        lambda r: rewrite(r / DATA, lambda t: t.drop_columns(["action"])),
        r"lacks the columns \['action'\]",
    ),
    "wrong width": (
        lambda r: edit_info(r, lambda i: i["features"]["action"].update(shape=[5])),
        r"statistics of 'action' have the shapes .* they must all have \(5,\)",
    ),
    "NaN": (
        lambda r: rewrite(
            r / DATA,
            set_column("next.reward", lambda c: pa.array([float("nan"), *c.to_pylist()[1:]], pa.float32())),
        ),
        "'next.reward' is NaN or infinite in row 0",
    ),
    "empty cell": (
        lambda r: rewrite(
            r / DATA, set_column("next.reward", lambda c: pa.array([None, *c.to_pylist()[1:]], pa.float32()))
        ),
        "'next.reward' has empty cells",
    ),
    "rows of unequal width": (
        lambda r: rewrite(
            r / DATA,
            set_column(
                "action", lambda c: pa.array([[1.0] * 3, [1.0], *c.to_pylist()[2:]], pa.list_(pa.float32()))
            ),
        ),
        r"'action' does not hold \(2,\) float32 values a row",
    ),
    "lists for episodes": (
        lambda r: rewrite(
            r / DATA, set_column("episode_index", lambda c: pa.array([[x] for x in c.to_pylist()]))
        ),
        r"'episode_index' does not hold \(1,\) int64 values a row",
    ),
    "texts for episodes": (
        lambda r: rewrite(r / DATA, set_column("episode_index", lambda c: c.cast(pa.string()))),
        r"'episode_index' does not hold \(1,\) int64 values a row",
    ),
    "a task that is not there": (
        lambda r: rewrite(r / DATA, set_column("task_index", lambda c: pa.array([-1, *c.to_pylist()[1:]]))),
        "frame 0 has task_index -1; meta/ has the tasks 0 to ",
    ),
    "rows missing": (
        lambda r: rewrite(r / DATA, lambda t: t.slice(0, 15)),
        r"episodes \[2\] have another length",
    ),
    "a timestamp off": (
        lambda r: rewrite(
            r / DATA, set_column("timestamp", lambda c: pa.array([*c.to_pylist()[:16], 0.45], pa.float32()))
        ),
        r"frame 3 of episode 2 is at 0.4500 s, at 10 frames a second it should be at 0.3000 s; 1 of 17",
    ),
    "another fps": (lambda r: edit_info(r, lambda i: i.update(fps=20)), "14 of 17 timestamps are off: fps"),
    "two frames in each other's place": (
        lambda r: rewrite(
            r / DATA, set_column("frame_index", lambda c: pa.array([1, 0, *c.to_pylist()[2:]]))
        ),
        "frame 0 says frame_index 1, but it is number 0 of episode 0",
    ),
    "a frame twice": (
        lambda r: rewrite(r / DATA, set_column("index", lambda c: pa.array([1, *c.to_pylist()[1:]]))),
        "some frames appear twice",
    ),
    "episode index repeated": (
        lambda r: rewrite(r / EPISODES, set_column("episode_index", lambda c: pa.array([0, 1, 1]))),
        "episode_index must count",
    ),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_faulty_tables_are_reported(copy: Path, fault: str):
    damage, message = FAULTS[fault]
    damage(copy)
    with pytest.raises(InputError, match=message):
        LeRobotDataset("test/recorded", root=copy)


VIDEO_FAULTS = {
    "no video": (lambda r: (r / VIDEO).unlink(), "file-000.mp4: no such file"),
    "half a video": (lambda r: (r / VIDEO).write_bytes((r / VIDEO).read_bytes()[:1500]), "file-000.mp4"),
    "not a video": (lambda r: (r / VIDEO).write_bytes(b"nothing"), "file-000.mp4: damaged or incomplete"),
    "wrong size": (
        lambda r: edit_info(r, lambda i: i["features"]["observation.images.top"].update(shape=[16, 48, 3])),
        r"frames are \(32, 48, 3\), info.json says \(16, 48, 3\)",
    ),
    "wrong offset": (
        lambda r: rewrite(
            r / EPISODES,
            set_column("videos/observation.images.top/from_timestamp", lambda c: pa.array([0.0, 0.55, 1.3])),
        ),
        "no frame within 0.0001 s of",
    ),
}


@pytest.mark.parametrize("is_cached", [False, True])
@pytest.mark.parametrize("fault", VIDEO_FAULTS)
def test_faulty_videos_are_reported(copy: Path, fault: str, is_cached: bool):
    damage, message = VIDEO_FAULTS[fault]
    damage(copy)
    dataset = LeRobotDataset("test/recorded", root=copy)
    with pytest.raises(InputError, match=message):
        dataset.cache_frames(budget_gb=1) if is_cached else dataset.read(np.arange(17))


def test_unknown_names_are_reported(root: Path):
    with pytest.raises(InputError, match="are no features"):
        LeRobotDataset("test/recorded", root=root, delta_timestamps={"acton": [0.0]})
    with pytest.raises(InputError, match="not multiples of 1/10"):
        LeRobotDataset("test/recorded", root=root, delta_timestamps={"action": [0.05]})
    with pytest.raises(InputError, match="no camera 'side'"):
        LeRobotDataset("test/recorded", root=root, cameras=["side"])
    with pytest.raises(InputError, match=r"dataset.episodes: \[7\]"):
        LeRobotDataset("test/recorded", root=root, episodes=[7])


def test_a_dataset_that_is_nowhere(tmp_path: Path):
    with pytest.raises(InputError, match=r"dataset 'nobody/nothing' .*lerobot_home.*Hub cannot be reached"):
        LeRobotDataset("nobody/nothing")
    with pytest.raises(InputError, match="not a LeRobotDataset"):
        LeRobotDataset("test/recorded", root=tmp_path)
