"""The numbers of a comparison, as compare.json has them: of each policy, of each pair."""

from collections.abc import Sequence
from dataclasses import asdict
from itertools import combinations
from typing import Any

import numpy as np

from lerobot_jax.comparison import statistics
from lerobot_jax.comparison.motion import measure_motion
from lerobot_jax.eval import Episode

Results = dict[str, Any]

AVERAGED = ("steps_to_success", "path_length", "agent_acceleration", "command_acceleration")


def choose_score(episodes: Sequence[Sequence[Episode]]) -> str:
    """Give the name of the score: what the environment tells besides the reward (Push-T: coverage), or that."""
    return next(iter(episodes[0][0].best_info), "reward")


def summarize_episodes(episodes: Sequence[Episode], score: str) -> Results:
    """Give a policy's means with their intervals, and what they come from, episode by episode."""
    rows: list[Results] = [
        {
            "seed": episode.seed,
            "success": episode.success,
            # The simulator's areas vary by rounding errors, which must not decide who is better.
            "max_score": round(episode.best_info.get(score, episode.max_reward), 9),
            "max_reward": round(episode.max_reward, 9),
            "sum_reward": round(episode.sum_reward, 9),
            "length": episode.length,
            "steps_to_success": episode.steps_to_success,
        }
        | measure_motion(episode)
        for episode in episodes
    ]
    num_successes = sum(episode.success for episode in episodes)
    scores = np.array([row["max_score"] for row in rows])
    success = {
        "count": num_successes,
        "rate": num_successes / len(rows),
        "interval": statistics.wilson_interval(num_successes, len(rows)),
    }
    max_score = {"mean": float(scores.mean()), "interval": statistics.mean_interval(scores)}
    means = {name: _mean([row[name] for row in rows if row[name] is not None]) for name in AVERAGED}
    return {"success": success, "max_score": max_score, **means, "episodes": rows}


def compare_pairs(policies: Sequence[Results]) -> Results:
    """Compare each two policies by success, by score, and by steps where both succeed."""
    success, score, steps = [], [], []
    for a, b in combinations(policies, 2):
        names = a["name"], b["name"]
        success.append(
            statistics.compare_successes(*names, *(_column(policy, "success") for policy in (a, b)))
        )
        score.append(statistics.compare_scores(*names, *(_column(policy, "max_score") for policy in (a, b))))
        steps.append({"a": a["name"], "b": b["name"]} | compare_steps(a["episodes"], b["episodes"]))
    return {
        "success_differences": [asdict(pair) for pair in statistics.decide(success)],
        "score_differences": [asdict(pair) for pair in statistics.decide(score)],
        "steps_differences": steps,
    }


def compare_steps(a: Sequence[Results], b: Sequence[Results]) -> Results:
    """Tell how many steps more the first policy took, in the episodes that both of them solved."""
    more = [
        row["steps_to_success"] - other["steps_to_success"]
        for row, other in zip(a, b, strict=True)
        if row["success"] and other["success"]
    ]
    return {"n": len(more), "difference": _mean(more)}


def _column(policy: Results, name: str) -> np.ndarray:
    return np.array([row[name] for row in policy["episodes"]])


def _mean(values: Sequence[float]) -> float | None:
    return float(np.mean(values)) if len(values) else None
