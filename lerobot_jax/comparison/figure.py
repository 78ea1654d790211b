"""compare.png: rates and scores with their intervals, differences of pairs, speed, and every single episode."""

import itertools
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import LinearSegmentedColormap
from matplotlib.figure import Figure

Results = Mapping[str, Any]

_COLORS = ("#30638e", "#d1495b", "#e0a030", "#2a9d5c", "#7b5ea7", "#8c6d46", "#4aa5b5", "#555555")
_GRAY = "#9a9a9a"
_SCORES = LinearSegmentedColormap.from_list("scores", ["#f4f1ea", "#cfe0d3", "#2a9d5c"])
_LARGEST_MAP = 60  # episodes for which the map's columns are labelled one by one


def draw(results: Results, path: Path) -> None:
    """Draw the figure."""
    num_rows, num_pairs = len(results["policies"]), len(results["success_differences"])
    row = 0.5 + 0.42 * max(num_rows, num_pairs, 2)
    figure = Figure(figsize=(14, 2 * row + 2.4 + 0.32 * num_rows), layout="constrained")
    figure.get_layout_engine().set(w_pad=0.12, h_pad=0.12)  # type: ignore[union-attr]
    grid = figure.add_gridspec(3, 3, height_ratios=[row, row, 0.8 + 0.32 * num_rows])
    _draw_success(figure.add_subplot(grid[0, 0]), results)
    _draw_scores(figure.add_subplot(grid[1, 0]), results)
    _draw_differences(figure.add_subplot(grid[0, 1]), results["success_differences"], "success, points", 100)
    _draw_differences(
        figure.add_subplot(grid[1, 1]), results["score_differences"], f"mean max {results['score']}", 1
    )
    _draw_solved(figure.add_subplot(grid[0, 2]), results)
    _draw_latency(figure.add_subplot(grid[1, 2]), results)
    _draw_episodes(figure, figure.add_subplot(grid[2, :]), results)
    figure.savefig(path, dpi=110)


def _draw_success(ax: Axes, results: Results) -> None:
    for y, policy in enumerate(results["policies"]):
        rate, (low, high) = policy["success"]["rate"], policy["success"]["interval"]
        _point(ax, y, 100 * rate, 100 * low, 100 * high, _COLORS[y % len(_COLORS)])
        ax.annotate(
            f"{100 * rate:.0f} %", (100 * rate, y), (0, 7), textcoords="offset points", ha="center", size=9
        )
    _style(ax, f"success in {results['n_episodes']} episodes, %")
    _label_rows(ax, [policy["name"] for policy in results["policies"]], _COLORS)
    ax.set_xlim(-4, 104)


def _draw_scores(ax: Axes, results: Results) -> None:
    """Draw the mean of each policy over the cloud of its episodes."""
    spread = np.random.default_rng(0)
    for y, policy in enumerate(results["policies"]):
        color = _COLORS[y % len(_COLORS)]
        values = [row["max_score"] for row in policy["episodes"]]
        places = y + spread.uniform(-0.28, 0.28, len(values))
        ax.scatter(values, places, s=10, color=color, alpha=0.3, linewidths=0)
        mean = policy["max_score"]["mean"]
        low, high = policy["max_score"]["interval"]
        _point(ax, y, mean, low, high, color)
        ax.annotate(f"{mean:.2f}", (mean, y), (0, 7), textcoords="offset points", ha="center", size=9)
    _style(ax, f"max {results['score']} of an episode, and its mean")
    _label_rows(ax, [policy["name"] for policy in results["policies"]], _COLORS)


def _draw_differences(ax: Axes, pairs: Sequence[Mapping[str, Any]], title: str, scale: float) -> None:
    """Draw the difference of each pair; the pairs that the episodes do not tell apart are gray."""
    ax.axvline(0, color="#333333", lw=1)
    for y, pair in enumerate(pairs):
        low, high = pair["interval"]
        color = _GRAY if pair["better"] is None else "#222222"
        _point(ax, y, scale * pair["difference"], scale * low, scale * high, color)
    _style(ax, f"difference in {title} (gray: cannot tell)")
    _label_rows(ax, [f"{pair['a']}\nminus {pair['b']}" for pair in pairs], ["#222222"])
    largest = 1.1 * max(abs(x) for x in ax.get_xlim())
    ax.set_xlim(-largest, largest)


def _draw_solved(ax: Axes, results: Results) -> None:
    """Draw how many episodes are solved within so many steps."""
    last = results["env"]["episode_length"]
    for i, policy in enumerate(results["policies"]):
        steps = sorted(row["steps_to_success"] for row in policy["episodes"] if row["success"])
        solved = 100 * np.arange(len(steps) + 1) / results["n_episodes"]
        ax.step([0, *steps, last], [*solved, solved[-1]], where="post", color=_COLORS[i % len(_COLORS)], lw=2)
    _style(ax, "solved within so many steps, %")
    ax.set_xlim(0, last)
    ax.set_ylim(0, max(10, 1.15 * ax.get_ylim()[1]))


def _draw_latency(ax: Axes, results: Results) -> None:
    """Draw the time of a chunk from p50 (dot) to p99, for each number of denoising steps."""
    if not results["latency"]:
        ax.set_axis_off()
        return
    order = [policy["name"] for policy in results["policies"]]
    colors = [_COLORS[order.index(x["name"]) % len(_COLORS)] for x in results["latency"]]
    labels = []
    for y, (x, color) in enumerate(zip(results["latency"], colors, strict=True)):
        face = color if x["is_configured"] else "white"
        ax.plot([x["p50_ms"], x["p99_ms"]], [y, y], color=color, lw=2, alpha=0.6)
        ax.plot(x["p50_ms"], y, "o", ms=7, color=color, markerfacecolor=face)
        steps = x["denoising_steps"]
        labels.append(x["name"] if steps is None else f"{x['name']}, {steps} steps")
    ax.axvline(1000 / results["fps"], color="#333333", lw=1, ls=":")
    _style(ax, "ms for a chunk, p50 to p99 (dotted: a step)")
    ax.set_xscale("log")
    ax.xaxis.set_major_formatter("{x:g}")
    _label_rows(ax, labels, colors)


def _draw_episodes(figure: Figure, ax: Axes, results: Results) -> None:
    """Draw the score of every policy in every episode, a dot for success; the hardest episodes come last."""
    policies, num = results["policies"], results["n_episodes"]
    scores = np.array([[row["max_score"] for row in policy["episodes"]] for policy in policies])
    success = np.array([[row["success"] for row in policy["episodes"]] for policy in policies])
    order = np.lexsort((-scores.mean(0), -success.sum(0)))
    image = ax.imshow(
        scores[:, order],
        aspect="auto",
        cmap=_SCORES,
        vmin=0,
        vmax=max(1.0, scores.max()),
        interpolation="none",
    )
    rows, columns = np.nonzero(success[:, order])
    ax.scatter(columns, rows, s=14, color="white", linewidths=0)
    ax.set_yticks(range(len(policies)), [policy["name"] for policy in policies], fontsize=9)
    ax.set_yticks(np.arange(0.5, len(policies) - 1), minor=True)
    ax.grid(which="minor", axis="y", color="white", lw=3)
    if num <= _LARGEST_MAP:
        seeds = [str(policies[0]["episodes"][i]["seed"]) for i in order]
        ax.set_xticks(range(num), seeds, fontsize=7, rotation=90)
        ax.set_xlabel("seed", fontsize=9)
    else:
        ax.set_xticks([])
    ax.tick_params(length=0, which="both")
    for side in ax.spines.values():
        side.set_visible(False)
    title = f"max {results['score']} in every episode (white dot: success), the easiest on the left"
    ax.set_title(title, fontsize=10, loc="left")
    bar = figure.colorbar(image, ax=ax, pad=0.01, aspect=12)
    bar.ax.tick_params(labelsize=8)
    bar.outline.set_visible(False)  # type: ignore[operator]


def _point(ax: Axes, y: float, value: float, low: float, high: float, color: str) -> None:
    ax.plot([low, high], [y, y], color=color, lw=2.5, solid_capstyle="round")
    ax.plot(value, y, "o", ms=8, color=color, markeredgecolor="white")


def _label_rows(ax: Axes, labels: Sequence[str], colors: Sequence[str]) -> None:
    ax.set_yticks(range(len(labels)), labels, fontsize=9)
    for text, color in zip(ax.get_yticklabels(), itertools.cycle(colors), strict=False):
        text.set_color(color)
    ax.set_ylim(len(labels) - 0.5, -0.5)
    ax.tick_params(axis="y", length=0)


def _style(ax: Axes, title: str) -> None:
    ax.set_title(title, fontsize=10, loc="left")
    ax.tick_params(labelsize=8)
    ax.grid(axis="x", alpha=0.25)
    ax.set_axisbelow(True)
    for side in ("top", "right", "left"):
        ax.spines[side].set_visible(False)
