"""Several seeds at once: each is the run of that seed alone."""

import dataclasses
import json
import random
import shutil
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lerobot_jax import checkpoint, checkpoint_writer, optim, train
from lerobot_jax.certificate import Certifier
from lerobot_jax.config import DatasetConfig, OptimizerConfig, TrainConfig, load_config
from lerobot_jax.errors import InputError
from lerobot_jax.features import FeatureType, PolicyFeature
from lerobot_jax.metrics import read_metrics
from lerobot_jax.policies.base import load_policy, make_policy
from lerobot_jax.policies.diffusion import DiffusionConfig
from lerobot_jax.seed_summary import summarize
from lerobot_jax.seeds import SeedLayout
from lerobot_jax.sharding import batch_sharding, make_mesh
from lerobot_jax.train_step import make_loss, make_train_step
from lerobot_jax.transforms import ImageTransformConfig, ImageTransformsConfig
from tests.data.recordings import record
from tests.runs import (
    FEATURES,
    RECIPE,
    assert_same_run,
    final_arrays,
    finish,
    start,
    wait_for,
)

SETTINGS = [
    "--config.optimizer.type=sgd",
    "--config.optimizer.lr=0.01",
    "--config.gradient_accumulation_steps=2",
    "--config.steps=4",
    "--config.save_freq=2",
    "--config.eval_steps=2",
    "--config.log_freq=1",
]


@pytest.fixture(scope="module")
def arguments(tmp_path_factory) -> list[str]:
    folder = tmp_path_factory.mktemp("tiny")
    root = record(folder / "dataset", lengths=(9, 12, 8, 11), features=FEATURES).root
    recipe = folder / "tiny.py"
    recipe.write_text(RECIPE.format(root=root))
    return [f"--config={recipe}", *SETTINGS]


@pytest.fixture(scope="module")
def group(arguments: list[str], tmp_path_factory) -> Path:
    """A run of 8 seeds, one a device."""
    folder = tmp_path_factory.mktemp("group")
    train.main([*arguments, "--config.num_seeds=8", f"--config.output_dir={folder}"])
    return folder


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
    logs = [[{k: v for k, v in line.items() if k not in speeds} for line in log] for log in logs]
    assert [set(line) for line in logs[0]] == [set(line) for line in logs[1]]
    for line, expected in zip(*logs, strict=True):
        for name, value in expected.items():
            np.testing.assert_allclose(line[name], value, rtol=2e-5, err_msg=name)


def test_each_seed_is_the_run_alone(arguments: list[str], group: Path, tmp_path: Path):
    train.main([*arguments, "--config.seed=1002", f"--config.output_dir={tmp_path}"])
    assert_equal_runs(group / "seed_1002", tmp_path)
    folders = sorted(path.name for path in group.glob("seed_*"))
    assert folders == [f"seed_{1000 + i}" for i in range(8)]
    weights = [final_arrays(group / name)["model.action_head.bias"] for name in folders]
    assert len({w.tobytes() for w in weights}) == 8
    assert load_policy(group / "seed_1001/checkpoints/last/pretrained_model").config.dim_model == 16


@pytest.mark.slow
def test_each_seed_is_the_run_alone_with_batches_split(arguments: list[str], tmp_path: Path):
    """Three seeds cannot be divided among 8 devices. With Adam, but for the keys' biases."""
    adam = ["--config.optimizer.type=adam", "--config.optimizer.lr=1e-3"]
    train.main([*arguments, *adam, "--config.num_seeds=3", f"--config.output_dir={tmp_path / 'run'}"])
    train.main([*arguments, *adam, "--config.seed=1001", f"--config.output_dir={tmp_path / 'alone'}"])
    ours, alone = final_arrays(tmp_path / "run/seed_1001"), final_arrays(tmp_path / "alone")
    for key, value in alone.items():
        if "opt_state" not in key and not key.endswith(("in_proj_bias", "['in_proj_bias']")):
            np.testing.assert_allclose(ours[key], value, rtol=1e-4, atol=1e-4, err_msg=key)


@pytest.mark.slow
def test_a_group_resumes_exactly_from_the_last_step_that_all_seeds_have(
    arguments: list[str], group: Path, tmp_path: Path, caplog
):
    """As after a kill in the middle of saving; then a seed's folder goes on alone."""
    killed = shutil.copytree(group, tmp_path / "killed", symlinks=True)
    seeds = sorted(path.name for path in group.glob("seed_*"))
    for name in seeds[:3]:
        folder = killed / name / "checkpoints"
        (folder / "000004").rename(folder / ".partial-000004")
    again = [*arguments, "--config.num_seeds=8", f"--config.output_dir={killed}"]
    with pytest.raises(InputError, match=r"already holds a run \(last checkpoint: step 2\)"):
        train.main(again)
    with pytest.raises(InputError, match="num_seeds is 4, but the run to resume had 8"):
        train.main([*again, "--config.num_seeds=4", "--config.resume=True"])
    train.main([*again, "--config.resume=True"])
    assert "going on at step 2, the last that all seeds have; later are 1003, 1004" in caplog.text
    for name in seeds:
        assert_same_run(group / name, killed / name)
        logs = [read_metrics(folder / name / "metrics.jsonl") for folder in (group, killed)]
        assert [r["step"] for r in logs[0]] == [r["step"] for r in logs[1]]
        assert not list((killed / name / "checkpoints").glob(".*"))
    alone = [*arguments, "--config.seed=1002", f"--config.output_dir={killed / 'seed_1002'}"]
    train.main([*alone, "--config.resume=True", "--config.steps=5"])
    assert checkpoint.saved_steps(killed / "seed_1002") == [2, 4, 5]
    with pytest.raises(
        InputError, match="a run of several seeds; give the folder of one: seed_1000, seed_1001"
    ):
        checkpoint.find_pretrained_model(killed)


@pytest.mark.slow
def test_killed_at_any_moment_a_group_resumes_exactly(arguments: list[str], tmp_path: Path):
    settings = [*arguments, "--config.num_seeds=3", "--config.steps=12", "--config.save_freq=2"]
    settings += ["--config.eval_steps=0", "--config.dataset.eval_split=0"]
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    finish([*settings, f"--config.output_dir={whole}"], tmp_path)
    dice = random.Random(0)
    again = [*settings, f"--config.output_dir={killed}"]
    runs = load_config(again).runs
    for attempt in range(3):
        before = checkpoint.common_steps(runs)
        process = start(again if attempt == 0 else [*again, "--config.resume=True"], tmp_path)
        wait_for(lambda before=before: checkpoint.common_steps(runs)[-1:] > before[-1:], process, tmp_path)
        time.sleep(dice.uniform(0, 1))
        process.kill()
        process.wait()
        assert checkpoint.common_steps(runs)
    finish([*again, "--config.resume=True"], tmp_path)
    for run in runs:
        assert_same_run(whole / run.run_dir.name, run.run_dir)


def test_with_one_seed_nothing_is_changed():
    layout, tree = SeedLayout(1, make_mesh()), {"a": jnp.ones(8)}

    def function(x):
        return x

    assert layout.over_seeds(function, (0,)) is function
    assert layout.stack([tree]) is layout.take(tree, 0) is tree
    assert layout.batches(16, axis=1) == batch_sharding(layout.mesh, 16, axis=1)
    policy, config = tiny_diffusion()
    loss_fn = make_loss(policy, policy.preprocess, ["one"])
    config = dataclasses.replace(config, num_seeds=1)
    optimizer = optim.make_optimizer(config, jax.eval_shape(policy.init, jax.random.key(0))[0])
    params, buffers = jax.eval_shape(policy.init, jax.random.key(0))
    state = {"step": jnp.zeros((), jnp.int32), "params": params, "buffers": buffers}
    state |= {
        "opt_state": jax.eval_shape(optimizer.init, params),
        "ema": {"params": params, "buffers": buffers},
    }

    def count_rules(config: TrainConfig) -> int:
        """Count the operations that have a rule of their own for several seeds."""
        step = jax.make_jaxpr(make_train_step(loss_fn, optimizer, config))
        return str(step(state, make_batch(0, 0), jax.random.key(0))).count("custom_vmap_call")

    several = dataclasses.replace(config, num_seeds=2)
    still = dataclasses.replace(config.dataset, image_transforms=ImageTransformsConfig(enable=False))
    assert count_rules(several) > count_rules(config)  # by the augmentations
    assert count_rules(config) == count_rules(dataclasses.replace(config, dataset=still))


def test_what_works_with_one_seed_only_is_refused(arguments: list[str], tmp_path: Path):
    several = [*arguments, f"--config.output_dir={tmp_path / 'run'}", "--config.num_seeds=3"]
    for name in ("dataset.streaming", "wandb.enable", "policy.push_to_hub"):
        with pytest.raises(InputError, match=f"{name} works with one seed only; num_seeds is 3"):
            train.main([*several, f"--config.{name}=True"])
    with pytest.raises(InputError, match=r"num_seeds=3 or batch_size=9 must be a multiple of the 8 devices"):
        train.main([*several, "--config.batch_size=9"])
    with pytest.raises(InputError, match="num_seeds must be at least 1"):
        train.main([*several, "--config.num_seeds=0"])
    with pytest.raises(InputError, match=r"from 0 to 2\*\*32 - 1, they are 4294967295 to 4294967297"):
        train.main([*several, f"--config.seed={2**32 - 1}"])
    assert not (tmp_path / "run").exists()


@pytest.mark.slow
def test_a_seed_that_diverges_is_named(arguments: list[str], tmp_path: Path):
    several = [*arguments, "--config.num_seeds=8", f"--config.output_dir={tmp_path}"]
    with pytest.raises(InputError, match=r"with seed 100\d, the (loss|largest weight) is (nan|inf) at step"):
        train.main([*several, "--config.optimizer.lr=1e30", "--config.optimizer.grad_clip_norm=0"])


def test_the_summary_of_all_seeds(tmp_path: Path):
    """Of the last step that all have; the success rate has the wider of two intervals."""
    runs = TrainConfig(num_seeds=3, output_dir=str(tmp_path)).runs
    for run, loss, success in zip(runs, (1.0, 2.0, 6.0), (0.0, 0.0, 0.0), strict=True):
        run.run_dir.mkdir()
        records = [{"step": 5, "loss": 9.0, "lr": 0.1}, {"step": 10, "loss": loss, "lr": 0.1}]
        records += [{"step": 10, "pc_success": success, "n_episodes": 20.0}]
        records += [{"step": 15, "loss": 7.0}] * (run.seed > 1000)  # the first one was stopped before
        lines = [json.dumps(record) for record in records]
        (run.run_dir / "metrics.jsonl").write_text("\n".join(lines) + "\n")
    table = summarize(runs, tmp_path)
    written = json.loads((tmp_path / "seeds.json").read_text())
    assert written["seeds"] == [1000, 1001, 1002]
    loss, success = written["metrics"]["loss"], written["metrics"]["pc_success"]
    assert list(written["metrics"]) == ["loss", "pc_success"]
    assert (loss["step"], loss["values"]) == (10, [1.0, 2.0, 6.0])
    assert (loss["mean"], loss["min"], loss["max"]) == (3.0, 1.0, 6.0)
    np.testing.assert_allclose(loss["std"], np.sqrt(7), rtol=1e-12)
    np.testing.assert_allclose(loss["interval"], 3 + np.array([-1, 1]) * 4.302653 * np.sqrt(7 / 3), rtol=1e-6)
    np.testing.assert_allclose(success["interval"], [0, 100 * 1.959964**2 / (60 + 1.959964**2)], rtol=1e-6)
    assert table.splitlines()[1].split()[:4] == ["loss", "10", "3", "2.646"]


def test_retention_keeps_what_all_seeds_have(tmp_path: Path):
    """The last checkpoint of all is there until all have a later one."""
    config = TrainConfig(num_seeds=2, output_dir=str(tmp_path), keep_last=1)
    policy, _ = tiny_diffusion()
    certifier = Certifier(policy)
    first, second = (
        checkpoint_writer.CheckpointWriter(run, policy, certifier, together=config.runs)
        for run in config.runs
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


@pytest.mark.slow
@pytest.mark.parametrize("num_devices", [1, 8])
def test_batch_norms_and_augmentation_of_each_seed(num_devices: int):
    """Diffusion Policy with images: buffers, parameters and averages of each seed, as alone."""
    policy, config = tiny_diffusion()
    runs = config.runs
    layout = SeedLayout(len(runs), make_mesh(devices=jax.devices()[:num_devices]))
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
