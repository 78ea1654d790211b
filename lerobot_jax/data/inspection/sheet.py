"""A picture of an episode: what its cameras see, and what its numbers do over time."""

import textwrap
from collections.abc import Mapping
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from lerobot_jax.data.dataset import LeRobotDataset
from lerobot_jax.features import ACTION, OBS_STATE, REWARD, SUCCESS, TASK

WIDTH = 15.0  # inches
STATE_COLOR, ACTION_COLOR, RESULT_COLOR = "#30638e", "#d1495b", "#3c7d4e"
PANELS_PER_ROW = 4
PANEL_HEIGHT = 1.75


def draw_episode(dataset: LeRobotDataset, num_frames: int = 8) -> Figure:
    """Draw a dataset that was opened with one episode.

    On top a row of evenly spaced frames for each camera; below a panel for each dimension of the state and the
    action, together where they have the same name, and for reward and success where the dataset has them.
    """
    times = dataset.columns["timestamp"]
    shown = np.unique(np.linspace(0, len(dataset) - 1, min(num_frames, len(dataset))).round().astype(int))
    panels = _panels(dataset)
    num_columns = min(PANELS_PER_ROW, max(2, len(panels)))
    num_rows = -(-len(panels) // num_columns)
    heights = [
        WIDTH / num_frames * camera.shape[0] / camera.shape[1] + 0.1 for camera in dataset.cameras.values()
    ]
    parts = [sum(heights) + 0.35] * bool(heights) + [PANEL_HEIGHT * num_rows + 0.3] * bool(panels)
    title = _title(dataset)
    figure = Figure(figsize=(WIDTH, sum(parts) + 0.25 * (title.count("\n") + 1)), layout="constrained")
    figure.suptitle(title, fontsize=12, x=0.01, ha="left")
    places = iter(figure.subfigures(len(parts), 1, height_ratios=parts, squeeze=False)[:, 0])
    if heights:
        grid = next(places).subplots(len(heights), num_frames, height_ratios=heights, squeeze=False)
        for row, key in zip(grid, dataset.cameras, strict=True):
            _draw_frames(row, key, dataset.read(shown, [key])[key])
        for ax, time in zip(grid[0], times[shown], strict=False):
            ax.set_title(f"{time:.2f} s", fontsize=10)
    if panels:
        grid = next(places).subplots(num_rows, num_columns, squeeze=False, sharex=True).reshape(-1)
        for ax, (name, curves) in zip(grid, panels.items(), strict=False):
            _draw_curves(ax, name, times, curves)
        for ax in grid[len(panels) :]:
            ax.set_axis_off()
        for ax in grid[max(0, len(panels) - num_columns) : len(panels)]:
            ax.set_xlabel("time, s", fontsize=9)
            ax.tick_params(labelbottom=True)
    return figure


def feature_names(key: str, feature: Mapping[str, Any]) -> list[str]:
    """Name each value of a feature: as info.json does, else by the feature's last word and a number."""
    num_values = int(np.prod(feature["shape"]))
    names = feature.get("names")
    if isinstance(names, dict):  # {"motors": [...]}
        names = [name for group in names.values() if isinstance(group, list) for name in group]
    if names is not None and len(names) == num_values:
        return [str(name) for name in names]
    word = key.rpartition(".")[2]
    return [word] if num_values == 1 else [f"{word} {i}" for i in range(num_values)]


def _title(dataset: LeRobotDataset) -> str:
    index = int(dataset.columns["episode_index"][0])
    length, fps = len(dataset), dataset.fps
    tasks = dict.fromkeys(dataset.read(np.arange(length), [TASK])[TASK])
    first = f"{dataset.repo_id}: episode {index} of {dataset.meta.total_episodes}, {length} frames, "
    first += f"{length / fps:.1f} s at {fps:g} fps"
    return "\n".join([first, *(line for task in tasks for line in textwrap.wrap(task, 150))])


def _panels(dataset: LeRobotDataset) -> dict[str, dict[str, np.ndarray]]:
    """Group the curves: panel -> feature -> values over time."""
    panels: dict[str, dict[str, np.ndarray]] = {}
    for key in (OBS_STATE, ACTION, REWARD, SUCCESS):
        if key in dataset.columns:
            values = dataset.columns[key].reshape(len(dataset), -1)
            for name, curve in zip(feature_names(key, dataset.features[key]), values.T, strict=True):
                panels.setdefault(name, {})[key] = curve
    return panels


def _draw_frames(axes: np.ndarray, key: str, frames: np.ndarray) -> None:
    for ax in axes:
        ax.set_axis_off()
    for ax, frame in zip(axes, frames, strict=False):
        ax.set_axis_on()
        ax.imshow(frame)
        ax.set_xticks([])
        ax.set_yticks([])
        for side in ax.spines.values():
            side.set_visible(False)
    name = key.removeprefix("observation.images.").removeprefix("observation.")
    axes[0].set_ylabel(textwrap.fill(name, 18), fontsize=10)


def _draw_curves(ax: Axes, name: str, times: np.ndarray, curves: Mapping[str, np.ndarray]) -> None:
    colors = {OBS_STATE: STATE_COLOR, ACTION: ACTION_COLOR}
    for key, curve in curves.items():
        color = colors.get(key, RESULT_COLOR)
        label = {OBS_STATE: "state", ACTION: "action"}.get(key)
        if curve.dtype == bool:
            # One frame is too narrow to be seen.
            name += f": from {times[curve.argmax()]:.2f} s" if curve.any() else ": never"
            ax.fill_between(times, curve.astype(float), step="post", color=color, alpha=0.3, lw=0)
            ax.step(times, curve.astype(float), where="post", color=color, lw=1.4)
            ax.set_ylim(-0.05, 1.05)
            ax.set_yticks([0, 1], ["no", "yes"])
        else:
            ax.plot(times, curve, color=color, lw=1.4, marker="o" if len(times) < 3 else None, label=label)
            ax.yaxis.set_major_locator(MaxNLocator(4))
    if any(key in colors for key in curves):
        ax.legend(fontsize=8, frameon=False, loc="best", ncols=2, handlelength=1.2)
    ax.set_title(name, fontsize=10)
    ax.set_xlim(times[0], times[-1] if len(times) > 1 else times[0] + 1)
    ax.tick_params(labelsize=8, labelbottom=False)
    ax.grid(alpha=0.25)
    for side in ("top", "right"):
        ax.spines[side].set_visible(False)
