"""Time the same work in lerobot_jax and in stock LeRobot, in turns, so that both see the same machine.

Each side is a process of its own: lerobot_jax in this Python, stock LeRobot in that of `--lerobot_python`.
"""

import argparse
import json
import sys
from collections.abc import Callable
from typing import Any

import numpy as np
from turns import Program, serve, take_turns

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
        settings = {
            key: tuple(value) if isinstance(value, list) else value for key, value in settings.items()
        }
        return serve(lambda: work[args.serve](args.policy, args.batch_size, **settings))
    if not args.lerobot_python:
        parser.error("--lerobot_python is needed: the Python of an environment with lerobot==0.6.1")

    pythons = {"lerobot_jax": sys.executable, "lerobot": args.lerobot_python}
    arguments = [
        f"--policy={args.policy}",
        f"--batch_size={args.batch_size}",
        f"--options={json.dumps(args.options)}",
    ]
    commands = [[pythons[side], script.__file__, f"--serve={side}", *arguments] for side in SIDES]
    milliseconds = take_turns([[Program(command)] for command in commands], args.rounds, args.steps)
    print(f"{args.policy} {what}, batch {args.batch_size}, one 96x96 camera, {settings or 'default sizes'}")
    print(
        f"{'':12} {'min':>9} {'median':>9} {'max':>9}   ms a {what}, {args.rounds} turns of {args.steps} {what}s"
    )
    for side, values in zip(SIDES, milliseconds, strict=True):
        print(f"{side:12} {values.min():9.1f} {np.median(values):9.1f} {values.max():9.1f}")
    ours, stock = milliseconds
    print(f"lerobot_jax / lerobot: {np.median(ours / stock):.2f} of its time (median over turns)")
    return None
