"""Several processes of the real program: they compute what one does, and end together."""

import dataclasses
import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import numpy as np
import pytest

from lerobot_jax import certificate, checkpoint
from lerobot_jax.metrics import read_metrics
from lerobot_jax.policies.base import load_policy
from tests.data.recordings import record
from tests.test_train import FEATURES, RECIPE, final_arrays

LENGTHS = (9, 12, 8, 11)
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
            "XLA_FLAGS": f"--xla_backend_optimization_level=0 --xla_force_host_platform_device_count={devices}",
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

    def end(self, timeout: float = 240) -> list[int]:
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
def run(root: Path, tmp_path: Path) -> Iterator[Run]:
    recipe = tmp_path / "tiny.py"
    recipe.write_text(RECIPE.format(root=root))
    yield Run(tmp_path, recipe)


def assert_close(a: Path, b: Path) -> None:
    """Compare whole train states: sums over devices are made in another order."""
    first, second = final_arrays(a), final_arrays(b)
    assert set(first) == set(second)
    for key, value in first.items():
        np.testing.assert_allclose(value, second[key], rtol=1e-5, atol=1e-6, err_msg=key)


def losses(folder: Path) -> list[tuple[int, float]]:
    records = read_metrics(folder / "metrics.jsonl")
    return [(r["step"], r.get("loss", r.get("eval_loss"))) for r in records]


def test_two_processes_are_one_and_one_goes_on(run: Run):
    """FSDP, gradient accumulation, validation loss; saved by two processes, continued by one."""
    more = [*EXACT, "--config.gradient_accumulation_steps=2", "--config.save_freq=3", "--config.eval_steps=3"]
    more += ["--config.log_freq=1", "--config.mesh.fsdp=4", "--config.mesh.min_shard_size=64"]
    two = run.start(2, 4, [*more, "--config.steps=3"])
    one = run.start(1, 8, [*more, "--config.steps=5"], name="alone")
    one.succeed()
    two.succeed()
    first, second = two.texts()
    assert "compiled the train step" in first
    assert second == ""
    assert checkpoint.saved_steps(run.output) == [3]
    certificate.check_files(run.output / "checkpoints/last/pretrained_model")
    run.start(1, 8, [*more, "--config.steps=5", "--config.resume=True"]).succeed()
    found, expected = losses(run.output), losses(run.folder / "alone")
    assert [step for step, _ in found] == [1, 2, 3, 3, 4, 5, 5]
    np.testing.assert_allclose(found, expected, rtol=1e-5)
    assert_close(run.output, run.folder / "alone")
    policy = load_policy(run.output / "checkpoints/000003/pretrained_model")
    certificate.check_actions(policy, run.output / "checkpoints/000003/pretrained_model")


def test_a_mistake_ends_all_processes_with_one_message(run: Run):
    (run.output / "other").mkdir(parents=True)
    both = run.start(2, 1)
    assert both.end() == [1, 1]
    message = f"{run.output} already holds a run"
    first, second = both.texts()
    assert f"error: {message}" in first
    assert f"error: process 0 of 2: {message}" in second
    assert "Traceback" not in first + second
