"""Relative actions are the same in both frameworks: statistics, batches, actions. Others are refused by stock."""

import dataclasses
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest

from lerobot_jax.data.dataset import LeRobotDataset
from lerobot_jax.data.target_statistics import complete_statistics, name_joints, target_statistics
from lerobot_jax.features import FeatureType, NormalizationMode, PolicyFeature
from lerobot_jax.policies.act import ACTConfig
from lerobot_jax.policies.base import FunctionalPolicy
from lerobot_jax.processors import ActionTarget, default_pipelines
from lerobot_jax.processors.actions import to_target
from tests.data.recordings import record
from tests.stock.conftest import lerobot_python, run_command
from tests.stock.policies import new_policy

pytestmark = pytest.mark.lerobot

PEER = Path(__file__).with_name("target_statistics_peer.py")
QUANTILES = {"q01": 0.01, "q10": 0.1, "q50": 0.5, "q90": 0.9, "q99": 0.99}
CHUNK = 6
JOINTS = ["shoulder.pos", "elbow.pos", "gripper.pos"]
FEATURES: dict[str, dict[str, Any]] = {
    "observation.state": {"dtype": "float32", "shape": (4,), "names": [*JOINTS, "load"]},
    "observation.environment_state": {"dtype": "float32", "shape": (5,), "names": None},
    "action": {"dtype": "float32", "shape": (3,), "names": JOINTS},
}
CONFIG = ACTConfig(
    input_features={
        "observation.state": PolicyFeature(FeatureType.STATE, (4,)),
        "observation.environment_state": PolicyFeature(FeatureType.ENV, (5,)),
    },
    dim_model=32,
    n_heads=2,
    dim_feedforward=64,
    chunk_size=CHUNK,
    n_action_steps=4,
    use_vae=False,
)
# What is predicted, and how it is normalized
POLICIES = {
    "relative": (ActionTarget("relative"), NormalizationMode.MEAN_STD),
    "excluded": (ActionTarget("relative", ("Gripper",)), NormalizationMode.MEAN_STD),
    "quantiles": (ActionTarget("relative", ("gripper",)), NormalizationMode.QUANTILES),
    "delta": (ActionTarget("delta"), NormalizationMode.MEAN_STD),
    "per_step": (ActionTarget("relative", statistics_per_step=True), NormalizationMode.MEAN_STD),
}


def make_policy(dataset: LeRobotDataset, target: ActionTarget, mode: NormalizationMode) -> FunctionalPolicy:
    modes = dict.fromkeys(("STATE", "ENV", "ACTION"), mode)
    policy = new_policy(dataclasses.replace(CONFIG, normalization_mapping=modes), 3, dataset.meta.stats)
    target = name_joints(target, dataset.features)
    stats = complete_statistics(dataset.meta.stats, dataset.columns)
    stats["action"] = target_statistics(dataset.columns, target, policy.config.action_delta_indices)
    features = policy.config.input_features, policy.config.output_features
    pre, post = default_pipelines(*features, modes, stats, "cpu", target=target)
    return policy.replace(preprocessor=pre, postprocessor=post)


def all_targets(dataset: LeRobotDataset, target: ActionTarget) -> np.ndarray:
    """Give what is predicted for each step of each whole chunk, (n, act)."""
    deltas = {"action": [k / dataset.fps for k in range(CHUNK)]}
    windows = LeRobotDataset("test/recorded", root=dataset.root, delta_timestamps=deltas)
    batch = windows.read(np.arange(len(windows)))
    whole = ~batch["action_is_pad"].any(axis=1)
    return to_target(batch["action"], batch["observation.state"], target)[whole].reshape(-1, 3)


@dataclasses.dataclass(frozen=True)
class Scene:
    dataset: LeRobotDataset
    policies: dict[str, FunctionalPolicy]
    batch: dict[str, np.ndarray]
    stock: dict[str, np.ndarray]

    @property
    def observation(self) -> dict[str, np.ndarray]:
        return {key: self.batch[key] for key in CONFIG.input_features}


@pytest.fixture(scope="module")
def scene(tmp_path_factory: pytest.TempPathFactory) -> Scene:
    folder = tmp_path_factory.mktemp("targets")
    dataset = record(folder / "data", (40, 4, 61, 25), FEATURES)
    policies = {name: make_policy(dataset, *settings) for name, settings in POLICIES.items()}
    for name, policy in policies.items():
        policy.save_pretrained(folder / name)
    rng = np.random.default_rng(5)
    shapes = {key: (3, *feature["shape"]) for key, feature in FEATURES.items()}
    shapes |= {"action": (3, CHUNK, 3), "later_states": (CONFIG.n_action_steps, 3, 4)}
    batch = {key: rng.normal(10, 3, shape).astype(np.float32) for key, shape in shapes.items()}
    batch["later_states"][0] = batch["observation.state"]
    np.savez(folder / "batch.npz", **batch)
    paths = [folder / name for name in ("data", "batch.npz", "out.npz")]
    arguments = (paths[0], "gripper", *paths[1:], *(folder / name for name in POLICIES))
    run_command(lerobot_python(), PEER, *arguments, folder=folder)
    with np.load(folder / "out.npz") as file:
        return Scene(dataset, policies, batch, dict(file))


@pytest.mark.parametrize("name", ["all", "excluded"])
def test_relative_statistics_are_those_of_stock(scene: Scene, name: str):
    """Equal up to rounding: stock's variance is a difference of float32 squares, its quantiles are off by a bin."""
    excluded = ("gripper",) * (name == "excluded")
    target = name_joints(ActionTarget("relative", excluded), scene.dataset.features)
    ours = target_statistics(scene.dataset.columns, target, range(CHUNK))
    stock = {
        key.removeprefix(f"stats/{name}/"): v for key, v in scene.stock.items() if f"stats/{name}/" in key
    }
    assert set(ours) == set(stock)
    for key in ("min", "max", "count"):
        np.testing.assert_array_equal(ours[key], stock[key], err_msg=key)
    np.testing.assert_allclose(ours["mean"], stock["mean"], rtol=1e-5, atol=1e-6)
    largest = np.maximum(np.abs(ours["min"]), np.abs(ours["max"])) ** 2
    assert (np.abs(ours["std"] ** 2 - stock["std"] ** 2) <= 2e-6 * largest).all()
    values = np.sort(all_targets(scene.dataset, target), axis=0)
    one_bin = (ours["max"] - ours["min"]) / 5000
    for key, fraction in QUANTILES.items():
        place = fraction * len(values)
        low, high = values[int(place) - 2] - one_bin, values[int(place) + 2] + one_bin
        for found in (ours[key], stock[key]):
            assert ((found >= low) & (found <= high)).all(), key


@pytest.mark.parametrize("name", ["relative", "excluded", "quantiles"])
def test_batches_and_chunks_are_those_of_stock(scene: Scene, name: str):
    policy = scene.policies[name]
    seen = policy.preprocess({**scene.observation, "action": scene.batch["action"]})
    for key in (*CONFIG.input_features, "action"):
        theirs = scene.stock[f"{name}/preprocessed/{key}"]
        np.testing.assert_allclose(seen[key], theirs, rtol=1e-6, atol=1e-6, err_msg=key)
    arrays = policy.params, policy.buffers, policy.preprocess(scene.observation), jax.random.key(0)
    chunk = policy.postprocess(jax.jit(policy.sample_actions)(*arrays), scene.observation)
    np.testing.assert_allclose(chunk, scene.stock[f"{name}/chunk"], rtol=1e-5, atol=1e-4)


def test_the_runner_keeps_the_state_of_the_chunk_where_stock_takes_the_latest(scene: Scene):
    runner = scene.policies["excluded"].make_runner(3)
    later = [scene.observation | {"observation.state": state} for state in scene.batch["later_states"]]
    ours = np.stack([runner.select_action(observation) for observation in later])
    np.testing.assert_allclose(
        ours, np.moveaxis(scene.stock["excluded/chunk"], 1, 0)[:4], rtol=1e-5, atol=1e-4
    )
    drift = (scene.batch["later_states"] - scene.batch["later_states"][:1])[..., :3] * [1, 1, 0]
    np.testing.assert_allclose(ours + drift, scene.stock["excluded/selected"], rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize(("name", "step"), [("delta", "delta_actions"), ("per_step", "per_step_normalizer")])
def test_stock_refuses_what_it_does_not_have(scene: Scene, name: str, step: str):
    assert f"lerobot_jax_{step}" in str(scene.stock[f"{name}/error"])
