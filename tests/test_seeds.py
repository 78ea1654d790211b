"""Several seeds at once: each is the run of that seed alone."""

import json
import os
import random
import shutil
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh

from lerobot_jax import checkpoint, checkpoint_writer, optim, train, training_data
from lerobot_jax.certificate import Certifier
from lerobot_jax.config import DatasetConfig, OptimizerConfig, TrainConfig, load_config
from lerobot_jax.data.mixture import DATASET_INDEX
from lerobot_jax.errors import InputError
from lerobot_jax.features import FeatureType, PolicyFeature
from lerobot_jax.metrics import read_metrics
from lerobot_jax.policies.base import load_policy, make_policy
from lerobot_jax.policies.diffusion import DiffusionConfig
from lerobot_jax.seed_summary import summarize
from lerobot_jax.seeds import SeedLayout
from lerobot_jax.sharding import make_mesh
from lerobot_jax.train_step import make_loss, make_train_step
from lerobot_jax.transforms import ImageTransformConfig, ImageTransformsConfig
from lerobot_jax.visualize import plot_curves
from tests.data.recordings import record
from tests.test_train import (
    FEATURES,
    RECIPE,
    assert_same_run,
    final_arrays,
    finish,
    start,
    wait_for,
)

SGD = ["--config.optimizer.type=sgd", "--config.optimizer.lr=0.01"]


@pytest.fixture(scope="module")
def root(tmp_path_factory) -> Path:
    return record(tmp_path_factory.mktemp("data") / "dataset", lengths=(9, 12, 8, 11), features=FEATURES).root


@pytest.fixture
def arguments(root: Path, tmp_path: Path) -> list[str]:
    recipe = tmp_path / "tiny.py"
    recipe.write_text(RECIPE.format(root=root))
    return [f"--config={recipe}", f"--config.output_dir={tmp_path / 'run'}"]


def assert_equal_runs(group_seed: Path, alone: Path) -> None:
    """Compare a seed's folder with that of the run of the seed alone, after a few steps."""
    ours, theirs = final_arrays(group_seed), final_arrays(alone)
    assert set(ours) == set(theirs)
    for key, value in theirs.items():
        np.testing.assert_allclose(ours[key], value, rtol=2e-6, atol=2e-6, err_msg=key)
    configs = [json.loads((folder / "train_config.json").read_text()) for folder in (group_seed, alone)]
    for config in configs:
        del config["output_dir"]
    assert configs[0] == configs[1]
    speeds = ("steps_per_s", "samples_per_s", "data_wait")
    logs = [read_metrics(folder / "metrics.jsonl") for folder in (group_seed, alone)]
    logs = [[{k: v for k, v in record.items() if k not in speeds} for record in log] for log in logs]
    assert [set(record) for record in logs[0]] == [set(record) for record in logs[1]]
    for record, expected in zip(*logs, strict=True):
        for name, value in expected.items():
            np.testing.assert_allclose(record[name], value, rtol=2e-5, err_msg=name)


@pytest.mark.parametrize("num_seeds", [8, 3])
def test_each_seed_is_the_run_alone(arguments: list[str], tmp_path: Path, num_seeds: int):
    """With seeds split over the 8 devices, or batches."""
    settings = [*SGD, "--config.steps=3", "--config.log_freq=1", "--config.eval_steps=3"]
    settings += ["--config.gradient_accumulation_steps=2"]
    train.main([*arguments, *settings, f"--config.num_seeds={num_seeds}"])
    alone = [a.replace("/run", "/alone") for a in arguments]
    train.main([*alone, *settings, "--config.seed=1002"])
    assert_equal_runs(tmp_path / "run/seed_1002", tmp_path / "alone")
    folders = sorted(path.name for path in (tmp_path / "run").glob("seed_*"))
    assert folders == [f"seed_{1000 + i}" for i in range(num_seeds)]
    assert load_policy(tmp_path / "run/seed_1001/checkpoints/last/pretrained_model").config.dim_model == 16
    weights = [final_arrays(tmp_path / "run" / name)["model.action_head.bias"] for name in folders]
    assert len({w.tobytes() for w in weights}) == num_seeds


def test_a_group_resumes_exactly_from_the_last_step_that_all_seeds_have(
    arguments: list[str], tmp_path: Path, caplog
):
    """As after a kill in the middle of saving; then a seed's folder goes on alone."""
    arguments = [*arguments, "--config.num_seeds=8", "--config.steps=9", "--config.save_freq=3"]
    arguments += ["--config.eval_steps=3", "--config.keep_last=1"]
    train.main(arguments)
    run, killed = tmp_path / "run", tmp_path / "killed"
    seeds = sorted(path.name for path in run.glob("seed_*"))
    for name in seeds:
        steps = checkpoint.saved_steps(run / name)
        best = int(os.readlink(run / name / "checkpoints/best"))
        assert steps == sorted({9, best})
    again = [a.replace("/run", "/killed") for a in arguments]
    train.main([*again, "--config.steps=6"])
    for name in seeds[:3]:  # as if it had been killed when five seeds had the checkpoint of step 9
        (killed / name / "checkpoints/.partial-000009/training_state").mkdir(parents=True)
    for name in seeds[3:]:
        shutil.copytree(run / name / "checkpoints/000009", killed / name / "checkpoints/000009")
    train.main([*again, "--config.resume=True"])
    assert "going on at step 6, the last that all seeds have; later are 1003, 1004" in caplog.text
    for name in seeds:
        assert_same_run(run / name, killed / name)
        logs = [read_metrics(folder / name / "metrics.jsonl") for folder in (run, killed)]
        assert [r["step"] for r in logs[0]] == [r["step"] for r in logs[1]]
        assert not list((killed / name / "checkpoints").glob(".*"))
    with pytest.raises(InputError, match="num_seeds is 4, but the run to resume had 8"):
        train.main([*again, "--config.num_seeds=4", "--config.resume=True"])
    with pytest.raises(InputError, match=r"already holds a run \(last checkpoint: step 9\)"):
        train.main(again)
    alone = [*again, "--config.num_seeds=1", "--config.seed=1002", "--config.resume=True"]
    train.main([*alone, f"--config.output_dir={killed / 'seed_1002'}", "--config.steps=10"])
    assert checkpoint.saved_steps(killed / "seed_1002")[-1] == 10
    with pytest.raises(InputError, match="a run of several seeds; give the folder of one: seed_1000, seed_1001"):
        checkpoint.find_pretrained_model(killed)


def test_retention_keeps_what_all_seeds_have(tmp_path: Path):
    """The last checkpoint of all is there until all have a later one."""
    config = TrainConfig(num_seeds=2, output_dir=str(tmp_path), keep_last=1)
    policy, _ = tiny_diffusion()
    certifier = Certifier(policy)
    first, second = (
        checkpoint_writer.CheckpointWriter(run, policy, certifier, together=config.runs) for run in config.runs
    )

    def publish(writer: checkpoint_writer.CheckpointWriter, step: int) -> None:
        (writer._folder / f"{step:06d}").mkdir(parents=True)
        writer._publish(f"{step:06d}", is_best=False)

    for step in (1, 2):
        publish(first, step)
        publish(second, step)
    publish(first, 3)
    publish(first, 4)
    assert checkpoint.saved_steps(tmp_path / "seed_1000") == [2, 4]
    assert checkpoint.common_steps(config.runs) == [2]
    publish(second, 4)
    assert checkpoint.common_steps(config.runs) == [4]
    first.remove_old()
    second.remove_old()
    assert [checkpoint.saved_steps(run.run_dir) for run in config.runs] == [[4], [4]]


# The step by itself


AUGMENTED = ImageTransformsConfig(
    enable=True,
    max_num_transforms=2,
    tfs={
        "brightness": ImageTransformConfig(type="ColorJitter", kwargs={"brightness": (0.2, 0.8)}),
        "affine": ImageTransformConfig(type="RandomAffine", kwargs={"degrees": (-9.0, 9.0)}),
    },
)


@pytest.mark.parametrize("num_devices", [1, 8])
def test_batch_norms_and_augmentation_of_each_seed(num_devices: int):
    """Diffusion Policy with images: buffers, parameters and averages of each seed, as alone."""
    policy, config = tiny_diffusion()
    runs = config.runs
    layout = SeedLayout(len(runs), Mesh(np.array(jax.devices()[:num_devices]), ("data",)))
    batches = [[make_batch(run.seed, step) for step in range(3)] for run in runs]
    batches = [layout.stack(each) for each in zip(*batches, strict=True)]
    arrays = [jax.jit(policy.init)(jax.random.key(run.seed)) for run in runs]
    keys = [jax.random.key(run.seed) for run in runs]
    optimizer = optim.make_optimizer(config, arrays[0][0])
    step = make_train_step(make_loss(policy, policy.preprocess, ["one"]), optimizer, config)

    def start_state(params, buffers):
        state = {"step": jnp.zeros((), jnp.int32), "params": params, "buffers": buffers}
        return state | {"opt_state": optimizer.init(params), "ema": {"params": params, "buffers": buffers}}

    together = layout.over_seeds(start_state, (0, 0))(*layout.stack(arrays))
    alone = start_state(*arrays[1])
    step_together, step_alone = jax.jit(layout.over_seeds(step, (0, 0, 0))), jax.jit(step)
    key = layout.stack(keys)
    for batch in batches:
        together, metrics = step_together(together, batch, key)
        alone, expected = step_alone(alone, jax.tree.map(lambda x: x[1], jax.device_get(batch)), keys[1])
        np.testing.assert_allclose(metrics["loss"][1], expected["loss"], rtol=1e-5)
        assert metrics["loss"][0] != metrics["loss"][1]
    found = jax.device_get(layout.take(together, 1))
    for (path, value), other in zip(
        jax.tree_util.tree_leaves_with_path(jax.device_get(alone)), jax.tree.leaves(found), strict=True
    ):
        np.testing.assert_allclose(other, value, rtol=1e-5, atol=5e-6, err_msg=str(path))


def tiny_diffusion():
    camera = "observation.images.top"
    policy_config = DiffusionConfig(
        horizon=8,
        n_action_steps=4,
        vision_backbone="resnet10w4",
        pretrained_backbone_weights=None,
        crop_shape=(28, 28),
        spatial_softmax_num_keypoints=3,
        down_dims=(8, 16),
        n_groups=4,
        kernel_size=3,
        diffusion_step_embed_dim=8,
        input_features={
            camera: PolicyFeature(FeatureType.VISUAL, (3, 32, 32)),
            "observation.state": PolicyFeature(FeatureType.STATE, (2,)),
        },
        output_features={"action": PolicyFeature(FeatureType.ACTION, (2,))},
    )
    shapes = {camera: (3, 1, 1), "observation.state": (2,), "action": (2,)}
    numbers = {"mean": 0.5, "std": 0.25, "min": -3.0, "max": 3.0}
    stats = {
        key: {name: np.full(shape, number, np.float32) for name, number in numbers.items()}
        for key, shape in shapes.items()
    }
    config = TrainConfig(
        policy=policy_config,
        dataset=DatasetConfig(image_transforms=AUGMENTED),
        optimizer=OptimizerConfig(type="sgd", lr=1e-2),
        batch_size=8,
        ema_decay=0.9,
        num_seeds=2,
    )
    return make_policy(policy_config, stats), config


def make_batch(seed: int, step: int) -> dict[str, np.ndarray]:
    rng = np.random.default_rng((seed, step))
    return {
        "observation.images.top": rng.integers(0, 256, (8, 2, 32, 32, 3), np.uint8),
        "observation.state": rng.normal(size=(8, 2, 2)).astype(np.float32),
        "action": rng.normal(size=(8, 8, 2)).astype(np.float32),
        "action_is_pad": np.zeros((8, 8), bool),
    }
