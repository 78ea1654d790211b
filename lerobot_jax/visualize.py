"""Pictures of a run and of what a policy predicts.

    python -m lerobot_jax.visualize --run=outputs/act_pusht
    python -m lerobot_jax.visualize --policy.path=outputs/act_pusht/checkpoints/last/pretrained_model

The first draws a run's curves (`curves.png`); the second draws predicted over recorded action chunks on samples
of a dataset (`action_chunks.png`).
"""

import dataclasses
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import matplotlib as mpl
import numpy as np
from absl import logging
from jaxtyping import Float
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from lerobot_jax.checkpoint import TRAIN_CONFIG_NAME
from lerobot_jax.config import DatasetConfig, option_values, parse
from lerobot_jax.data.dataset import LeRobotDataset
from lerobot_jax.data.metadata import LeRobotDatasetMetadata
from lerobot_jax.data.windows import policy_delta_timestamps
from lerobot_jax.errors import InputError, reported_on_one_line
from lerobot_jax.features import ACTION, TASK
from lerobot_jax.files import read_json
from lerobot_jax.logs import setup_logging
from lerobot_jax.metrics import METRICS_NAME, read_metrics
from lerobot_jax.policies.base import find_policy, load_policy

CURVES_NAME = "curves.png"
CHUNKS_NAME = "action_chunks.png"
PREDICTED, RECORDED = "#d1495b", "#30638e"


@dataclasses.dataclass(frozen=True)
class VisualizeConfig:
    """What to draw: a run's curves (`run`), or a policy's predictions on a dataset (--policy.path)."""

    run: str | None = None
    """A run's folder."""
    dataset: DatasetConfig = dataclasses.field(default_factory=DatasetConfig)
    """With --policy.path, the default is what the policy was trained on."""
    num_samples: int = 6
    """How many samples to draw."""
    seed: int = 0
    """Which samples."""
    output: str | None = None
    """The picture; None: in the run's or the policy's folder."""


def plot_curves(run_dir: Path, output: Path | None = None) -> Path | None:
    """Draw losses, evaluations, gradients and speed over the steps of a run; return the picture's path.

    Of a run of several seeds, it draws the curve of each, and their mean.
    """
    folders = sorted(run_dir.glob("seed_*"), key=lambda folder: (len(folder.name), folder.name)) or [run_dir]
    logs = [log for folder in folders if (log := read_metrics(folder / METRICS_NAME))]
    logged = {name for log in logs for record in log for name in record}
    of_datasets = sorted(name for name in logged if name.startswith(("loss/", "eval_loss/")))
    panels = [
        (title, [name for name in names if name in logged], top)
        for title, names, top in (
            ("loss", ("loss", "eval_loss", *of_datasets), None),
            ("reward", ("avg_max_reward", "avg_max_coverage"), 1.0),
            ("success, %", ("pc_success",), 100.0),
            ("gradient norm", ("grad_norm",), None),
            ("samples per second", ("samples_per_s",), None),
        )
        if logged & {*names}
    ]
    if not panels:
        return None
    figure = Figure(figsize=(4.2 * len(panels), 3.2), layout="constrained")
    axes = np.atleast_1d(figure.subplots(1, len(panels)))
    last_step = max(log[-1]["step"] for log in logs)
    for ax, (title, names, top) in zip(axes, panels, strict=True):
        for i, name in enumerate(names):
            _plot_metric(ax, logs, name, f"C{i}")
        _style(ax, title, "step")
        ax.set_xlim(0, last_step * 1.05)
        if title == "loss":
            ax.set_yscale("log")
        else:
            ax.set_ylim(0, None if top is None else top * 1.05)
        if len(names) > 1 or len(logs) > 1:
            ax.legend(frameon=False)
    path = output or run_dir / CURVES_NAME
    figure.savefig(path, dpi=110)
    return path


def _plot_metric(ax: Axes, logs: Sequence[Sequence[dict[str, Any]]], name: str, color: str) -> None:
    """Draw a metric of a run; of several, thin curves and their mean where all have it."""
    curves = [{record["step"]: record[name] for record in log if name in record} for log in logs]
    steps = sorted(set.intersection(*(set(curve) for curve in curves)))
    means = [np.mean([curve[step] for curve in curves]) for step in steps]
    marker = "o" if len(steps) < 12 else None
    label = name if len(logs) == 1 else f"{name}, mean of {len(logs)} seeds"
    if len(logs) > 1:
        for curve in curves:
            ax.plot([*curve], [*curve.values()], marker=marker, ms=2, color=color, lw=0.8, alpha=0.4)
    ax.plot(steps, means, marker=marker, ms=4, color=color, label=label)


def plot_chunks(
    recorded: Float[np.ndarray, "n chunk act"],
    predicted: Float[np.ndarray, "n chunk act"],
    is_pad: np.ndarray,
    labels: Sequence[str],
    names: Sequence[str],
    output: Path,
) -> None:
    """Draw recorded and predicted actions: one row a sample, one column an action dimension.

    Args:
        recorded: what was recorded, in the dataset's units.
        predicted: what the policy gives.
        is_pad: (n, chunk), steps after the episode's end, which are not drawn.
        labels: of the samples.
        names: of the action dimensions.
        output: the picture's path.
    """
    n, _, dims = recorded.shape
    figure = Figure(figsize=(3.2 * dims + 0.6, 1.9 * n + 0.8), layout="constrained")
    axes = np.array(figure.subplots(n, dims, squeeze=False))
    for row in range(n):
        steps = np.flatnonzero(~is_pad[row])
        error = np.abs(recorded[row, steps] - predicted[row, steps]).mean()
        for column in range(dims):
            ax = axes[row, column]
            ax.plot(steps, recorded[row, steps, column], color=RECORDED, lw=2, label="recorded")
            ax.plot(steps, predicted[row, steps, column], color=PREDICTED, lw=1.5, label="predicted")
            _style(ax, names[column] if row == 0 else "", "step of the chunk" if row == n - 1 else "")
        axes[row, 0].set_ylabel(f"{labels[row]}\nmean error {error:.3g}", fontsize=8)
    axes[0, 0].legend(frameon=False, fontsize=8)
    output.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(output, dpi=110)


def trained_on(policy_folder: Path) -> DatasetConfig:
    """Tell what a policy was trained on, from the train_config.json beside it (ours or LeRobot's)."""
    path = policy_folder / TRAIN_CONFIG_NAME
    if not path.exists():
        return DatasetConfig()
    source = read_json(path)["dataset"]
    episodes = source.get("episodes")
    return DatasetConfig(
        repo_id=source["repo_id"],
        root=source.get("root"),
        episodes=None if episodes is None else tuple(episodes),
        revision=source.get("revision"),
    )


def predict_samples(policy_folder: Path, config: VisualizeConfig) -> dict[str, Any]:
    """Predict chunks on random frames of a dataset; give what `plot_chunks` draws, without the output."""
    policy = load_policy(policy_folder)
    source = config.dataset
    if source.root is None and source.repo_id.startswith("builtin/"):
        from lerobot_jax.envs.demonstrations import make_builtin_dataset

        make_builtin_dataset(source.repo_id)
    meta = LeRobotDatasetMetadata.find(source.repo_id, source.root, source.revision)
    windows = policy_delta_timestamps(policy.config, meta.features, meta.fps)
    dataset = LeRobotDataset(
        source.repo_id,
        source.root,
        source.episodes,
        windows,
        revision=source.revision,
        cameras=[
            key for key in policy.config.needed_inputs(meta.features) if key in policy.config.image_features
        ],
    )
    rows = np.sort(np.random.default_rng(config.seed).choice(len(dataset), config.num_samples, replace=False))
    batch = dataset.read(rows)
    needed = policy.config.needed_inputs(batch)
    missing = [key for key in needed if key not in batch]
    if missing:
        raise InputError(f"the policy needs {missing}, {source.repo_id} has {sorted(dataset.features)}")

    def predict(params, buffers, observation, key):
        actions = policy.sample_actions(params, buffers, policy.preprocess(observation), key)
        return policy.postprocess(actions, observation)

    observation = {key: batch[key] for key in needed}
    if policy.preprocessor.has_text:
        observation = policy.tokenize(observation | {TASK: batch[TASK]})
    predicted = jax.jit(predict)(policy.params, policy.buffers, observation, jax.random.key(config.seed))
    dims = batch[ACTION].shape[-1]
    trained, sampled = policy.config.action_delta_indices, policy.config.sampled_delta_indices
    steps = np.isin(trained or [0], sampled or [0])
    return {
        "recorded": batch[ACTION][:, steps],
        "predicted": np.asarray(predicted),
        "is_pad": batch[f"{ACTION}_is_pad"][:, steps],
        "labels": [
            f"episode {e}, frame {f}"
            for e, f in zip(batch["episode_index"], batch["frame_index"], strict=True)
        ],
        "names": _action_names(meta.features[ACTION], dims),
    }


def main(argv: Sequence[str]) -> None:
    policy_path = next(iter(option_values(argv, "--policy.path")), None)
    others = [a for a in argv if a not in ("--policy.path", policy_path, f"--policy.path={policy_path}")]
    policy_folder = None if policy_path is None else find_policy(policy_path)
    default = (
        VisualizeConfig() if policy_folder is None else VisualizeConfig(dataset=trained_on(policy_folder))
    )
    config = parse(VisualizeConfig, default, others, "lerobot_jax.visualize", __doc__ or "")
    if (config.run is None) == (policy_folder is None):
        raise InputError("give either --run=RUN_FOLDER or --policy.path=FOLDER_OR_HUB_NAME, see --help")
    mpl.use("agg")
    if config.run is not None:
        path = plot_curves(Path(config.run), Path(config.output) if config.output else None)
        if path is None:
            raise InputError(f"{Path(config.run) / METRICS_NAME}: no metrics to draw")
    else:
        assert policy_path is not None
        assert policy_folder is not None
        folder = policy_folder if Path(policy_path).is_dir() else Path()  # not in the Hub's cache
        path = Path(config.output) if config.output else folder / CHUNKS_NAME
        plot_chunks(**predict_samples(policy_folder, config), output=path)
    logging.info("drawn: %s", path)


def _style(ax: Axes, title: str, xlabel: str) -> None:
    ax.set_title(title, fontsize=10)
    ax.set_xlabel(xlabel, fontsize=8)
    ax.tick_params(labelsize=8)
    ax.grid(alpha=0.25)
    for side in ("top", "right"):
        ax.spines[side].set_visible(False)


def _action_names(feature: dict[str, Any], dims: int) -> list[str]:
    names = feature.get("names")
    if isinstance(names, dict):  # {"motors": [names]}, or {name: place}
        groups = list(names.values())
        names = groups[0] if groups and isinstance(groups[0], list) else list(names)
    return list(names) if names is not None and len(names) == dims else [f"{ACTION} {i}" for i in range(dims)]


if __name__ == "__main__":
    setup_logging()
    with reported_on_one_line():
        main(sys.argv[1:])
