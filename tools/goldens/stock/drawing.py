"""Weights, statistics and inputs: each a function of its name and the seed."""

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from lerobot.configs import FeatureType
from torch import Tensor, nn

from lerobot_jax.errors import InputError
from tests.goldens import initial_value, random_generator

from .. import of_policy

INIT_SCALE = 1.0
BATCH_SIZE = 3
PADDED_STEPS = [0, 2, 1]  # at the end of each sample's actions
PICTURES = 3  # a camera shows so many different pictures in turn: more would only make the folders larger

Arrays = dict[str, np.ndarray]


def set_weights(policy: nn.Module, name: str, seed: int) -> dict[str, str]:
    """Give every parameter and every statistic of a normalization its value; tell of which kind each is."""
    kinds = {}
    for path, module in policy.named_modules():
        tensors = dict(module.named_parameters(recurse=False))
        if "Norm" in type(module).__name__:  # other buffers are constants of the architecture
            tensors |= {k: v for k, v in module.named_buffers(recurse=False) if v.is_floating_point()}
        for key, tensor in tensors.items():
            full = f"{path}.{key}"
            kinds[full] = of_policy(name, initial_kind)(module, key, tensor)
            value = initial_value(kinds[full], full, list(tensor.shape), seed, INIT_SCALE)
            tensor.data.copy_(torch.from_numpy(value))
    return kinds


def initial_kind(module: nn.Module, key: str, tensor: Tensor) -> str:
    """Tell which kind of `tests.goldens.initial_value` suits a tensor of a module."""
    if key in ("running_mean", "running_var"):
        return key
    if key.endswith("bias"):
        return "bias"
    if "Norm" in type(module).__name__ and key == "weight":
        return "norm_weight"
    if isinstance(module, nn.Embedding):
        return "embed"
    if tensor.ndim > 1:
        return "weight"
    raise InputError(f"no rule says which values '{key}' of a {type(module).__name__} should have")


def draw_statistics(key: str, shape: tuple[int, ...], seed: int, constant: int | None) -> Arrays:
    """Draw a feature's statistics as datasets have them; `constant` is a dimension that never moves."""
    rng = random_generator(f"statistics/{key}", seed)
    if len(shape) == 3:
        shape = (shape[0], 1, 1)
        mean, std = rng.uniform(0.3, 0.7, shape), rng.uniform(0.1, 0.4, shape)
        low, high = np.zeros(shape), np.ones(shape)
    else:
        mean, std = rng.normal(size=shape), rng.uniform(0.3, 1.3, shape)
        if constant is not None:
            std[constant] = 0
        low, high = mean - rng.uniform(2, 3, shape) * std, mean + rng.uniform(2, 3, shape) * std
    stats = {"mean": mean, "std": std, "min": low, "max": high, "q50": mean}
    for percent in (1, 10):
        margin = (0.01 + percent / 100) * (high - low)
        stats |= {f"q{percent:02}": low + margin, f"q{100 - percent}": high - margin}
    return {k: v.astype(np.float32) for k, v in stats.items()} | {"count": np.array([1000])}


def draw_feature(
    name: str, shape: tuple[int, ...], stats: Arrays, lead: tuple[int, ...], seed: int
) -> np.ndarray:
    """Draw values of a feature as they occur in a dataset; images are uint8."""
    rng = random_generator(name, seed)
    if len(shape) == 3:
        return rng.integers(0, 256, (*lead, *shape), dtype=np.uint8)
    noise = rng.standard_normal((*lead, *shape), dtype=np.float32)
    return np.clip(stats["mean"] + stats["std"] * noise, stats["min"], stats["max"])


def draw_batch(config: Any, stats: Mapping[str, Arrays], seed: int) -> Arrays:
    """Draw a training batch: windows as the policy asks for them, some of the actions padded."""
    window = config.observation_delta_indices
    lead = (BATCH_SIZE,) if window is None else (BATCH_SIZE, len(window))
    batch = {}
    for key, feature in config.input_features.items():
        # One moment's pictures are those of the first observation: equal arrays are stored once.
        name = f"0/{key}" if feature.type == FeatureType.VISUAL else f"batch/{key}"
        batch[key] = draw_feature(name, feature.shape, stats[key], lead, seed)
    steps = len(config.action_delta_indices)
    for key, feature in config.output_features.items():
        batch[key] = draw_feature(f"batch/{key}", feature.shape, stats[key], (BATCH_SIZE, steps), seed)
    padded = np.minimum(PADDED_STEPS, steps - 1)
    batch["action_is_pad"] = np.arange(steps) >= steps - padded[:, None]
    return batch


def draw_observation(config: Any, stats: Mapping[str, Arrays], step: int, seed: int) -> Arrays:
    """Draw what an environment shows at a step."""
    observation = {}
    for key, feature in config.input_features.items():
        moment = step % PICTURES if feature.type == FeatureType.VISUAL else step
        observation[key] = draw_feature(f"{moment}/{key}", feature.shape, stats[key], (BATCH_SIZE,), seed)
    return observation


def to_tensors(values: Mapping[str, Any]) -> dict[str, Any]:
    """Give arrays to torch; uint8 images become float, in 0..1. What is no array stays as it is."""
    tensors = {}
    for key, value in values.items():
        if isinstance(value, np.ndarray):
            value = value / np.float32(255) if value.dtype == np.uint8 else value.copy()
            value = torch.from_numpy(value)
        tensors[key] = value
    return tensors
