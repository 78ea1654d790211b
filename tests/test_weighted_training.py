"""Training with weights of samples: the real program, in every way that samples are read."""

import dataclasses
import functools
import json
import shutil
from pathlib import Path

import jax
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from lerobot_jax import sharding, train, training_data
from lerobot_jax.config import DatasetConfig, SourceConfig, TrainConfig, load_config
from lerobot_jax.data.dataset import LeRobotDataset
from lerobot_jax.data.sample_weights import PROGRESS_NAME, SampleWeightingConfig
from lerobot_jax.data.streaming import StreamedSamples
from lerobot_jax.errors import InputError
from lerobot_jax.metrics import read_metrics
from lerobot_jax.policies.diffusion import DiffusionConfig
from lerobot_jax.recipe import rebuild_config, write_recipe
from lerobot_jax.seeds import SeedLayout
from lerobot_jax.train_step import make_loss, weighted_mean
from tests.data.recordings import record
from tests.runs import FEATURES, RECIPE, assert_same_run

WEIGHTED = "--config.sample_weighting.type=rabc"


def write_progress(dataset: LeRobotDataset, seed: int) -> None:
    """Write wavering progress beside a dataset."""
    columns = {key: dataset.columns[key] for key in ("index", "episode_index")}
    columns["progress_sparse"] = np.random.default_rng(seed).random(len(dataset)).cumsum() % 1
    columns["progress_unknown"] = np.full(len(dataset), np.nan)
    pq.write_table(pa.table(columns), dataset.root / PROGRESS_NAME)


@pytest.fixture(scope="module")
def datasets(tmp_path_factory: pytest.TempPathFactory) -> list[LeRobotDataset]:
    folder = tmp_path_factory.mktemp("data")
    found = [record(folder / f"{i}", (9, 12, 8, 11), FEATURES) for i in range(2)]
    for i, dataset in enumerate(found):
        write_progress(dataset, i)
    return found


@pytest.fixture
def arguments(datasets: list[LeRobotDataset], tmp_path: Path) -> list[str]:
    recipe = tmp_path / "tiny.py"
    recipe.write_text(RECIPE.format(root=datasets[0].root))
    changes = ["steps=4", "log_freq=2", "eval_steps=4", "save_freq=2", "sample_weighting.kappa=0.4"]
    return [f"--config={recipe}", *(f"--config.{change}" for change in changes)]


def test_a_weighted_run_resumes_exactly_with_frames_on_the_device(arguments: list[str], tmp_path: Path):
    whole, stopped = ([*arguments, f"--config.output_dir={tmp_path / name}"] for name in ("whole", "stopped"))
    train.main(whole)
    record = read_metrics(tmp_path / "whole/metrics.jsonl")[0]
    counts = [record[f"sample_weight_num_{name}_weight"] for name in ("zero", "full")]
    assert all(0 < count < 8 for count in counts)
    assert counts[1] / 8 < record["sample_weight_mean_weight"] < 1 - counts[0] / 8
    train.main([*stopped, "--config.steps=2", "--config.dataset.frame_mode=device"])
    settings = json.loads((tmp_path / "stopped/train_config.json").read_text())
    assert settings["sample_weighting"]["kappa"] == 0.4
    resumed = [*stopped, "--config.resume=True"]
    with pytest.raises(InputError, match=r"sample_weighting.kappa is 0.5, but the run to resume had 0.4"):
        train.main([*resumed, "--config.sample_weighting.kappa=0.5"])
    train.main(resumed)
    assert_same_run(tmp_path / "whole", tmp_path / "stopped")


@pytest.mark.slow
def test_the_validation_loss_has_no_weights(arguments: list[str], tmp_path: Path):
    hardly_counts = [
        "--config.gradient_accumulation_steps=2",
        "--config.sample_weighting.head_mode=unknown",
    ]
    hardly_counts += ["--config.sample_weighting.extra_params", "fallback_weight", "1e-30"]
    train.main([*arguments, *hardly_counts, f"--config.output_dir={tmp_path / 'run'}"])
    first, *_, last = read_metrics(tmp_path / "run/metrics.jsonl")
    assert 0 < first["loss"] < 1e-12
    assert (first["sample_weight_num_zero_weight"], first["sample_weight_num_full_weight"]) == (0, 0)
    assert last["eval_loss"] > 0.1


def test_runs_from_before_there_were_weights_go_on_without(arguments: list[str], tmp_path: Path):
    run = [*(a for a in arguments if "sample_weighting" not in a), f"--config.output_dir={tmp_path / 'run'}"]
    train.main([*run, "--config.steps=1"])
    path = tmp_path / "run/train_config.json"
    settings = json.loads(path.read_text())
    assert settings.pop("sample_weighting") is None
    path.write_text(json.dumps(settings))
    train.main([*run, "--config.steps=1", "--config.resume=True"])
    with pytest.raises(InputError, match=r"sample_weighting is \{.*'rabc'.*, but the run to resume had None"):
        train.main([*run, "--config.resume=True", WEIGHTED])


def open_samples(config: TrainConfig):
    """Give what `train.main` opens: the sources, a policy for each, and the samples in training order."""
    sources = training_data.open_sources(config)
    policies = training_data.build_policies(config, sources)
    mesh = sharding.make_mesh()
    placement = sharding.replicated(mesh), sharding.batch_sharding(mesh, 64)
    samples = training_data.training_samples(config, sources, policies, *placement)
    return sources, policies, samples


def assert_weights_are_those_of_the_frames(batch, weights: list[np.ndarray], datasets: list[LeRobotDataset]):
    """No two frames have the same state."""
    which = batch.get("dataset_index", np.zeros(64, int))
    for state, weight, number in zip(
        np.asarray(batch["observation.state"]), np.asarray(batch["sample_weight"]), which, strict=True
    ):
        columns = datasets[number].columns
        (row,) = np.flatnonzero((columns["observation.state"] == state).all(axis=1))
        assert weight == weights[number][columns["index"][row]]


@pytest.mark.parametrize("way", ["host", "device", "seeds", "streaming", "mixture"])
def test_weights_travel_with_the_samples(
    way: str, arguments: list[str], datasets: list[LeRobotDataset], tmp_path: Path, monkeypatch
):
    monkeypatch.setenv("LEROBOT_JAX_CACHE", str(tmp_path / "cache"))
    config = load_config(arguments)
    changes = {
        "host": {},
        "device": {"frame_mode": "device"},
        "seeds": {},
        "streaming": {"streaming": True, "buffer_size": 12},
        "mixture": {
            "repo_id": "",
            "root": None,
            "mixture": tuple(
                SourceConfig(f"test/{i}", root=str(each.root)) for i, each in enumerate(datasets)
            ),
        },
    }
    chosen = dataclasses.replace(config.dataset, **changes[way])
    config = dataclasses.replace(config, dataset=chosen, num_seeds=2 if way == "seeds" else 1)
    sources, policies, samples = open_samples(config)
    weights = [source.settings["added_columns"]["sample_weight"] for source in sources]
    batch = samples.read(np.arange(64))
    for part in [jax.tree.map(lambda x: x[1], batch)] if way == "seeds" else [batch]:
        assert_weights_are_those_of_the_frames(part, weights, datasets)
    if way != "streaming":
        place = SeedLayout(1, sharding.make_mesh()).shared_batch
        held_out = training_data.held_out_batches(config, sources, policies, samples, place)
        assert all("sample_weight" not in next(batches)[1] for batches in held_out.values())
    if isinstance(samples, StreamedSamples):
        samples.close()


@pytest.mark.slow
def test_in_a_mixture_the_loss_of_a_dataset_is_weighted_too(arguments: list[str]):
    """Against the losses of single samples; a dataset whose samples do not count has none."""
    config = load_config(arguments)
    _, (policy, *_), samples = open_samples(config)
    params, buffers = jax.jit(policy.init)(jax.random.key(0))
    batch, key = samples.read(np.arange(8)), jax.random.key(1)
    sample_losses = functools.partial(policy.loss_fn, reduction="none")
    losses, _ = jax.jit(sample_losses)(params, buffers, policy.preprocess(batch), key)
    weights = np.array([0, 0.5, 1, 0.25, 0, 0, 0, 0], np.float32)
    batch |= {"sample_weight": weights, "dataset_index": np.array([0, 0, 0, 1, 1, 1, 2, 2])}
    loss_fn = make_loss(policy, policy.preprocess, ["a", "b", "c"], config.sample_weighting)
    loss, (metrics, _) = jax.jit(loss_fn)(params, buffers, batch, key)
    np.testing.assert_allclose(loss, np.average(losses, weights=weights), rtol=1e-4)
    np.testing.assert_allclose(metrics["loss/a"], (losses[1] * 0.5 + losses[2]) / 1.5, rtol=1e-5)
    np.testing.assert_allclose(metrics["loss/b"], losses[3], rtol=1e-5)
    assert np.isnan(metrics["loss/c"])
    uniform = make_loss(policy, policy.preprocess, ["a", "b", "c"], SampleWeightingConfig("uniform"))
    del batch["sample_weight"]
    loss, (metrics, _) = jax.jit(uniform)(params, buffers, batch, key)
    np.testing.assert_allclose(loss, np.mean(losses), rtol=1e-5)
    np.testing.assert_allclose(metrics["loss/c"], np.mean(losses[6:]), rtol=1e-5)
    assert {name for name in metrics if "weight" in name} == {"sample_weight_mean_weight"}


# What PyTorch computes by LeRobot's formula for the losses 1, 2, 4, 8
MEANS: dict[tuple[float, ...], tuple[str, float, float]] = {
    (0.64499563, 0.343403488, 0.0, 1.0): ("rabc", 1e-6, 4.693121910095215),
    (0.5, 0.25, 0.0, 1.0): ("rabc", 0.1, 5.142856121063232),
    (1e-4, 0.0, 0.0, 2e-4): ("rabc", 1e-3, 5.666660785675049),
    (1e-7, 0.0, 0.0, 0.0): ("rabc", 1e-6, 0.9999971985816956),
    (0.0, 0.0, 0.0, 0.0): ("rabc", 1e-6, 0.0),
    (1.0, 1.0, 1.0, 1.0): ("uniform", 1e-6, 3.7499990463256836),
}


@pytest.mark.parametrize("weights", MEANS)
def test_the_weighted_mean_is_that_of_lerobot(weights: tuple[float, ...]):
    kind, epsilon, expected = MEANS[weights]
    config = SampleWeightingConfig(kind, epsilon=epsilon)
    losses = jax.numpy.array([1.0, 2.0, 4.0, 8.0])
    mean, metrics = weighted_mean(losses, jax.numpy.array(weights), config)
    np.testing.assert_allclose(mean, expected, rtol=3e-7)
    np.testing.assert_allclose(metrics["sample_weight_mean_weight"], np.mean(weights), rtol=1e-6)
    if kind == "rabc":
        assert metrics["sample_weight_num_zero_weight"] == weights.count(0.0)
        assert metrics["sample_weight_num_full_weight"] == weights.count(1.0)


def test_wrong_settings_stop_before_anything_is_made(
    arguments: list[str], datasets: list[LeRobotDataset], tmp_path: Path
):
    bare = shutil.copytree(datasets[0].root, tmp_path / "bare")
    (bare / PROGRESS_NAME).unlink()
    faults = {
        rf"{bare}/{PROGRESS_NAME}: no such file": [f"--config.dataset.root={bare}"],
        r"lacks the columns \['progress_dense'\]; it has \[.*'progress_sparse'": [
            "--config.sample_weighting.head_mode=dense"
        ],
        r"sample_weighting.type must be rabc or uniform, not 'best'": ["--config.sample_weighting.type=best"],
        r"Unrecognized options: --config.sample_weighting.kapa=1; perhaps you meant "
        r"--config.sample_weighting.kappa": ["--config.sample_weighting.kapa=1"],
    }
    for message, more in faults.items():
        with pytest.raises(InputError, match=message):
            train.main([*arguments, *more, f"--config.output_dir={tmp_path / 'run'}"])
        assert not (tmp_path / "run").exists()
    config = load_config(arguments)
    with pytest.raises(
        InputError, match=r"type=rabc needs a policy with a chunk_size, .*; diffusion has none"
    ):
        training_data.open_sources(dataclasses.replace(config, policy=DiffusionConfig()))
    mixture = DatasetConfig(mixture=(SourceConfig("test/0", root=str(datasets[0].root)),))
    weighting = SampleWeightingConfig(progress_path="some.parquet")
    config = dataclasses.replace(config, dataset=mixture, sample_weighting=weighting, eval_steps=0)
    with pytest.raises(
        InputError, match=r"progress_path is for one dataset; in a mixture, each has a sarm_prog"
    ):
        training_data.open_sources(config)


def test_settings_come_back_from_json_and_as_a_recipe():
    weighting = SampleWeightingConfig(
        progress_path="/home/alice/p.parquet", extra_params={"fallback_weight": 0.5}
    )
    config = TrainConfig(sample_weighting=weighting)
    assert rebuild_config(json.loads(json.dumps(config.to_dict()))) == config
    scope: dict = {}
    exec(write_recipe(config), scope)
    anywhere = dataclasses.replace(weighting, progress_path="FILE")
    assert scope["get_config"]().sample_weighting == anywhere
