"""Evaluate a policy whose chunks come late: success against the inference delay, with and without RTC.

    python benchmarks/rtc.py outputs/pi0_pusht/checkpoints/last/pretrained_model
    python benchmarks/rtc.py FOLDER --delays 0 2 4 --guidance lerobot trained --n_episodes 200

Without real-time chunking (naive), a chunk is predicted on its own, and the robot switches to it when it is there;
that works for every policy that predicts chunks. With it, a flow policy predicts the chunk along the old one, in
each of the ways of `policy.rtc_config.guidance`. All see the same episodes. Prints a table (the accelerations are
those of the commands, in units/s²: the smoother the smaller), and draws rtc.png.
"""

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.figure import Figure

from lerobot_jax.comparison.motion import rms_acceleration
from lerobot_jax.compilation import keep_compiled_programs
from lerobot_jax.config import EnvConfig, EvalConfig
from lerobot_jax.errors import reported_on_one_line
from lerobot_jax.eval import check_environment, run_episodes, summarize
from lerobot_jax.policies.base import FunctionalPolicy, load_policy
from lerobot_jax.policies.rtc import RTCConfig
from lerobot_jax.rtc_queue import check_delay

NAIVE = "naive"


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("policy", help="a pretrained_model folder, or a name on the Hub")
    parser.add_argument("--delays", type=int, nargs="+", default=list(range(7)), help="default: %(default)s")
    parser.add_argument(
        "--guidance",
        nargs="*",
        default=["lerobot", "vjp"],
        choices=["lerobot", "vjp", "trained"],
        help="default: %(default)s",
    )
    parser.add_argument(
        "--schedule",
        default="LINEAR",
        choices=["ZEROS", "ONES", "LINEAR", "EXP"],
        help="default: %(default)s",
    )
    parser.add_argument("--execution_horizon", type=int, default=10, help="default: %(default)s")
    parser.add_argument("--n_action_steps", type=int, help="executed of each chunk; default: the policy's")
    parser.add_argument("--n_episodes", type=int, default=50, help="default: %(default)s")
    parser.add_argument("--batch_size", type=int, default=0, help="episodes side by side; default: automatic")
    parser.add_argument("--episode_length", type=int, default=300, help="default: %(default)s")
    parser.add_argument("--seed", type=int, default=1000, help="of the first episode (default: %(default)s)")
    parser.add_argument("--output", type=Path, default=Path("rtc.png"), help="default: %(default)s")
    args = parser.parse_args(argv)
    env = EnvConfig(type="pusht", episode_length=args.episode_length)
    policy = load_policy(args.policy)
    if args.n_action_steps:
        policy = policy.with_settings(n_action_steps=args.n_action_steps)
    ways = make_ways(policy, args.guidance, args.schedule, args.execution_horizon)
    for delay in args.delays:
        check_delay(policy.config, delay)
    check_environment(policy.config, env)
    results = []
    for delay in args.delays:
        config = EvalConfig(args.n_episodes, args.batch_size, True, 0, delay)
        rows = {name: evaluate(way, env, config, args.seed, name) for name, way in ways.items()}
        results.append({"delay": delay, "ways": rows})
    print(write_table(results))
    draw(results, args.output)
    print(f"drawn in {args.output}")


def make_ways(
    policy: FunctionalPolicy, guidances: Sequence[str], schedule: str, execution_horizon: int
) -> dict[str, FunctionalPolicy]:
    """Give the policy without real-time chunking and, if it can, with each guidance."""
    if not hasattr(policy.config, "rtc_config"):
        return {NAIVE: policy}
    ways = {NAIVE: policy.with_settings(rtc_config=None)}
    for guidance in guidances:
        rtc: Any = {
            "guidance": guidance,
            "prefix_attention_schedule": schedule,
            "execution_horizon": execution_horizon,
        }
        ways[guidance] = policy.with_settings(rtc_config=RTCConfig(**rtc))
    return ways


def evaluate(
    policy: FunctionalPolicy, env: EnvConfig, config: EvalConfig, seed: int, name: str
) -> dict[str, Any]:
    """Give eval_info.json's overall numbers, and how jerky the commands are."""
    runner = policy.make_runner(config.num_envs, seed, config.inference_delay)
    runner.compile()
    title = f"{name}, delay {config.inference_delay}"
    episodes = run_episodes(runner, env, config, seed=seed, output_dir=Path(), title=title)
    assert episodes is not None
    overall = summarize(str(env.type), episodes, 0.0, config.inference_delay)["overall"]
    jerkiness = [rms_acceleration(np.stack(e.commands), e.fps) or 0.0 for e in episodes]
    return overall | {"acceleration": float(np.mean(jerkiness))}


def write_table(results: Sequence[dict[str, Any]]) -> str:
    """Write a row for each delay and, for each way, success with its interval, reward and jerkiness."""
    names = list(results[0]["ways"])
    lines = [f"{'delay':>5}" + "".join(f"{name:>16}: success, %   reward   acceleration" for name in names)]
    for row in results:
        line = f"{row['delay']:5d}"
        for name in names:
            found = row["ways"][name]
            low, high = found["pc_success_interval"]
            success = f"{found['pc_success']:.0f} ({low:.0f} to {high:.0f})"
            line += f"{success:>29} {found['avg_max_reward']:8.3f} {found['acceleration']:14.0f}"
        lines.append(line)
    return "\n".join(lines)


def draw(results: Sequence[dict[str, Any]], path: Path) -> None:
    """Draw success and mean max reward against the delay."""
    figure = Figure(figsize=(10, 4), layout="constrained")
    left, right = figure.subplots(1, 2)
    delays = [row["delay"] for row in results]
    for name in results[0]["ways"]:
        rows = [row["ways"][name] for row in results]
        success = np.array([row["pc_success"] for row in rows])
        bounds = np.array([row["pc_success_interval"] for row in rows]).T
        left.errorbar(delays, success, np.abs(bounds - success[None]), marker="o", capsize=3, label=name)
        right.plot(delays, [row["avg_max_reward"] for row in rows], marker="o", label=name)
    left.set_ylabel("success, %")
    left.set_ylim(-4, 104)
    right.set_ylabel("mean max reward")
    for ax in (left, right):
        ax.set_xlabel("inference delay, steps")
        ax.set_xticks(delays)
        ax.spines[["top", "right"]].set_visible(False)
    left.legend(frameon=False)
    figure.savefig(path, dpi=110)


if __name__ == "__main__":
    keep_compiled_programs()
    with reported_on_one_line():
        main()
