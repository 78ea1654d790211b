"""Compare policies on the same episodes: which one suits my data?

    python -m lerobot_jax.compare outputs/act_pusht outputs/diffusion_pusht --eval.n_episodes=100

Each RUN is a run's folder (its last checkpoint), a checkpoint's folder, a pretrained_model folder, or a name on
the Hub. All policies run the same episodes of the environment, begun from the same seeds, so they are compared
episode by episode: successes, the largest coverage, the steps it took, how smoothly the agent moved. Then they
take turns to show how fast they act. This is written:

    compare.md      in plain words which policy is better, or that nobody can tell yet; and the tables
    compare.png     the same as a figure
    compare.mp4     the first episodes side by side (--eval.max_episodes_rendered, at most 10)
    compare.json    all numbers, also of each episode
    NAME/           each policy's eval_info.json and videos

The same command gives the same numbers, except for times.
"""

import dataclasses
import datetime
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import tyro
from absl import logging

from lerobot_jax.comparison import figure, latency, report, video
from lerobot_jax.comparison.conclusion import conclude
from lerobot_jax.comparison.results import Results, choose_score, compare_pairs, summarize_episodes
from lerobot_jax.comparison.runs import check_contestants, find_contestants
from lerobot_jax.compilation import keep_compiled_programs
from lerobot_jax.config import EnvConfig, EvalConfig, parse
from lerobot_jax.errors import InputError, reported_on_one_line
from lerobot_jax.eval import EVAL_INFO_NAME, Episode, describe, run_episodes, summarize
from lerobot_jax.files import write_json
from lerobot_jax.logs import setup_logging
from lerobot_jax.policies.base import FunctionalPolicy


@dataclasses.dataclass(frozen=True)
class CompareConfig:
    """Which policies to compare, and how."""

    runs: Annotated[tuple[str, ...], tyro.conf.Positional, tyro.conf.arg(metavar="RUN RUN ...")] = ()
    """Two or more run folders, checkpoints, pretrained_model folders or names on the Hub."""
    names: tuple[str, ...] = ()
    """What to call them, a name for each RUN, given after the RUNs; by default they are called as their folders."""
    env: EnvConfig = dataclasses.field(default_factory=lambda: EnvConfig(type="pusht"))
    eval: EvalConfig = dataclasses.field(default_factory=lambda: EvalConfig(max_episodes_rendered=6))
    seed: int = 1000
    """The first episode's seed; the next ones follow."""
    denoising_steps: tuple[int, ...] = (5, 10, 20)
    """Measure the latency with these numbers of denoising steps too, where a policy has such a choice."""
    latency_rounds: int = 100
    """How many times the latency is measured; 0: not at all."""
    output_dir: str | None = None
    """Where to write; None: outputs/compare_<date>_<time>."""

    def __post_init__(self):
        if any(steps < 1 for steps in self.denoising_steps):
            raise ValueError(f"denoising_steps must be at least 1, not {self.denoising_steps}")
        if self.latency_rounds < 0:
            raise ValueError(f"latency_rounds must not be negative, it is {self.latency_rounds}")


def main(argv: Sequence[str]) -> None:
    keep_compiled_programs()
    # Everything that can be wrong with the input is checked before the first episode.
    config = parse(CompareConfig, CompareConfig(), argv, "lerobot_jax.compare", __doc__ or "")
    if config.env.type is None:
        raise InputError("--env.type is missing, e.g. --env.type=pusht")
    contestants = find_contestants(config.runs, config.names)
    check_contestants(contestants, config.env, config.eval.inference_delay)
    folder = Path(config.output_dir or f"outputs/compare_{datetime.datetime.now():%Y-%m-%d_%H-%M-%S}")
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise InputError(f"{folder} is in use already; choose another folder with --output_dir=...")
    policies = {contestant.name: contestant.load() for contestant in contestants}

    episodes = [evaluate(name, policy, config, folder / name) for name, policy in policies.items()]
    score = choose_score(episodes)
    results: Results = {
        "env": dataclasses.asdict(config.env),
        "seed": config.seed,
        "n_episodes": config.eval.n_episodes,
        "inference_delay": config.eval.inference_delay,
        "fps": episodes[0][0].fps,
        "score": score,
        "policies": [
            contestant.describe(policies[contestant.name]) | summarize_episodes(of_one, score)
            for contestant, of_one in zip(contestants, episodes, strict=True)
        ],
    }
    results |= compare_pairs(results["policies"])
    results |= {"machine": latency.describe_machine(), "latency_rounds": config.latency_rounds, "latency": []}
    if config.latency_rounds:
        variants = [
            variant
            for name, policy in policies.items()
            for variant in latency.make_variants(
                name, policy, config.env, config.seed, config.denoising_steps
            )
        ]
        results["latency"] = latency.measure(variants, config.latency_rounds)
    results["conclusion"] = conclude(results)

    write_json(results, folder / "compare.json", indent=2)
    figure.draw(results, folder / "compare.png")
    has_video = config.eval.max_episodes_rendered > 0
    if has_video:
        video.write_grid(results, episodes, folder / "compare.mp4")
    (folder / "compare.md").write_text(report.write(results, has_video=has_video), encoding="utf-8")
    for sentence in results["conclusion"]:
        logging.info("%s", sentence.replace("**", ""))
    logging.info("written to %s", folder)


def evaluate(name: str, policy: FunctionalPolicy, config: CompareConfig, folder: Path) -> list[Episode]:
    """Run a policy's episodes; write its eval_info.json and videos."""
    start = time.monotonic()
    runner = policy.make_runner(config.eval.num_envs, config.seed, config.eval.inference_delay)
    episodes = run_episodes(
        runner, config.env, config.eval, seed=config.seed, output_dir=folder, title=f"evaluating {name}"
    )
    assert episodes is not None
    info = summarize(str(config.env.type), episodes, time.monotonic() - start, runner.inference_delay)
    write_json(info, folder / EVAL_INFO_NAME, indent=2)
    logging.info("%s: %s", name, describe(info))
    return episodes


if __name__ == "__main__":
    setup_logging()
    with reported_on_one_line():
        main(sys.argv[1:])
