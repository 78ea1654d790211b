import errno
import hashlib
import json
import os
import shutil
from pathlib import Path
from typing import Any

import av
import numpy as np
import pyarrow.parquet as pq
import pytest

from lerobot_jax.data import statistics, video
from lerobot_jax.data.dataset import LeRobotDataset
from lerobot_jax.data.editing import COUNTING, delete_episodes, merge_datasets, split_dataset
from lerobot_jax.data.metadata import LeRobotDatasetMetadata
from lerobot_jax.data.remux import SourceVideo, VideoFiles
from lerobot_jax.errors import InputError
from tests.data.recordings import FEATURES, record
from tests.data.v21 import VARIED, record_v21

TOP = "observation.images.top"
NUMBERS = {key: feature for key, feature in FEATURES.items() if key != TOP}


def load(root: Path) -> LeRobotDatasetMetadata:
    return LeRobotDatasetMetadata.load("test/edited", root)


def frames(root: Path, episode: int) -> dict[str, Any]:
    """Read the frames of an episode."""
    dataset = LeRobotDataset("test/edited", root, [episode])
    return dataset.read(np.arange(len(dataset)))


def rows(root: Path) -> list[dict[str, Any]]:
    return pq.read_table(root / "meta/episodes").to_pylist()


def assert_copied(output: Path, expected: list[tuple[Path, int]]) -> None:
    """Check that a dataset consists of these episodes: equal in all but what counts over the dataset."""
    meta = load(output)
    assert meta.total_episodes == len(expected)
    start = 0
    for episode, (root, source_episode) in enumerate(expected):
        got, wanted = frames(output, episode), frames(root, source_episode)
        assert set(got) == set(wanted)
        for key in set(wanted) - set(COUNTING):
            np.testing.assert_array_equal(got[key], wanted[key], err_msg=f"episode {episode}: {key}")
        length = len(wanted["index"])
        np.testing.assert_array_equal(got["index"], np.arange(start, start + length))
        np.testing.assert_array_equal(got["episode_index"], np.full(length, episode))
        assert [meta.tasks[i] for i in got["task_index"]] == wanted["task"]
        start += length
    for path in (output / "data").rglob("*.parquet"):
        groups = pq.ParquetFile(path)
        for i in range(groups.num_row_groups):  # one an episode
            assert len(set(groups.read_row_group(i, ["episode_index"])["episode_index"].to_pylist())) == 1


def assert_statistics_carried(output: Path, expected: list[tuple[Path, int]]) -> None:
    """Check the episodes' statistics: those of the source, and for what is renumbered those of its new numbers."""
    for episode, (row, (root, source_episode)) in enumerate(zip(rows(output), expected, strict=True)):
        before, now = rows(root)[source_episode], frames(output, episode)
        for column in (name for name in row if name.startswith("stats/")):
            _, key, name = column.split("/")
            wanted = before[column]
            if key in COUNTING:
                wanted = statistics.vector_statistics(now[key])[name].tolist()
            assert row[column] == wanted, column


def checksums(root: Path) -> dict[str, str]:
    return {
        str(path): hashlib.sha256(path.read_bytes()).hexdigest() for path in root.rglob("*") if path.is_file()
    }


def test_merged_datasets_follow_each_other(tmp_path: Path):
    """One has other tasks, and format v2.1, which has no quantiles and a file for every episode."""
    old = record_v21(tmp_path / "a", (5, 8, 4), VARIED)
    record(tmp_path / "b", (6, 3), VARIED)
    path = old / "meta/tasks.jsonl"
    path.write_text(path.read_text().replace("task 0", "another"))
    path = old / "meta/episodes.jsonl"
    path.write_text(path.read_text().replace("task 0", "another"))
    before = [checksums(tmp_path / name) for name in "ab"]
    meta = merge_datasets([load(old), load(tmp_path / "b")], tmp_path / "out")
    assert meta.root == tmp_path / "out"
    assert meta.tasks == ["another", "task 1", "task 0"]
    assert meta.info["codebase_version"] == "v3.0"
    assert "total_videos" not in meta.info
    expected = [(old, 0), (old, 1), (old, 2), (tmp_path / "b", 0), (tmp_path / "b", 1)]
    assert_copied(meta.root, expected)
    assert "stats/action/q50" not in rows(meta.root)[0]
    assert rows(meta.root)[4]["stats/action/mean"] == rows(tmp_path / "b")[1]["stats/action/mean"]
    assert [checksums(tmp_path / name) for name in "ab"] == before
    assert len(list((meta.root / "videos").rglob("*.mp4"))) == 1


def test_a_converted_dataset_equals_the_recorded_one(tmp_path: Path):
    """All episodes of a v2.1 dataset, which was made of a v3.0 one, in v3.0 again."""
    recorded = record(tmp_path / "new", (5, 8, 4), VARIED)
    meta = merge_datasets([load(record_v21(tmp_path / "old", (5, 8, 4), VARIED))], tmp_path / "out")
    everything = np.arange(len(recorded))
    converted = LeRobotDataset("test/converted", meta.root).read(everything)
    for key, values in recorded.read(everything).items():
        np.testing.assert_array_equal(converted[key], values, err_msg=key)
    for row, wanted in zip(rows(meta.root), rows(recorded.root), strict=True):
        assert row == {name: value for name, value in wanted.items() if name in row}


def test_statistics_of_the_whole_are_those_of_its_frames(tmp_path: Path):
    datasets = [record(tmp_path / name, lengths) for name, lengths in (("a", (5, 8)), ("b", (30, 1, 4)))]
    merged = merge_datasets([dataset.meta for dataset in datasets], tmp_path / "out")
    expected = [(d.root, e) for d in datasets for e in range(d.num_episodes)]
    assert_statistics_carried(merged.root, expected)
    table = LeRobotDataset("test/edited", merged.root).columns
    for key in (*COUNTING, "action", "timestamp"):
        values = table[key].reshape(len(table[key]), -1).astype(np.float64)
        stats = merged.stats[key]
        np.testing.assert_allclose(stats["mean"], values.mean(0), rtol=1e-6, err_msg=key)
        np.testing.assert_allclose(stats["std"], values.std(0), rtol=1e-5, err_msg=key)
        np.testing.assert_array_equal(stats["max"].astype(np.float32), values.max(0).astype(np.float32))
        assert stats["count"] == [48]


def test_deleted_episodes_are_gone_and_the_others_as_before(tmp_path: Path):
    source = record(tmp_path / "source", (5, 8, 4, 7, 6), VARIED)
    meta = delete_episodes(source.meta, [0, 2], tmp_path / "out")
    expected = [(source.root, e) for e in (1, 3, 4)]
    assert_copied(meta.root, expected)
    assert_statistics_carried(meta.root, expected)
    assert meta.tasks == ["task 1", "task 0"]  # in the order in which they come
    parts = [rows(source.root)[e] for e in (1, 3, 4)]
    for name in ("min", "max", "mean", "std", "q10", "count"):
        stats = [
            {n: np.array(p[f"stats/{TOP}/{n}"]) for n in ("min", "max", "mean", "std", "count", "q10")}
            for p in parts
        ]
        wanted = statistics.combine_statistics([{"": part} for part in stats])[""][name]
        np.testing.assert_allclose(meta.stats[TOP][name], wanted, rtol=1e-12)


def test_splits_by_fractions_and_by_episodes(tmp_path: Path):
    source = record(tmp_path / "source", (3, 4, 5, 2, 6), NUMBERS).meta
    cases: dict[str, tuple[dict[str, Any], dict[str, list[int]]]] = {
        "fractions": ({"train": 0.5, "val": 0.3, "test": 0.2}, {"train": [0, 1], "val": [2], "test": [3, 4]}),
        "episodes": ({"b": [4, 1], "a": [0]}, {"b": [1, 4], "a": [0]}),
    }
    for name, (splits, expected) in cases.items():
        result = split_dataset(source, splits, tmp_path / name)
        assert sorted(path.name for path in (tmp_path / name).iterdir()) == sorted(expected)
        for split, episodes in expected.items():
            assert result[split].root == tmp_path / name / split
            assert_copied(result[split].root, [(source.root, e) for e in episodes])


CODECS = {
    "h264, B-frames": ("libx264", {"g": "10", "bf": "3"}),
    "h264, open groups": ("libx264", {"g": "10", "x264-params": "open-gop=1:bframes=3"}),
    "hevc, open groups": ("libx265", {"g": "10", "x265-params": "log-level=none"}),
    "hevc, leading pictures": ("libx265", {"g": "10", "x265-params": "log-level=none:open-gop=0:radl=2"}),
    "av1": ("libsvtav1", {"g": "10", "preset": "12"}),
}


def encode(path: Path, codec: str, options: dict[str, str], num_frames: int, fps: int = 30) -> None:
    """Encode moving frames as one stream, in which episodes begin anywhere."""
    rng = np.random.default_rng(0)
    scenes = rng.integers(0, 255, (num_frames, 4, 4, 3)).repeat(16, 1).repeat(16, 2).astype(np.uint8)
    with av.open(str(path), "w") as container:
        stream: Any = container.add_stream(codec, fps, options=options)
        stream.pix_fmt, stream.height, stream.width = "yuv420p", 64, 64
        for i in range(num_frames):
            frame = av.VideoFrame.from_ndarray(np.roll(scenes[i // 7], 2 * i, 1), "rgb24")
            container.mux(stream.encode(frame))
        container.mux(stream.encode())


def decode(path: Path) -> tuple[np.ndarray, float]:
    """Decode a video whose frames must follow each other without gaps; give its rate, too."""
    times, images = zip(*video.decode_video(path), strict=True)
    with av.open(str(path)) as container:
        rate = float(container.streams.video[0].average_rate or 0)
    assert len(SourceVideo(path).pts) == len(times)  # no packet is there in vain
    np.testing.assert_allclose(times, np.arange(len(times)) / rate, atol=1e-9)
    return np.stack(images), rate


@pytest.mark.parametrize("name", CODECS)
def test_cut_videos_decode_to_the_same_pixels(tmp_path: Path, name: str):
    """Also where episodes do not begin at keyframes, and frames are decoded in another order than shown."""
    encode(tmp_path / "source.mp4", *CODECS[name], num_frames=60)
    pixels, _ = decode(tmp_path / "source.mp4")
    episodes = [(0, 9), (9, 20), (20, 21), (21, 33), (33, 47), (47, 60)]
    for trial, order in enumerate(([0, 2, 5], [1, 3, 4], [5, 0, 3], [0, 1, 2, 3, 4, 5], [4])):
        files = VideoFiles(tmp_path / f"{trial}", "cam", 30, 1000, 1e9)
        source = SourceVideo(tmp_path / "source.mp4")
        columns = []
        for e in order:
            start, end = episodes[e]
            columns.append(files.add(source, start / 30, np.arange(end - start) / 30))
        files.close()
        videos = {
            i: decode(path)
            for i, path in enumerate(sorted((tmp_path / f"{trial}/videos/cam/chunk-000").iterdir()))
        }
        assert all(rate == 30 for _, rate in videos.values())
        for e, row in zip(order, columns, strict=True):
            start, end = episodes[e]
            first = row["videos/cam/from_timestamp"] * 30
            assert first == pytest.approx(round(first), abs=1e-9)
            images, _ = videos[row["videos/cam/file_index"]]
            np.testing.assert_array_equal(images[round(first) :][: end - start], pixels[start:end])
        if order == sorted(range(6)):  # all of it: nothing is copied twice
            assert sum(len(images) for images, _ in videos.values()) == 60


def test_times_do_not_drift_over_many_episodes(tmp_path: Path):
    """A seventh of a second is no whole number of microseconds, which is what joining by ffmpeg counts in."""
    encode(tmp_path / "source.mp4", "libx264", {"g": "2"}, num_frames=7)
    files = VideoFiles(tmp_path / "out", "cam", 30, 1000, 1e9)
    sources = [SourceVideo(tmp_path / "source.mp4") for _ in range(2)]
    starts = [
        files.add(sources[i % 2], 0.0, np.arange(7) / 30)["videos/cam/from_timestamp"] for i in range(600)
    ]
    files.close()
    times = SourceVideo(tmp_path / "out/videos/cam/chunk-000/file-000.mp4")
    np.testing.assert_allclose(np.sort(times.pts) * float(times.time_base), np.arange(4200) / 30, atol=1e-9)
    np.testing.assert_allclose(starts, np.arange(600) * 7 / 30, atol=1e-9)


def test_videos_of_other_codecs_get_their_own_files(tmp_path: Path):
    record(tmp_path / "a", (5, 8), encoding=video.H264)
    record(tmp_path / "b", (6,))
    meta = merge_datasets([load(tmp_path / "a"), load(tmp_path / "b")], tmp_path / "out")
    assert_copied(meta.root, [(tmp_path / "a", 0), (tmp_path / "a", 1), (tmp_path / "b", 0)])
    assert meta.episodes[f"videos/{TOP}/file_index"].tolist() == [0, 0, 1]
    details = meta.features[TOP]["info"]
    assert (details["video.codec"], details["video.preset"], details["video.g"]) == (None, None, 2)


def test_a_video_of_one_frame_does_not_decide_for_longer_ones(tmp_path: Path):
    """It is decoded in the order in which it is shown, whatever is said of it; theirs are not."""
    files, rows = VideoFiles(tmp_path / "out", "cam", 30, 1000, 1e9), []
    lengths = {"one": 1, "many": 30}
    for name in ("one", "many", "one"):
        encode(tmp_path / f"{name}.mp4", *CODECS["h264, B-frames"], num_frames=lengths[name])
        rows.append(files.add(SourceVideo(tmp_path / f"{name}.mp4"), 0.0, np.arange(lengths[name]) / 30))
    files.close()
    assert [row["videos/cam/file_index"] for row in rows] == [0, 1, 1]
    joined, _ = decode(tmp_path / "out/videos/cam/chunk-000/file-001.mp4")
    parts = [decode(tmp_path / f"{name}.mp4")[0] for name in ("many", "one")]
    np.testing.assert_array_equal(joined, np.concatenate(parts))


def test_files_stay_within_their_sizes(tmp_path: Path):
    source = record(tmp_path / "source", (5, 8, 4, 7)).meta
    source.info |= {"data_files_size_in_mb": 0.0001, "video_files_size_in_mb": 0.0005, "chunks_size": 2}
    meta = delete_episodes(source, [1], tmp_path / "out")
    assert_copied(meta.root, [(source.root, 0), (source.root, 2), (source.root, 3)])
    assert meta.episodes["data/file_index"].tolist() == [0, 1, 0]
    assert meta.episodes["data/chunk_index"].tolist() == [0, 0, 1]
    assert len(set(map(meta.video_file, range(3), [TOP] * 3))) > 1
    assert meta.info["chunks_size"] == 2


def test_what_lerobot_does_not_know_is_kept_where_all_agree(tmp_path: Path):
    for name in "ab":
        root = record(tmp_path / name, (3, 2), NUMBERS).root
        info = json.loads((root / "meta/info.json").read_text())
        info |= {"operator": "Kim", "place": name}
        (root / "meta/info.json").write_text(json.dumps(info))
        path = root / "meta/episodes/chunk-000/file-000.parquet"
        table = pq.read_table(path).append_column("success", [[True, False]])
        pq.write_table(table, path)
    meta = merge_datasets([load(tmp_path / "a"), load(tmp_path / "b")], tmp_path / "out")
    assert meta.info["operator"] == "Kim"
    assert "place" not in meta.info
    assert list(meta.episodes["success"]) == [True, False, True, False]


def test_datasets_that_do_not_go_together_are_refused(tmp_path: Path):
    one = record(tmp_path / "one", (2,), NUMBERS).meta
    reward = {"dtype": "float32", "shape": (2,), "names": None}
    others = {
        r"next\.reward' has shape \(1,\) in .*one and \(2,\) in .*other": {"next.reward": reward},
        r"'observation\.state' has names \['a', 'b', 'c'\] in .*one and None in": {
            "observation.state": NUMBERS["observation.state"] | {"names": None}
        },
        r"other lacks the features \['action'\] that .*one has": {"action": None},
        r"one lacks the features \['extra'\] that .*other has": {"extra": reward},
    }
    for message, changes in others.items():
        features = {k: f for k, f in (NUMBERS | changes).items() if f}
        other = record(tmp_path / "other", (2,), features).meta
        with pytest.raises(InputError, match=message):
            merge_datasets([one, other], tmp_path / "out")
        shutil.rmtree(tmp_path / "other")
    other = record(tmp_path / "other", (2,), NUMBERS, robot_type="so101").meta
    with pytest.raises(InputError, match=r"robot_type is None in .*one and 'so101' in .*other"):
        merge_datasets([one, other], tmp_path / "out")
    other.info |= {"robot_type": None, "fps": 20}
    with pytest.raises(InputError, match=r"fps is 10 in .*one and 20 in .*other"):
        merge_datasets([one, other], tmp_path / "out")
    other.info["fps"] = 10
    del other.stats["action"]
    with pytest.raises(InputError, match=r"only one has statistics of \['action'\]"):
        merge_datasets([one, other], tmp_path / "out")
    with pytest.raises(InputError, match=r"one is given more than once"):
        merge_datasets([one, load(tmp_path / "one")], tmp_path / "out")
    with pytest.raises(InputError, match="at least one dataset"):
        merge_datasets([], tmp_path / "out")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["one", "other"]


def test_statistics_without_counts_are_refused_before_anything_is_written(tmp_path: Path):
    sources = [record(tmp_path / name, (3, 4), NUMBERS).meta for name in "ab"]
    path = sources[1].root / "meta/stats.json"
    stats = json.loads(path.read_text())
    del stats["action"]["count"], stats["index"]["count"]
    path.write_text(json.dumps(stats))
    sources[1] = load(sources[1].root)
    with pytest.raises(
        InputError, match=r"b/meta: the statistics of \['action'\] lack some of .* stats .*b --write"
    ):
        merge_datasets(sources, tmp_path / "out")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a", "b"]
    split_dataset(sources[1], {"all": 1.0}, tmp_path / "out")  # nothing to combine


def test_a_full_disk_is_named_and_nothing_is_left(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    sources = [record(tmp_path / name, (3, 4), NUMBERS).meta for name in "ab"]

    def fail(*_: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(pq.ParquetWriter, "write_table", fail)
    with pytest.raises(InputError, match=r"out: cannot be written \(No space left on device\)"):
        merge_datasets(sources, tmp_path / "out")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a", "b"]


def test_wrong_choices_are_refused_before_anything_is_written(tmp_path: Path):
    source = record(tmp_path / "source", (2, 3, 2), NUMBERS).meta
    deletions = {r"\[-1, 3\] are no episodes of .*0\.\.2": [3, 0, -1], "these are all 3 episodes": [0, 1, 2]}
    deletions |= {"at least one episode": [], r"\[1\] are given more than once": [1, 1]}
    for message, episodes in deletions.items():
        with pytest.raises(InputError, match=message):
            delete_episodes(source, episodes, tmp_path / "out")
    splits: dict[str, dict[str, Any]] = {
        "at least one split": {},
        "fractions sum to 1.1": {"a": 0.6, "b": 0.5},
        "each must lie in 0..1": {"a": -0.5, "b": 1.0},
        "'b' would have none of the 3 episodes": {"a": 0.7, "b": 0.3},
        "episode 1 is in 'a' and in 'b'": {"a": [0, 1], "b": [1]},
        r"'b': \[7\] are no episodes": {"a": [0], "b": [7]},
        "'a' would have none": {"a": [], "b": [1]},
        "fractions for all splits or for none": {"a": [0], "b": 0.5},
        "cannot be the name of a folder": {"../a": [0]},
    }
    for message, chosen in splits.items():
        with pytest.raises(InputError, match=message):
            split_dataset(source, chosen, tmp_path / "out")
    (tmp_path / "taken").mkdir()
    with pytest.raises(InputError, match="taken: already exists"):
        delete_episodes(source, [0], tmp_path / "taken")
    with pytest.raises(InputError, match="inside"):
        delete_episodes(source, [0], source.root / "edited")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["source", "taken"]


def test_nothing_appears_when_a_source_is_damaged(tmp_path: Path):
    source = record(tmp_path / "source", (5, 8, 4))
    name = source.meta.video_file(0, TOP)
    path = source.root / name
    whole = path.read_bytes()
    for damage, message in ((whole[:300], "no video stream"), (b"", "damaged"), (None, "no such file")):
        path.unlink()
        if damage is not None:
            path.write_bytes(damage)
        with pytest.raises(InputError, match=f"{name}.*{message}"):
            delete_episodes(load(source.root), [0], tmp_path / "out")
    path.write_bytes(whole[:-200])  # cuts into the last episode, which is then the one to delete
    with pytest.raises(InputError, match=rf"source: episode 2: .*{name}: no frame within .* of 1\.6\d+ s"):
        delete_episodes(load(source.root), [0], tmp_path / "out")
    delete_episodes(load(source.root), [2], tmp_path / "repaired")
    path.write_bytes(whole)
    assert_copied(tmp_path / "repaired", [(source.root, 0), (source.root, 1)])
    shutil.rmtree(tmp_path / "repaired")
    short = record(tmp_path / "short", (5, 4)).root
    shutil.copy(short / name, source.root / name)
    with pytest.raises(InputError, match=rf"source: episode 1: .*{name}: no frame within .* of 1\.\d+ s"):
        delete_episodes(load(source.root), [0], tmp_path / "out")
    shutil.copy(short / "data/chunk-000/file-000.parquet", source.root / "data/chunk-000/file-000.parquet")
    with pytest.raises(InputError, match=r"file-000\.parquet: has 0 rows of episode 2, meta/ says 4"):
        delete_episodes(load(source.root), [0, 1], tmp_path / "out")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["short", "source"]
