"""The parts of `TrainConfig` about the optimizer: itself, the learning-rate schedule, averages of the weights."""

import dataclasses
import math
from typing import Literal


@dataclasses.dataclass(frozen=True)
class OptimizerConfig:
    """The optimizer; what is None follows the policy's preset in LeRobot."""

    type: Literal["adamw", "adam", "sgd", "adafactor"] | None = None
    """adamw, adam, sgd or adafactor, with PyTorch's arithmetic. Adafactor's lr is relative to a parameter's size:
    0.01 unless given, and parameters with a rate of their own keep its ratio to the policy's."""
    lr: float | None = None
    """Learning rate."""
    betas: tuple[float, float] | None = None
    """Decay rates of Adam's moments."""
    eps: float | None = None
    """Adam's epsilon."""
    weight_decay: float | None = None
    """Weight decay."""
    momentum: float | None = None
    """SGD's momentum."""
    grad_clip_norm: float | None = None
    """Gradients with a larger global norm are scaled down to it; 0: never."""
    moments_dtype: Literal["float32", "bfloat16", "int8"] | None = None
    """How adam and adamw keep their moments: float32, the default, takes 8 bytes a weight, bfloat16 4, int8 2."""
    beta2_decay: float | None = None
    """adafactor: the decay rate of the second moment is 1 - step ** beta2_decay."""
    layer_decay: float | None = None
    """Each layer's learning rate is that of the next one, towards the output, times this; e.g. 0.75."""

    def __post_init__(self):
        for name in ("lr", "eps", "weight_decay", "momentum", "grad_clip_norm"):
            value = getattr(self, name)
            if value is not None and not 0 <= value < math.inf:
                raise ValueError(f"optimizer.{name} must be finite and not negative, it is {value}")
        if self.betas is not None and not all(0 <= beta < 1 for beta in self.betas):
            raise ValueError(f"optimizer.betas must be in [0, 1), not {self.betas}")
        if self.beta2_decay is not None and not -math.inf < self.beta2_decay <= 0:
            raise ValueError(f"optimizer.beta2_decay must not be positive, it is {self.beta2_decay}")
        if self.layer_decay is not None and not 0 < self.layer_decay <= 1:
            raise ValueError(f"optimizer.layer_decay must be in (0, 1], not {self.layer_decay}")


@dataclasses.dataclass(frozen=True)
class SchedulerConfig:
    """How the learning rate changes; None follows the policy's preset in LeRobot."""

    type: (
        Literal[
            "constant",
            "constant_with_warmup",
            "cosine",
            "cosine_annealing_with_warmup",
            "cosine_decay_with_warmup",
            "vqbet",
        ]
        | None
    ) = None
    """LeRobot's schedules; `cosine` is diffusers'; `constant` is none; `vqbet` waits for the codes."""
    num_warmup_steps: int | None = None
    """Steps over which the learning rate rises."""
    num_decay_steps: int | None = None
    """cosine_decay_with_warmup: steps until decay_lr; scaled down with shorter runs."""
    peak_lr: float | None = None
    """cosine_decay_with_warmup: the rate that decay_lr is relative to."""
    decay_lr: float | None = None
    """cosine_decay_with_warmup: the final learning rate."""
    num_vqvae_training_steps: int | None = None
    """vqbet: steps before warm-up, at the full rate."""
    num_cycles: float | None = None
    """vqbet: how many waves of the cosine; 0.5, the default, falls to 0."""

    def __post_init__(self):
        names = ("num_warmup_steps", "num_decay_steps", "peak_lr", "decay_lr", "num_vqvae_training_steps")
        for name in (*names, "num_cycles"):
            value = getattr(self, name)
            if value is not None and value < 0:
                raise ValueError(f"scheduler.{name} must not be negative, it is {value}")


@dataclasses.dataclass(frozen=True)
class EMAConfig:
    """How the exponential moving average of the weights follows them; `ema_decay` turns it on.

    In the n-th update of the average, n = 0, 1, ..., the decay rate is at most `ema_decay`, and also at most
    (1 + n) / (10 + n) with `warmup`, 1 - (1 + n / inv_gamma) ** -power with `power`.
    """

    schedule: Literal["warmup", "constant", "power"] = "warmup"
    """How the decay rate rises to ema_decay; `power` is that of diffusers' EMAModel, used by Diffusion Policy."""
    inv_gamma: float | None = None
    """power: steps are counted in these; 1 by default."""
    power: float | None = None
    """power: 2/3 by default; Diffusion Policy has 3/4, for shorter runs."""
    min_decay: float | None = None
    """power: the decay rate is at least this, after the first update; 0 by default."""
    update_after_step: int = 0
    """The average is the weights themselves until so many optimizer updates are done."""
    update_every: int = 1
    """Optimizer updates for each update of the average."""

    def __post_init__(self):
        for name in ("inv_gamma", "power", "min_decay"):
            if getattr(self, name) is not None and self.schedule != "power":
                raise ValueError(f"ema.{name} needs ema.schedule=power, it is {self.schedule}")
        for name in ("inv_gamma", "power"):
            value = getattr(self, name)
            if value is not None and not 0 < value < math.inf:
                raise ValueError(f"ema.{name} must be finite and positive, it is {value}")
        if self.min_decay is not None and not 0 <= self.min_decay < 1:
            raise ValueError(f"ema.min_decay must be in [0, 1), not {self.min_decay}")
        if self.update_after_step < 0 or self.update_every < 1:
            raise ValueError("ema.update_after_step must not be negative, ema.update_every must be positive")


@dataclasses.dataclass(frozen=True)
class SWAConfig:
    """Stochastic weight averaging: the equal average of the weights of some steps (arXiv:1803.05407)."""

    start: int | None = None
    """The average begins with the weights after so many steps; None: there is no such average. Until then, the
    weights themselves are evaluated and exported."""
    freq: int = 1
    """Every so many steps from there on, the weights join the average."""

    def __post_init__(self):
        if self.start is not None and self.start < 1:
            raise ValueError(f"swa.start must be at least 1, not {self.start}")
        if self.freq < 1:
            raise ValueError(f"swa.freq must be at least 1, not {self.freq}")
