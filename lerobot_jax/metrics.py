"""A run's metrics: `metrics.jsonl`, one JSON object a line, and Weights & Biases if asked for."""

import hashlib
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lerobot_jax import distributed
from lerobot_jax.config import TrainConfig
from lerobot_jax.errors import InputError

METRICS_NAME = "metrics.jsonl"


class MetricsLog:
    """Appends records to a run's metrics.jsonl. Every record has a "step"."""

    def __init__(self, config: TrainConfig, first_step: int):
        """Open the log; what a resumed run will compute again (records after `first_step`) is dropped.

        Of several processes, the first one writes; those of the others have no records.
        """
        self._wandb, self.records = None, []
        self.path = config.run_dir / METRICS_NAME
        self._metric = config.best_metric or ("avg_max_reward" if config.env.type else "eval_loss")
        if not distributed.is_first():
            return
        self.records = [record for record in read_metrics(self.path) if record["step"] <= first_step]
        partial = self.path.with_suffix(".partial")
        partial.write_text("".join(json.dumps(record) + "\n" for record in self.records))
        os.replace(partial, self.path)
        self._wandb = _start_wandb(config) if config.wandb.enable else None

    def write(self, step: int, values: Mapping[str, float]) -> None:
        if not distributed.is_first():
            return
        record = {"step": step, **{name: float(f"{value:.8g}") for name, value in values.items()}}
        self.records.append(record)
        with self.path.open("a") as file:
            file.write(json.dumps(record) + "\n")
        if self._wandb is not None:
            self._wandb.log(dict(values), step=step)

    def write_scored(self, step: int, values: Mapping[str, float]) -> bool:
        """Write a record; tell whether it is the best so far by the run's metric."""
        earlier = [record[self._metric] for record in self.records if self._metric in record]
        self.write(step, values)
        if self._metric not in values:
            return False
        value = values[self._metric]
        return not earlier or (value < min(earlier) if self._metric == "eval_loss" else value > max(earlier))

    def close(self) -> None:
        if self._wandb is not None:
            self._wandb.finish()


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """Read a metrics.jsonl; a last line that a killed run left incomplete is ignored."""
    if not path.exists():
        return []
    records = []
    for line in path.read_text().splitlines():
        try:
            records.append(json.loads(line))
        except json.JSONDecodeError:
            break
    return records


def import_wandb() -> Any:
    """Import the package `wandb`, or say how to get it."""
    try:
        import wandb
    except ImportError:
        raise InputError("wandb.enable needs the package wandb: pip install 'lerobot_jax[wandb]'") from None
    return wandb


def _start_wandb(config: TrainConfig) -> Any:
    run_id = hashlib.sha256(str(config.run_dir.resolve()).encode()).hexdigest()[:16]
    return import_wandb().init(
        project=config.wandb.project,
        entity=config.wandb.entity,
        notes=config.wandb.notes,
        mode=config.wandb.mode or "online",
        name=config.name,
        dir=str(config.run_dir),
        config=config.to_dict(),
        resume="allow",
        id=run_id,  # so that a resumed run goes on in it
    )
