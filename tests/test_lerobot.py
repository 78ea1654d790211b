"""Stock LeRobot, live: run with `pytest -m lerobot` where LEROBOT_PYTHON names a Python that has lerobot==0.6.1."""

import dataclasses
import json
import os
import subprocess
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest

from lerobot_jax import torch_state
from lerobot_jax.data import video
from lerobot_jax.data.dataset import LeRobotDataset
from lerobot_jax.features import FeatureType, NormalizationMode, PolicyFeature
from lerobot_jax.policies.act import ACTConfig
from lerobot_jax.policies.base import load_policy, make_policy

pytestmark = pytest.mark.lerobot
PEER = Path(__file__).parent / "lerobot_peer.py"


def stock(tmp_path: Path, command: str, **arguments: Any) -> dict[str, np.ndarray]:
    """Run a command of lerobot_peer.py; give its result."""
    python = os.environ.get("LEROBOT_PYTHON")
    if not python:
        pytest.fail("LEROBOT_PYTHON must name a Python with lerobot==0.6.1")
    folder = tmp_path / command
    folder.mkdir(exist_ok=True)
    (folder / "arguments.json").write_text(json.dumps(arguments))
    environment = os.environ | {"HF_HUB_OFFLINE": "1", "CUDA_VISIBLE_DEVICES": ""}
    run = subprocess.run(
        [python, PEER, command, folder / "arguments.json"],
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert run.returncode == 0, run.stderr[-3000:]
    with np.load(folder / "result.npz") as file:
        return dict(file)


VIDEO = {"dtype": "video", "shape": (32, 48, 3), "names": ["height", "width", "channels"]}
FEATURES = {
    "observation.images.top": VIDEO,
    "observation.images.side": {
        "dtype": "image",
        "shape": (24, 24, 3),
        "names": ["height", "width", "channels"],
    },
    "observation.state": {"dtype": "float32", "shape": (3,), "names": ["a", "b", "c"]},
    "action": {"dtype": "float32", "shape": (2,), "names": None},
    "next.reward": {"dtype": "float32", "shape": (1,), "names": None},
    "next.done": {"dtype": "bool", "shape": (1,), "names": None},
}
DELTAS = {
    "action": [0.0, 0.1, 0.2, 0.3],
    "observation.images.top": [-0.1, 0.0],
    "observation.state": [-0.2, 0.0],
}


def make_frames(path: Path) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(3)
    lengths = [12, 7, 15]
    n = sum(lengths)
    smooth = rng.integers(0, 255, (n, 4, 6, 3)).repeat(8, 1).repeat(8, 2).astype(np.uint8)
    frames = {
        "observation.images.top": smooth,
        "observation.images.side": rng.integers(0, 255, (n, 24, 24, 3)).astype(np.uint8),
        "observation.state": rng.normal(50, 20, (n, 3)).astype(np.float32),
        "action": rng.normal(0, 1, (n, 2)).astype(np.float32),
        "next.reward": rng.uniform(0, 1, (n, 1)).astype(np.float32),
        "next.done": np.isin(np.arange(n), np.cumsum(lengths) - 1)[:, None],
        "episode_ends": np.cumsum(lengths),
        "tasks": np.array(["push", "pull", "push"]),
    }
    np.savez(path, **frames)
    return frames


def write_ours(root: Path, frames: dict[str, np.ndarray], encoding: video.VideoEncoding) -> None:
    writer = LeRobotDataset.create("test/ours", 10, FEATURES, root=root, encoding=encoding)
    start = 0
    for end, task in zip(frames["episode_ends"], frames["tasks"], strict=True):
        for t in range(start, end):
            writer.add_frame({"task": str(task)} | {key: frames[key][t] for key in FEATURES})
        writer.save_episode()
        start = end
    writer.finalize()


def assert_equal_to_stock(dataset: LeRobotDataset, recorded: dict[str, np.ndarray]) -> None:
    batch = dataset.read(np.arange(len(dataset)))
    assert set(batch) == {key for key in recorded if not key.startswith("stats/")}
    for key, value in batch.items():
        np.testing.assert_array_equal(np.asarray(value), recorded[key], err_msg=key)
    for key, stats in dataset.meta.stats.items():
        for name, value in stats.items():
            np.testing.assert_array_equal(value, recorded[f"stats/{key}/{name}"], err_msg=f"{key} {name}")


@pytest.mark.parametrize("vcodec", ["libsvtav1", "h264"])
@pytest.mark.parametrize("episodes", [None, [2, 0]])
def test_datasets_both_ways(tmp_path: Path, vcodec: str, episodes: list[int] | None):
    """Frames, indices, timestamps, tasks, padding and statistics are equal, whoever writes and whoever reads."""
    frames = make_frames(tmp_path / "frames.npz")
    encoding = video.VideoEncoding() if vcodec == "libsvtav1" else video.H264
    write_ours(tmp_path / "ours", frames, encoding)
    arguments = {
        "frames": str(tmp_path / "frames.npz"),
        "features": FEATURES,
        "root": str(tmp_path / "stock"),
    }
    stock(tmp_path, "write_dataset", vcodec=vcodec, **arguments)
    for root in ("ours", "stock"):
        read = stock(
            tmp_path, "read_dataset", root=str(tmp_path / root), episodes=episodes, delta_timestamps=DELTAS
        )
        dataset = LeRobotDataset("test/ours", tmp_path / root, episodes, DELTAS)
        assert_equal_to_stock(dataset, read)
    ours, theirs = (LeRobotDataset("test/ours", tmp_path / root).meta for root in ("ours", "stock"))
    for key, stats in theirs.stats.items():
        for name, value in stats.items():
            np.testing.assert_array_equal(ours.stats[key][name], value, err_msg=f"{key} {name}")
    info = {
        name: {k: v for k, v in meta.info.items() if k != "features"}
        for name, meta in (("ours", ours), ("theirs", theirs))
    }
    assert info["ours"] == info["theirs"]
    assert ours.features == theirs.features


STATE = PolicyFeature(FeatureType.STATE, (3,))
ENV = PolicyFeature(FeatureType.ENV, (5,))
IMAGE = PolicyFeature(FeatureType.VISUAL, (3, 40, 56))
MIN_MAX = dict.fromkeys(("VISUAL", "STATE", "ENV", "ACTION"), NormalizationMode.MIN_MAX)
POLICIES = {
    "two cameras": ACTConfig(
        input_features={
            "observation.state": STATE,
            "observation.images.a": IMAGE,
            "observation.images.b": IMAGE,
        },
        vision_backbone="resnet18",
        dim_model=64,
        n_heads=4,
        dim_feedforward=96,
        chunk_size=12,
        n_action_steps=5,
    ),
    "environment state": ACTConfig(
        input_features={"observation.environment_state": ENV, "observation.state": STATE},
        normalization_mapping=MIN_MAX,
        pre_norm=True,
        feedforward_activation="gelu",
        n_decoder_layers=2,
        dim_model=32,
        n_heads=2,
        dim_feedforward=64,
        chunk_size=8,
        n_action_steps=8,
        use_vae=False,
    ),
    "ensembling": ACTConfig(
        input_features={"observation.images.a": IMAGE, "observation.state": STATE},
        vision_backbone="resnet50",
        replace_final_stride_with_dilation=True,
        temporal_ensemble_coeff=0.01,
        n_action_steps=1,
        chunk_size=6,
        dim_model=32,
        n_heads=2,
        dim_feedforward=64,
    ),
}


def new_policy(name: str):
    config = dataclasses.replace(
        POLICIES[name],
        output_features={"action": PolicyFeature(FeatureType.ACTION, (2,))},
        pretrained_backbone_weights=None,
        device="cpu",
    )
    rng = np.random.default_rng(1)
    stats = {}
    for key, feature in {**config.input_features, **config.output_features}.items():
        shape = (3, 1, 1) if feature.type == FeatureType.VISUAL else feature.shape
        low = rng.normal(0, 1, shape).astype(np.float32)
        stats[key] = {"mean": low, "std": np.abs(low) + 0.5, "min": low - 1, "max": low + 2}
    policy = make_policy(config, stats)
    params, buffers = policy.init(jax.random.key(0))
    return policy.replace(params=params, buffers=buffers)


@pytest.mark.parametrize("name", POLICIES)
def test_stock_loads_our_policy_and_acts_alike(tmp_path: Path, name: str):
    policy = new_policy(name)
    policy.save_pretrained(tmp_path / "policy")
    rng = np.random.default_rng(2)
    steps, batch = 9, 2
    observations = {
        key: rng.uniform(0, 1, (steps, batch, *feature.shape)).astype(np.float32)
        for key, feature in policy.config.input_features.items()
    }
    np.savez(tmp_path / "observations.npz", **observations)
    arguments = {"folder": str(tmp_path / "policy"), "observations": str(tmp_path / "observations.npz")}
    theirs = stock(tmp_path, "act", steps=steps, **arguments)
    loaded = load_policy(tmp_path / "policy")
    first = loaded.preprocess({key: value[0] for key, value in observations.items()})
    chunk = loaded.postprocess(loaded.sample_actions(loaded.params, loaded.buffers, first, jax.random.key(0)))
    np.testing.assert_allclose(chunk, theirs["chunk"], rtol=1e-4, atol=1e-4)
    runner = loaded.make_runner(batch)
    for t in range(steps):
        actions = runner.select_action({key: value[t] for key, value in observations.items()})
        np.testing.assert_allclose(actions, theirs["actions"][t], rtol=1e-4, atol=1e-4, err_msg=f"step {t}")


@pytest.mark.parametrize("name", POLICIES)
def test_new_policies_start_like_stock_ones(tmp_path: Path, name: str):
    """Every parameter is drawn from the same distribution: equal spread, up to sampling error."""
    policy = new_policy(name)
    ours = torch_state.to_torch(policy.module, policy.params, policy.buffers)
    (tmp_path / "config").mkdir()
    theirs = stock(tmp_path, "initialize", config=policy.config.to_dict(), folder=str(tmp_path / "config"))
    assert set(ours) == set(theirs)
    for key, (mean, std, largest) in theirs.items():
        value = ours[key]
        error = 6 / np.sqrt(value.size)
        scale = max(std, largest / 3)
        assert abs(value.mean() - mean) <= error * scale + 1e-6, key
        assert abs(value.std() - std) <= error * scale + 1e-6, key
        assert np.abs(value).max() <= 1.5 * largest + 1e-6, key
