"""Roll a policy out in a simulated environment: success rate with its interval, rewards, videos.

    python -m lerobot_jax.eval --policy.path=outputs/act_pusht/checkpoints/last/pretrained_model \
        --env.type=pusht --eval.n_episodes=50

Mirrors `lerobot.scripts.lerobot_eval`, with two differences. An environment starts its next episode as soon as it
is free, so nothing is computed and thrown away; and an episode depends on its seed only, so the result is the same
at any `eval.batch_size`.
"""

import dataclasses
import datetime
import math
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from absl import logging

from lerobot_jax.compilation import keep_compiled_programs
from lerobot_jax.config import EnvConfig, EvalConfig, option_values, parse, with_mentioned_parts
from lerobot_jax.data.video import write_video
from lerobot_jax.errors import InputError, reported_on_one_line
from lerobot_jax.features import TASK
from lerobot_jax.files import write_json
from lerobot_jax.logs import setup_logging
from lerobot_jax.policies.base import find_policy, load_config, load_policy
from lerobot_jax.policies.config import PolicyConfig
from lerobot_jax.progress import progress_bar
from lerobot_jax.rollout import Runner
from lerobot_jax.rtc_queue import check_delay

EVAL_INFO_NAME = "eval_info.json"


@dataclasses.dataclass(frozen=True)
class EvalPipelineConfig:
    """What to evaluate, where and how."""

    policy: PolicyConfig | None = None
    """The policy, given as --policy.path=FOLDER_OR_HUB_NAME; its settings can be overridden."""
    env: EnvConfig = dataclasses.field(default_factory=lambda: EnvConfig(type="pusht"))
    eval: EvalConfig = dataclasses.field(default_factory=EvalConfig)
    seed: int = 1000
    """The first episode's seed; the next ones follow."""
    output_dir: str | None = None
    """Where videos and eval_info.json go; None: outputs/eval/<date>/<time>_<env>_<policy>."""


@dataclasses.dataclass
class Episode:
    """One episode while it runs, and its result."""

    number: int
    seed: int
    fps: int  # steps a second
    length: int = 0
    sum_reward: float = 0.0
    max_reward: float = -math.inf
    success: bool = False
    steps_to_success: int | None = None
    best_info: dict[str, float] = dataclasses.field(default_factory=dict)
    # The actions, and where the agent was: at first and after each of them.
    commands: list[np.ndarray] = dataclasses.field(default_factory=list)
    positions: list[np.ndarray] = dataclasses.field(default_factory=list)
    frames: list[np.ndarray] = dataclasses.field(default_factory=list)
    video_path: str | None = None


def evaluate(
    runner: Runner,
    env: EnvConfig,
    config: EvalConfig,
    *,
    seed: int,
    output_dir: Path,
    should_stop: Callable[[], bool] = lambda: False,
) -> dict[str, Any] | None:
    """Run episodes with seeds `seed`, `seed` + 1, ...; return eval_info.json's content, None when stopped.

    Args and errors are those of `run_episodes`.
    """
    start = time.monotonic()
    episodes = run_episodes(runner, env, config, seed=seed, output_dir=output_dir, should_stop=should_stop)
    if episodes is None:
        return None
    info = summarize(str(env.type), episodes, time.monotonic() - start, runner.inference_delay)
    info["overall"]["chunk_latency_p95_s"] = runner.latency.p95()
    return info


def run_episodes(
    runner: Runner,
    env: EnvConfig,
    config: EvalConfig,
    *,
    seed: int,
    output_dir: Path,
    should_stop: Callable[[], bool] = lambda: False,
    title: str = "evaluating",
) -> list[Episode] | None:
    """Run episodes with seeds `seed`, `seed` + 1, ...; return them in this order, None when stopped.

    Args:
        runner: the policy, with `config.num_envs` slots.
        env: the environment.
        config: how many episodes, how many at a time, how many videos.
        seed: of the first episode.
        output_dir: where `videos/` go.
        should_stop: asked at every step.
        title: of the progress bar.

    Raises:
        InputError: when the environment does not fit the policy.
    """
    from lerobot_jax.envs.vector import make_vector_env, observation_type

    obs_type = observation_type(env, runner.policy.config.input_features)
    envs = make_vector_env(env, obs_type, config.num_envs, config.use_async_envs)
    try:
        return _run_episodes(runner, envs, config, seed, output_dir, should_stop, title)
    finally:
        envs.close()


def _run_episodes(
    runner: Runner,
    envs: Any,
    config: EvalConfig,
    seed: int,
    output_dir: Path,
    should_stop: Callable[[], bool],
    title: str,
) -> list[Episode] | None:
    from lerobot_jax.envs.pusht import INFO_POSITION
    from lerobot_jax.envs.vector import task_texts

    num_envs, fps = envs.num_envs, envs.metadata.get("render_fps", 10)
    waiting = [Episode(i, seed + i, fps) for i in reversed(range(config.n_episodes))]
    done: list[Episode] = []
    running: list[Episode | None] = [None] * num_envs
    resets = np.ones(num_envs, bool)  # which environments are to begin an episode
    observation: Any = None
    task: dict[str, list[str]] = {}
    with progress_bar(title, config.n_episodes, "episode") as bar:
        while len(done) < config.n_episodes:
            if should_stop():
                return None
            if resets.any():
                for i in np.flatnonzero(resets):
                    running[i] = waiting.pop() if waiting else None
                    if (episode := running[i]) is not None:
                        runner.reset(int(i), episode.number)
                # An environment without an episode left is kept going, since all are stepped together.
                seeds = [seed if episode is None else episode.seed for episode in running]
                observation, info = envs.reset(seed=seeds, options={"reset_mask": resets})
                for i in np.flatnonzero(resets):
                    if (episode := running[i]) is not None:
                        episode.positions.append(info[INFO_POSITION][i])
                if runner.policy.preprocessor.has_text:
                    task = {TASK: task_texts(envs)}
                _record(envs, running, config, resets)
            active = [i for i, episode in enumerate(running) if episode is not None]
            actions = runner.select_action({**observation, **task}, active)
            observation, rewards, terminated, truncated, info = envs.step(actions)
            resets = terminated | truncated
            _record(envs, running, config, ~np.zeros(num_envs, bool))
            for i in active:
                episode = running[i]
                assert episode is not None
                shown = {key: value[i] for key, value in info.items()}
                _add_step(episode, actions[i], float(rewards[i]), shown)
                if resets[i]:
                    _save_video(episode, output_dir)
                    done.append(episode)
                    bar.set_postfix_str(f"success {np.mean([e.success for e in done]):.0%}", refresh=False)
                    bar.update()
    return sorted(done, key=lambda episode: episode.number)


def _add_step(episode: Episode, action: np.ndarray, reward: float, info: Mapping[str, Any]) -> None:
    from lerobot_jax.envs.pusht import INFO_METRICS, INFO_POSITION

    episode.length += 1
    episode.commands.append(action)
    episode.positions.append(info[INFO_POSITION])
    episode.sum_reward += reward
    episode.max_reward = max(episode.max_reward, reward)
    if info.get("is_success", False) and not episode.success:
        episode.success, episode.steps_to_success = True, episode.length
    for name in INFO_METRICS:
        if name in info:
            episode.best_info[name] = max(episode.best_info.get(name, -math.inf), float(info[name]))


def _record(envs: Any, running: Sequence[Episode | None], config: EvalConfig, chosen: np.ndarray) -> None:
    """Draw the environments whose episodes become videos."""
    wanted = [
        i
        for i, e in enumerate(running)
        if chosen[i] and e is not None and e.number < config.max_episodes_rendered
    ]
    if not wanted:
        return
    # Environments in other processes can only be drawn all at once.
    pictures = {i: envs.envs[i].render() for i in wanted} if hasattr(envs, "envs") else envs.call("render")
    for i in wanted:
        episode = running[i]
        assert episode is not None
        episode.frames.append(pictures[i])


def _save_video(episode: Episode, output_dir: Path) -> None:
    if episode.frames:
        path = output_dir / "videos" / f"eval_episode_{episode.number}.mp4"
        write_video(path, episode.frames, episode.fps)
        episode.video_path = str(path)
        episode.frames = []


def summarize(
    group: str, episodes: Sequence[Episode], seconds: float, inference_delay: int = 0
) -> dict[str, Any]:
    """Give eval_info.json's content: LeRobot's fields, and beside them intervals, lengths, seeds, the delay."""
    videos = [episode.video_path for episode in episodes if episode.video_path is not None]
    metrics: dict[str, Any] = {
        "sum_rewards": [episode.sum_reward for episode in episodes],
        "max_rewards": [episode.max_reward for episode in episodes],
        "successes": [episode.success for episode in episodes],
        "video_paths": videos,
        "predicted_video_paths": [],
        "seeds": [episode.seed for episode in episodes],
        "lengths": [episode.length for episode in episodes],
    }
    for name in episodes[0].best_info:
        metrics[f"max_{name}"] = [episode.best_info[name] for episode in episodes]
    num_successes = sum(metrics["successes"])
    overall: dict[str, Any] = {
        "avg_sum_reward": float(np.mean(metrics["sum_rewards"])),
        "avg_max_reward": float(np.mean(metrics["max_rewards"])),
        "pc_success": 100 * num_successes / len(episodes),
        "pc_success_interval": [100 * bound for bound in wilson_interval(num_successes, len(episodes))],
        "n_episodes": len(episodes),
        "avg_length": float(np.mean(metrics["lengths"])),
        "inference_delay": inference_delay,
    }
    overall |= {f"avg_max_{name}": float(np.mean(metrics[f"max_{name}"])) for name in episodes[0].best_info}
    times = {"eval_s": seconds, "eval_ep_s": seconds / len(episodes)}
    paths = {"video_paths": videos, "predicted_video_paths": []}
    return {
        "per_task": [{"task_group": group, "task_id": 0, "metrics": metrics}],
        "per_group": {group: overall | paths},
        "overall": overall | times | paths,
    }


def wilson_interval(successes: int, trials: int) -> tuple[float, float]:
    """Give the 95 % confidence interval of a success probability (Wilson, 1927)."""
    from scipy import stats  # takes half a second

    low, high = stats.binomtest(successes, trials).proportion_ci(method="wilson")
    return float(low), float(high)


def check_environment(policy: PolicyConfig, env: EnvConfig) -> None:
    """Raise `InputError` unless the environment takes the policy's action, shows and says what it needs."""
    from lerobot_jax.envs.vector import make_vector_env, observation_type, task_texts

    envs = make_vector_env(env, observation_type(env, policy.input_features), 1, use_async_envs=False)
    shown, taken = sorted(envs.single_observation_space.keys()), envs.single_action_space.shape  # type: ignore
    if policy.text_steps:
        task_texts(envs)
    envs.close()
    if policy.action_feature.shape != taken:
        raise InputError(
            f"the policy's action has shape {policy.action_feature.shape}, env.type={env.type} takes {taken}"
        )
    missing = [key for key in policy.needed_inputs(shown) if key not in shown]
    if missing:
        raise InputError(f"the policy needs {missing}, env.type={env.type} shows only {shown}")


def describe(info: Mapping[str, Any]) -> str:
    """Say an evaluation's result on one line."""
    overall = info["overall"]
    low, high = overall["pc_success_interval"]
    extra = "".join(
        f", mean {name.removeprefix('avg_').replace('_', ' ')} {overall[name]:.3f}"
        for name in overall
        if name.startswith("avg_max_") and name != "avg_max_reward"
    )
    return (
        f"{overall['n_episodes']} episodes: success {overall['pc_success']:.1f} % (95 %: {low:.1f} to {high:.1f}), "
        f"mean max reward {overall['avg_max_reward']:.3f}, mean sum of rewards {overall['avg_sum_reward']:.1f}"
        f"{extra}, mean length {overall['avg_length']:.0f} steps"
    )


def load_eval_config(argv: Sequence[str]) -> tuple[str, EvalPipelineConfig]:
    """Parse the command line; `--policy.path` is taken first because it says which settings a policy has."""
    path = next(iter(option_values(argv, "--policy.path")), None)
    wants_help = bool({"-h", "--help"} & set(argv))
    if path is None and not wants_help:
        raise InputError("--policy.path=FOLDER_OR_HUB_NAME is missing, see --help")
    default = EvalPipelineConfig()
    if path is not None:
        policy = with_mentioned_parts(load_config(find_policy(path)), "--policy", argv)
        default = dataclasses.replace(default, policy=policy)
    others = [a for a in argv if a not in ("--policy.path", path, f"--policy.path={path}")]
    config = parse(EvalPipelineConfig, default, others, "lerobot_jax.eval", __doc__ or "")
    return path or "", config


def main(argv: Sequence[str]) -> None:
    keep_compiled_programs()
    path, config = load_eval_config(argv)
    assert config.policy is not None
    if config.env.type is None:
        raise InputError("--env.type is missing, e.g. --env.type=pusht")
    check_delay(config.policy, config.eval.inference_delay)
    policy = load_policy(path, config=config.policy)
    stamp = f"{datetime.datetime.now():%Y-%m-%d/%H-%M-%S}"
    folder = Path(config.output_dir or f"outputs/eval/{stamp}_{config.env.type}_{config.policy.type}")
    check_environment(policy.config, config.env)
    runner = policy.make_runner(config.eval.num_envs, config.seed, config.eval.inference_delay)
    runner.compile()
    info = evaluate(runner, config.env, config.eval, seed=config.seed, output_dir=folder)
    assert info is not None
    write_json(info, folder / EVAL_INFO_NAME, indent=2)
    logging.info("%s", describe(info))
    logging.info("written to %s", folder)


if __name__ == "__main__":
    setup_logging()
    with reported_on_one_line():
        main(sys.argv[1:])
