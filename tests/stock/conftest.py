"""Stock LeRobot, live: its functions in a process of its Python (tests/lerobot_peer.py), and its commands."""

import json
import os
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.goldens import HUB

PEER = Path(__file__).parents[1] / "lerobot_peer.py"


def lerobot_python() -> Path:
    """Give the Python of stock LeRobot's environment."""
    python = os.environ.get("LEROBOT_PYTHON")
    if not python:
        pytest.fail("LEROBOT_PYTHON must name a Python with lerobot==0.6.1; `make lerobot` builds one")
    return Path(python)


def environment() -> dict[str, str]:
    """Give the environment variables under which commands need no network and no GPU."""
    return os.environ | {
        "HF_HUB_OFFLINE": "1",
        "HF_HUB_CACHE": str(HUB),
        "CUDA_VISIBLE_DEVICES": "",
        "JAX_PLATFORMS": "cpu",
        "XLA_FLAGS": "",
    }


def run_command(*arguments: Any, folder: Path) -> str:
    """Run a command in a folder; give what it printed. The name of one of LeRobot's scripts is enough."""
    program, *rest = map(str, arguments)
    if program.startswith("lerobot-"):
        program = str(lerobot_python().with_name(program))
    run = subprocess.run(
        [program, *rest],
        cwd=folder,
        env=environment(),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        check=False,
    )
    assert run.returncode == 0, run.stdout[-3000:]
    return run.stdout


class Peer:
    """A process of tests/lerobot_peer.py: `peer("act", folder=...)` gives the arrays of its function `act`.

    Args:
        folder: for what it writes.
        program: another file, which adds commands.
    """

    def __init__(self, folder: Path, program: Path = PEER):
        self._folder, self._log = folder, folder / "log.txt"
        with self._log.open("w") as log:
            self._process = subprocess.Popen(
                [lerobot_python(), program],
                env=environment(),
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=log,
                text=True,
            )

    def __call__(self, command: str, **arguments: Any) -> dict[str, np.ndarray]:
        result = self._folder / "result.npz"
        request = {"command": command, "arguments": arguments, "result": str(result)}
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        print(json.dumps(request, default=str), file=self._process.stdin, flush=True)
        answer = self._process.stdout.readline()
        if answer != "done\n":
            pytest.fail(json.loads(answer) if answer else f"it died: {self._log.read_text()[-3000:]}")
        with np.load(result) as file:
            return dict(file)

    def close(self) -> None:
        self._process.communicate()  # the end of its input ends it


@pytest.fixture(scope="module")
def stock(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Peer]:
    peer = Peer(tmp_path_factory.mktemp("stock"))
    yield peer
    peer.close()
