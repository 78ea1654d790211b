"""The real program is stopped, killed, resumed, and finds damaged checkpoints and full disks."""

import os
import random
import shutil
import signal
import time
from pathlib import Path

import pytest

from lerobot_jax import certificate, checkpoint, checkpoint_writer, train
from lerobot_jax.config import load_config
from lerobot_jax.errors import InputError
from lerobot_jax.metrics import read_metrics
from tests.runs import assert_same_run, finish, start, tiny_arguments, wait_for


@pytest.fixture
def arguments(tiny_root: Path, tmp_path: Path) -> list[str]:
    return tiny_arguments(tiny_root, tmp_path)


@pytest.fixture
def run(tiny_run: Path, tmp_path: Path) -> Path:
    """Give a whole run's folder, to be damaged; it is that of `arguments`."""
    return shutil.copytree(tiny_run, tmp_path / "run", symlinks=True)


def test_a_resumed_run_is_the_uninterrupted_one(arguments: list[str], tiny_run: Path, tmp_path: Path):
    """Also when it is resumed with another number of threads."""
    train.main([*arguments, "--config.steps=10"])
    train.main([*arguments, "--config.resume=True", "--config.num_workers=1", "--config.prefetch_factor=1"])
    assert_same_run(tmp_path / "run", tiny_run)
    records = read_metrics(tmp_path / "run/metrics.jsonl")
    assert [r["step"] for r in records if "loss" in r] == [5, 10, 15, 20]


def test_old_checkpoints_are_removed_but_the_best_stays(arguments: list[str], tmp_path: Path):
    """At a learning rate at which the policy gets worse and worse."""
    settings = {"steps": 6, "save_freq": 2, "eval_steps": 2, "keep_last": 1, "policy.optimizer_lr": 1.0}
    train.main([*arguments, *(f"--config.{name}={value}" for name, value in settings.items())])
    run = tmp_path / "run"
    losses = {r["step"]: r["eval_loss"] for r in read_metrics(run / "metrics.jsonl") if "eval_loss" in r}
    best = min(losses, key=losses.__getitem__)
    assert best < 6
    assert os.readlink(run / "checkpoints/best") == f"{best:06d}"
    assert checkpoint.saved_steps(run) == [best, 6]


def test_killed_at_any_moment_the_run_resumes_exactly(arguments: list[str], tmp_path: Path):
    """Saves follow one another without a pause, so that most kills hit one in progress."""
    settings = ["--config.steps=30", "--config.eval_steps=0", "--config.log_freq=10"]
    finish([*arguments, *settings, "--config.save_freq=0"], tmp_path)
    killed = [a.replace("/run", "/killed") for a in arguments] + [*settings, "--config.save_freq=3"]
    folder = tmp_path / "killed"
    dice = random.Random(0)
    for attempt in range(3):
        process = start(killed if attempt == 0 else [*killed, "--config.resume=True"], tmp_path)
        before = checkpoint.saved_steps(folder)[-1:] if attempt else []
        if attempt < 2:
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


def test_a_stopped_run_saves_before_it_ends(arguments: list[str], tmp_path: Path):
    """By Ctrl-C; it goes on, and a cluster stops it again."""
    settings = [*arguments, "--config.steps=100000", "--config.save_freq=0", "--config.eval_steps=0"]
    run, metrics = tmp_path / "run", tmp_path / "run/metrics.jsonl"
    for number, more in ((signal.SIGINT, []), (signal.SIGTERM, ["--config.resume=True"])):
        before = checkpoint.saved_steps(run)
        logged = len(read_metrics(metrics)) if before else 0
        process = start([*settings, *more], tmp_path)
        wait_for(
            lambda logged=logged: metrics.exists() and len(read_metrics(metrics)) > logged + 3,
            process,
            tmp_path,
        )
        process.send_signal(number)
        assert process.wait(timeout=60) == 128 + number
        *earlier, last = checkpoint.saved_steps(run)
        assert earlier == before
        assert last >= 20 + sum(before)
        said = f"stopped at step {last}; continue with --config.resume=True"
        assert said in (tmp_path / "log.txt").read_text()


def test_damaged_checkpoints_are_reported(arguments: list[str], run: Path):
    state = run / "checkpoints/000020/training_state"
    for path in [p for p in state.rglob("*") if p.is_file() and p.stat().st_size > 200]:
        path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    with pytest.raises(
        InputError, match=r"000020/training_state: the checkpoint is damaged .*remove .*000020"
    ):
        train.main([*arguments, "--config.resume=True", "--config.steps=30"])


def test_a_full_disk_while_saving_keeps_the_last_good_checkpoint(
    arguments: list[str], run: Path, monkeypatch
):
    """From which the run goes on, as it does when the last one is removed."""
    shutil.rmtree(run / "checkpoints/000020")
    original = checkpoint_writer.FunctionalPolicy.save_pretrained

    def full(self, folder, certified, **settings):
        if "000020" in str(folder):
            raise OSError(28, "No space left on device", str(folder))
        original(self, folder, certified, **settings)

    monkeypatch.setattr(checkpoint_writer.FunctionalPolicy, "save_pretrained", full)
    with pytest.raises(InputError, match=r"000020: could not save .*No space left.*last good one is 000010"):
        train.main([*arguments, "--config.resume=True"])
    assert checkpoint.saved_steps(run) == [10]
    assert not list((run / "checkpoints").glob(".*"))
    monkeypatch.undo()
    train.main([*arguments, "--config.resume=True"])
    assert checkpoint.saved_steps(run) == [10, 20]


def test_too_little_space_is_told_before_writing(arguments: list[str], tmp_path: Path, monkeypatch):
    monkeypatch.setattr(checkpoint_writer.shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(10, 10, 0))
    with pytest.raises(
        InputError, match=r"could not save the checkpoint .*MB needed, 0 MB free\); there is none yet"
    ):
        train.main(arguments)


def test_a_used_folder_is_refused_with_advice(arguments: list[str], tiny_run: Path):
    with pytest.raises(InputError, match="no run to resume"):
        train.main([*arguments, "--config.resume=True"])
    used = [*arguments, f"--config.output_dir={tiny_run}"]
    with pytest.raises(
        InputError, match=r"already holds a run \(last checkpoint: step 20\).*resume=True.*output_dir"
    ):
        train.main(used)
    used.append("--config.resume=True")
    with pytest.raises(InputError, match="batch_size is 16, but the run to resume had 8"):
        train.main([*used, "--config.batch_size=16"])
    with pytest.raises(InputError, match=r"policy.dropout is 0.5, but the run to resume had 0.1"):
        train.main([*used, "--config.policy.dropout=0.5"])


@pytest.mark.parametrize(("schedule", "warns"), [("cosine", True), ("constant_with_warmup", False)])
def test_more_steps_warn_if_the_schedule_depends_on_them(arguments, caplog, schedule: str, warns: bool):
    scheduled = [*arguments, f"--config.scheduler.type={schedule}", "--config.scheduler.num_warmup_steps=1"]
    checkpoint.write_train_config(load_config([*scheduled, "--config.steps=2"]))
    checkpoint.open_run(load_config([*scheduled, "--config.steps=4", "--config.resume=True"]))
    assert ("steps is 4, but was 2 when the run began" in caplog.text) == warns


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
