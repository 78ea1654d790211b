"""Programs that do work in turns, so that all see the same machine; each is a process of its own, or several."""

import os
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

import numpy as np


class Program(NamedTuple):
    """A command that calls `serve`, and what is added to its environment."""

    command: Sequence[str]
    environment: Mapping[str, str] = {}


def take_turns(contestants: Sequence[Sequence[Program]], rounds: int, count: int) -> list[np.ndarray]:
    """Give the milliseconds of one repetition, for each turn of each contestant.

    Args:
        contestants: each is one program, or several that work together and take as long as the slowest.
        rounds: turns of each.
        count: repetitions a turn.
    """
    started = [[_start(program) for program in programs] for programs in contestants]
    for processes in started:
        for process in processes:
            assert process.stdout is not None
            if process.stdout.readline() != "ready\n":
                raise SystemExit(f"{process.args} did not start: see above")
    milliseconds: list[list[float]] = [[] for _ in started]
    for _ in range(rounds):
        for processes, values in zip(started, milliseconds, strict=True):
            values.append(max(_ask(processes, count)) / count * 1e3)
    for processes in started:
        for process in processes:
            assert process.stdin is not None
            process.stdin.close()
        for process in processes:
            process.wait()
    return [np.array(values) for values in milliseconds]


def _start(program: Program) -> subprocess.Popen[str]:
    environment = {**os.environ, **program.environment}
    return subprocess.Popen(
        program.command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment
    )


def _ask(processes: Sequence[subprocess.Popen[str]], count: int) -> list[float]:
    for process in processes:
        assert process.stdin is not None
        process.stdin.write(f"{count}\n")
        process.stdin.flush()
    answers = []
    for process in processes:
        assert process.stdout is not None
        answers.append(float(process.stdout.readline()))
    return answers


def serve(make_work: Callable[[], Callable[[int], None]]) -> None:
    """Read how often to do the work, write how many seconds it took, until the input ends."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what a library prints must not get between the answers
    run = make_work()
    run(3)
    print("ready", file=answers, flush=True)
    for line in sys.stdin:
        start = time.perf_counter()
        run(int(line))
        print(time.perf_counter() - start, file=answers, flush=True)
