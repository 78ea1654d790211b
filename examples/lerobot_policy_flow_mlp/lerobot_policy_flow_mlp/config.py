"""Settings of the flow matching MLP."""

import dataclasses
from collections.abc import Mapping
from typing import Any, ClassVar

from lerobot_jax.errors import InputError
from lerobot_jax.features import (
    ACTION,
    OBS_ENV_STATE,
    OBS_STATE,
    FeatureType,
    NormalizationMode,
    PolicyFeature,
)
from lerobot_jax.policies.config import PolicyConfig


def _mean_std() -> dict[str, NormalizationMode]:
    return dict.fromkeys(("STATE", "ENV", "ACTION"), NormalizationMode.MEAN_STD)


@dataclasses.dataclass(frozen=True)
class FlowMLPConfig(PolicyConfig):
    """From the current state to a chunk of actions; no images."""

    type: ClassVar[str] = "flow_mlp"

    chunk_size: int = 16
    """How many action steps are predicted at once."""
    n_action_steps: int = 8
    """How many of them are executed before the policy looks again; at most chunk_size."""
    normalization_mapping: dict[str, NormalizationMode] = dataclasses.field(
        default_factory=_mean_std, hash=False
    )
    """Feature type -> how it is normalized. The noise is standard normal, so actions should be about as large."""
    hidden_dim: int = 512
    """Width of the MLP."""
    num_blocks: int = 4
    """Residual blocks of the MLP."""
    num_inference_steps: int = 10
    """Euler steps from noise to actions."""
    optimizer_lr: float = 1e-3
    """Learning rate."""
    optimizer_weight_decay: float = 1e-4
    """AdamW's weight decay."""

    def __post_init__(self):
        super().__post_init__()
        for name in ("chunk_size", "hidden_dim", "num_blocks", "num_inference_steps"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, not {getattr(self, name)}")
        if not 1 <= self.n_action_steps <= self.chunk_size:
            raise ValueError(
                f"n_action_steps must be in 1..chunk_size={self.chunk_size}, not {self.n_action_steps}"
            )
        if self.n_obs_steps != 1:
            raise ValueError(
                f"n_obs_steps must be 1, not {self.n_obs_steps}: flow_mlp sees the current step only"
            )

    @property
    def observation_delta_indices(self) -> None:
        return None

    @property
    def action_delta_indices(self) -> list[int]:
        return list(range(self.chunk_size))

    @property
    def denoising_steps(self) -> tuple[str, int]:
        return "num_inference_steps", self.num_inference_steps

    @property
    def layer_order(self) -> tuple[str, ...]:
        return (r"model\.input_proj\.", r"model\.blocks\.(\d+)\.", r"model\.(?:norm|output_proj)\.")

    @property
    def optimizer_preset(self) -> Mapping[str, Any]:
        return {"type": "adamw", "lr": self.optimizer_lr, "weight_decay": self.optimizer_weight_decay}

    def check_features(self) -> None:
        others = [key for key, feature in self.input_features.items() if len(feature.shape) != 1]
        if others or not self.input_features:
            raise InputError(
                f"input_features: flow_mlp takes vectors, at least one, and nothing like {others}"
            )
        if len(self.action_feature.shape) != 1:
            raise InputError(f"output_features: the action must be a vector, not {self.action_feature.shape}")

    @classmethod
    def tiny(cls) -> "FlowMLPConfig":
        return cls(
            input_features={
                OBS_STATE: PolicyFeature(FeatureType.STATE, (3,)),
                OBS_ENV_STATE: PolicyFeature(FeatureType.ENV, (4,)),
            },
            output_features={ACTION: PolicyFeature(FeatureType.ACTION, (2,))},
            chunk_size=4,
            n_action_steps=2,
            hidden_dim=16,
            num_blocks=1,
            num_inference_steps=3,
        )
