"""Reader of the folders in tests/golden: what stock LeRobot computed for given weights, inputs and noise.

A folder holds `model/` (what LeRobot's save_pretrained wrote), `batch.safetensors` (inputs and every random draw),
`expected.safetensors` (`CASE/...`) and `meta.json`.
"""

import json
import math
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import safetensors.numpy

ROOT = Path(__file__).parent / "golden"
HUB = ROOT / "hub"  # laid out as the Hub's cache, with small models that stand for large ones
CLIP = "tests/clip-tiny"


class Golden:
    """One recorded policy."""

    def __init__(self, path: Path):
        self.path = path
        self.meta: dict[str, Any] = json.loads((path / "meta.json").read_text())
        self.batch = _load(path / "batch.safetensors")
        self.expected = _load(path / "expected.safetensors")
        for name, source in self.meta["dedup"].items():
            for arrays in (self.batch, self.expected):
                if source in arrays:
                    arrays[name] = arrays[source]

    def inputs(self, prefix: str) -> dict[str, Any]:
        """Give the entries under a prefix (`raw/`, `in/`, `obs/0/`, ...)."""
        arrays = {k.removeprefix(prefix): v for k, v in self.batch.items() if k.startswith(prefix)}
        strings = {k.removeprefix(prefix): v for k, v in self.meta["strings"].items() if k.startswith(prefix)}
        return arrays | strings

    def draws(self, case: str) -> list[np.ndarray]:
        """Give the random tensors of a case in the order in which LeRobot drew them."""
        return [self.batch[k] for k in sorted(self.batch) if k.startswith(f"noise/{case}/")]

    def tolerance(self, key: str) -> float:
        """Tell how far an output may be off: 1e-4 of its scale, or what rounding the weights once more does."""
        moved, scale = self.meta["noise_floor"].get(key, (0.0, 0.0))
        return max(1e-4 * scale, 3 * moved)

    def stored_or_initial_weights(self) -> dict[str, np.ndarray]:
        """Give the weights; where they are not stored, they follow from names and seed."""
        path = self.path / "model" / "model.safetensors"
        if path.exists():
            return safetensors.numpy.load_file(path)
        meta = self.meta
        return {
            name: initial_value(kind, name, meta["param_shapes"][name], meta["seed"], meta["init_scale"])
            for name, kind in meta["init_kinds"].items()
        }


def initial_value(kind: str, name: str, shape: list[int], seed: int, scale: float) -> np.ndarray:
    """Give the value that a parameter has in every golden, by its name."""
    noise = random_generator(name, seed).standard_normal(tuple(shape), dtype=np.float32)
    fan_in = max(1, math.prod(shape[1:])) if len(shape) > 1 else max(1, shape[0])
    values = {
        "norm_weight": 1.0 + 0.2 * noise,
        "bias": 0.1 * noise,
        "running_mean": 0.2 * noise,
        "running_var": 0.5 + 0.5 * np.abs(noise),
        "embed": 0.5 * scale * noise,
        "weight": (1.2 * scale / math.sqrt(fan_in)) * noise,
    }
    return values[kind].astype(np.float32)


def random_generator(name: str, seed: int) -> np.random.Generator:
    """Give the source of everything that is drawn under a name."""
    return np.random.Generator(np.random.Philox(key=zlib.crc32(name.encode()) + (seed << 32)))


def _load(path: Path) -> dict[str, np.ndarray]:
    """Read a file; uint8 images, marked `#u8`, stand for value / 255."""
    arrays = safetensors.numpy.load_file(path)
    return {
        k.removesuffix("#u8"): v.astype(np.float32) / np.float32(255) if k.endswith("#u8") else v
        for k, v in arrays.items()
    }
