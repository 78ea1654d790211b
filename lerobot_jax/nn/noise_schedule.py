"""Diffusion over actions: the noise schedules and samplers DDPM and DDIM, as pure functions.

Mirrors `diffusers.DDPMScheduler` and `diffusers.DDIMScheduler` with the settings that LeRobot leaves to its users;
the others have diffusers' defaults (timesteps "leading", variance "fixed_small", eta 0). Everything is float32.

Papers: "Denoising Diffusion Probabilistic Models" (https://arxiv.org/abs/2006.11239) and "Denoising Diffusion
Implicit Models" (https://arxiv.org/abs/2010.02502).
"""

import dataclasses
import math
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

KINDS = ("DDPM", "DDIM")
BETA_SCHEDULES = ("linear", "scaled_linear", "squaredcos_cap_v2", "sigmoid", "laplace")
PREDICTION_TYPES = ("epsilon", "sample")


@dataclasses.dataclass(frozen=True)
class NoiseSchedule:
    """How noise is added in training and taken away when sampling; the fields are diffusers'."""

    kind: str = "DDPM"
    num_train_timesteps: int = 100
    beta_schedule: str = "squaredcos_cap_v2"
    beta_start: float = 0.0001
    beta_end: float = 0.02
    prediction_type: str = "epsilon"
    clip_sample: bool = True
    clip_sample_range: float = 1.0

    def __post_init__(self):
        kinds = {"DDPM": BETA_SCHEDULES, "DDIM": BETA_SCHEDULES[:3]}
        if self.kind not in kinds:
            raise ValueError(f"noise_scheduler_type must be one of {', '.join(kinds)}, not '{self.kind}'")
        if self.beta_schedule not in kinds[self.kind]:
            known = ", ".join(kinds[self.kind])
            raise ValueError(
                f"beta_schedule of {self.kind} must be one of {known}, not '{self.beta_schedule}'"
            )
        if self.prediction_type not in PREDICTION_TYPES:
            known = " or ".join(PREDICTION_TYPES)
            raise ValueError(f"prediction_type must be {known}, not '{self.prediction_type}'")
        if self.num_train_timesteps < 1:
            raise ValueError(f"num_train_timesteps must be at least 1, not {self.num_train_timesteps}")
        if self.clip_sample and not self.clip_sample_range > 0:
            raise ValueError(f"clip_sample_range must be positive, not {self.clip_sample_range}")

    @property
    def betas(self) -> Float[np.ndarray, " train_steps"]:
        """The share of variance that each step of the forward process adds."""
        num, start, end = self.num_train_timesteps, self.beta_start, self.beta_end
        if self.beta_schedule == "linear":
            return np.linspace(start, end, num).astype(np.float32)
        if self.beta_schedule == "scaled_linear":
            return np.linspace(start**0.5, end**0.5, num).astype(np.float32) ** 2
        if self.beta_schedule == "sigmoid":
            x = np.linspace(-6, 6, num).astype(np.float32)
            return (1 / (1 + np.exp(-x))) * np.float32(end - start) + np.float32(start)
        alpha_bar = _cosine if self.beta_schedule == "squaredcos_cap_v2" else _laplace
        betas = [min(1 - alpha_bar((i + 1) / num) / alpha_bar(i / num), 0.999) for i in range(num)]
        return np.array(betas, np.float32)

    @property
    def alphas_cumprod(self) -> Float[np.ndarray, " train_steps"]:
        """The share of the clean sample's variance that is left at each step."""
        return np.cumprod(np.float32(1) - self.betas, dtype=np.float32)

    def timesteps(self, num_steps: int) -> Int[np.ndarray, " steps"]:
        """Give the steps to sample at, the noisiest first.

        Raises:
            ValueError: when there are more than the model was trained with.
        """
        if not 1 <= num_steps <= self.num_train_timesteps:
            raise ValueError(
                f"num_inference_steps must be in 1..num_train_timesteps={self.num_train_timesteps}, not {num_steps}"
            )
        return np.arange(num_steps)[::-1] * (self.num_train_timesteps // num_steps)

    def num_step_noises(self, num_steps: int) -> int:
        """Tell how many steps of sampling add noise: with DDPM all but the last, with DDIM none."""
        return num_steps - 1 if self.kind == "DDPM" else 0

    def add_noise(
        self,
        sample: Float[Array, "b chunk act"],
        noise: Float[Array, "b chunk act"],
        timestep: Int[Array, " b"],
    ) -> Float[Array, "b chunk act"]:
        """Give what is left of clean samples after some steps of the forward process."""
        left = jnp.asarray(self.alphas_cumprod)[timestep][:, None, None]
        return jnp.sqrt(left) * sample + jnp.sqrt(1 - left) * noise

    def sample(
        self,
        predict: Callable[[Float[Array, "b chunk act"], Int[Array, ""]], Float[Array, "b chunk act"]],
        noise: Float[Array, "b chunk act"],
        step_noise: Float[Array, "noises b chunk act"],
        num_steps: int,
    ) -> Float[Array, "b chunk act"]:
        """Turn noise into a sample, step by step.

        Args:
            predict: the model: (noisy sample, timestep) -> what `prediction_type` says.
            noise: where to begin.
            step_noise: what the steps add, `num_step_noises` of them.
            num_steps: how many steps.
        """
        step = self._ddpm_step if self.kind == "DDPM" else self._ddim_step
        missing = jnp.zeros((num_steps - len(step_noise), *noise.shape), noise.dtype)
        inputs = self._coefficients(num_steps) | {"noise": jnp.concatenate([step_noise, missing])}

        def body(x: Array, c: dict[str, Array]) -> tuple[Array, None]:
            return step(x, predict(x, c["timestep"]), c), None

        return jax.lax.scan(body, noise, inputs)[0]

    def _coefficients(self, num_steps: int) -> dict[str, Array]:
        """Give what the steps differ in, each with a leading axis of steps."""
        timesteps = self.timesteps(num_steps)
        before = timesteps - self.num_train_timesteps // num_steps
        left = self.alphas_cumprod
        left_before = np.where(before >= 0, left[before], np.float32(1))
        values = {"left": left[timesteps], "left_before": left_before}
        return {name: jnp.asarray(x, jnp.float32) for name, x in values.items()} | {
            "timestep": jnp.asarray(timesteps, jnp.int32)
        }

    def _clean(self, x: Array, predicted: Array, c: dict[str, Array]) -> Array:
        if self.prediction_type == "epsilon":
            return (x - jnp.sqrt(1 - c["left"]) * predicted) / jnp.sqrt(c["left"])
        return predicted

    def _clip(self, clean: Array) -> Array:
        limit = self.clip_sample_range
        return jnp.clip(clean, -limit, limit) if self.clip_sample else clean

    def _ddpm_step(self, x: Array, predicted: Array, c: dict[str, Array]) -> Array:
        """DDPM, equation 7."""
        alpha = c["left"] / c["left_before"]
        beta = 1 - alpha
        clean = self._clip(self._clean(x, predicted, c))
        mean = jnp.sqrt(c["left_before"]) * beta / (1 - c["left"]) * clean
        mean = mean + jnp.sqrt(alpha) * (1 - c["left_before"]) / (1 - c["left"]) * x
        variance = jnp.maximum((1 - c["left_before"]) / (1 - c["left"]) * beta, 1e-20)
        return mean + jnp.sqrt(variance) * c["noise"]

    def _ddim_step(self, x: Array, predicted: Array, c: dict[str, Array]) -> Array:
        """DDIM, equation 12, without noise."""
        clean = self._clean(x, predicted, c)
        epsilon = predicted
        if self.prediction_type == "sample":
            epsilon = (x - jnp.sqrt(c["left"]) * clean) / jnp.sqrt(1 - c["left"])
        return jnp.sqrt(c["left_before"]) * self._clip(clean) + jnp.sqrt(1 - c["left_before"]) * epsilon


def _cosine(t: float) -> float:
    return math.cos((t + 0.008) / 1.008 * math.pi / 2) ** 2


def _laplace(t: float) -> float:
    snr = math.exp(-0.5 * math.copysign(1, 0.5 - t) * math.log(1 - 2 * abs(0.5 - t) + 1e-6))
    return math.sqrt(snr / (1 + snr))
