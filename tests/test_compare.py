import dataclasses
import json
import shutil
from pathlib import Path

import jax
import numpy as np
import PIL.Image
import pytest

from lerobot_jax import compare
from lerobot_jax.data.video import decode_video
from lerobot_jax.errors import InputError
from lerobot_jax.features import FeatureType, NormalizationMode, PolicyFeature
from lerobot_jax.files import read_json, write_json
from lerobot_jax.policies.base import FunctionalPolicy, make_policy
from lerobot_jax.policies.diffusion import DiffusionConfig
from tests.test_eval import KEYPOINTS, make_act

SETTINGS = {
    "env": {"type": "pusht"},
    "dataset": {"repo_id": "builtin/pusht_keypoints"},
    "batch_size": 8,
    "gradient_accumulation_steps": 2,
}
SHORT = [
    "--env.episode_length=12",
    "--eval.n_episodes=3",
    "--eval.batch_size=2",
    "--eval.use_async_envs=False",
]
QUICK = [*SHORT, "--eval.max_episodes_rendered=2", "--latency_rounds=4", "--denoising_steps", "2", "99"]


def make_diffusion() -> FunctionalPolicy:
    config = dataclasses.replace(
        DiffusionConfig.tiny(),
        input_features=KEYPOINTS,
        output_features={"action": PolicyFeature(FeatureType.ACTION, (2,))},
        normalization_mapping=dict.fromkeys(("STATE", "ENV", "ACTION"), NormalizationMode.MIN_MAX),
        crop_shape=None,
    )
    features = {**KEYPOINTS, **config.output_features}
    stats = {k: {"min": np.zeros(f.shape), "max": np.full(f.shape, 512.0)} for k, f in features.items()}
    policy = make_policy(config, stats)
    params, buffers = policy.init(jax.random.key(1))
    return policy.replace(params=params, buffers=buffers)


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, str]:
    """A run of ACT with a checkpoint of step 20, and Diffusion Policy in a folder of its own."""
    root = tmp_path_factory.mktemp("runs")
    checkpoints = root / "act/checkpoints"
    model = checkpoints / "000020/pretrained_model"
    make_act(KEYPOINTS).save_pretrained(model)
    write_json(SETTINGS, model / "train_config.json")
    (checkpoints / "last").symlink_to("000020")
    records = [
        {"step": 10, "steps_per_s": 5.0},
        {"step": 10, "pc_success": 0.0},
        {"step": 20, "steps_per_s": 2.5},
    ]
    (root / "act/metrics.jsonl").write_text("".join(json.dumps(r) + "\n" for r in records))
    make_diffusion().save_pretrained(root / "diffusion")
    return str(root / "act"), str(root / "diffusion")


@pytest.fixture(scope="module")
def folder(runs: tuple[str, str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What a comparison of them leaves behind."""
    folder = tmp_path_factory.mktemp("compared") / "act_or_diffusion"
    compare.main([*runs, *QUICK, f"--output_dir={folder}"])
    return folder


def test_all_numbers_are_written(folder: Path):
    results = read_json(folder / "compare.json")
    act, diffusion = results["policies"]
    assert (act["name"], act["type"], act["step"]) == ("act", "act", 20)
    assert (act["datasets"], act["batch_size"]) == (["builtin/pusht_keypoints"], 16)
    assert act["training_s"] == 10 / 5.0 + 10 / 2.5
    assert (diffusion["name"], diffusion["step"], diffusion["training_s"]) == ("diffusion", None, None)
    assert diffusion["num_parameters"] == sum(x.size for x in jax.tree.leaves(make_diffusion().params))
    for policy in (act, diffusion):
        info = read_json(folder / policy["name"] / "eval_info.json")["per_task"][0]["metrics"]
        rows = policy["episodes"]
        assert [row["seed"] for row in rows] == info["seeds"] == [1000, 1001, 1002]
        np.testing.assert_allclose([row["max_score"] for row in rows], info["max_coverage"], atol=1e-9)
        np.testing.assert_allclose([row["sum_reward"] for row in rows], info["sum_rewards"], atol=1e-9)
        assert policy["max_score"]["mean"] == pytest.approx(np.mean(info["max_coverage"]), abs=1e-8)
        assert policy["success"] == {
            "count": 0,
            "rate": 0.0,
            "interval": [0.0, pytest.approx(0.5615, abs=1e-4)],
        }
        assert policy["steps_to_success"] is None
        assert 0 < policy["path_length"] < 12 * 200
        assert policy["agent_acceleration"] > 0 < policy["command_acceleration"]
    assert results["score"] == "coverage"
    (pair,) = results["success_differences"]
    assert pair["table"] == {"both": 0, "only_a": 0, "only_b": 0, "neither": 3}
    assert (pair["a"], pair["b"], pair["p_holm"], pair["better"]) == ("act", "diffusion", 1.0, None)
    (pair,) = results["score_differences"]
    means = [policy["max_score"]["mean"] for policy in (act, diffusion)]
    assert pair["difference"] == pytest.approx(means[0] - means[1])
    assert pair["p"] >= 2 / 2**3


def test_latency_is_measured_for_each_number_of_denoising_steps(folder: Path):
    rows = read_json(folder / "compare.json")["latency"]
    # 99 are more than this diffusion policy was trained with.
    assert [(x["name"], x["denoising_steps"], x["is_configured"]) for x in rows] == [
        ("act", None, True),
        ("diffusion", 2, False),
        ("diffusion", 3, True),
    ]
    assert all(0 < x["p50_ms"] <= x["p99_ms"] for x in rows)


def test_the_page_tells_it_in_words(folder: Path):
    page = (folder / "compare.md").read_text()
    assert page.startswith(
        "# act or diffusion?\n\n- By success, **none is better**: nobody solved one of the 3 ep"
    )
    assert "- By mean max coverage, **3 episodes do not tell " in page
    assert " fastest**: " in page or "equally fast**: " in page
    assert (
        "They did not learn from the same data (act from builtin/pusht_keypoints, diffusion from unknown"
        in page
    )
    assert "## 3 episodes of PushT-v0 (seeds 1000 to 1002)" in page
    assert "| act - diffusion | 0 / 0 / 0 / 3 | +0 points (-56 to +56) | p = 1.00: cannot tell |" in page
    assert "| diffusion | 3 (its own) | " in page
    assert "| builtin/pusht_keypoints | 20 of batch 16 | 6 s |" in page
    assert "took turns, 4 times" in page
    tables = [line for line in page.splitlines() if line.startswith("|")]
    for line in tables:
        assert line.endswith("|")
    assert page.count("![") == 1
    assert "[compare.mp4](compare.mp4)" in page


def test_the_figure_shows_something(folder: Path):
    with PIL.Image.open(folder / "compare.png") as picture:
        pixels = np.asarray(picture.convert("RGB"))
    assert pixels.shape[1] > 1000
    assert pixels.std() > 20


def test_the_video_shows_both_to_the_end(folder: Path):
    frames = [frame for _, frame in decode_video(folder / "compare.mp4")]
    assert len(frames) == 12 + 1 + 10  # a view of the start, one after each step, a second at the end
    height, width, _ = frames[0].shape
    assert width > 2 * 300
    assert height > 2 * 300
    corner = frames[-1][-30:, :30].astype(int)  # what failed ends with a red frame
    assert np.abs(corner - (209, 73, 91)).sum(-1).min() < 40
    assert np.abs(frames[5][-30:, :30].astype(int) - (209, 73, 91)).sum(-1).min() > 100


def test_the_same_command_gives_the_same_numbers(runs: tuple[str, str], folder: Path, tmp_path: Path):
    again = tmp_path / "again"
    arguments = ["--eval.max_episodes_rendered=0", "--latency_rounds=0", "--eval.batch_size=3"]
    compare.main([*runs, *SHORT[:2], SHORT[3], *arguments, f"--output_dir={again}"])
    first, second = read_json(folder / "compare.json"), read_json(again / "compare.json")
    assert second["latency"] == []
    assert not (again / "compare.mp4").exists()
    assert "## Latency" not in (again / "compare.md").read_text()
    assert (again / "compare.png").exists()
    for results in (first, second):
        for name in ("conclusion", "latency", "latency_rounds"):
            del results[name]
    assert first == second


def test_mistakes(runs: tuple[str, str], folder: Path, tmp_path: Path):
    act, diffusion = runs
    make_act(KEYPOINTS, action=3).save_pretrained(tmp_path / "wide")
    velocity = {"observation.velocity": PolicyFeature(FeatureType.STATE, (2,))}
    make_act(KEYPOINTS | velocity).save_pretrained(tmp_path / "other_inputs")
    shutil.copytree(diffusion, tmp_path / "of_aloha")
    write_json({"env": {"type": "aloha"}}, tmp_path / "of_aloha/train_config.json")
    (tmp_path / "empty").mkdir()
    for arguments, message in (
        ([], "give two or more: python -m lerobot_jax.compare RUN RUN"),
        ([act], "give two or more"),
        ([act, f"{act}/checkpoints/last"], "act and .*last are the same policy, "),
        ([act, "/nowhere"], "/nowhere: no such folder"),
        ([act, str(tmp_path / "empty")], "empty has no config.json"),
        ([act, str(tmp_path / "wide")], r"act and wide act in different spaces: .* \(2,\) and \(3,\)"),
        ([act, str(tmp_path / "other_inputs")], "other_inputs: the policy needs .*velocity.*shows only"),
        ([act, str(tmp_path / "of_aloha")], "of_aloha was made for env.type=aloha, not for pusht"),
        ([act, diffusion, f"--output_dir={folder}"], "is in use already; choose another folder"),
        ([act, diffusion, "--names", "a"], "--names: 2 policies need as many names, not 1"),
        ([act, diffusion, "--names", "a", "a"], "--names must differ"),
        ([act, diffusion, "--names", "a", "../b"], "--names must differ, and folders are called by them"),
        ([act, diffusion, "--env.type=None"], "--env.type is missing"),
        ([act, diffusion, "--denoising_steps", "0"], "denoising_steps must be at least 1"),
        ([act, diffusion, "--latency_rounds=-1"], "latency_rounds must not be negative"),
        ([act, diffusion, "--eval.n_episode=3"], "perhaps you meant --eval.n_episodes"),
    ):
        with pytest.raises(InputError, match=message):
            compare.main(arguments)


def test_help_teaches(capsys: pytest.CaptureFixture[str]):
    with pytest.raises(SystemExit) as ended:
        compare.main(["--help"])
    text = capsys.readouterr().out
    assert ended.value.code == 0
    for word in ("RUN RUN ...", "--eval.n_episodes", "--denoising_steps", "compare.md", "same episodes"):
        assert word in text
