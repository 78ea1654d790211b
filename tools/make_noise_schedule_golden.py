"""Record what the schedulers of diffusers give, for tests/nn/golden/noise_schedule.npz.

    $LEROBOT_PYTHON tools/make_noise_schedule_golden.py

`sample`, `noise` (b, chunk, act), `step_noise` (steps, b, chunk, act) and `timestep` (b) are the same for all. For
each configuration in CONFIGS, by its number: `N/betas`, `N/alphas_cumprod`, `N/timesteps`, `N/noisy` (the sample
after `timestep` steps of noise) and `N/sampled` (step, b, chunk, act): what sampling from `noise` goes through when
the model predicts sin(3 x) / 2 + t / 100.
"""

import itertools
import json
from pathlib import Path

import numpy as np
import torch  # pyright: ignore[reportMissingImports]
from diffusers.schedulers import (  # pyright: ignore[reportMissingImports]
    DDIMScheduler,
    DDPMScheduler,
    scheduling_ddpm,
)

OUT = Path(__file__).resolve().parent.parent / "tests" / "nn" / "golden" / "noise_schedule.npz"
SETTINGS = ("kind", "beta_schedule", "prediction_type", "clip_sample", "num_train_timesteps", "num_steps")
CONFIGS = [
    dict(zip(SETTINGS, (kind, schedule, predicted, clips, *steps), strict=True))
    for (kind, schedule), predicted, clips, steps in itertools.product(
        [
            *itertools.product(("DDPM", "DDIM"), ("linear", "scaled_linear", "squaredcos_cap_v2")),
            ("DDPM", "sigmoid"),
            ("DDPM", "laplace"),
        ],
        ("epsilon", "sample"),
        (True, False),
        ((100, 10), (25, 7), (6, 6)),  # trained with, sampled with
    )
]


def main() -> None:
    rng = np.random.default_rng(0)
    sample, noise = rng.normal(size=(2, 2, 3, 2)).astype(np.float32)
    step_noise = rng.normal(size=(9, *noise.shape)).astype(np.float32)
    timestep = np.array([1, 5])
    arrays = {"sample": sample, "noise": noise, "step_noise": step_noise, "timestep": timestep}
    arrays["configs"] = np.array(json.dumps(CONFIGS))
    for i, config in enumerate(CONFIGS):
        settings = {k: v for k, v in config.items() if k not in ("kind", "num_steps")}
        scheduler = (DDPMScheduler if config["kind"] == "DDPM" else DDIMScheduler)(
            beta_start=0.0002, beta_end=0.03, clip_sample_range=1.5, **settings
        )
        noisy = scheduler.add_noise(*map(torch.from_numpy, (sample, noise, timestep)))
        scheduler.set_timesteps(config["num_steps"])
        remaining = iter(torch.from_numpy(step_noise))
        scheduling_ddpm.randn_tensor = lambda *args, remaining=remaining, **kwargs: next(remaining)
        x, steps = torch.from_numpy(noise), []
        for t in scheduler.timesteps:
            x = scheduler.step(torch.sin(3 * x) / 2 + t / 100, t, x).prev_sample
            steps.append(x.numpy())
        arrays |= {
            f"{i}/betas": scheduler.betas.numpy(),
            f"{i}/alphas_cumprod": scheduler.alphas_cumprod.numpy(),
            f"{i}/timesteps": scheduler.timesteps.numpy(),
            f"{i}/noisy": noisy.numpy(),
            f"{i}/sampled": np.stack(steps),
        }
    OUT.parent.mkdir(exist_ok=True)
    np.savez_compressed(OUT, allow_pickle=False, **arrays)


if __name__ == "__main__":
    main()
