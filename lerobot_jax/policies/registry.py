"""Finds a policy's package by its type: those that are here, modules by their dotted name, and plugins."""

import functools
import importlib
import importlib.metadata
import pkgutil
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lerobot_jax.errors import InputError
from lerobot_jax.policies.config import PolicyConfig

if TYPE_CHECKING:
    from lerobot_jax.policies.base import Policy


def policy_class(name: str) -> "type[Policy]":
    """Find a policy by its type, as written in config.json."""
    return _policy_module(name).Policy


def config_class(name: str) -> type[PolicyConfig]:
    """Find a policy's settings class by its type."""
    return _policy_module(name).Config


@functools.cache
def _policy_module(name: str) -> Any:
    """Import the package of a policy type: `lerobot_jax.policies.<name>`, `name` itself if dotted, or a plugin.

    A plugin is an installed distribution `lerobot_policy_*` whose package offers `Config` and `Policy`. Plugins of
    stock LeRobot have the same prefix, so one that is none of ours, or cannot be imported here, is passed over.

    Raises:
        InputError: telling which policies there are, and what each plugin is instead.
    """
    if "." in name:
        return importlib.import_module(name)
    builtin = [m.name for m in pkgutil.iter_modules([str(Path(__file__).parent)]) if m.ispkg]
    if name in builtin:
        return importlib.import_module(f"lerobot_jax.policies.{name}")
    others = []
    names = {str(d.metadata["Name"]).replace("-", "_") for d in importlib.metadata.distributions()}
    plugins = {plugin for plugin in names if plugin.startswith("lerobot_policy_")}
    for plugin in sorted(plugins, key=lambda plugin: (plugin != f"lerobot_policy_{name}", plugin)):
        try:
            module = importlib.import_module(plugin)
        except Exception as error:
            others.append(f"{plugin} cannot be imported ({type(error).__name__}: {error})")
            continue
        if not hasattr(module, "Config") or not hasattr(module, "Policy"):
            others.append(f"{plugin} has no Config and Policy")
        elif (kind := getattr(module.Config, "type", None)) == name:
            return module
        else:
            others.append(f"{plugin} is of type '{kind}'")
    known = f"lerobot_jax has {', '.join(builtin)}; of the installed plugins, "
    raise InputError(f"no policy of type '{name}': {known}{'; '.join(others) or 'there is none'}")
