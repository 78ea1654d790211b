"""Make the Push-T demonstrations that the package ships: the expert's actions, without observations.

    python tools/make_pusht_demonstrations.py

The file holds, for every successful episode in the order of its seed:

- seeds (n,) uint32: `env.reset(seed=seed)` gives the start,
- lengths (n,) int16: control steps, the last one reaches success; add them up as int64,
- actions (sum(lengths), 2) float32, in px.

Stepping gym_pusht/PushT-v0 with them repeats the episodes exactly. The result depends on the arguments only, not on
the number of processes.
"""

import argparse
import functools
import multiprocessing
from pathlib import Path

import numpy as np

from lerobot_jax.envs.demonstrations import DEMONSTRATIONS
from lerobot_jax.envs.pusht import FastPushTEnv
from lerobot_jax.envs.pusht_expert import PushTExpert, run_episode
from lerobot_jax.progress import progress_bar


@functools.cache
def world() -> tuple[FastPushTEnv, PushTExpert]:
    """Make this process's environment and expert."""
    return FastPushTEnv(obs_type="state", render_mode="rgb_array"), PushTExpert()


def demonstrate(seed: int) -> np.ndarray | None:
    """Return the actions (length, 2) of one episode, None if it fails."""
    success, actions = run_episode(*world(), seed)
    return actions if success else None


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--episodes", type=int, default=1100, help="how many seeds to try (default: %(default)s)"
    )
    parser.add_argument(
        "--first_seed",
        type=int,
        default=1_000_000,
        help="far from the seeds that evaluations use, so that these are new to the policy (default: %(default)s)",
    )
    parser.add_argument("--processes", type=int, default=2, help="default: %(default)s")
    parser.add_argument("--output", type=Path, default=DEMONSTRATIONS, help="default: %(default)s")
    args = parser.parse_args()

    seeds = range(args.first_seed, args.first_seed + args.episodes)
    episodes = {}
    context = multiprocessing.get_context("spawn")
    with context.Pool(args.processes) as pool, progress_bar("demonstrating", len(seeds), "episode") as bar:
        for seed, actions in zip(seeds, pool.imap(demonstrate, seeds, chunksize=4), strict=True):
            if actions is not None:
                episodes[seed] = actions
            bar.update()
    if not episodes:
        raise SystemExit("no episode succeeded")
    lengths = np.array([len(actions) for actions in episodes.values()], np.int16)
    np.savez_compressed(
        args.output,
        seeds=np.array(list(episodes), np.uint32),
        lengths=lengths,
        actions=np.concatenate(list(episodes.values())),
    )
    print(
        f"{args.output}: {len(episodes)} of {len(seeds)} episodes succeeded, {lengths.sum(dtype=int)} steps, "
        f"{lengths.mean():.1f} an episode, {args.output.stat().st_size / 1e6:.2f} MB"
    )


if __name__ == "__main__":
    main()
