"""The real program is run: trained, stopped, killed, resumed."""

import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import safetensors.numpy

from lerobot_jax import (
    certificate,
    checkpoint,
    checkpoint_writer,
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

RECIPE = """
from lerobot_jax.config import DatasetConfig, TrainConfig
from lerobot_jax.features import NormalizationMode
from lerobot_jax.policies.act import ACTConfig

def get_config(variant=""):
    return TrainConfig(
        job_name="tiny",
        dataset=DatasetConfig(repo_id="test/recorded", root="{root}", eval_split=0.3),
        policy=ACTConfig(
            normalization_mapping=dict.fromkeys(("STATE", "ENV", "ACTION"), NormalizationMode.MEAN_STD),
            chunk_size=4, n_action_steps=2, dim_model=16, n_heads=2, dim_feedforward=16, n_encoder_layers=1,
            n_vae_encoder_layers=1, latent_dim=4, optimizer_lr=1e-3,
        ),
        steps=20, batch_size=8, log_freq=5, save_freq=10, env_eval_freq=0, eval_steps=10, ema_decay=0.9,
    )
"""
FEATURES = {
    "observation.environment_state": {"dtype": "float32", "shape": (4,), "names": None},
    "observation.state": {"dtype": "float32", "shape": (3,), "names": None},
    "action": {"dtype": "float32", "shape": (2,), "names": None},
}


@pytest.fixture(scope="module")
def root(tmp_path_factory) -> Path:
    return record(tmp_path_factory.mktemp("data") / "dataset", lengths=(9, 12, 8, 11), features=FEATURES).root


@pytest.fixture
def arguments(root: Path, tmp_path: Path) -> list[str]:
    recipe = tmp_path / "tiny.py"
    recipe.write_text(RECIPE.format(root=root))
    return [f"--config={recipe}", f"--config.output_dir={tmp_path / 'run'}"]


def final_arrays(run: Path) -> dict[str, np.ndarray]:
    """Read the weights that a run exported last, and its whole train state."""
    step = checkpoint.saved_steps(run)[-1]
    folder = run / "checkpoints" / f"{step:06d}"
    import orbax.checkpoint as ocp

    with ocp.Checkpointer(ocp.PyTreeCheckpointHandler()) as checkpointer:
        path = (folder / "training_state").resolve()
        stored = checkpointer.metadata(path).item_metadata.tree
        # As numpy: the devices of other processes, which may have saved it, are not here.
        as_numpy = jax.tree.map(lambda _: ocp.RestoreArgs(restore_type=np.ndarray), stored)
        state = checkpointer.restore(path, args=ocp.args.PyTreeRestore(restore_args=as_numpy))
    named = {
        jax.tree_util.keystr(path): np.asarray(x) for path, x in jax.tree_util.tree_leaves_with_path(state)
    }
    return named | safetensors.numpy.load_file(folder / "pretrained_model/model.safetensors")


def assert_same_run(a: Path, b: Path) -> None:
    first, second = final_arrays(a), final_arrays(b)
    assert set(first) == set(second)
    for key, value in first.items():
        np.testing.assert_array_equal(value, second[key], err_msg=key)


def test_a_run_leaves_its_files(arguments: list[str], tmp_path: Path):
    train.main(arguments)
    run = tmp_path / "run"
    assert checkpoint.saved_steps(run) == [10, 20]
    assert os.readlink(run / "checkpoints/last") == "000020"
    assert (run / "checkpoints/best").is_symlink()
    assert (run / "curves.png").stat().st_size > 5000
    assert json.loads((run / "train_config.json").read_text())["policy"]["dim_model"] == 16
    records = read_metrics(run / "metrics.jsonl")
    logged = [r for r in records if "loss" in r]
    assert [r["step"] for r in logged] == [5, 10, 15, 20]
    assert {"l1_loss", "kld_loss", "grad_norm", "lr", "samples_per_s", "data_wait"} <= set(logged[0])
    assert logged[-1]["loss"] < logged[0]["loss"]
    assert [r["step"] for r in records if "eval_loss" in r] == [10, 20]
    folder = run / "checkpoints/last/pretrained_model"
    files = {path.name for path in folder.iterdir()}
    assert {"config.json", "model.safetensors", "policy_preprocessor.json", "train_config.json"} <= files
    policy = load_policy(folder)
    ema = final_arrays(run)["['ema']['params']['model']['action_head']['bias']"]
    np.testing.assert_array_equal(policy.params["model"]["action_head"]["bias"], ema)


@pytest.mark.parametrize("log_freq", [0, 7])
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


def test_a_training_state_becomes_a_policy(arguments: list[str], tmp_path: Path):
    """Averaged or raw weights, from a run, a checkpoint or its training_state, as they are or rounded."""
    train.main([*arguments, "--config.eval_steps=0", "--config.dataset.eval_split=0"])
    run, out = tmp_path / "run", tmp_path / "out"
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


def test_a_resumed_run_is_the_uninterrupted_one(arguments: list[str], tmp_path: Path):
    """Also when it is resumed with another number of threads, and with gradient accumulation."""
    more = [
        "--config.gradient_accumulation_steps=2",
        "--config.eval_steps=0",
        "--config.dataset.eval_split=0",
    ]
    train.main([*arguments, *more])
    half = [a.replace("/run", "/half") for a in arguments]
    train.main([*half, *more, "--config.steps=10"])
    train.main([*half, *more, "--config.resume=True", "--config.num_workers=1", "--config.prefetch_factor=1"])
    assert_same_run(tmp_path / "run", tmp_path / "half")
    steps = [r["step"] for r in read_metrics(tmp_path / "half/metrics.jsonl")]
    assert steps == [5, 10, 15, 20]


@pytest.mark.parametrize(("schedule", "warns"), [("cosine", True), ("constant_with_warmup", False)])
def test_more_steps_warn_if_the_schedule_depends_on_them(arguments, caplog, schedule: str, warns: bool):
    scheduled = [*arguments, f"--config.scheduler.type={schedule}", "--config.scheduler.num_warmup_steps=1"]
    checkpoint.write_train_config(load_config([*scheduled, "--config.steps=2"]))
    checkpoint.open_run(load_config([*scheduled, "--config.steps=4", "--config.resume=True"]))
    assert ("steps is 4, but was 2 when the run began" in caplog.text) == warns


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


def test_a_used_folder_is_refused_with_advice(arguments: list[str], tmp_path: Path):
    with pytest.raises(InputError, match="no run to resume"):
        train.main([*arguments, "--config.resume=True"])
    train.main([*arguments, "--config.steps=1"])
    with pytest.raises(
        InputError, match=r"already holds a run \(last checkpoint: step 1\).*resume=True.*output_dir"
    ):
        train.main(arguments)
    changed = [*arguments, "--config.resume=True", "--config.batch_size=16"]
    with pytest.raises(InputError, match="batch_size is 16, but the run to resume had 8"):
        train.main(changed)
    with pytest.raises(InputError, match=r"policy.dropout is 0.5, but the run to resume had 0.1"):
        train.main([*arguments, "--config.resume=True", "--config.policy.dropout=0.5"])


def test_old_checkpoints_are_removed_but_the_best_stays(arguments: list[str], tmp_path: Path):
    train.main(
        [
            *arguments,
            "--config.steps=12",
            "--config.save_freq=2",
            "--config.keep_last=2",
            "--config.eval_steps=3",
        ]
    )
    run = tmp_path / "run"
    records = [r for r in read_metrics(run / "metrics.jsonl") if "eval_loss" in r]
    best = min(records, key=lambda r: r["eval_loss"])["step"]
    assert os.readlink(run / "checkpoints/best") == f"{best:06d}"
    assert set(checkpoint.saved_steps(run)) == {10, 12, best}


def test_fine_tuning_starts_from_the_given_weights(arguments: list[str], tmp_path: Path):
    train.main([*arguments, "--config.steps=3"])
    source = tmp_path / "run/checkpoints/last/pretrained_model"
    tuned = [a.replace("/run", "/tuned") for a in arguments]
    path = f"--config.policy.pretrained_path={source}"
    train.main([*tuned, path, "--config.steps=1", "--config.policy.optimizer_lr=1e-9"])
    before, after = (load_policy(p) for p in (source, tmp_path / "tuned/checkpoints/last/pretrained_model"))
    for a, b in zip(jax.tree.leaves(before.params), jax.tree.leaves(after.params), strict=True):
        np.testing.assert_allclose(a, b, atol=1e-6)
    config = json.loads((source / "config.json").read_text())
    config["input_features"]["observation.state"]["shape"] = [7]
    wide = shutil.copytree(source, tmp_path / "wide")
    (wide / "config.json").write_text(json.dumps(config))
    with pytest.raises(InputError, match=r"'observation.state' of shape \(7,\) is needed"):
        train.main([*tuned, "--config.output_dir=other", f"--config.policy.pretrained_path={wide}"])


def test_wrong_input_stops_before_anything_is_made(arguments: list[str], tmp_path: Path, root: Path):
    faults = {
        r"ACT needs at least one image or": [f"--config.dataset.root={_without_env_state(tmp_path)}"],
        r"batch_size=9 must be a multiple of the 8 devices": ["--config.batch_size=9"],
        r"dataset.root is not a LeRobotDataset": [f"--config.dataset.root={tmp_path}"],
        r"'observation.state' is to be normalized with MEAN_STD, but .* \['mean', 'std'\] are missing": [
            f"--config.dataset.root={_without_statistics(root, tmp_path)}",
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
    brightness = []
    for key, some in zip(micro_keys, images, strict=True):
        changed = random_transforms(transforms)(
            jax.random.split(key)[0], {"observation.images.top": jnp.asarray(some)}
        )
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


def test_a_loss_that_is_not_finite_stops_the_run(arguments: list[str], tmp_path: Path):
    with pytest.raises(InputError, match=r"the loss is (nan|inf) at step .*lower the learning rate"):
        train.main([*arguments, "--config.policy.optimizer_lr=1e30", "--config.optimizer.grad_clip_norm=0"])
    assert checkpoint.saved_steps(tmp_path / "run") == []


def test_weights_that_are_not_finite_are_not_saved(arguments: list[str], tmp_path: Path):
    """The loss of a step is that of the weights before it."""
    with pytest.raises(InputError, match=r"the largest weight is (nan|inf) at step 1"):
        train.main(
            [
                *arguments,
                "--config.steps=1",
                "--config.optimizer.lr=1e38",
                "--config.optimizer.weight_decay=1e10",
            ]
        )
    assert checkpoint.saved_steps(tmp_path / "run") == []


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


# In a process of its own


def start(arguments: list[str], tmp_path: Path) -> subprocess.Popen:
    environment = os.environ | {"XLA_FLAGS": "--xla_backend_optimization_level=0"}
    command = [sys.executable, "-m", "lerobot_jax.train", *arguments]
    with (tmp_path / "log.txt").open("a") as log:
        return subprocess.Popen(command, env=environment, stdout=log, stderr=log, cwd=tmp_path)


def finish(arguments: list[str], tmp_path: Path) -> None:
    assert start(arguments, tmp_path).wait(timeout=300) == 0, (tmp_path / "log.txt").read_text()[-3000:]


def wait_for(condition, process: subprocess.Popen, tmp_path: Path) -> None:
    deadline = time.monotonic() + 120
    while not condition():
        assert process.poll() is None, (tmp_path / "log.txt").read_text()[-3000:]
        assert time.monotonic() < deadline
        time.sleep(0.01)


def test_killed_at_any_moment_the_run_resumes_exactly(arguments: list[str], tmp_path: Path):
    """Saves follow one another without a pause, so that most kills hit one in progress."""
    settings = ["--config.steps=45", "--config.save_freq=3", "--config.eval_steps=0", "--config.log_freq=10"]
    finish([*arguments, *settings], tmp_path)
    killed = [a.replace("/run", "/killed") for a in arguments] + settings
    folder = tmp_path / "killed"
    dice = random.Random(0)
    for attempt in range(4):
        process = start(killed if attempt == 0 else [*killed, "--config.resume=True"], tmp_path)
        before = checkpoint.saved_steps(folder)[-1:] if attempt else []
        if attempt < 3:
            wait_for(lambda before=before: checkpoint.saved_steps(folder)[-1:] != before, process, tmp_path)
        else:  # once before anything new is saved
            wait_for(
                lambda: "compiled" in (tmp_path / "log.txt").read_text().split("killed")[-1],
                process,
                tmp_path,
            )
        time.sleep(dice.uniform(0, 0.4))
        process.kill()
        process.wait()
        for step in checkpoint.saved_steps(folder):  # whatever is there is whole
            certificate.check_files(folder / "checkpoints" / f"{step:06d}" / "pretrained_model")
    finish([*killed, "--config.resume=True"], tmp_path)
    assert_same_run(tmp_path / "run", folder)
    assert not list((folder / "checkpoints").glob(".*"))


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_stopped_run_saves_before_it_ends(arguments: list[str], tmp_path: Path, number: int):
    settings = ["--config.steps=100000", "--config.save_freq=0", "--config.eval_steps=0"]
    process = start([*arguments, *settings], tmp_path)
    metrics = tmp_path / "run/metrics.jsonl"
    wait_for(lambda: metrics.exists() and len(read_metrics(metrics)) > 3, process, tmp_path)
    process.send_signal(number)
    assert process.wait(timeout=60) == 128 + number
    steps = checkpoint.saved_steps(tmp_path / "run")
    assert len(steps) == 1
    assert steps[0] >= 20
    assert "continue with --config.resume=True" in (tmp_path / "log.txt").read_text()
    finish(
        [*arguments, f"--config.steps={steps[0] + 1}", "--config.eval_steps=0", "--config.resume=True"],
        tmp_path,
    )


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


def test_damaged_checkpoints_are_reported(arguments: list[str], tmp_path: Path):
    train.main([*arguments, "--config.eval_steps=0", "--config.dataset.eval_split=0"])
    state = tmp_path / "run/checkpoints/000020/training_state"
    for path in [p for p in state.rglob("*") if p.is_file() and p.stat().st_size > 200]:
        path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    resumed = [*arguments, "--config.eval_steps=0", "--config.dataset.eval_split=0", "--config.resume=True"]
    with pytest.raises(
        InputError, match=r"000020/training_state: the checkpoint is damaged .*remove .*000020"
    ):
        train.main([*resumed, "--config.steps=30"])
    shutil.rmtree(tmp_path / "run/checkpoints/000020")
    train.main(resumed)
    assert checkpoint.saved_steps(tmp_path / "run") == [10, 20]


def test_a_full_disk_while_saving_keeps_the_last_good_checkpoint(
    arguments: list[str], tmp_path: Path, monkeypatch
):
    original = checkpoint_writer.FunctionalPolicy.save_pretrained

    def full(self, folder, certified):
        if "000020" in str(folder):
            raise OSError(28, "No space left on device", str(folder))
        original(self, folder, certified)

    monkeypatch.setattr(checkpoint_writer.FunctionalPolicy, "save_pretrained", full)
    with pytest.raises(InputError, match=r"000020: could not save .*No space left.*last good one is 000010"):
        train.main(arguments)
    assert checkpoint.saved_steps(tmp_path / "run") == [10]
    assert not list((tmp_path / "run/checkpoints").glob(".*"))
    monkeypatch.undo()
    train.main([*arguments, "--config.resume=True"])
    assert checkpoint.saved_steps(tmp_path / "run") == [10, 20]


def test_too_little_space_is_told_before_writing(arguments: list[str], tmp_path: Path, monkeypatch):
    monkeypatch.setattr(checkpoint_writer.shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(10, 10, 0))
    with pytest.raises(
        InputError, match=r"could not save the checkpoint .*MB needed, 0 MB free\); there is none yet"
    ):
        train.main(arguments)


@pytest.mark.slow
def test_a_run_with_other_targets(arguments: list[str], root: Path, tmp_path: Path):
    """Statistics are those of what is predicted; resuming, exporting and fine-tuning keep the target."""
    few = ["--config.steps=2", "--config.eval_steps=0", "--config.save_freq=1"]
    delta = "--config.policy.action_target.representation=delta"
    train.main([*arguments, *few, delta])
    folder = tmp_path / "run/checkpoints/last/pretrained_model"
    policy = load_policy(folder)
    dataset = LeRobotDataset("test", root)
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
def test_quantiles_that_stats_json_lacks_are_computed(arguments: list[str], root: Path, tmp_path: Path):
    old = shutil.copytree(root, tmp_path / "old")
    path = old / "meta/stats.json"
    stats = json.loads(path.read_text())
    without = {key: {n: v for n, v in values.items() if n[0] != "q"} for key, values in stats.items()}
    path.write_text(json.dumps(without))
    recipe = Path(arguments[0].partition("=")[2])
    recipe.write_text(recipe.read_text().replace(str(root), str(old)).replace("MEAN_STD", "QUANTILES"))
    train.main([*arguments, "--config.steps=1", "--config.eval_steps=0"])
    policy = load_policy(tmp_path / "run/checkpoints/last/pretrained_model")
    found = policy.preprocessor.steps[-1].stats["observation.state"]["q99"]
    state = LeRobotDataset("test", root).columns["observation.state"]
    np.testing.assert_allclose(found, np.quantile(state, 0.99, axis=0), rtol=1e-6)
