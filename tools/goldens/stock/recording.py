"""Record everything about a policy, and compute a record again."""

import copy
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import lerobot
import numpy as np
import torch
from torch import Tensor, nn

from lerobot_jax.errors import InputError
from tests.goldens import Golden

from .. import Variant, find_policies, of_policy
from . import cases, drawing
from .drawing import Arrays
from .policy import Stock, load_stock, write_model
from .tape import Tape

EPISODE_STEPS = 8
NOISE_TRIALS = 4
ROUNDING = 1e-5  # of an output's scale: what another processor may change

torch.set_num_threads(1)  # the order of sums does not depend on the number of cores


@dataclass
class Record:
    """What a golden folder holds beside its model."""

    batch: Arrays
    expected: Arrays
    meta: dict[str, Any]


def record(policy: str, name: str, variant: Variant, seed: int, folder: Path) -> Record:
    """Write a new policy into a folder, load it from there and run all cases.

    Raises:
        InputError: naming the outputs that are not finite.
    """
    config, stats, weights = write_model(policy, variant, seed, folder / "model")
    inputs = draw_inputs(policy, config, stats, seed)
    stock = load_stock(folder / "model", seed, inputs)
    names = find_policies()[policy].CASES
    runs = {case: cases.run_case(stock, case, seed) for case in names}
    expected = {key: value for outputs, _ in runs.values() for key, value in outputs.items()}
    broken = [key for key, value in expected.items() if not np.isfinite(value).all()]
    if broken:
        raise InputError(f"variant '{name}' in tools/goldens/{policy}.py: LeRobot's {broken} are not finite")
    tapes = {case: tape for case, (_, tape) in runs.items() if tape.draws}
    draws = {f"noise/{case}/{i:03}": x for case, tape in tapes.items() for i, x in enumerate(tape.draws)}
    arrays = {key: value for key, value in inputs.items() if isinstance(value, np.ndarray)}
    gradients = cases.gradient_names(stock.policy)
    meta = {
        "policy": policy,
        "variant": name,
        "seed": seed,
        "cases": list(names),
        "versions": {"lerobot": lerobot.__version__, "torch": torch.__version__},
        "strings": {key: value for key, value in inputs.items() if key not in arrays},
        "tape": {case: tape.descriptions for case, tape in tapes.items()},
        "noise_floor": measure_noise_floor(stock, runs),
        "grad_names": {case: gradients for case in names if f"{case}/grad_head" in expected}
        | {"train_steps_state": cases.state_names(stock.policy)},
        "init_scale": drawing.INIT_SCALE,
        **weights,
    }
    return Record(arrays | preprocessed(stock) | draws, expected, meta)


def differences(golden: Golden) -> list[str]:
    """Compute a recorded folder again, from its files; tell where it differs by more than rounding."""
    meta = golden.meta
    stock = load_stock(golden.path / "model", meta["seed"], golden.batch | meta["strings"])
    actual = preprocessed(stock)
    for case in meta["cases"]:
        # With a seed of its own: noise that is not on the tape shows.
        outputs, tape = cases.run_case(stock, case, meta["seed"] + 1, golden.draws(case))
        actual |= outputs
        if len(tape.draws) != len(golden.draws(case)):
            actual[f"noise/{case}"] = np.array(len(tape.draws))
    recorded = golden.expected | {k: v for k, v in golden.batch.items() if k.startswith(("in/", "obs_in/"))}
    found = [f"{key}: in one of them only" for key in sorted(actual.keys() ^ recorded.keys())]
    for key in sorted(actual.keys() & recorded.keys()):
        one, other = actual[key].astype(np.float64), recorded[key].astype(np.float64)
        limit = max(ROUNDING * np.abs(other).max(initial=0), 3 * meta["noise_floor"].get(key, (0.0,))[0])
        if one.shape != other.shape:
            found.append(f"{key}: shape {one.shape}, recorded {other.shape}")
        elif not (np.abs(one - other) <= limit).all():
            found.append(f"{key}: differs by {np.abs(one - other).max():.2g}, rounding explains {limit:.2g}")
    return found


def draw_inputs(policy: str, config: Any, stats: dict[str, Arrays], seed: int) -> dict[str, Any]:
    """Give a training batch as `raw/KEY` and an episode as `obs/STEP/KEY`."""
    batch = of_policy(policy, drawing.draw_batch)(config, stats, seed)
    inputs = {f"raw/{key}": value for key, value in batch.items()}
    for t in range(EPISODE_STEPS):
        observation = of_policy(policy, drawing.draw_observation)(config, stats, t, seed)
        inputs |= {f"obs/{t}/{key}": value for key, value in observation.items()}
    return inputs


def preprocessed(stock: Stock) -> Arrays:
    """Give what LeRobot's preprocessor makes of the batch (of images the first sample) and of observations."""
    images = stock.policy.config.image_features
    arrays = {f"in/{k}": v[:1] if k in images else v for k, v in stock.batch.items()}
    for t, observation in enumerate(stock.observations):
        values = stock.preprocess(copy.deepcopy(observation))
        arrays |= {f"obs_in/{t}/{k}": v for k, v in values.items() if k not in images}
    return {key: value.numpy() for key, value in arrays.items() if isinstance(value, Tensor)}


def measure_noise_floor(stock: Stock, runs: dict[str, tuple[Arrays, Tape]]) -> dict[str, list[float]]:
    """Give [how far an output moves, its scale] when each weight moves by one ulp and other kernels compute."""
    floats = {
        key: x for key, (outputs, _) in runs.items() for key, x in outputs.items() if x.dtype.kind == "f"
    }
    moves = dict.fromkeys(floats, 0.0)
    for trial in range(NOISE_TRIALS):
        moved = copy.deepcopy(stock)
        _move_weights(moved.policy, torch.Generator().manual_seed(trial))
        for case, (_, tape) in runs.items():
            with torch.backends.mkldnn.flags(enabled=False):
                outputs, _ = cases.run_case(moved, case, 0, tape.draws)
            for key in outputs.keys() & floats.keys():
                moves[key] = max(moves[key], float(np.abs(outputs[key] - floats[key]).max(initial=0)))
    scales = {key: float(np.abs(x).max(initial=0)) for key, x in floats.items()}
    return {key: [float(f"{move:.3g}"), float(f"{scales[key]:.3g}")] for key, move in moves.items()}


@torch.no_grad()
def _move_weights(policy: nn.Module, directions: torch.Generator) -> None:
    """Replace each floating-point number by the next one up or down; 0 is exact, and marks what a mask hides."""
    for value in policy.state_dict().values():
        if value.is_floating_point():
            up = torch.rand(value.shape, generator=directions) < 0.5
            moved = torch.nextafter(value, torch.where(up, torch.inf, -torch.inf))
            value.copy_(torch.where(value == 0, value, moved))
