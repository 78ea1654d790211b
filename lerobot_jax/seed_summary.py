"""What the seeds of a run have in common: the mean, spread and interval of each final metric, in `seeds.json`."""

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import scipy.stats

from lerobot_jax.config import TrainConfig
from lerobot_jax.eval import wilson_interval
from lerobot_jax.files import write_json
from lerobot_jax.metrics import METRICS_NAME, read_metrics

SEEDS_NAME = "seeds.json"
SUCCESS = "pc_success"
# About the run rather than the policies, or the same for all of them.
LEFT_OUT = (
    "step",
    "lr",
    "steps_per_s",
    "samples_per_s",
    "data_wait",
    "eval_s",
    "eval_ep_s",
    "n_episodes",
    "chunk_latency_p95_s",
)


def summarize(runs: Sequence[TrainConfig], folder: Path) -> str:
    """Write seeds.json into the folder of all runs; return the same as a table.

    A metric's values are those of the last step at which all runs have it. `interval` is the 95 % interval of the
    mean over seeds (Student's t). The interval of the success rate is the wider of that and of what the number of
    episodes allows (Wilson's, of all seeds' episodes together), so that seeds which all fail do not look certain.
    """
    logs = [read_metrics(run.run_dir / METRICS_NAME) for run in runs]
    names = dict.fromkeys(name for record in logs[0] for name in record if name not in LEFT_OUT)
    found = {name: values for name in names if (values := _last_values(logs, name)) is not None}
    metrics = {name: _statistics(name, *values) for name, values in found.items()}
    seeds = [run.seed for run in runs]
    write_json({"seeds": seeds, "metrics": metrics}, folder / SEEDS_NAME, indent=2)
    return _table(f"seeds {seeds[0]} to {seeds[-1]}", metrics)


def _last_values(logs: Sequence[Sequence[dict[str, Any]]], name: str) -> tuple[int, list[dict]] | None:
    """Give the last step at which all runs have a metric, and the records there."""
    by_step = [{record["step"]: record for record in log if name in record} for log in logs]
    steps = set.intersection(*(set(records) for records in by_step))
    return (max(steps), [records[max(steps)] for records in by_step]) if steps else None


def _statistics(name: str, step: int, records: Sequence[dict[str, Any]]) -> dict[str, Any]:
    values = [record[name] for record in records]
    mean, std = float(np.mean(values)), float(np.std(values, ddof=1))
    half = float(scipy.stats.t.ppf(0.975, len(values) - 1)) * std / math.sqrt(len(values))
    low, high = mean - half, mean + half
    if name == SUCCESS:
        episodes = [record["n_episodes"] for record in records]
        successes = round(float(np.dot(values, episodes)) / 100)
        bounds = [100 * bound for bound in wilson_interval(successes, int(sum(episodes)))]
        low, high = max(0.0, min(low, bounds[0])), min(100.0, max(high, bounds[1]))
    spread = {"min": min(values), "max": max(values), "interval": [low, high]}
    return {"step": step, "values": values, "mean": mean, "std": std} | spread


def _table(title: str, metrics: dict[str, dict[str, Any]]) -> str:
    width = max([len(title), *map(len, metrics)])
    lines = [f"{title:{width}} {'step':>8} {'mean':>10} {'std':>10} {'min':>10} {'max':>10}   95 % interval"]
    for name, row in metrics.items():
        numbers = " ".join(f"{row[key]:10.4g}" for key in ("mean", "std", "min", "max"))
        low, high = row["interval"]
        lines.append(f"{name:{width}} {row['step']:8d} {numbers}   {low:.4g} to {high:.4g}")
    return "\n".join(lines)
