"""Stored statistics of a feature beside the exact ones, as a table."""

import dataclasses
from collections.abc import Mapping, Sequence

import numpy as np

from lerobot_jax.data.inspection.description import align
from lerobot_jax.data.statistics import explained

COLUMNS = ("min", "q01", "q10", "q50", "q90", "q99", "max", "mean", "std")
LEGEND = """\
~  LeRobot's approximation: quantiles are averages of the episodes' ones, from histograms; moments are float32
!  wrong: neither the exact value nor what LeRobot computes of this data
-  not stored"""


@dataclasses.dataclass(frozen=True)
class Comparison:
    """The table of a feature, and which of its stored statistics are wrong or missing."""

    lines: list[str]
    wrong: list[str]
    missing: list[str]


def compare_numbers(
    names: Sequence[str],
    exact: Mapping[str, np.ndarray],
    averaged: Mapping[str, np.ndarray],
    stored: Mapping[str, np.ndarray],
) -> Comparison:
    """Compare the statistics of a numeric feature.

    Args:
        names: of its dimensions (the last axis).
        exact: what `exact_statistics` gives.
        averaged: what `averaged_statistics` gives.
        stored: those of the dataset.
    """
    stored = _on_last_axis(stored)
    wrong = [
        name for name in stored if name in exact and not explained(name, stored[name], exact, averaged).all()
    ]
    missing = [name for name in exact if name not in stored]
    rows = [["", "", *COLUMNS]]
    for i, dimension in enumerate(names):
        rows.append([dimension, "exact", *(f"{exact[name][i]:.5g} " for name in COLUMNS)])
        cells, differences = [], []
        for name in COLUMNS:
            if name not in stored:
                cells.append("- ")
                differences.append("")
                continue
            is_explained = explained(name, stored[name], exact, averaged)[i]
            difference = stored[name][i] - exact[name][i]
            is_small = abs(difference) <= 1e-4 * exact["std"][i] + 1e-9
            mark = "!" if not is_explained else " " if is_small else "~"
            cells.append(f"{stored[name][i]:.5g}{mark}")
            differences.append("" if is_small and is_explained else f"{difference:+.3g} ")
        rows.append(["", "stored", *cells])
        if any(differences):
            rows.append(["", "difference", *differences])
    return Comparison(_table(rows), wrong, missing)


def compare_images(stored: Mapping[str, np.ndarray], computed: Mapping[str, np.ndarray] | None) -> list[str]:
    """Show the statistics of a camera's channels, with those computed anew if they were."""
    rows = [["", "", *COLUMNS]]
    for i in range(len(next(iter(stored.values() if stored else (computed or {}).values()), ()))):
        for kind, values in (("computed", computed), ("stored", stored)):
            if values:
                cells = [f"{values[name].reshape(-1)[i]:.5g}" if name in values else "-" for name in COLUMNS]
                rows.append([f"channel {i}", kind, *cells])
    return _table(rows)


def _on_last_axis(stored: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Reduce what v2.1 keeps for every value of a feature to what v3.0 keeps, where that can be done."""
    if all(value.ndim == 1 for value in stored.values()):
        return dict(stored)
    reduced = {"min": np.min, "max": np.max, "mean": np.mean}
    values = {
        n: f(stored[n].reshape(-1, stored[n].shape[-1]), axis=0) for n, f in reduced.items() if n in stored
    }
    return values | {"count": stored["count"]}


def _table(rows: Sequence[Sequence[str]]) -> list[str]:
    """Align words to the left and numbers to the right."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return align(
        [
            [c.ljust(w) if i < 2 else c.rjust(w) for i, (c, w) in enumerate(zip(row, widths, strict=True))]
            for row in rows
        ]
    )
