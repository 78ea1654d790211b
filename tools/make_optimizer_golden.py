"""Record what PyTorch's Adafactor and averages, and diffusers' average give, for tests/golden/optimizers.npz.

    $LEROBOT_PYTHON tools/make_optimizer_golden.py

`adafactor/N/NAME` (step, *shape): the parameters after each step with the N-th of `adafactor/settings`, from
`start/NAME` on with the gradients `gradient/NAME` (step, *shape); the rate of step i is `lr * factors[i]`.
`weights` and `statistics` (step, number): what is averaged; `ema/N` and `swa/N` the averages after each step.
"""

import json
from pathlib import Path

import numpy as np
import torch  # pyright: ignore[reportMissingImports]
from diffusers.training_utils import EMAModel  # pyright: ignore[reportMissingImports]

OUT = Path(__file__).resolve().parent.parent / "tests" / "golden" / "optimizers.npz"
SHAPES = {
    "matrix": (6, 4),
    "vector": (5,),
    "layer_0": (4, 3),
    "layer_1": (4, 3),
    "norm_0": (3,),
    "norm_1": (3,),
}
ADAFACTOR = [
    {"lr": 0.01, "weight_decay": 0.0, "beta2_decay": -0.8},
    {"lr": 0.5, "weight_decay": 0.1, "beta2_decay": -0.5},  # 1 / sqrt(step) is less from step 5 on
]
EMA = [
    {"decay": 0.9, "inv_gamma": 1.0, "power": 2 / 3, "min_decay": 0.0, "update_after_step": 0, "every": 1},
    {"decay": 0.99, "inv_gamma": 2.0, "power": 0.75, "min_decay": 0.3, "update_after_step": 5, "every": 1},
    {"decay": 0.8, "inv_gamma": 1.0, "power": 0.75, "min_decay": 0.0, "update_after_step": 0, "every": 3},
]
SWA = [{"start": 1, "freq": 1}, {"start": 6, "freq": 4}]


def adafactor(settings, start, gradients, factors):
    params = {name: torch.nn.Parameter(torch.from_numpy(value.copy())) for name, value in start.items()}
    optimizer = torch.optim.Adafactor(params.values(), **settings)
    found = {name: [] for name in start}
    for step, factor in enumerate(factors):
        optimizer.param_groups[0]["lr"] = settings["lr"] * float(factor)
        for name, param in params.items():
            param.grad = torch.from_numpy(gradients[name][step])
        optimizer.step()
        for name, param in params.items():
            found[name].append(param.detach().numpy().copy())
    return {name: np.stack(values) for name, values in found.items()}


def ema(settings, weights):
    settings = dict(settings)
    every = settings.pop("every")
    param = torch.nn.Parameter(torch.zeros(weights.shape[1]))
    model, found = EMAModel([param], use_ema_warmup=True, **settings), []
    for step, value in enumerate(weights):
        param.data = torch.from_numpy(value.copy())
        if (step + 1) % every == 0:
            model.step([param])
        found.append(model.shadow_params[0].numpy().copy())
    return np.stack(found)


def swa(settings, weights, statistics):
    """Average as training does that calls `update_parameters` after these steps, and has the weights before."""
    model = torch.nn.Module()
    model.weight = torch.nn.Parameter(torch.zeros(weights.shape[1]))
    model.register_buffer("statistic", torch.zeros(statistics.shape[1]))
    averaged, found = torch.optim.swa_utils.AveragedModel(model, use_buffers=True), []
    for step, values in enumerate(zip(weights, statistics, strict=True), start=1):
        model.weight.data, model.statistic.data = (torch.from_numpy(value.copy()) for value in values)
        since = step - settings["start"]
        if since >= 0 and since % settings["freq"] == 0:
            averaged.update_parameters(model)
        shown = model if since < 0 else averaged.module
        found.append((shown.weight.detach().numpy().copy(), shown.statistic.numpy().copy()))
    weights, statistics = zip(*found, strict=True)
    return np.stack(weights), np.stack(statistics)


def main() -> None:
    rng = np.random.default_rng(0)
    start = {name: rng.normal(size=shape).astype(np.float32) for name, shape in SHAPES.items()}
    start["vector"] *= 1e-4  # smaller than what Adafactor takes for the smallest size
    sizes = np.array([1, 0.01, 3, 1e-3, 1, 0, 10, 1], np.float32)
    gradients = {
        name: (rng.normal(size=(8, *shape)) * sizes.reshape(-1, *[1] * len(shape))).astype(np.float32)
        for name, shape in SHAPES.items()
    }
    factors = np.array([0.0, 0.5, 1, 1, 1, 1, 0.7, 0.4], np.float32)
    weights = np.cumsum(rng.normal(size=(16, 5)), axis=0).astype(np.float32)
    statistics = rng.uniform(size=(16, 3)).astype(np.float32)
    arrays = {"factors": factors, "weights": weights, "statistics": statistics}
    arrays |= {f"start/{name}": value for name, value in start.items()}
    arrays |= {f"gradient/{name}": value for name, value in gradients.items()}
    arrays["adafactor/settings"] = np.array(json.dumps(ADAFACTOR))
    for i, settings in enumerate(ADAFACTOR):
        found = adafactor(settings, start, gradients, factors)
        arrays |= {f"adafactor/{i}/{name}": values for name, values in found.items()}
    arrays["ema/settings"], arrays["swa/settings"] = np.array(json.dumps(EMA)), np.array(json.dumps(SWA))
    for i, settings in enumerate(EMA):
        arrays[f"ema/{i}"] = ema(settings, weights)
    for i, settings in enumerate(SWA):
        arrays[f"swa/{i}/weights"], arrays[f"swa/{i}/statistics"] = swa(settings, weights, statistics)
    np.savez_compressed(OUT, allow_pickle=False, **arrays)


if __name__ == "__main__":
    main()
