import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lerobot_jax.nn.noise_schedule import NoiseSchedule

# What diffusers gave: tools/make_noise_schedule_golden.py
GOLDEN = dict(np.load(Path(__file__).parent / "golden" / "noise_schedule.npz"))
CONFIGS = list(enumerate(json.loads(str(GOLDEN["configs"]))))


def schedule_of(config: dict) -> NoiseSchedule:
    settings = {key: value for key, value in config.items() if key != "num_steps"}
    return NoiseSchedule(beta_start=0.0002, beta_end=0.03, clip_sample_range=1.5, **settings)


@pytest.mark.parametrize(("i", "config"), CONFIGS)
def test_schedules_are_those_of_diffusers(i: int, config: dict):
    schedule = schedule_of(config)
    np.testing.assert_allclose(schedule.betas, GOLDEN[f"{i}/betas"], rtol=2e-6)
    np.testing.assert_allclose(schedule.alphas_cumprod, GOLDEN[f"{i}/alphas_cumprod"], rtol=2e-5, atol=1e-9)
    np.testing.assert_array_equal(schedule.timesteps(config["num_steps"]), GOLDEN[f"{i}/timesteps"])
    sample, noise = jnp.asarray(GOLDEN["sample"]), jnp.asarray(GOLDEN["noise"])
    noisy = schedule.add_noise(sample, noise, jnp.asarray(GOLDEN["timestep"], jnp.int32))
    np.testing.assert_allclose(noisy, GOLDEN[f"{i}/noisy"], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(("i", "config"), CONFIGS)
def test_sampling_is_that_of_diffusers(i: int, config: dict):
    schedule, num_steps = schedule_of(config), config["num_steps"]
    step_noise = jnp.asarray(GOLDEN["step_noise"])[: schedule.num_step_noises(num_steps)]

    def predict(x: jax.Array, timestep: jax.Array) -> jax.Array:
        return jnp.sin(3 * x) / 2 + timestep / 100

    sampled = schedule.sample(predict, jnp.asarray(GOLDEN["noise"]), step_noise, num_steps)
    expected = GOLDEN[f"{i}/sampled"]
    # What the first steps divide by is nearly 0: that enlarges rounding.
    scale = np.abs(expected).max()
    np.testing.assert_allclose(sampled, expected[-1], rtol=0, atol=1e-4 * scale)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"kind": "PNDM"}, "noise_scheduler_type must be one of DDPM, DDIM, not 'PNDM'"),
        ({"kind": "DDIM", "beta_schedule": "sigmoid"}, "beta_schedule of DDIM must be one of linear"),
        ({"prediction_type": "v_prediction"}, "prediction_type must be epsilon or sample"),
        ({"num_train_timesteps": 0}, "num_train_timesteps must be at least 1"),
        ({"clip_sample_range": 0.0}, "clip_sample_range must be positive"),
    ],
)
def test_impossible_settings_are_refused(settings: dict, message: str):
    with pytest.raises(ValueError, match=message):
        NoiseSchedule(**settings)


def test_no_more_steps_than_were_trained():
    with pytest.raises(
        ValueError, match=r"num_inference_steps must be in 1\.\.num_train_timesteps=100, not 101"
    ):
        NoiseSchedule().timesteps(101)
