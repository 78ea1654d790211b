"""Time a train step of several seeds at once against a step of one.

    python benchmarks/seeds.py
    python benchmarks/seeds.py --num_seeds=4 --batch_sizes 8 32

The policy is ACT with the sizes of `configs/act_pusht.py:state`; a step is normalization, forward, backward,
clipping, the optimizer and the average of the weights. The two take turns, so that both see the same machine.
"""

import argparse
import time

import jax
import numpy as np
from act_state import make_program, make_steps


def seconds(run, steps: int) -> float:
    """Give the seconds that a step takes."""
    start = time.perf_counter()
    run(steps)
    return (time.perf_counter() - start) / steps


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--num_seeds", type=int, default=8, help="default: %(default)s")
    parser.add_argument("--batch_sizes", type=int, nargs="+", default=[64, 8], help="default: %(default)s")
    parser.add_argument("--rounds", type=int, default=7, help="turns of each (default: %(default)s)")
    parser.add_argument("--steps", type=int, default=5, help="steps a turn (default: %(default)s)")
    args = parser.parse_args()

    devices = f"{jax.device_count()} {jax.default_backend()} device(s)"
    print(f"ACT of configs/act_pusht.py:state, {devices}, {args.rounds} turns of {args.steps} steps, medians")
    print(
        f"{'batch':>5} {'1 seed, ms':>12} {f'{args.num_seeds} seeds, ms':>12} {'ratio':>7}   ms a seed's step"
    )
    for batch_size in args.batch_sizes:
        runs = [make_steps(make_program(batch_size=batch_size, num_seeds=n)) for n in (1, args.num_seeds)]
        for run in runs:
            run(2)
        turns = 1e3 * np.array([[seconds(run, args.steps) for run in runs] for _ in range(args.rounds)])
        alone, together = np.median(turns, axis=0)
        ratio = np.median(turns[:, 1] / turns[:, 0])
        print(
            f"{batch_size:5d} {alone:12.1f} {together:12.1f} {ratio:7.2f}   "
            f"{alone:.1f} alone, {together / args.num_seeds:.1f} together",
            flush=True,
        )


if __name__ == "__main__":
    main()
