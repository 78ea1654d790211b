"""The real program is run; for stops and resuming see test_checkpoints.py."""

import json
import os
import shutil
import sys
from pathlib import Path
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from lerobot_jax import (
    checkpoint,
    convert,
    state_dict,
    train,
    train_step,
    training_data,
)
from lerobot_jax.config import DatasetConfig, OptimizerConfig, TrainConfig, load_config
from lerobot_jax.data.dataset import LeRobotDataset
from lerobot_jax.data.target_statistics import target_statistics
from lerobot_jax.errors import InputError
from lerobot_jax.metrics import read_metrics
from lerobot_jax.policies.act import ACTConfig
from lerobot_jax.policies.base import load_policy
from lerobot_jax.processors import ActionTarget
from lerobot_jax.transforms import ImageTransformConfig, ImageTransformsConfig, random_transforms
from tests.data.recordings import record
from tests.runs import FEATURES, final_arrays, start, tiny_arguments


@pytest.fixture
def arguments(tiny_root: Path, tmp_path: Path) -> list[str]:
    return tiny_arguments(tiny_root, tmp_path)


def test_a_run_leaves_its_files(tiny_run: Path):
    assert checkpoint.saved_steps(tiny_run) == [10, 20]
    assert os.readlink(tiny_run / "checkpoints/last") == "000020"
    assert (tiny_run / "checkpoints/best").is_symlink()
    assert (tiny_run / "curves.png").stat().st_size > 5000
    assert json.loads((tiny_run / "train_config.json").read_text())["policy"]["dim_model"] == 16
    records = read_metrics(tiny_run / "metrics.jsonl")
    logged = [r for r in records if "loss" in r]
    assert [r["step"] for r in logged] == [5, 10, 15, 20]
    assert {"l1_loss", "kld_loss", "grad_norm", "lr", "samples_per_s", "data_wait"} <= set(logged[0])
    assert logged[-1]["loss"] < logged[0]["loss"]
    assert [r["step"] for r in records if "eval_loss" in r] == [10, 20]
    folder = tiny_run / "checkpoints/last/pretrained_model"
    files = {path.name for path in folder.iterdir()}
    assert {"config.json", "model.safetensors", "policy_preprocessor.json", "train_config.json"} <= files
    policy = load_policy(folder)
    ema = final_arrays(tiny_run)["['ema']['params']['model']['action_head']['bias']"]
    np.testing.assert_array_equal(policy.params["model"]["action_head"]["bias"], ema)


@pytest.mark.parametrize("log_freq", [pytest.param(0, marks=pytest.mark.slow), 7])
def test_the_speed_is_that_of_training(
    log_freq: int, arguments: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """On a clock by which a batch takes a second, and a save or an evaluation a hundred, between two records."""
    now = [0.0]
    monkeypatch.setattr(train, "time", SimpleNamespace(monotonic=lambda: now[0]))

    def slowed(function, seconds: float):
        def slow(*args, **kwargs):
            now[0] += seconds
            return function(*args, **kwargs)

        return slow

    def slow_batches(batches, placement):
        for batch in prefetch(batches, placement):
            now[0] += 1
            yield batch

    prefetch = train.loader.prefetch_to_device
    monkeypatch.setattr(train.loader, "prefetch_to_device", slow_batches)
    monkeypatch.setattr(train, "held_out_losses", slowed(train.held_out_losses, 100))
    monkeypatch.setattr(train, "plot_curves", slowed(train.plot_curves, 100))
    train.main([*arguments, f"--config.log_freq={log_freq}"])
    logged = [r for r in read_metrics(tmp_path / "run/metrics.jsonl") if "steps_per_s" in r]
    assert [r["step"] for r in logged] == ([20] if log_freq == 0 else [7, 14, 20])
    assert [r["steps_per_s"] for r in logged] == [1.0] * len(logged)


def test_nothing_is_traced_or_compiled_twice(arguments: list[str], monkeypatch: pytest.MonkeyPatch):
    """After the first validation and save, a run has all its programs."""
    counts, traced = [], []
    jax.monitoring.register_event_duration_secs_listener(
        lambda event, *_, **__: traced.append(event) if event.startswith("/jax/core/compile") else None
    )
    save = train.save
    monkeypatch.setattr(train, "save", lambda *args, **kw: (save(*args, **kw), counts.append(len(traced))))
    train.main([*arguments, "--config.save_freq=5", "--config.eval_steps=5"])
    assert len(counts) == 4
    assert counts[0] > 0
    assert len(traced) == counts[1]


def test_a_training_state_becomes_a_policy(tiny_run: Path, tmp_path: Path):
    """Averaged or raw weights, from a run, a checkpoint or its training_state, as they are or rounded."""
    run, out = shutil.copytree(tiny_run, tmp_path / "run", symlinks=True), tmp_path / "out"
    saved = dict(state_dict.read(run / "checkpoints/000020/pretrained_model"))
    arrays = final_arrays(run)
    raw_bias = arrays["['params']['model']['action_head']['bias']"]
    assert (raw_bias != saved["model.action_head.bias"]).any()
    convert.main(["to-torch", str(run), f"--output_dir={out}/ema"])
    for key, value in saved.items():
        np.testing.assert_array_equal(state_dict.read(out / "ema")[key], value, err_msg=key)
    checkpoints = run / "checkpoints"
    convert.main(["to-torch", str(checkpoints / "000020"), "--weights=raw", f"--output_dir={out}/raw"])
    np.testing.assert_array_equal(load_policy(out / "raw").params["model"]["action_head"]["bias"], raw_bias)
    (checkpoints / "000020/pretrained_model/model.safetensors").unlink()
    source = checkpoints / "000020/training_state"
    convert.main(["to-torch", str(source), "--dtype=bfloat16", f"--output_dir={out}/half"])
    half = state_dict.read(out / "half")
    for key, value in saved.items():
        np.testing.assert_array_equal(half[key], value.astype(half[key].dtype), err_msg=key)
    assert {array.dtype.name for array in half.values()} == {"bfloat16"}
    (source / "_METADATA").write_text("{}")
    with pytest.raises(InputError, match=r"training_state: damaged, or not of this policy"):
        convert.main(["to-torch", str(source), f"--output_dir={out}/damaged"])


def test_metrics_go_to_weights_and_biases_too(arguments: list[str], tmp_path: Path, monkeypatch):
    with pytest.raises(InputError, match=r"pip install 'lerobot_jax\[wandb\]'"):
        train.main([*arguments, "--config.wandb.enable=True"])
    assert not (tmp_path / "run").exists()
    logged, started = [], {}
    run = SimpleNamespace(log=lambda values, step: logged.append((step, values)), finish=lambda: None)
    fake = SimpleNamespace(init=lambda **settings: started.update(settings) or run)
    monkeypatch.setitem(sys.modules, "wandb", fake)
    train.main([*arguments, "--config.wandb.enable=True", "--config.eval_steps=0"])
    assert started["config"]["policy"]["chunk_size"] == 4
    assert [step for step, _ in logged] == [5, 10, 15, 20]
    assert {"loss", "lr"} <= set(logged[0][1])


def test_fine_tuning_starts_from_the_given_weights(arguments: list[str], tiny_run: Path, tmp_path: Path):
    source = tiny_run / "checkpoints/last/pretrained_model"
    path = f"--config.policy.pretrained_path={source}"
    train.main([*arguments, path, "--config.steps=1", "--config.policy.optimizer_lr=1e-9"])
    before, after = (load_policy(p) for p in (source, tmp_path / "run/checkpoints/last/pretrained_model"))
    for a, b in zip(jax.tree.leaves(before.params), jax.tree.leaves(after.params), strict=True):
        np.testing.assert_allclose(a, b, atol=1e-6)
    config = json.loads((source / "config.json").read_text())
    config["input_features"]["observation.state"]["shape"] = [7]
    wide = shutil.copytree(source, tmp_path / "wide")
    (wide / "config.json").write_text(json.dumps(config))
    with pytest.raises(InputError, match=r"'observation.state' of shape \(7,\) is needed"):
        train.main([*arguments, "--config.output_dir=other", f"--config.policy.pretrained_path={wide}"])


def test_wrong_input_stops_before_anything_is_made(arguments: list[str], tmp_path: Path, tiny_root: Path):
    faults = {
        r"ACT needs at least one image or": [f"--config.dataset.root={_without_env_state(tmp_path)}"],
        r"batch_size=9 must be a multiple of the 8 devices": ["--config.batch_size=9"],
        r"dataset.root is not a LeRobotDataset": [f"--config.dataset.root={tmp_path}"],
        r"'observation.state' is to be normalized with MEAN_STD, but .* \['mean', 'std'\] are missing": [
            f"--config.dataset.root={_without_statistics(tiny_root, tmp_path)}",
            "--config.dataset.streaming=True",
            "--config.dataset.eval_split=0",
            "--config.eval_steps=0",
        ],
        r"the policy's action has shape \(2,\), env.type=pusht takes|the policy needs \['observation.": [
            "--config.env.type=pusht",
            "--config.env.obs_type=pixels",
        ],
        r"timm/resnet18.tv_in1k": [
            f"--config.dataset.root={record(tmp_path / 'images').root}",
            "--config.eval_steps=0",
        ],
    }
    for message, more in faults.items():
        with pytest.raises(InputError, match=message):
            train.main([*arguments, *more])
        assert not (tmp_path / "run").exists() or message.startswith("timm")


def _without_env_state(tmp_path: Path) -> Path:
    features = {k: v for k, v in FEATURES.items() if "environment" not in k}
    return record(tmp_path / "no_env", features=features).root


def _without_statistics(root: Path, tmp_path: Path) -> Path:
    copy = shutil.copytree(root, tmp_path / "no_stats")
    stats = json.loads((copy / "meta/stats.json").read_text())
    del stats["observation.state"]
    (copy / "meta/stats.json").write_text(json.dumps(stats))
    return copy


def test_images_are_augmented_within_the_step():
    """Each micro-batch, with a key of its own; nothing else of the batch is touched."""
    tfs = {"brightness": ImageTransformConfig(type="ColorJitter", kwargs={"brightness": (0.2, 0.8)})}
    transforms = ImageTransformsConfig(enable=True, max_num_transforms=1, tfs=tfs)
    config = TrainConfig(
        policy=ACTConfig(optimizer_lr=1.0),
        dataset=DatasetConfig(image_transforms=transforms),
        optimizer=OptimizerConfig(type="sgd", grad_clip_norm=0.0),
        gradient_accumulation_steps=2,
    )
    images = np.full((2, 3, 8, 8, 3), 200, np.uint8)
    batch = {"observation.images.top": images, "index": np.arange(6, dtype=np.uint8).reshape(2, 3)}

    def loss(params, buffers, batch, key):
        means = batch["observation.images.top"].astype(jnp.float32).mean((1, 2, 3))
        total = jnp.sum(params["w"] * means)
        return total, ({"loss": total, "index": batch["index"].sum()}, buffers)

    params = {"w": jnp.zeros(3)}
    optimizer = optax.sgd(1.0)
    state = {"step": jnp.array(7), "params": params, "buffers": {}, "opt_state": optimizer.init(params)}
    new, metrics = jax.jit(train_step.make_train_step(loss, optimizer, config))(
        state, batch, jax.random.key(5)
    )
    micro_keys = jax.random.split(jax.random.fold_in(jax.random.key(5), 7), 2)
    brightness, augment = [], jax.jit(random_transforms(transforms))
    for key, some in zip(micro_keys, images, strict=True):
        changed = augment(jax.random.split(key)[0], {"observation.images.top": jnp.asarray(some)})
        brightness.append(changed["observation.images.top"].astype(np.float32).mean((1, 2, 3)))
    np.testing.assert_allclose(new["params"]["w"], -np.mean(brightness, axis=0), rtol=1e-5)
    assert len(np.unique(brightness)) == 6
    assert np.max(brightness) < 200 * 0.81
    assert metrics["index"] == 7.5


def test_micro_batches_of_a_step_see_the_same_progress():
    """So that phases change between optimizer steps, and steps are counted, not forward passes."""
    config = TrainConfig(batch_size=1, gradient_accumulation_steps=3)

    def loss(params, buffers, batch, key):
        found = {"loss": params["w"].sum(), "steps": buffers["steps"] * 1.0, "rare": jnp.nan}
        return found["loss"], (found, {"steps": buffers["steps"] + 1, "passes": buffers["passes"] + 1})

    params, optimizer = {"w": jnp.zeros(1)}, optax.sgd(1.0)
    state = {
        "step": jnp.array(0),
        "params": params,
        "buffers": {"steps": jnp.array(4), "passes": jnp.array(40)},
        "opt_state": optimizer.init(params),
    }
    step = train_step.make_train_step(loss, optimizer, config, progress={("steps",)})
    new, metrics = jax.jit(step)(state, {"index": np.zeros((3, 1))}, jax.random.key(0))
    assert new["buffers"] == {"steps": 5, "passes": 43}
    assert metrics["steps"] == 4
    assert train_step.mean_metrics([metrics, metrics | {"rare": jnp.float32(2)}])["rare"] == 2
    assert "rare" not in train_step.mean_metrics([metrics])


def test_features_of_one_number_keep_their_axis(tmp_path: Path):
    """LeRobot's datasets give them without; a policy wants (batch, 1) and (batch, chunk, 1)."""
    number = {"dtype": "float32", "shape": (1,), "names": None}
    names = ("observation.state", "observation.environment_state", "action")
    root = record(tmp_path / "one", (9, 12), dict.fromkeys(names, number)).root
    config = TrainConfig(
        policy=ACTConfig(chunk_size=4, n_action_steps=2), dataset=DatasetConfig("test/one", root=str(root))
    )
    (source,) = training_data.open_sources(config)
    (policy,) = training_data.build_policies(config, [source])
    keys = training_data.batch_keys(policy, source)
    batch = source.dataset.read(np.arange(4), keys)
    seen = train_step.make_preprocess([policy], is_mixture=False)(batch)
    shapes = {key: seen[key].shape for key in ("observation.state", "action", "action_is_pad")}
    assert shapes == {"observation.state": (4, 1), "action": (4, 4, 1), "action_is_pad": (4, 4)}


def test_mistakes_are_one_line_on_the_command_line(arguments: list[str], tmp_path: Path):
    process = start([*arguments, "--config.batch_sise=3"], tmp_path)
    assert process.wait(timeout=120) == 1
    lines = (tmp_path / "log.txt").read_text().splitlines()
    assert lines == [
        "error: Unrecognized options: --config.batch_sise=3; perhaps you meant --config.batch_size"
    ]


def test_the_recipes_are_valid():
    recipes = sorted((Path(__file__).parent.parent / "configs").glob("*.py"))
    assert recipes
    for path in recipes:
        assert load_config([f"--config={path}"]).job_name


@pytest.mark.slow
def test_a_run_with_other_targets(arguments: list[str], tiny_root: Path, tmp_path: Path):
    """Statistics are those of what is predicted; resuming, exporting and fine-tuning keep the target."""
    few = ["--config.steps=2", "--config.eval_steps=0", "--config.save_freq=1"]
    delta = "--config.policy.action_target.representation=delta"
    train.main([*arguments, *few, delta])
    folder = tmp_path / "run/checkpoints/last/pretrained_model"
    policy = load_policy(folder)
    dataset = LeRobotDataset("test", tiny_root)
    expected = target_statistics(dataset.columns, ActionTarget("delta"), range(4))
    for name, value in expected.items():
        np.testing.assert_allclose(policy.postprocessor.steps[0].stats["action"][name], value, rtol=1e-6)
    with pytest.raises(
        InputError, match=r"policy.action_target is .*absolute.*the run to resume had .*delta"
    ):
        train.main([*arguments, *few, "--config.resume=True", "--config.steps=4"])
    train.main([*arguments, *few, delta, "--config.resume=True", "--config.steps=3"])
    tuned = [
        arguments[0],
        f"--config.output_dir={tmp_path / 'tuned'}",
        f"--config.policy.pretrained_path={folder}",
    ]
    train.main([*tuned, *few])
    tuned_policy = load_policy(tmp_path / "tuned/checkpoints/last/pretrained_model")
    assert tuned_policy.config.action_target == policy.config.action_target == ActionTarget("delta")


@pytest.mark.slow
def test_quantiles_that_stats_json_lacks_are_computed(arguments: list[str], tiny_root: Path, tmp_path: Path):
    old = shutil.copytree(tiny_root, tmp_path / "old")
    path = old / "meta/stats.json"
    stats = json.loads(path.read_text())
    without = {key: {n: v for n, v in values.items() if n[0] != "q"} for key, values in stats.items()}
    path.write_text(json.dumps(without))
    recipe = Path(arguments[0].partition("=")[2])
    recipe.write_text(recipe.read_text().replace(str(tiny_root), str(old)).replace("MEAN_STD", "QUANTILES"))
    train.main([*arguments, "--config.steps=1", "--config.eval_steps=0"])
    policy = load_policy(tmp_path / "run/checkpoints/last/pretrained_model")
    found = policy.preprocessor.steps[-1].stats["observation.state"]["q99"]
    state = LeRobotDataset("test", tiny_root).columns["observation.state"]
    np.testing.assert_allclose(found, np.quantile(state, 0.99, axis=0), rtol=1e-6)
