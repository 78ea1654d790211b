"""Read and write JSON files, with errors that name the file."""

import json
import os
from pathlib import Path
from typing import Any

from lerobot_jax.errors import InputError


def read_json(path: Path) -> Any:
    """Read a JSON file; raise `InputError` naming it when it is missing or damaged."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise InputError(f"{path}: no such file") from None
    except (ValueError, RecursionError) as error:  # also numbers of thousands of digits, endless nesting
        raise InputError(f"{path}: not valid JSON ({error})") from None


def write_json(data: Any, path: Path, indent: int = 4) -> None:
    """Write a JSON file, indented as LeRobot does; it appears whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.partial")
    partial.write_text(json.dumps(data, indent=indent, ensure_ascii=False), encoding="utf-8")
    os.replace(partial, path)
