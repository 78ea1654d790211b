"""A run's train_config.json back as a recipe: Python that repeats the run."""

import dataclasses
import enum
import json
import types
import typing
from collections.abc import Mapping
from typing import Any

from lerobot_jax.config import TrainConfig, WandBConfig
from lerobot_jax.errors import InputError
from lerobot_jax.hub import is_hub_name
from lerobot_jax.policies.base import config_class


def rebuild_config(settings: Mapping[str, Any]) -> TrainConfig | None:
    """Turn the content of train_config.json back into a config; None if another program or version wrote it."""
    try:
        policy = config_class(settings["policy"]["type"]).from_dict(settings["policy"])
        config = _from_json(TrainConfig, {name: x for name, x in settings.items() if name != "policy"})
        config = dataclasses.replace(config, policy=policy)
    except (InputError, KeyError, TypeError, ValueError, AttributeError):
        return None
    return config if json.loads(json.dumps(config.to_dict())) == settings else None


def _from_json(kind: Any, value: Any) -> Any:
    """Undo what JSON does to a value of some type: dataclasses become objects, tuples lists."""
    parts = [kind, *typing.get_args(kind)]
    if isinstance(value, list):
        sequence = next((part for part in parts if typing.get_origin(part) is tuple), tuple[Any, ...])
        return tuple(_from_json(typing.get_args(sequence)[0], item) for item in value)
    if not isinstance(value, Mapping):
        return value
    kinds = typing.get_args(kind) if isinstance(kind, types.UnionType) else (kind,)
    part = next((each for each in kinds if dataclasses.is_dataclass(each)), None)
    if part is not None:
        hints = typing.get_type_hints(part)
        return typing.cast(type, part)(**{name: _from_json(hints[name], x) for name, x in value.items()})
    return {name: _from_json(parts[-1], item) for name, item in value.items()}


def write_recipe(config: TrainConfig) -> str:
    """Write the recipe that repeats a run, without what belongs to one machine or account."""
    is_local = config.policy.pretrained_path is not None and not is_hub_name(config.policy.pretrained_path)
    policy = dataclasses.replace(
        config.policy,
        push_to_hub=False,
        repo_id=None,
        private=None,
        tags=None,
        license=None,
        pretrained_path="FOLDER" if is_local else config.policy.pretrained_path,
    )
    weighting = config.sample_weighting
    if weighting is not None and weighting.has_local_path:
        weighting = dataclasses.replace(weighting, progress_path="FILE")
    config = dataclasses.replace(
        config,
        policy=policy,
        sample_weighting=weighting,
        dataset=dataclasses.replace(
            config.dataset,
            root=None,
            mixture=tuple(dataclasses.replace(source, root=None) for source in config.dataset.mixture),
        ),
        wandb=WandBConfig(),
        resume=False,
        output_dir=None,
    )
    types: set[type] = {TrainConfig}
    body = _python(config, 1, types)
    imports = []
    for module in sorted({kind.__module__ for kind in types}):
        names = sorted(kind.__name__ for kind in types if kind.__module__ == module)
        imports.append(f"from {module} import {', '.join(names)}")
    return "\n".join([*imports, "", "", 'def get_config(variant=""):', f"    return {body}"])


def _python(value: Any, depth: int, types: set[type]) -> str:
    """Write a value as Python; the types that it names are added to `types`."""
    if isinstance(value, enum.Enum):
        types.add(type(value))
        return f"{type(value).__name__}.{value.name}"
    if dataclasses.is_dataclass(value):
        types.add(type(value))
        chosen = [field.name for field in dataclasses.fields(value) if _differs(field, value)]
        items = [f"{name}={_python(getattr(value, name), depth + 1, types)}" for name in chosen]
        start, end = f"{type(value).__name__}(", ")"
    elif isinstance(value, Mapping):
        items = [f"{_python(k, 0, types)}: {_python(v, depth + 1, types)}" for k, v in value.items()]
        start, end = "{", "}"
    elif isinstance(value, tuple):
        items = [_python(item, depth + 1, types) for item in value]
        start, end = "(", ",)" if len(value) == 1 else ")"
    else:
        return json.dumps(value, ensure_ascii=False) if isinstance(value, str) else repr(value)
    line = start + ", ".join(items) + end
    if len(line) + 4 * depth <= 80 and "\n" not in line:
        return line
    indent = "\n" + "    " * (depth + 1)
    return start + "".join(f"{indent}{item}," for item in items) + "\n" + "    " * depth + end[-1]


def _differs(field: dataclasses.Field, value: Any) -> bool:
    if field.default_factory is not dataclasses.MISSING:
        return getattr(value, field.name) != field.default_factory()
    return getattr(value, field.name) != field.default
