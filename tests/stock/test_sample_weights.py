"""Weights of samples, and a weighted step, are those of stock LeRobot."""

import dataclasses
import json
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from lerobot_jax import torch_state
from lerobot_jax.data.dataset import LeRobotDataset
from lerobot_jax.data.sample_weights import SampleWeightingConfig, sample_weights
from lerobot_jax.features import FeatureType, PolicyFeature
from lerobot_jax.policies.act import ACTConfig
from lerobot_jax.train_step import make_loss
from tests.data.recordings import record
from tests.runs import FEATURES
from tests.stock.conftest import lerobot_python, run_command
from tests.stock.policies import new_policy

pytestmark = pytest.mark.lerobot

LENGTHS = (40, 9, 61, 25)
BATCH = 12
ACT = ACTConfig(
    input_features={
        "observation.state": PolicyFeature(FeatureType.STATE, (3,)),
        "observation.environment_state": PolicyFeature(FeatureType.ENV, (4,)),
    },
    dim_model=32,
    n_heads=2,
    dim_feedforward=64,
    chunk_size=6,
    n_action_steps=4,
    latent_dim=4,
    dropout=0.0,
)
CASES: dict[str, tuple[int, dict[str, Any]]] = {
    "default": (6, {}),
    "dense": (17, {"head_mode": "dense", "kappa": 0.05}),
    "wide": (3, {"kappa": 0.5, "epsilon": 0.01}),
    "below zero": (6, {"kappa": -0.02, "extra_params": {"fallback_weight": 0.25}}),
    "beyond the episodes": (100, {"kappa": 0.3}),
    "constant": (6, {"head_mode": "constant", "kappa": 1e-9}),
    "backwards": (6, {"head_mode": "backwards"}),
    "unknown": (6, {"head_mode": "unknown"}),
    "step": (6, {"kappa": 0.05}),
}


def write_progress(dataset: LeRobotDataset, path: Path) -> None:
    """Write progress that wavers, is unknown here and there, and lacks some frames; rows in no order."""
    rng = np.random.default_rng(3)
    index, episode = dataset.columns["index"], dataset.columns["episode_index"]
    part = dataset.columns["frame_index"] / dataset.meta.episodes["length"][episode]
    wavering = (part + rng.normal(0, 0.04, len(index))).astype(np.float32)
    columns = {
        "index": index,
        "episode_index": episode,
        "progress_sparse": np.where(rng.random(len(index)) < 0.1, np.nan, wavering).astype(np.float32),
        "progress_dense": wavering.astype(np.float64) ** 2,
        "progress_constant": np.full(len(index), 0.5),
        "progress_backwards": 1 - part,
        "progress_unknown": np.full(len(index), np.nan),
    }
    kept = rng.permutation(len(index))[8:]
    pq.write_table(pa.table({name: column[kept] for name, column in columns.items()}), path)


@dataclasses.dataclass(frozen=True)
class Scene:
    dataset: LeRobotDataset
    settings: dict[str, dict[str, Any]]
    policy: Any
    batch: dict[str, np.ndarray]
    noise: np.ndarray
    stock: dict[str, np.ndarray]

    def weights(self, case: str) -> np.ndarray:
        config = SampleWeightingConfig(**self.settings[case])
        return sample_weights(config, self.dataset.meta, CASES[case][0], root=None, episodes=range(4))


@pytest.fixture(scope="module")
def scene(tmp_path_factory: pytest.TempPathFactory) -> Scene:
    folder = tmp_path_factory.mktemp("weights")
    dataset = record(folder / "data", LENGTHS, FEATURES)
    write_progress(dataset, folder / "progress.parquet")
    path = {"progress_path": str(folder / "progress.parquet")}
    settings = {name: path | changes for name, (_, changes) in CASES.items()}
    cases = {
        name: {"settings": settings[name], "chunk_size": chunk, "num_frames": len(dataset)}
        for name, (chunk, _) in CASES.items()
    }
    (folder / "cases.json").write_text(json.dumps(cases))
    policy = new_policy(ACT, 2, dataset.meta.stats)
    policy.save_pretrained(folder / "policy")
    rng = np.random.default_rng(5)
    chosen = rng.permutation(len(dataset))[:BATCH]
    batch = {key: dataset.columns[key][chosen] for key in (*ACT.input_features, "index")}
    batch["action"] = rng.normal(10, 3, (BATCH, ACT.chunk_size, 2)).astype(np.float32)
    # As much padding in each: then the mean of the losses of single samples is the loss of the batch.
    batch["action_is_pad"] = np.tile(np.arange(ACT.chunk_size) == ACT.chunk_size - 1, (BATCH, 1))
    noise = jax.random.normal(jax.random.split(jax.random.key(7))[0], (BATCH, ACT.latent_dim))
    np.savez(folder / "batch.npz", allow_pickle=False, **batch | {"noise": np.asarray(noise)})
    run_command(lerobot_python(), Path(__file__).with_name("sample_weights_peer.py"), folder, folder=folder)
    with np.load(folder / "out.npz") as file:
        return Scene(dataset, settings, policy, batch, np.asarray(noise), dict(file))


@pytest.mark.parametrize("case", CASES)
def test_weights_are_those_of_stock(scene: Scene, case: str):
    ours = scene.weights(case)
    assert ours.dtype == np.float32
    np.testing.assert_array_equal(ours, scene.stock[f"{case}/weights"])
    if case in ("dense", "wide", "beyond the episodes"):  # all sorts
        assert set(np.where(np.isin(ours, (0, 1)), ours, 0.5)) == {0.0, 0.5, 1.0}


def test_a_weighted_step_is_that_of_stock(scene: Scene):
    policy = scene.policy
    weights = scene.weights("step")[scene.batch["index"]]
    assert 0 < np.sum(weights == 0) < BATCH
    config = SampleWeightingConfig(**scene.settings["step"])
    loss_fn = make_loss(policy, policy.preprocess, ["one"], config)
    batch = {key: value for key, value in scene.batch.items() if key != "index"} | {"sample_weight": weights}
    gradient_fn = jax.jit(jax.value_and_grad(loss_fn, has_aux=True))
    (loss, (metrics, _)), gradients = gradient_fn(policy.params, policy.buffers, batch, jax.random.key(7))
    named = torch_state.to_torch(policy.module, gradients, policy.buffers)
    theirs = {
        k.removeprefix("step/metrics/"): v for k, v in scene.stock.items() if k.startswith("step/metrics/")
    }
    assert set(theirs) == {
        "loss",
        "sample_weight_mean_weight",
        "sample_weight_num_zero_weight",
        "sample_weight_num_full_weight",
    }
    np.testing.assert_allclose(loss, theirs["loss"], rtol=1e-5)
    for key, value in theirs.items():
        np.testing.assert_allclose(metrics[key], value, rtol=1e-5, err_msg=key)
    stock = {k.removeprefix("step/gradients/"): v for k, v in scene.stock.items() if "/gradients/" in k}
    assert set(stock) <= set(named)
    for key, value in stock.items():
        np.testing.assert_allclose(named[key], value, rtol=1e-4, atol=1e-5 * np.abs(value).max(), err_msg=key)
