"""The parts of `TrainConfig` about the optimizer: the optimizer itself and the learning-rate schedule."""

import dataclasses
import math
from typing import Literal


@dataclasses.dataclass(frozen=True)
class OptimizerConfig:
    """The optimizer; what is None follows the policy's preset in LeRobot."""

    type: Literal["adamw", "adam", "sgd"] | None = None
    """adamw, adam or sgd, with PyTorch's arithmetic."""
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

    def __post_init__(self):
        for name in ("lr", "eps", "weight_decay", "momentum", "grad_clip_norm"):
            value = getattr(self, name)
            if value is not None and not 0 <= value < math.inf:
                raise ValueError(f"optimizer.{name} must be finite and not negative, it is {value}")
        if self.betas is not None and not all(0 <= beta < 1 for beta in self.betas):
            raise ValueError(f"optimizer.betas must be in [0, 1), not {self.betas}")


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
