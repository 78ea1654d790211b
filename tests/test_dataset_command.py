import json
import os
import re
import shutil
from pathlib import Path

import numpy as np
import PIL.Image
import pytest

from lerobot_jax import dataset as command
from lerobot_jax.data.dataset import LeRobotDataset
from lerobot_jax.data.inspection.sheet import feature_names
from lerobot_jax.data.video import H264
from lerobot_jax.errors import InputError
from tests.data.recordings import FEATURES, record
from tests.data.v21 import record_v21


@pytest.fixture(scope="module")
def recorded(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return record(tmp_path_factory.mktemp("recorded") / "arm", (5, 80, 4), encoding=H264).root


@pytest.fixture(scope="module")
def old(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return record_v21(tmp_path_factory.mktemp("old") / "arm_v21", (5, 8), encoding=H264)


@pytest.fixture
def root(recorded: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(recorded, tmp_path / "arm"))


def run(capsys: pytest.CaptureFixture[str], *arguments: object) -> str:
    command.main([str(argument) for argument in arguments])
    return capsys.readouterr().out


def change_stats(root: Path, key: str, **values: list) -> None:
    path = root / "meta/stats.json"
    stats = json.loads(path.read_text())
    stats[key] |= values
    path.write_text(json.dumps(stats))


def test_help_teaches(capsys: pytest.CaptureFixture[str]):
    page = run(capsys)
    for name in command.COMMANDS:
        assert f"lerobot_jax.dataset {name} " in page
        with pytest.raises(SystemExit):
            command.main([name, "--help"])
        shown = " ".join(capsys.readouterr().out.split())
        assert (command.COMMANDS[name][0].__doc__ or "").partition("\n")[0] in shown


def test_info(capsys: pytest.CaptureFixture[str], recorded: Path):
    shown = run(capsys, "info", recorded)
    for line in (
        r"format +LeRobotDataset v3\.0",
        r"frames +89 at 10 fps: 9 s",
        r"episodes +3 of 4 to 80 frames, median 5",
        r"tasks: 2 +2 episodes: task 0",
        r"decoded +410 kB",  # 89 x 32 x 48 x 3
        r"policies +act: takes observation\.images\.top, observation\.state; gives action",
        r"observation\.state +float32 +3 +a, b, c",
        r"observation\.images\.top +32 x 48 +h264, yuv420p +2 frames +410 kB",
    ):
        assert re.search(line, shown), (line, shown)
    sizes = sum(path.stat().st_size for path in recorded.rglob("*") if path.is_file())
    assert f"{sizes / 1000:#.3g} kB (" in shown


def test_info_says_what_a_policy_lacks(capsys: pytest.CaptureFixture[str], tmp_path: Path):
    features = {"observation.state": FEATURES["observation.state"], "action": FEATURES["action"]}
    record(tmp_path / "blind", (3,), features)
    assert "act: no: input_features: ACT needs at least one image" in run(capsys, "info", tmp_path / "blind")


def test_datasets_are_named_in_three_ways(capsys: pytest.CaptureFixture[str], recorded: Path, tmp_path: Path):
    assert run(capsys, "info", recorded).startswith("arm\n")
    assert run(capsys, "info", f"--root={recorded}").startswith("arm\n")
    assert run(capsys, "info", "me/arm", f"--root={recorded}").startswith("me/arm\n")
    shutil.copytree(recorded, Path(os.environ["HF_LEROBOT_HOME"]) / "me/cached")
    assert run(capsys, "info", "me/cached").startswith("me/cached\n")
    with pytest.raises(InputError, match="name a dataset"):
        command.main(["info"])
    with pytest.raises(InputError, match="me/nowhere"):
        command.main(["info", "me/nowhere"])
    with pytest.raises(InputError, match="no such folder"):
        command.main(["check", f"--root={tmp_path / 'nowhere'}"])
    with pytest.raises(InputError, match="there is no command 'inspect'"):
        command.main(["inspect"])


def test_stats_mark_what_is_approximate_wrong_or_missing(capsys: pytest.CaptureFixture[str], root: Path):
    shown = run(capsys, "stats", root)
    assert "!" not in shown.partition("!  wrong")[0]
    assert "~" in shown.partition("~  LeRobot")[0]  # episodes' averages
    change_stats(root, "action", max=[100.0, 100.0])
    path = root / "meta/stats.json"
    stats = json.loads(path.read_text())
    del stats["next.reward"]["q99"]
    path.write_text(json.dumps(stats))
    shown = run(capsys, "stats", root)
    assert "100!" in shown
    assert "action: max wrong" in shown
    assert "next.reward: q99 missing" in shown
    assert "observation.state:" not in shown


def test_stats_show_how_far_float32_is_off(capsys: pytest.CaptureFixture[str], tmp_path: Path):
    """LeRobot's variance is a difference of squares; far from zero, nothing is left of it."""
    features = {"action": FEATURES["action"] | {"shape": (1,)}}
    writer = LeRobotDataset.create("test/far", fps=10, features=features, root=tmp_path / "far")
    for value in np.random.default_rng(0).normal(1e5, 1, 500).astype(np.float32):
        writer.add_frame({"action": np.array([value]), "task": "t"})
    writer.save_episode()
    writer.finalize()
    shown = run(capsys, "stats", tmp_path / "far")
    exact, stored, difference = (line.split()[-1] for line in shown.splitlines()[3:6])
    assert float(exact) == pytest.approx(1, abs=0.1)
    assert stored.endswith("~")
    assert abs(float(difference)) > 0.5


def test_stats_are_written_exactly_and_the_first_ones_kept(
    capsys: pytest.CaptureFixture[str], root: Path, recorded: Path
):
    change_stats(root, "action", max=[100.0, 100.0])
    wrong = (root / "meta/stats.json").read_bytes()
    for arguments in (("--write", root), (root, "--write", "True")):  # the second time, the backup stays
        assert "written: " in run(capsys, "stats", *arguments)
        assert (root / "meta/stats.json.bak").read_bytes() == wrong
    dataset, before = (
        LeRobotDataset("test/recorded", root),
        LeRobotDataset("test/recorded", recorded).meta.stats,
    )
    stats = dataset.meta.stats
    assert set(stats) == set(before)
    for key in ("observation.state", "action", "next.reward", "next.done"):
        values = dataset.columns[key].reshape(len(dataset), -1).astype(np.float64)
        assert set(stats[key]) == set(before[key])
        np.testing.assert_allclose(stats[key]["max"], values.max(0))
        np.testing.assert_allclose(stats[key]["q10"], np.quantile(values, 0.1, axis=0), rtol=1e-12)
        np.testing.assert_allclose(stats[key]["std"], before[key]["std"], rtol=1e-5)
        assert stats[key]["min"].shape == before[key]["min"].shape
    assert stats["observation.images.top"]["mean"].shape == (3, 1, 1)
    np.testing.assert_array_equal(stats["timestamp"]["q01"], before["timestamp"]["q01"])
    shown = run(capsys, "stats", root)
    assert "difference" not in shown
    assert "no problem" in run(capsys, "check", root)


def test_stats_of_v21_are_shown_but_not_written(capsys: pytest.CaptureFixture[str], old: Path):
    shown = run(capsys, "stats", old)
    assert "!" not in shown.partition("!  wrong")[0]
    with pytest.raises(InputError, match=r"convert it to v3\.0 before --write"):
        command.main(["stats", str(old), "--write"])


def test_check_tells_every_problem_and_fails(capsys: pytest.CaptureFixture[str], root: Path, old: Path):
    for healthy in (root, old):
        for options in ([], ["--decode"]):
            assert "no problem in" in run(capsys, "check", healthy, *options)
    change_stats(root, "action", max=[100.0, 100.0])
    (root / "data/chunk-000/file-007.parquet").write_bytes(b"x")
    with pytest.raises(InputError, match=r"arm: 2 problems$"):
        command.main(["check", str(root)])
    shown = capsys.readouterr().out
    assert re.search(r"file-007.parquet: belongs to no episode\n +repair: delete it", shown)
    assert re.search(
        r"meta/stats.json: 'action': max is .*\n +repair: compute them anew: stats --write", shown
    )


def test_check_finds_faults_of_v21(old: Path, tmp_path: Path):
    root = Path(shutil.copytree(old, tmp_path / "old"))
    next(root.rglob("episode_000001.mp4")).unlink()
    data = next(root.rglob("episode_000000.parquet"))
    data.write_bytes(data.read_bytes()[:-20])
    with pytest.raises(InputError, match="2 problems"):
        command.main(["check", str(root)])


@pytest.mark.parametrize("which", ["recorded", "old"])
def test_view(
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    request: pytest.FixtureRequest,
    tmp_path: Path,
    which: str,
):
    source = request.getfixturevalue(which)
    monkeypatch.chdir(tmp_path)
    path = run(capsys, "view", source, "--episode=1").strip()
    assert path == f"{source.name}_episode_000001.png"
    with PIL.Image.open(path) as picture:
        assert picture.width == 1500
        assert np.asarray(picture.convert("RGB")).std() > 20
    assert run(capsys, "view", source, "--output=new/sheet.png", "--num_frames=3").strip() == "new/sheet.png"
    assert (tmp_path / "new/sheet.png").exists()


def test_view_of_what_is_not_there(recorded: Path, tmp_path: Path):
    with pytest.raises(InputError, match=r"9"):
        command.main(["view", str(recorded), "--episode=9"])
    with pytest.raises(InputError, match="num_frames must be at least 1"):
        command.main(["view", str(recorded), "--num_frames=0"])
    with pytest.raises(InputError, match=r"--output=.*xyz"):
        command.main(["view", str(recorded), f"--output={tmp_path / 'sheet.xyz'}"])


def test_names_of_features():
    assert feature_names("action", {"shape": (2,), "names": {"motors": ["a", "b"]}}) == ["a", "b"]
    assert feature_names("action", {"shape": (2,), "names": ["a"]}) == ["action 0", "action 1"]
    assert feature_names("next.reward", {"shape": (1,), "names": None}) == ["reward"]


def test_convert_merge_split_and_delete(
    capsys: pytest.CaptureFixture[str], recorded: Path, old: Path, tmp_path: Path
):
    run(capsys, "convert", old, f"--output={tmp_path / 'new'}")
    run(capsys, "merge", recorded, tmp_path / "new", f"--output={tmp_path / 'both'}")
    both = LeRobotDataset("test/both", tmp_path / "both")
    assert (both.num_episodes, len(both)) == (5, 89 + 13)
    run(
        capsys,
        "split",
        tmp_path / "both",
        "--fractions",
        "train=0.8",
        "val=0.2",
        f"--output={tmp_path / 'parts'}",
    )
    lengths = [len(LeRobotDataset("test/part", tmp_path / "parts" / name)) for name in ("train", "val")]
    assert lengths == [5 + 80 + 4 + 5, 8]
    run(capsys, "split", tmp_path / "both", "--episodes", "a=0,2-3", "b=4", f"--output={tmp_path / 'other'}")
    assert len(LeRobotDataset("test/part", tmp_path / "other/a")) == 5 + 4 + 5
    run(
        capsys, "delete-episodes", tmp_path / "both", "--episodes", "1", "3", f"--output={tmp_path / 'fewer'}"
    )
    assert len(LeRobotDataset("test/part", tmp_path / "fewer")) == 5 + 4 + 8
    for made in ("new", "both", "parts/train", "parts/val", "other/a", "other/b", "fewer"):
        assert "no problem" in run(capsys, "check", tmp_path / made, "--decode"), made


def test_mistakes_in_splits(recorded: Path, tmp_path: Path):
    output = f"--output={tmp_path / 'new'}"
    for arguments, message in (
        (["split", str(recorded), output], "give either --fractions or --episodes"),
        (["split", str(recorded), "--fractions", "train", output], "--fractions: expected NAME=VALUE"),
        (["split", str(recorded), "--episodes", "a=x", output], "--episodes: expected NAME=VALUE"),
        (["split", str(recorded), "--episodes", "a=0-", output], "--episodes: expected NAME=VALUE"),
        (["split", str(recorded), "--episodes", "a=2-0", output], "--episodes: 2-0 has no episode"),
        (
            ["split", str(recorded), "--episodes", "a=0-99999999999", output],
            "no dataset has more than 10,000,000",
        ),
        (
            ["split", str(recorded), "--episodes", "a=0-999", output],
            r"\[3, .*, 12\] and 987 more are no episodes",
        ),
        (["split", str(recorded), "--episodes", "a=0", "a=1", output], "each name can be given once"),
        (["merge", str(recorded), output], "name two or more datasets"),
        (["delete-episodes", str(recorded), output], "name the --episodes"),
        (["delete-episodes", str(recorded), "--episodes", "0"], "output"),
    ):
        with pytest.raises(InputError, match=message):
            command.main(arguments)
    assert not (tmp_path / "new").exists()


def test_cache(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, recorded: Path, tmp_path: Path
):
    monkeypatch.setenv("LEROBOT_JAX_CACHE", str(tmp_path / "cache"))
    assert "frames: 0 B in 0 files' frames" in run(capsys, "cache")
    dataset = LeRobotDataset("test/recorded", recorded)
    dataset.cache_frames(1.0)
    shown = run(capsys, "cache", "--evict")
    assert re.search(r"4\d\d kB +\d{4}-\d\d-\d\d \d\d:\d\d +in use +.*file-000\.mp4", shown)
    assert "removed: 0 B" in shown
    del dataset
    shown = run(capsys, "cache", "--evict")
    assert re.search(r"0 B in 0 files' frames\nremoved: 4\d\d kB of 1 files' frames", shown)
