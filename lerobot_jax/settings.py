"""Settings from JSON files: are they known, and of the types that a dataclass wants?"""

import difflib
import types
import typing
from collections.abc import Mapping, Sequence
from typing import Any

from lerobot_jax.errors import InputError


def check_settings(values: Mapping[str, Any], wanted: Mapping[str, Any]) -> None:
    """Raise `InputError` naming a setting that is unknown or has a value of the wrong type.

    Args:
        values: name -> value.
        wanted: name -> type annotation.
    """
    for name, value in values.items():
        if name not in wanted:
            close = difflib.get_close_matches(name, wanted, 1)
            hint = (
                f"the nearest known is '{close[0]}'" if close else f"known are {', '.join(wanted) or 'none'}"
            )
            raise InputError(f"unknown setting '{name}'; {hint}")
        if not has_type(value, wanted[name]):
            raise InputError(f"{name} must be of type {_name(wanted[name])}, it is {value!r}")


def has_type(value: Any, wanted: Any) -> bool:
    """Tell whether a value fits a type annotation; an int is a float, a bool is no number."""
    kind, parts = typing.get_origin(wanted), typing.get_args(wanted)
    if wanted is Any:
        return True
    if kind in (typing.Union, types.UnionType):
        return any(has_type(value, part) for part in parts)
    if kind is typing.Literal:
        return value in parts
    if kind in (Sequence, list, tuple):
        items = parts[:1] if kind is not tuple or parts[1:] == (...,) else parts
        fits = isinstance(value, list | tuple) and (len(items) == 1 or len(value) == len(items))
        return fits and all(has_type(x, items[i if len(items) > 1 else 0]) for i, x in enumerate(value))
    if kind in (Mapping, dict):
        is_map = isinstance(value, Mapping)
        return is_map and all(has_type(k, parts[0]) and has_type(v, parts[1]) for k, v in value.items())
    if wanted in (int, float):
        return isinstance(value, int if wanted is int else int | float) and not isinstance(value, bool)
    return isinstance(value, wanted)


def _name(wanted: Any) -> str:
    name = wanted.__name__ if isinstance(wanted, type) else str(wanted)
    return name.replace("collections.abc.", "").replace("typing.", "")
