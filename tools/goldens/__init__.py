"""What tools/make_golden.py records of each policy: one file a policy; the folder stock/ does the work.

A policy's file is named after the policy's type and holds

    CASES       the names of what is recorded: functions of stock/cases.py
    VARIANTS    name -> Variant: the configurations that are recorded

Where a policy needs something of its own, its file defines a function under the name of the one it replaces: a
case, `set_weights`, `initial_kind`, `draw_batch` or `draw_observation`.
"""

import importlib
import pkgutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import ModuleType
from typing import Any


@dataclass(frozen=True)
class Variant:
    """One configuration of a policy."""

    about: str
    """What this one covers that the others do not; shown by --list."""
    inputs: Mapping[str, tuple[int, ...]]
    """Observation key -> shape; images channel-first. The key tells the feature's type."""
    action: int
    """Size of the action."""
    settings: Mapping[str, Any]
    """Fields of the policy's config.json, as LeRobot writes them."""
    constant: tuple[str, int] | None = None
    """A feature and its dimension that never moves in the dataset: its range and its deviation are 0."""
    store_weights: bool = False
    """Keep model.safetensors; otherwise the weights follow from names and seed, which is smaller."""


def find_policies() -> dict[str, ModuleType]:
    """Give the policies' files in this folder, by policy type; importing them needs no torch."""
    names = sorted(module.name for module in pkgutil.iter_modules(__path__) if not module.ispkg)
    return {name: importlib.import_module(f"{__name__}.{name}") for name in names}


def of_policy(policy: str, function: Callable[..., Any]) -> Callable[..., Any]:
    """Give the function that a policy's file has in the place of `function`, or `function` itself."""
    return getattr(find_policies()[policy], function.__name__, function)
