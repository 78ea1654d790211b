import signal
import subprocess
import sys

import pytest

from lerobot_jax.errors import InputError, reported_on_one_line

SCRIPT = """
import os, signal
from lerobot_jax.errors import reported_on_one_line
with reported_on_one_line():
    os.kill(os.getpid(), signal.SIGINT)
    signal.pause()
"""


def test_ctrl_c_ends_with_one_line():
    ended = subprocess.run([sys.executable, "-c", SCRIPT], capture_output=True, text=True, timeout=120)
    assert (ended.returncode, ended.stderr) == (128 + signal.SIGINT, "interrupted\n")


def test_an_input_error_is_one_line(capsys: pytest.CaptureFixture[str]):
    with pytest.raises(SystemExit) as ended, reported_on_one_line():
        raise InputError("no such thing")
    assert (ended.value.code, capsys.readouterr().err) == (1, "error: no such thing\n")
