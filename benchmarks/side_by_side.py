"""Time the same work in lerobot_jax and in stock LeRobot, in turns, so that both see the same machine.

Each side is a process of its own: lerobot_jax in this Python, stock LeRobot in that of `--lerobot_python`.
"""

import argparse
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

SIDES = ("lerobot_jax", "lerobot")
# Gives a function that does the work so many times, for the policy's name, the batch size and settings.
MakeWork = Callable[..., Callable[[int], None]]


def main(
    work: dict[str, MakeWork],
    what: str,
    options: dict[str, dict[str, Any]],
    *,
    batch_size: int,
    rounds: int,
    count: int,
) -> None:
    """Parse the command line of a benchmark, run it, and print its table.

    Args:
        work: side -> its work.
        what: names the work, in the table.
        options: policy -> its settings on both sides.
        batch_size: the default.
        rounds: the default number of turns.
        count: the default number of repetitions in a turn.
    """
    script: Any = sys.modules["__main__"]
    parser = argparse.ArgumentParser(
        description=script.__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--lerobot_python", help="the Python of an environment with lerobot==0.6.1")
    parser.add_argument("--policy", choices=options, default="act", help="default: %(default)s")
    parser.add_argument("--batch_size", type=int, default=batch_size, help="default: %(default)s")
    parser.add_argument(
        "--rounds", type=int, default=rounds, help="turns of each side (default: %(default)s)"
    )
    parser.add_argument("--steps", type=int, default=count, help=f"{what}s a turn (default: %(default)s)")
    parser.add_argument(
        "--options", type=json.loads, default={}, help="settings of both policies, as '{\"use_vae\": false}'"
    )
    parser.add_argument("--serve", choices=SIDES, help=argparse.SUPPRESS)
    args = parser.parse_args()
    settings = options[args.policy] | args.options
    if args.serve:
        return _serve(work[args.serve], args.policy, args.batch_size, settings)
    if not args.lerobot_python:
        parser.error("--lerobot_python is needed: the Python of an environment with lerobot==0.6.1")

    pythons = {"lerobot_jax": sys.executable, "lerobot": args.lerobot_python}
    arguments = [
        f"--policy={args.policy}",
        f"--batch_size={args.batch_size}",
        f"--options={json.dumps(args.options)}",
    ]
    commands = [[pythons[side], script.__file__, f"--serve={side}", *arguments] for side in SIDES]
    milliseconds = _take_turns(commands, args.rounds, args.steps)
    print(f"{args.policy} {what}, batch {args.batch_size}, one 96x96 camera, {settings or 'default sizes'}")
    print(
        f"{'':12} {'min':>9} {'median':>9} {'max':>9}   ms a {what}, {args.rounds} turns of {args.steps} {what}s"
    )
    for side, values in zip(SIDES, milliseconds, strict=True):
        print(f"{side:12} {values.min():9.1f} {np.median(values):9.1f} {values.max():9.1f}")
    ours, stock = milliseconds
    print(f"lerobot_jax / lerobot: {np.median(ours / stock):.2f} of its time (median over turns)")
    return None


def _take_turns(commands: Sequence[Sequence[str]], rounds: int, count: int) -> list[np.ndarray]:
    """Start the processes; give the milliseconds of one repetition, for each turn of each process."""
    processes = []
    for command in commands:
        process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        assert process.stdin is not None
        assert process.stdout is not None
        if process.stdout.readline() != "ready\n":
            raise SystemExit(f"{command[0]} did not start: see above")
        processes.append((process, process.stdin, process.stdout))
    milliseconds: list[list[float]] = [[] for _ in processes]
    for _ in range(rounds):
        for (_, questions, answers), values in zip(processes, milliseconds, strict=True):
            questions.write(f"{count}\n")
            questions.flush()
            values.append(float(answers.readline()) / count * 1e3)
    for process, _, _ in processes:
        process.communicate()
    return [np.array(values) for values in milliseconds]


def _serve(make_work: MakeWork, name: str, batch_size: int, options: dict[str, Any]) -> None:
    """Read how often to do the work, write how long it took, until the input ends."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what a library prints must not get between the answers
    options = {key: tuple(value) if isinstance(value, list) else value for key, value in options.items()}
    run = make_work(name, batch_size, **options)
    run(3)
    print("ready", file=answers, flush=True)
    for line in sys.stdin:
        start = time.perf_counter()
        run(int(line))
        print(time.perf_counter() - start, file=answers, flush=True)
