"""LeRobot's commands and ours, on each other's checkpoints."""

import json
import re
import sys
from pathlib import Path

import numpy as np
import pytest
import safetensors.numpy

from lerobot_jax.data.dataset import LeRobotDataset
from lerobot_jax.features import FeatureType, NormalizationMode, PolicyFeature
from lerobot_jax.metrics import read_metrics
from lerobot_jax.policies.act import ACTConfig
from tests.data.recordings import FEATURES
from tests.stock.conftest import run_command
from tests.stock.policies import new_policy

pytestmark = pytest.mark.lerobot


def test_evaluations_agree_episode_by_episode(tmp_path: Path):
    """The policy pushes the block at random; in the second episode the block is in its place from the start."""
    policy = ACTConfig(
        input_features={
            "observation.state": PolicyFeature(FeatureType.STATE, (2,)),
            "observation.environment_state": PolicyFeature(FeatureType.ENV, (16,)),
        },
        normalization_mapping=dict.fromkeys(("STATE", "ENV", "ACTION"), NormalizationMode.MEAN_STD),
        dim_model=32,
        n_heads=2,
        dim_feedforward=64,
        n_encoder_layers=1,
        chunk_size=16,
        n_action_steps=8,
    )
    sizes = {"observation.state": 2, "observation.environment_state": 16, "action": 2}
    pixels = {key: {"mean": np.full(n, 256.0), "std": np.full(n, 90.0)} for key, n in sizes.items()}
    pixels["action"]["mean"] = np.array([220.0, 320.0])
    new_policy(policy, action=2, stats=pixels).save_pretrained(tmp_path / "policy")
    arguments = [
        f"--policy.path={tmp_path / 'policy'}",
        "--env.type=pusht",
        "--env.obs_type=environment_state_agent_pos",
        "--env.episode_length=60",
        "--eval.n_episodes=3",
        "--seed=1750936",
    ]
    more = ["--policy.device=cpu", "--eval.batch_size=1", "--eval.use_async_envs=false"]
    run_command("lerobot-eval", *arguments, *more, "--output_dir=stock", folder=tmp_path)
    run_command(sys.executable, "-m", "lerobot_jax.eval", *arguments, "--output_dir=ours", folder=tmp_path)
    theirs, ours = (
        json.loads((tmp_path / name / "eval_info.json").read_text())["per_task"][0]["metrics"]
        for name in ("stock", "ours")
    )
    assert ours["successes"] == theirs["successes"] == [False, True, False]
    np.testing.assert_allclose(ours["max_rewards"], theirs["max_rewards"], rtol=1e-4)
    np.testing.assert_allclose(ours["sum_rewards"], theirs["sum_rewards"], rtol=1e-4)
    constant = np.multiply(ours["max_rewards"], ours["lengths"])
    assert (ours["sum_rewards"] < 0.9 * constant)[[0, 2]].all()  # the block was moved


RECIPE = """
from lerobot_jax.config import DatasetConfig, TrainConfig
from lerobot_jax.policies.act import ACTConfig

def get_config(variant=""):
    return TrainConfig(
        job_name="small",
        dataset=DatasetConfig(repo_id="test/recorded", root="{root}"),
        policy=ACTConfig(
            pretrained_backbone_weights=None, chunk_size=4, n_action_steps=2, dim_model=32, n_heads=2,
            dim_feedforward=64, n_encoder_layers=1, use_vae=False, dropout=0.0, device="cpu",
            optimizer_lr=1e-3, optimizer_lr_backbone=1e-4,
        ),
        batch_size={frames}, log_freq=1, save_freq=0, env_eval_freq=0,
    )
"""
LENGTHS = (5, 3, 4)
"""Episodes. A batch is the whole dataset, so that its order does not matter."""


def record_noise(root: Path) -> None:
    """Record a dataset without equal neighbours, between which max-pooling would choose by rounding errors."""
    features = {k: f for k, f in FEATURES.items() if not k.startswith("next.")}
    writer = LeRobotDataset.create("test/recorded", fps=10, features=features, root=root)
    rng = np.random.default_rng(0)
    for length in LENGTHS:
        for _ in range(length):
            frame = {
                "observation.images.top": rng.integers(0, 256, (32, 48, 3), np.uint8),
                "observation.state": rng.normal(0, 1, 3).astype(np.float32),
                "action": rng.normal(0, 1, 2).astype(np.float32),
            }
            writer.add_frame(frame | {"task": "push"})
        writer.save_episode()
    writer.finalize()


def train_ours(recipe: Path, run: Path, *arguments: str) -> tuple[Path, list[dict[str, float]]]:
    """Give the last checkpoint and what was logged in every step."""
    command = [sys.executable, "-m", "lerobot_jax.train", f"--config={recipe}", f"--config.output_dir={run}"]
    run_command(*command, *arguments, folder=recipe.parent)
    return run / "checkpoints/last/pretrained_model", read_metrics(run / "metrics.jsonl")


def test_training_goes_on_from_either_framework(tmp_path: Path):
    """From our checkpoint both take the same steps; from stock's we take the step that stock takes next."""
    root, recipe = tmp_path / "dataset", tmp_path / "recipe.py"
    record_noise(root)
    recipe.write_text(RECIPE.format(root=root, frames=sum(LENGTHS)))
    start, _ = train_ours(recipe, tmp_path / "start", "--config.steps=1")
    ours, logged = train_ours(
        recipe, tmp_path / "ours", f"--config.policy.pretrained_path={start}", "--config.steps=3"
    )
    output = run_command(
        "lerobot-train",
        f"--policy.path={start}",
        "--dataset.repo_id=test/recorded",
        f"--dataset.root={root}",
        "--dataset.video_backend=pyav",
        f"--batch_size={sum(LENGTHS)}",
        "--num_workers=0",
        "--steps=3",
        "--save_freq=2",
        "--log_freq=1",
        "--env_eval_freq=0",
        f"--output_dir={tmp_path / 'stock'}",
        folder=tmp_path,
    )
    stock = [(float(a), float(b)) for a, b in re.findall(r"loss:([\d.]+) grdn:([\d.]+)", output)]
    assert len(stock) == 3
    np.testing.assert_allclose([(r["loss"], r["grad_norm"]) for r in logged], stock, rtol=2e-3)
    assert stock[2][0] < 0.99 * stock[0][0]  # it learns

    before, after, theirs = (
        safetensors.numpy.load_file(folder / "model.safetensors")
        for folder in (start, ours, tmp_path / "stock/checkpoints/000003/pretrained_model")
    )
    assert set(theirs) == set(after)
    for key, value in theirs.items():
        step = np.linalg.norm(value - before[key])
        # What has no gradient, such as the biases of attention keys, Adam moves by rounding errors alone.
        assert np.linalg.norm(after[key] - value) <= 1e-2 * step + 1e-3, key

    checkpoint = tmp_path / "stock/checkpoints/000002/pretrained_model"
    _, next_step = train_ours(
        recipe, tmp_path / "next", f"--config.policy.pretrained_path={checkpoint}", "--config.steps=1"
    )
    np.testing.assert_allclose((next_step[0]["loss"], next_step[0]["grad_norm"]), stock[2], rtol=2e-3)
