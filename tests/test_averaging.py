"""Averages of the weights: their rules against diffusers and PyTorch, and whole runs with them."""

import dataclasses
import json
import shutil
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lerobot_jax import averaging, checkpoint, convert, state_dict, train
from lerobot_jax.config import TrainConfig
from lerobot_jax.errors import InputError
from lerobot_jax.files import read_json, write_json
from lerobot_jax.optim_config import EMAConfig, SWAConfig
from lerobot_jax.policies.base import load_policy
from tests.data.recordings import record
from tests.runs import FEATURES, RECIPE, assert_same_run

# What diffusers and PyTorch gave: tools/make_optimizer_golden.py
GOLDEN = dict(np.load(Path(__file__).parent / "golden" / "optimizers.npz"))


def averages(config: TrainConfig, values: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Give the average after each step, from zeros on."""
    average, found = {name: jnp.zeros(x.shape[1:], x.dtype) for name, x in values.items()}, []
    update = jax.jit(lambda *args: averaging.update_average(config, *args))
    for step in range(len(next(iter(values.values())))):
        average = update(average, {name: x[step] for name, x in values.items()}, jnp.asarray(step))
        found.append(average)
    return {name: np.stack([each[name] for each in found]) for name in values}


@pytest.mark.parametrize("i", range(3))
def test_the_power_schedule_is_that_of_diffusers(i: int):
    settings = json.loads(str(GOLDEN["ema/settings"]))[i]
    settings["update_every"] = settings.pop("every")
    decay = settings.pop("decay")
    config = TrainConfig(ema_decay=decay, ema=EMAConfig(schedule="power", **settings))
    found = averages(config, {"w": GOLDEN["weights"]})["w"]
    np.testing.assert_allclose(found, GOLDEN[f"ema/{i}"], rtol=1e-5, atol=1e-6)


def test_warm_up_follows_fast_at_first_and_constant_does_not():
    ones = {"w": np.ones((3, 2), np.float32)}
    found = averages(TrainConfig(ema_decay=0.999), ones)["w"]
    behind = np.cumprod([1 / 10, 2 / 11, 3 / 12])
    np.testing.assert_allclose(found, 1 - behind[:, None].repeat(2, 1), rtol=1e-6)
    assert averaging.ema_rate(EMAConfig(), 0.9, 10**6) == pytest.approx(0.1)
    found = averages(TrainConfig(ema_decay=0.75, ema=EMAConfig(schedule="constant")), ones)["w"]
    np.testing.assert_allclose(found[:, 0], 1 - 0.75 ** np.arange(1, 4), rtol=1e-6)


def test_the_average_may_begin_late_and_follow_seldom():
    """Until then it is the weights to the bit, and in between it does not move."""
    config = TrainConfig(
        ema_decay=0.75, ema=EMAConfig(schedule="constant", update_after_step=4, update_every=3)
    )
    weights = GOLDEN["weights"]
    found = averages(config, {"w": weights})["w"]
    np.testing.assert_array_equal(found[:4], weights[:4])
    np.testing.assert_array_equal(found[4:6], weights[[3, 3]])
    np.testing.assert_allclose(found[6], 0.75 * weights[3] + 0.25 * weights[6], rtol=1e-5)
    np.testing.assert_array_equal(found[7], found[6])


@pytest.mark.parametrize("i", range(2))
def test_swa_is_pytorchs_averaged_model(i: int):
    config = TrainConfig(swa=SWAConfig(**json.loads(str(GOLDEN["swa/settings"]))[i]))
    names = ("weights", "statistics")
    counts = np.arange(len(GOLDEN["weights"]), dtype=np.int32)[:, None]
    found = averages(config, {name: GOLDEN[name] for name in names} | {"counts": counts})
    for name in names:
        np.testing.assert_allclose(found[name], GOLDEN[f"swa/{i}/{name}"], rtol=1e-5, atol=1e-6)
    np.testing.assert_array_equal(found["counts"], counts)  # whole numbers are those of the last step


@pytest.mark.parametrize(
    ("make", "message"),
    {
        lambda: EMAConfig(power=0.7): r"ema.power needs ema.schedule=power, it is warmup",
        lambda: EMAConfig("power", inv_gamma=0): r"ema.inv_gamma must be finite and positive",
        lambda: EMAConfig("power", min_decay=1): r"ema.min_decay must be in \[0, 1\)",
        lambda: EMAConfig(update_every=0): r"ema.update_every must be positive",
        lambda: SWAConfig(start=0): r"swa.start must be at least 1",
        lambda: SWAConfig(start=1, freq=0): r"swa.freq must be at least 1",
        lambda: TrainConfig(ema=EMAConfig("constant")): r"ema needs ema_decay",
        lambda: TrainConfig(ema_decay=0.5, ema=EMAConfig("power", min_decay=0.6)): r"more than ema_decay=0.5",
        lambda: TrainConfig(swa=SWAConfig(freq=2)): r"swa.freq needs swa.start",
        lambda: TrainConfig(swa=SWAConfig(1), ema_decay=0.9): r"there is one average",
        lambda: TrainConfig(swa=SWAConfig(9), steps=8): r"swa.start=9 is after the last step, 8",
    }.items(),
)
def test_what_cannot_be_is_refused(make, message: str):
    with pytest.raises(ValueError, match=message):
        make()


@pytest.fixture(scope="module")
def root(tmp_path_factory) -> Path:
    return record(tmp_path_factory.mktemp("data") / "dataset", lengths=(9, 12), features=FEATURES).root


@pytest.fixture(scope="module")
def swa_run(root: Path, tmp_path_factory) -> Path:
    """A run of 12 steps whose average begins after 4; it was stopped after 6."""
    folder = tmp_path_factory.mktemp("swa")
    recipe = folder / "tiny.py"
    recipe.write_text(RECIPE.format(root=root).replace("ema_decay=0.9", "keep_last=0"))
    arguments = [f"--config={recipe}", "--config.dataset.eval_split=0", "--config.eval_steps=0"]
    arguments += ["--config.swa.start=4", "--config.swa.freq=4", "--config.save_freq=2"]
    arguments += ["--config.optimizer.moments_dtype=int8"]
    train.main([*arguments, f"--config.output_dir={folder / 'run'}", "--config.steps=12"])
    arguments.append(f"--config.output_dir={folder / 'half'}")
    train.main([*arguments, "--config.steps=6"])
    train.main([*arguments, "--config.steps=12", "--config.resume=True"])
    assert_same_run(folder / "run", folder / "half")
    return folder / "run"


def exported(run: Path, step: int) -> dict[str, np.ndarray]:
    return dict(state_dict.read(run / f"checkpoints/{step:06d}/pretrained_model"))


@pytest.mark.slow
def test_a_run_exports_its_equal_average(swa_run: Path, tmp_path: Path):
    """Of the weights after steps 4, 8 and 12, and before the first of them the weights themselves."""
    raw = {}
    for step in (2, 4, 8, 12):
        convert.main(
            [
                "to-torch",
                str(swa_run / f"checkpoints/{step:06d}"),
                f"--output_dir={tmp_path / str(step)}",
                "--weights=raw",
            ]
        )
        raw[step] = dict(state_dict.read(tmp_path / str(step)))
    for step, among in {2: (2,), 4: (4,), 8: (4, 8), 12: (4, 8, 12)}.items():
        for key, value in exported(swa_run, step).items():
            mean = np.mean([raw[each][key] for each in among], axis=0)
            np.testing.assert_allclose(value, mean, rtol=1e-5, atol=1e-7, err_msg=key)
    convert.main(
        [
            "to-torch",
            str(swa_run),
            f"--output_dir={tmp_path / 'averaged'}",
            "--weights=ema",
            "--dtype=float32",
        ]
    )
    for key, value in state_dict.read(tmp_path / "averaged").items():
        np.testing.assert_array_equal(value, exported(swa_run, 12)[key])


def test_runs_from_before_there_were_such_settings_resume(root: Path, tmp_path: Path):
    recipe = tmp_path / "tiny.py"
    recipe.write_text(RECIPE.format(root=root))
    arguments = [f"--config={recipe}", f"--config.output_dir={tmp_path / 'old'}"]
    config = train.load_config([*arguments, "--config.steps=4"])
    config.run_dir.mkdir()
    old = json.loads(json.dumps(config.to_dict()))
    for name in ("ema", "swa"):
        del old[name]
    for name in ("moments_dtype", "beta2_decay", "layer_decay"):
        del old["optimizer"][name]
    write_json(old, config.run_dir / checkpoint.TRAIN_CONFIG_NAME)
    checkpoint.open_run(dataclasses.replace(config, resume=True))
    other = dataclasses.replace(config, ema=EMAConfig("constant"), resume=True)
    with pytest.raises(InputError, match=r"ema.schedule is constant, but the run to resume had warmup"):
        checkpoint.open_run(other)


@pytest.mark.slow
def test_checkpoints_of_a_run_are_averaged(swa_run: Path, tmp_path: Path):
    convert.main(
        ["average", str(swa_run), "--steps", "2", "6", "10", f"--output_dir={tmp_path / 'averaged'}"]
    )
    found = dict(state_dict.read(tmp_path / "averaged"))
    parts = [exported(swa_run, step) for step in (2, 6, 10)]
    assert found.keys() == parts[0].keys()
    for key, value in found.items():
        mean = np.mean([part[key].astype(np.float64) for part in parts], axis=0)
        np.testing.assert_array_equal(value, mean.astype(np.float32), err_msg=key)
    policy = load_policy(tmp_path / "averaged")  # whose certificate is that of its actions
    assert policy.config == load_policy(swa_run / "checkpoints/last/pretrained_model").config
    convert.main(["average", str(swa_run), f"--output_dir={tmp_path / 'all'}"])
    key = "model.action_head.weight"
    mean = np.mean([exported(swa_run, step)[key] for step in range(2, 13, 2)], axis=0)
    np.testing.assert_allclose(state_dict.read(tmp_path / "all")[key], mean, rtol=1e-5)


@pytest.mark.lerobot
def test_stock_lerobot_runs_the_average(swa_run: Path, tmp_path: Path, capsys: pytest.CaptureFixture):
    convert.main(["average", str(swa_run), "--steps", "6", "12", f"--output_dir={tmp_path / 'averaged'}"])
    convert.main(["verify", str(tmp_path / "averaged")])
    assert "Stock LeRobot loads every weight, and computes the same." in capsys.readouterr().out


@pytest.mark.slow
def test_what_cannot_be_averaged_is_refused(swa_run: Path, tmp_path: Path):
    out = f"--output_dir={tmp_path / 'averaged'}"
    with pytest.raises(InputError, match=r"at least two checkpoints, not only that of step 2"):
        convert.main(["average", str(swa_run), "--steps", "2", out])
    with pytest.raises(InputError, match=r"no checkpoint of step 3; there are those of the steps 2, 4"):
        convert.main(["average", str(swa_run), "--steps", "2", "3", out])
    run = tmp_path / "run"
    shutil.copytree(swa_run, run, symlinks=True)
    path = run / "checkpoints/000004/pretrained_model/config.json"
    write_json(read_json(path) | {"n_action_steps": 1}, path)
    with pytest.raises(InputError, match=r"different policies: config.json: 'n_action_steps' is 2, was 1"):
        convert.main(["average", str(run), "--steps", "2", "4", "6", out])
    folder = run / "checkpoints/000008/pretrained_model"
    for path in folder.glob("policy_preprocessor_*.safetensors"):
        statistics = {key: value + 1 for key, value in state_dict.read(path).items()}
        state_dict.write(statistics, path)
    with pytest.raises(InputError, match=r"different policies: 'policy_preprocessor.*differs"):
        convert.main(["average", str(run), "--steps", "2", "8", out])
    assert not (tmp_path / "averaged").exists()
