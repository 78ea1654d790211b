"""Settings of ACT. Mirrors `lerobot.policies.act.configuration_act.ACTConfig`."""

import dataclasses
from collections.abc import Mapping
from typing import Any, ClassVar

from lerobot_jax.errors import InputError
from lerobot_jax.features import ACTION, OBS_STATE, FeatureType, NormalizationMode, PolicyFeature
from lerobot_jax.nn.execution import TensorAxis
from lerobot_jax.nn.resnet import TORCHVISION_WEIGHTS, parse_resnet
from lerobot_jax.policies.config import ParamGroup, PolicyConfig


def _mean_std() -> dict[str, NormalizationMode]:
    return dict.fromkeys(("VISUAL", "STATE", "ACTION"), NormalizationMode.MEAN_STD)


@dataclasses.dataclass(frozen=True)
class ACTConfig(PolicyConfig):
    """Action Chunking Transformer; the defaults are those of the paper's bimanual ALOHA tasks."""

    type: ClassVar[str] = "act"

    chunk_size: int = 100
    """How many action steps are predicted at once."""
    n_action_steps: int = 100
    """How many of them are executed before the policy looks again; at most chunk_size."""
    normalization_mapping: dict[str, NormalizationMode] = dataclasses.field(
        default_factory=_mean_std, hash=False
    )
    """Feature type -> how it is normalized; a type that is not listed (ENV) is left as it is."""
    vision_backbone: str = "resnet18"
    """The image encoder: resnet18, 34, 50, 101 or 152; the suffix wN makes it N channels wide instead of 64."""
    pretrained_backbone_weights: str | None = "ResNet18_Weights.IMAGENET1K_V1"
    """ImageNet weights for it: torchvision's name, a safetensors file with torchvision's keys, or a Hub name."""
    replace_final_stride_with_dilation: bool | int = False
    """Keep twice the resolution in the last stage (resnet50 and larger)."""
    pre_norm: bool = False
    """Normalize before attention and feed-forward layers instead of after."""
    dim_model: int = 512
    """Width of the transformer."""
    n_heads: int = 8
    """Attention heads; they divide dim_model."""
    dim_feedforward: int = 3200
    """Width of the feed-forward layers."""
    feedforward_activation: str = "relu"
    """relu or gelu."""
    n_encoder_layers: int = 4
    """Transformer encoder layers."""
    n_decoder_layers: int = 1
    """Transformer decoder layers; the original code uses only the first of its 7."""
    use_vae: bool = True
    """Train as a conditional VAE: a second encoder sees the actions and gives a latent."""
    latent_dim: int = 32
    """Size of the latent."""
    n_vae_encoder_layers: int = 4
    """Layers of the VAE's encoder."""
    temporal_ensemble_coeff: float | None = None
    """Average overlapping chunks with weights exp(-coeff * age), oldest first; n_action_steps must be 1."""
    dropout: float = 0.1
    """Dropout rate in the transformers."""
    kl_weight: float = 10.0
    """Weight of the KL divergence in the loss."""
    optimizer_lr: float = 1e-5
    """Learning rate."""
    optimizer_weight_decay: float = 1e-4
    """AdamW's weight decay."""
    optimizer_lr_backbone: float = 1e-5
    """Learning rate of the image encoder."""

    def __post_init__(self):
        super().__post_init__()
        sizes = ("chunk_size", "dim_model", "n_heads", "dim_feedforward", "latent_dim")
        for name in (*sizes, "n_encoder_layers", "n_decoder_layers", "n_vae_encoder_layers"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, not {getattr(self, name)}")
        parse_resnet(self.vision_backbone)
        if self.replace_final_stride_with_dilation and not parse_resnet(self.vision_backbone).bottleneck:
            raise ValueError("replace_final_stride_with_dilation needs resnet50 or larger")
        if self.feedforward_activation not in ("relu", "gelu"):
            raise ValueError(
                f"feedforward_activation must be relu or gelu, not '{self.feedforward_activation}'"
            )
        if self.temporal_ensemble_coeff is not None and self.n_action_steps != 1:
            raise ValueError(
                "n_action_steps must be 1 with temporal_ensemble_coeff: every step asks the policy"
            )
        if not 1 <= self.n_action_steps <= self.chunk_size:
            raise ValueError(
                f"n_action_steps must be in 1..chunk_size={self.chunk_size}, not {self.n_action_steps}"
            )
        if self.n_obs_steps != 1:
            raise ValueError(f"n_obs_steps must be 1, not {self.n_obs_steps}: ACT sees the current step only")
        if self.dim_model % self.n_heads or self.dim_model % 4:
            raise ValueError(
                f"dim_model={self.dim_model} must be a multiple of n_heads={self.n_heads} and of 4"
            )
        for name in ("kl_weight", "optimizer_lr", "optimizer_weight_decay", "optimizer_lr_backbone"):
            if not getattr(self, name) >= 0:
                raise ValueError(f"{name} must not be negative, it is {getattr(self, name)}")
        if not 0 <= self.dropout < 1:
            raise ValueError(f"dropout must be in [0, 1), not {self.dropout}")

    def exported(self) -> "ACTConfig":
        """Name backbone weights only if they are torchvision's; the checkpoint holds them in any case."""
        known = self.pretrained_backbone_weights in TORCHVISION_WEIGHTS
        return self if known else dataclasses.replace(self, pretrained_backbone_weights=None)

    @property
    def observation_delta_indices(self) -> None:
        return None

    @property
    def action_delta_indices(self) -> list[int]:
        return list(range(self.chunk_size))

    @property
    def param_groups(self) -> tuple[ParamGroup, ...]:
        return (ParamGroup(r"model\.backbone\.", lr=self.optimizer_lr_backbone),)

    @property
    def layer_order(self) -> tuple[str, ...]:
        return (
            r"model\.backbone\.(?:conv1|bn1)\.",
            r"model\.backbone\.layer(\d+)\.",
            # What makes the encoder's tokens, the VAE as a whole among it, and the positions.
            r"model\.(?:vae_encoder\w*|encoder_\w+|decoder_pos_embed)\.",
            r"model\.encoder\.layers\.(\d+)\.",
            r"model\.encoder\.norm\.",
            r"model\.decoder\.layers\.(\d+)\.",
            r"model\.(?:decoder\.norm|action_head)\.",
        )

    @property
    def peft_presets(self) -> Mapping[str, str]:
        layers = r"(encoder|decoder)\.layers\.\d+\.(self_attn|multihead_attn|linear1|linear2)"
        convolutions = r"(conv\d|downsample\.0)"
        return {
            "transformer": rf"model\.{layers}",
            "vision_encoder": rf"model\.backbone\.(.*\.)?{convolutions}",
        }

    @property
    def tensor_axes(self) -> tuple[TensorAxis, ...]:
        return (TensorAxis(r"linear1\.kernel", -1), TensorAxis(r"linear2\.kernel", -2))

    @property
    def optimizer_preset(self) -> Mapping[str, Any]:
        return {"type": "adamw", "lr": self.optimizer_lr, "weight_decay": self.optimizer_weight_decay}

    def check_features(self) -> None:
        if not self.image_features and not self.env_state_feature:
            raise InputError("input_features: ACT needs at least one image or observation.environment_state")
        if len(self.action_feature.shape) != 1:
            raise InputError(f"output_features: the action must be a vector, not {self.action_feature.shape}")

    @classmethod
    def tiny(cls) -> "ACTConfig":
        return cls(
            input_features={
                OBS_STATE: PolicyFeature(FeatureType.STATE, (3,)),
                "observation.images.top": PolicyFeature(FeatureType.VISUAL, (3, 32, 32)),
            },
            output_features={ACTION: PolicyFeature(FeatureType.ACTION, (2,))},
            chunk_size=4,
            n_action_steps=2,
            vision_backbone="resnet18w4",
            pretrained_backbone_weights=None,
            dim_model=16,
            n_heads=2,
            dim_feedforward=16,
            n_encoder_layers=1,
            n_vae_encoder_layers=1,
            latent_dim=4,
        )
