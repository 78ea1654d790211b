"""How long training stands still to save a checkpoint, beside how long it takes until it is on disk.

    python benchmarks/checkpoint.py

ACT on keypoints, from the recipe's size to a hundred times as many parameters; parameters, moments and the average
of the weights are saved, and the policy for stock LeRobot. While a save is written, training goes on.
"""

import argparse
import tempfile
import time
from pathlib import Path

import jax
import numpy as np
from act_state import make_program

from lerobot_jax import checkpoint
from lerobot_jax.certificate import Certifier
from lerobot_jax.checkpoint_writer import CheckpointWriter

WIDTHS = (256, 512, 1024)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--saves", type=int, default=5, help="of each (default: %(default)s)")
    args = parser.parse_args()
    print(f"{'parameters':>12} {'state, MB':>10} {'stands still, s':>16} {'until on disk, s':>17}")
    for width in WIDTHS:
        with tempfile.TemporaryDirectory() as folder:
            measure(width, args.saves, Path(folder))


def measure(width: int, saves: int, folder: Path) -> None:
    sizes = {"dim_model": width, "dim_feedforward": 4 * width}
    program = make_program(policy=sizes, output_dir=str(folder / "run"), keep_last=1)
    checkpoint.write_train_config(program.config)
    state = program.first_state()
    writer = CheckpointWriter(program.config, program.policy, Certifier(program.policy))
    times = []
    for step in range(saves + 1):
        started = time.perf_counter()
        writer.save(step, state, is_best=False)
        stood_still = time.perf_counter() - started
        writer.wait()
        times.append((stood_still, time.perf_counter() - started))
    stall, total = np.median(times[1:], axis=0)  # the first also compiles
    num_params = sum(x.size for x in jax.tree.leaves(state["params"]))
    megabytes = sum(x.nbytes for x in jax.tree.leaves(state)) / 1e6
    print(f"{num_params:12,} {megabytes:10.0f} {stall:16.2f} {total:17.2f}", flush=True)


if __name__ == "__main__":
    main()
