"""Several processes of the real program: they compute what one does, and end together."""

import dataclasses
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import pytest

from lerobot_jax import certificate, checkpoint, convert
from lerobot_jax.distributed import Address, find_address
from lerobot_jax.errors import InputError
from lerobot_jax.metrics import read_metrics
from lerobot_jax.policies.base import load_policy
from tests.compiler import XLA_FLAGS
from tests.data.recordings import record
from tests.runs import FEATURES, RECIPE, final_arrays
from tests.test_training_text import RECIPE as TOLD_RECIPE
from tests.test_training_text import TOKENIZERS

LENGTHS = (9, 12, 8, 11)
SLURM = {"SLURM_JOB_ID": "7", "SLURM_STEP_NODELIST": "n1", "SLURM_PROCID": "0", "SLURM_LOCALID": "0"}
EXACT = ["--config.ema_decay=0.9", "--config.optimizer.type=sgd", "--config.optimizer.lr=0.1"]
ENDLESS = ["--config.steps=1000000", "--config.eval_steps=0", "--config.dataset.eval_split=0"]


@dataclasses.dataclass
class Run:
    """Starts the processes of a run on this machine."""

    folder: Path
    recipe: Path

    @property
    def output(self) -> Path:
        return self.folder / "run"

    def start(self, num: int, devices: int, more: Sequence[str] = (), name: str = "run") -> "Processes":
        with socket.socket() as probe:
            probe.bind(("localhost", 0))
            address = f"localhost:{probe.getsockname()[1]}"
        # Only the first process keeps compiled programs, and the keys of the others' are other ones.
        environment = os.environ | {
            "XLA_FLAGS": f"{XLA_FLAGS} --xla_force_host_platform_device_count={devices}",
            "PYTHONUNBUFFERED": "1",
        }
        if num > 1:
            environment |= {"JAX_COORDINATOR_ADDRESS": address, "JAX_NUM_PROCESSES": str(num)}
        command = [sys.executable, "-m", "lerobot_jax.train", f"--config={self.recipe}"]
        command += [f"--config.output_dir={self.folder / name}", *more]
        logs = [self.folder / f"{name}-{num}-{i}.log" for i in range(num)]
        found = []
        for i, log in enumerate(logs):
            own = environment | ({"JAX_PROCESS_ID": str(i)} if num > 1 else {})
            with log.open("w") as file:
                found.append(subprocess.Popen(command, env=own, stdout=file, stderr=file, cwd=self.folder))
        return Processes(found, logs)


@dataclasses.dataclass
class Processes:
    """The processes of a run, and what they have said."""

    processes: list[subprocess.Popen]
    logs: list[Path]

    def texts(self) -> list[str]:
        return [log.read_text() for log in self.logs]

    def end(self, timeout: float = 400) -> list[int]:
        """Wait until all have ended; give their exit codes."""
        deadline = time.monotonic() + timeout
        try:
            return [each.wait(max(0.1, deadline - time.monotonic())) for each in self.processes]
        except subprocess.TimeoutExpired:
            raise AssertionError(f"still running: {[text[-1500:] for text in self.texts()]}") from None
        finally:
            self.kill()

    def succeed(self) -> None:
        codes = self.end()
        assert codes == [0] * len(codes), "\n\n".join(text[-3000:] for text in self.texts())

    def wait_for(self, condition: Callable[[], object], timeout: float = 240) -> None:
        deadline = time.monotonic() + timeout
        while not condition():
            if time.monotonic() > deadline or any(each.poll() is not None for each in self.processes):
                self.kill()
                raise AssertionError("\n\n".join(text[-3000:] for text in self.texts()))
            time.sleep(0.05)

    def kill(self) -> None:
        for each in self.processes:
            each.kill()
            each.wait()


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return record(tmp_path_factory.mktemp("data") / "dataset", lengths=LENGTHS, features=FEATURES).root


@pytest.fixture
def run(root: Path, tmp_path: Path) -> Run:
    recipe = tmp_path / "tiny.py"
    recipe.write_text(RECIPE.format(root=root))
    return Run(tmp_path, recipe)


def assert_close(a: Path, b: Path) -> None:
    """Compare whole train states: sums over devices are made in another order."""
    first, second = final_arrays(a), final_arrays(b)
    assert set(first) == set(second)
    for key, value in first.items():
        np.testing.assert_allclose(value, second[key], rtol=1e-5, atol=1e-6, err_msg=key)


def losses(folder: Path) -> list[tuple[int, float]]:
    records = read_metrics(folder / "metrics.jsonl")
    return [(r["step"], r[name]) for r in records for name in ("loss", "eval_loss") if name in r]


def test_two_processes_are_one_and_one_goes_on(run: Run):
    """FSDP, gradient accumulation, validation loss; saved by two processes, continued by one."""
    more = [*EXACT, "--config.gradient_accumulation_steps=2", "--config.save_freq=3", "--config.eval_steps=3"]
    more += ["--config.log_freq=1", "--config.mesh.fsdp=8", "--config.mesh.min_shard_size=64"]
    two = run.start(2, 4, [*more, "--config.steps=3"])
    one = run.start(1, 8, [*more, "--config.steps=5"], name="alone")
    one.succeed()
    two.succeed()
    first, second = two.texts()
    assert "compiled the train step" in first
    assert not any(word in second for word in ("compiled", "training", "done", "error"))
    assert checkpoint.saved_steps(run.output) == [3]
    certificate.check_files(run.output / "checkpoints/last/pretrained_model")
    run.start(1, 8, [*more, "--config.steps=5", "--config.resume=True"]).succeed()
    found, expected = losses(run.output), losses(run.folder / "alone")
    assert [step for step, _ in found] == [1, 2, 3, 3, 4, 5, 5]
    np.testing.assert_allclose(found, expected, rtol=1e-5)
    assert_close(run.output, run.folder / "alone")
    policy = load_policy(run.output / "checkpoints/000003/pretrained_model")
    certificate.check_actions(policy, run.output / "checkpoints/000003/pretrained_model")


@pytest.mark.slow
def test_processes_begin_with_the_same_weights(run: Run):
    """Each device of each process gets its part of a policy's arrays, in float32, however they are stored."""
    more = [*EXACT, "--config.steps=2", "--config.mesh.fsdp=4", "--config.mesh.min_shard_size=64"]
    run.start(1, 4, more, name="first").succeed()
    half = run.folder / "half"
    source = run.folder / "first/checkpoints/last/pretrained_model"
    convert.from_torch(convert.FromTorch(str(source), str(half), dtype="bfloat16"))
    more += [f"--config.policy.pretrained_path={half}", "--config.freeze", r"model\.encoder\.layers"]
    one = run.start(1, 4, more, name="one")
    two = run.start(2, 2, more, name="two")
    one.succeed()
    two.succeed()
    assert_close(run.folder / "two", run.folder / "one")


@pytest.mark.slow
def test_a_mistake_ends_all_processes_with_one_message(run: Run):
    (run.output / "other").mkdir(parents=True)
    both = run.start(2, 1)
    assert both.end() == [1, 1]
    message = f"{run.output} already holds a run"
    first, second = both.texts()
    assert f"error: {message}" in first
    assert f"error: process 0 of 2: {message}" in second
    assert "Traceback" not in first + second


def checkpoints_are_whole(folder: Path) -> list[int]:
    steps = checkpoint.saved_steps(folder)
    for step in steps:
        certificate.check_files(folder / "checkpoints" / f"{step:06d}" / "pretrained_model")
        assert (folder / "checkpoints" / f"{step:06d}" / "training_state/_CHECKPOINT_METADATA").exists()
    return steps


@pytest.mark.slow
@pytest.mark.parametrize("victim", [2, 0])
def test_a_killed_process_ends_the_others_and_fewer_go_on(run: Run, victim: int):
    more = [
        *EXACT,
        *ENDLESS,
        "--config.log_freq=1",
        "--config.mesh.fsdp=4",
        "--config.mesh.min_shard_size=64",
    ]
    four = run.start(4, 1, [*more, "--config.save_freq=5"])
    if victim:
        four.wait_for(lambda: checkpoint.saved_steps(run.output))
    else:  # while it saves
        four.wait_for(lambda: checkpoint.saved_steps(run.output))
        four.wait_for(lambda: list((run.output / "checkpoints").glob(".partial-*/training_state*")))
    killed_at = time.monotonic()
    four.processes[victim].kill()
    codes = four.end(60)
    assert [code for i, code in enumerate(codes) if i != victim] == [1, 1, 1]
    assert time.monotonic() - killed_at < 60
    last = checkpoints_are_whole(run.output)[-1]
    for i, text in enumerate(four.texts()):
        message = f"process {victim} of 4 is gone (processes count from 0); the last good checkpoint is step"
        assert i == victim or message in text
        assert i == victim or "start all processes again with --config.resume=True" in text
    resumed = ["--config.resume=True", "--config.save_freq=1"]
    steps = f"--config.steps={last + 2}"
    run.start(2, 2, [*more, *resumed, f"--config.steps={last + 1}"]).succeed()
    run.start(1, 4, [*more, *resumed, steps]).succeed()
    run.start(1, 4, [*more, steps], name="alone").succeed()
    np.testing.assert_allclose(losses(run.output), losses(run.folder / "alone"), rtol=1e-4)
    assert_close(run.output, run.folder / "alone")
    assert not list((run.output / "checkpoints").glob(".partial*"))


@pytest.mark.slow
def test_a_stop_request_to_one_process_saves_and_ends_all(run: Run):
    two = run.start(2, 1, [*ENDLESS, "--config.save_freq=0", "--config.log_freq=1"])
    two.wait_for(lambda: len(losses(run.output)) > 3)
    two.processes[1].send_signal(signal.SIGTERM)
    assert two.end() == [128 + signal.SIGTERM] * 2
    (step,) = checkpoints_are_whole(run.output)
    assert f"stopped at step {step}; continue with --config.resume=True" in two.texts()[0]


@pytest.mark.slow
def test_streamed_datasets_and_mixtures(run: Run, root: Path):
    """Held-out batches that cannot be divided, too."""
    more = [*EXACT, "--config.steps=4", "--config.log_freq=1", "--config.eval_steps=2"]
    streamed = [*more, "--config.dataset.streaming=True", "--config.dataset.buffer_size=16"]
    run.start(2, 2, streamed).succeed()
    run.start(1, 4, streamed, name="alone").succeed()
    np.testing.assert_allclose(losses(run.output), losses(run.folder / "alone"), rtol=1e-5)
    sources = f'(SourceConfig("test/a", 3.0, root="{root}"), SourceConfig("test/b", 1.0, root="{root}"))'
    text = run.recipe.read_text().replace("import DatasetConfig,", "import DatasetConfig, SourceConfig,")
    run.recipe.write_text(text.replace(f'repo_id="test/recorded", root="{root}"', f"mixture={sources}"))
    run.start(2, 2, more, name="mixed").succeed()
    run.start(1, 4, more, name="mixed_alone").succeed()
    np.testing.assert_allclose(losses(run.folder / "mixed"), losses(run.folder / "mixed_alone"), rtol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("frames", ["device", "decode"])
def test_prompts_tell_the_state(run: Run, frames: str, monkeypatch: pytest.MonkeyPatch):
    """Each process tokenizes its part of a batch, wherever the frames lie."""
    monkeypatch.setenv("PYTHONPATH", str(Path(__file__).parent.parent))
    monkeypatch.setenv("HF_HUB_CACHE", str(TOKENIZERS))
    root = record(run.folder / "seen", lengths=LENGTHS).root
    run.recipe.write_text(TOLD_RECIPE.format(root=root))
    more = [f"--config.dataset.frame_mode={frames}", "--config.gradient_accumulation_steps=2"]
    more += [*EXACT[1:], "--config.steps=4", "--config.log_freq=1", "--config.eval_steps=2"]
    run.start(2, 2, more).succeed()
    run.start(1, 4, more, name="alone").succeed()
    np.testing.assert_allclose(losses(run.output), losses(run.folder / "alone"), rtol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("frames", ["device", "cache"])
def test_episodes_are_rolled_out_by_the_first_process(run: Run, root: Path, frames: str):
    """The dataset is made once; its rows may lie on the devices."""
    run.recipe.write_text(
        run.recipe.read_text()
        .replace(f'"test/recorded", root="{root}"', '"builtin/pusht_keypoints"')
        .replace("env_eval_freq=0", "env_eval_freq=2")
    )
    more = ["--config.env.type=pusht", "--config.env.obs_type=environment_state_agent_pos"]
    more += [
        "--config.eval.n_episodes=2",
        "--config.env.episode_length=20",
        "--config.steps=2",
        "--config.log_freq=1",
        "--config.eval_steps=2",
    ]
    more += ["--config.max_eval_samples=20", f"--config.dataset.frame_mode={frames}"]
    run.start(2, 2, [*EXACT, *more]).succeed()
    run.start(1, 4, [*EXACT, *more], name="alone").succeed()
    found, expected = (read_metrics(f / "metrics.jsonl") for f in (run.output, run.folder / "alone"))
    assert [set(record) for record in found] == [set(record) for record in expected]
    np.testing.assert_allclose(losses(run.output), losses(run.folder / "alone"), rtol=1e-5)
    rewards = [
        [r["avg_max_reward"] for r in records if "avg_max_reward" in r] for records in (found, expected)
    ]
    np.testing.assert_allclose(*rewards, rtol=1e-3)
    assert len(list((run.output / "eval/step_000002/videos").rglob("*.mp4"))) == 2


ADDRESSES = {
    "nothing": ({}, "auto", None),
    "off": ({"JAX_NUM_PROCESSES": "2"}, "off", None),
    "flag": ({}, "host:1,4,3", Address("host:1", 4, 3)),
    "plain": (
        {"JAX_COORDINATOR_ADDRESS": "a:1", "JAX_NUM_PROCESSES": "2", "JAX_PROCESS_ID": "0"},
        "auto",
        Address("a:1", 2, 0),
    ),
    "one": (
        {"JAX_COORDINATOR_ADDRESS": "a:1", "JAX_NUM_PROCESSES": "1", "JAX_PROCESS_ID": "0"},
        "auto",
        None,
    ),
    "slurm": (SLURM | {"SLURM_NTASKS": "4"}, "auto", Address(cluster_detection_method="slurm")),
    "slurm, one task": (SLURM | {"SLURM_NTASKS": "1"}, "auto", None),
    "slurm, a step of one task": (
        SLURM | {"SLURM_NTASKS": "4", "SLURM_STEP_NUM_TASKS": "1"},
        "auto",
        None,
    ),
    "a batch script without srun": ({"SLURM_JOB_ID": "7", "SLURM_NTASKS": "4"}, "auto", None),
}


@pytest.mark.parametrize("case", ADDRESSES)
def test_processes_find_their_place(case: str, monkeypatch: pytest.MonkeyPatch):
    variables, setting, expected = ADDRESSES[case]
    for name in [name for name in os.environ if name.startswith(("SLURM_", "OMPI_", "JAX_"))]:
        monkeypatch.delenv(name)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    assert find_address(setting) == expected


def test_incomplete_addresses_are_reported(monkeypatch: pytest.MonkeyPatch):
    with pytest.raises(InputError, match="must be auto, off, or HOST:PORT,PROCESSES,INDEX; it is yes"):
        find_address("yes")
    with pytest.raises(InputError, match="process 4 of 4 cannot be"):
        find_address("host:1,4,4")
    monkeypatch.setenv("JAX_NUM_PROCESSES", "2")
    with pytest.raises(InputError, match="JAX_COORDINATOR_ADDRESS and JAX_PROCESS_ID must be set too"):
        find_address("auto")
