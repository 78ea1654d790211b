"""Settings of VQ-BeT. Mirrors `lerobot.policies.vqbet.configuration_vqbet.VQBeTConfig`."""

import dataclasses
from collections.abc import Mapping
from typing import Any, ClassVar

from lerobot_jax.errors import InputError
from lerobot_jax.features import ACTION, OBS_STATE, FeatureType, NormalizationMode, PolicyFeature
from lerobot_jax.nn.execution import TensorAxis
from lerobot_jax.nn.resnet import TORCHVISION_WEIGHTS, parse_resnet
from lerobot_jax.policies.config import ParamGroup, PolicyConfig

VQVAE = r"vqbet\.action_head\.vqvae_model\."
TOKENS_PER_STEP = 3  # of the image, the state, and the query for actions


def _normalization() -> dict[str, NormalizationMode]:
    return {
        "VISUAL": NormalizationMode.IDENTITY,
        "STATE": NormalizationMode.MIN_MAX,
        "ACTION": NormalizationMode.MIN_MAX,
    }


@dataclasses.dataclass(frozen=True)
class VQBeTConfig(PolicyConfig):
    """VQ-BeT, a transformer that chooses among codes for chunks of actions; the defaults are LeRobot's."""

    type: ClassVar[str] = "vqbet"

    n_obs_steps: int = 5
    """How many observation steps the policy sees: the current one and those before."""
    n_action_pred_token: int = 3
    """How many chunks it learns to predict: that of the current step and those of the next ones."""
    action_chunk_size: int = 5
    """Actions in a chunk, all of which are executed."""
    normalization_mapping: dict[str, NormalizationMode] = dataclasses.field(
        default_factory=_normalization, hash=False
    )
    """Feature type -> how it is normalized; a type that is not listed is left as it is."""
    vision_backbone: str = "resnet18"
    """The image encoder: resnet18, 34, 50, 101 or 152; the suffix wN makes it N channels wide instead of 64."""
    crop_shape: tuple[int, int] | None = (84, 84)
    """Crop images to (height, width)."""
    crop_is_random: bool = True
    """Crop anywhere in training; else, and always when acting, crop the middle."""
    pretrained_backbone_weights: str | None = "ResNet18_Weights.IMAGENET1K_V1"
    """ImageNet weights for it: torchvision's name, a safetensors file with torchvision's keys, or a Hub name."""
    use_group_norm: bool = False
    """Group norm instead of batch norm in the image encoder; not with pretrained weights."""
    spatial_softmax_num_keypoints: int = 32
    """Keypoints that the image encoder finds."""
    n_vqvae_training_steps: int = 20000
    """Steps in which the codes are learned, at the beginning; then the transformer learns to choose among them."""
    vqvae_n_embed: int = 16
    """Codes in each of the two codebooks."""
    vqvae_embedding_dim: int = 256
    """Width of a code."""
    vqvae_enc_hidden_dim: int = 128
    """Width of the networks that turn chunks of actions into codes and back."""
    vqvae_kmeans_init: bool = dataclasses.field(default=False, metadata={"in_lerobot": False})
    """Begin with the centres of the first batch's clusters for codes; stock LeRobot begins with random ones."""
    gpt_block_size: int = 500
    """The longest sequence of tokens; each observation step has 3, each further chunk 1."""
    gpt_input_dim: int = 512
    """Width of the tokens."""
    gpt_output_dim: int = 512
    """Width of what the transformer gives for each."""
    gpt_n_layer: int = 8
    """Its layers."""
    gpt_n_head: int = 8
    """Its attention heads."""
    gpt_hidden_dim: int = 512
    """Its width."""
    dropout: float = 0.1
    """Its dropout."""
    offset_loss_weight: float = 10000.0
    """Weight of the error of the predicted actions."""
    primary_code_loss_weight: float = 5.0
    """Weight of the choice in the first codebook."""
    secondary_code_loss_weight: float = 0.5
    """Weight of the choice in the second."""
    bet_softmax_temperature: float = 0.1
    """Temperature at which codes are drawn."""
    sequentially_select: bool = False
    """Choose from the second codebook when the choice from the first is known, not at the same time."""
    optimizer_lr: float = 1e-4
    """Learning rate."""
    optimizer_betas: tuple[float, float] = (0.95, 0.999)
    """Adam's."""
    optimizer_eps: float = 1e-8
    """Adam's."""
    optimizer_weight_decay: float = 1e-6
    """Adam's; none for the transformer's biases, norms and positions."""
    optimizer_vqvae_lr: float = 1e-3
    """Learning rate while the codes are learned."""
    optimizer_vqvae_weight_decay: float = 1e-4
    """Weight decay while the codes are learned."""
    scheduler_warmup_steps: int = 500
    """Steps in which the learning rate rises, after those in which the codes are learned."""

    def __post_init__(self):
        super().__post_init__()
        sizes = ("n_action_pred_token", "action_chunk_size", "spatial_softmax_num_keypoints", "vqvae_n_embed")
        sizes += ("vqvae_embedding_dim", "vqvae_enc_hidden_dim", "gpt_input_dim", "gpt_output_dim")
        for name in (*sizes, "gpt_n_layer", "gpt_n_head"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, not {getattr(self, name)}")
        if self.gpt_hidden_dim < 1 or self.gpt_hidden_dim % self.gpt_n_head:
            raise ValueError(
                f"gpt_hidden_dim must be a multiple of gpt_n_head={self.gpt_n_head}, not {self.gpt_hidden_dim}"
            )
        if self.gpt_block_size < self.num_tokens:
            raise ValueError(
                f"gpt_block_size must be at least {self.num_tokens} (3 tokens for each of n_obs_steps, and "
                f"n_action_pred_token - 1), not {self.gpt_block_size}"
            )
        spec = parse_resnet(self.vision_backbone)
        if self.use_group_norm and self.pretrained_backbone_weights:
            raise ValueError(
                "use_group_norm needs pretrained_backbone_weights=None: group norm does not suit their weights"
            )
        if self.use_group_norm and spec.width % 16:
            raise ValueError(
                f"use_group_norm needs a backbone of a multiple of 16 channels, not {spec.width}"
            )
        if self.crop_shape is not None and (len(self.crop_shape) != 2 or min(self.crop_shape) < 1):
            raise ValueError(f"crop_shape must be (height, width), not {self.crop_shape}")
        if not 0 <= self.dropout < 1:
            raise ValueError(f"dropout must be in [0, 1), not {self.dropout}")
        if not self.bet_softmax_temperature > 0:
            raise ValueError(f"bet_softmax_temperature must be positive, not {self.bet_softmax_temperature}")
        numbers = ["offset_loss_weight", "primary_code_loss_weight", "secondary_code_loss_weight"]
        numbers += ["optimizer_lr", "optimizer_eps", "optimizer_weight_decay", "optimizer_vqvae_lr"]
        numbers += ["optimizer_vqvae_weight_decay", "n_vqvae_training_steps", "scheduler_warmup_steps"]
        for name in numbers:
            if not getattr(self, name) >= 0:
                raise ValueError(f"{name} must not be negative, it is {getattr(self, name)}")

    @property
    def num_chunks(self) -> int:
        """How many chunks of actions are predicted in training: one from each step on."""
        return self.n_obs_steps + self.n_action_pred_token - 1

    @property
    def num_tokens(self) -> int:
        """How many tokens the transformer sees."""
        return TOKENS_PER_STEP * self.n_obs_steps + self.n_action_pred_token - 1

    @property
    def n_action_steps(self) -> int:
        """How many actions of a chunk are executed."""
        return self.action_chunk_size

    def exported(self) -> "VQBeTConfig":
        """Name backbone weights only if they are torchvision's."""
        known = self.pretrained_backbone_weights in TORCHVISION_WEIGHTS
        weights = self.pretrained_backbone_weights if known else None
        return dataclasses.replace(self, pretrained_backbone_weights=weights)

    @property
    def observation_delta_indices(self) -> list[int]:
        return list(range(1 - self.n_obs_steps, 1))

    @property
    def action_delta_indices(self) -> list[int]:
        return list(range(1 - self.n_obs_steps, self.n_action_pred_token + self.action_chunk_size - 1))

    @property
    def sampled_delta_indices(self) -> list[int]:
        return list(range(self.action_chunk_size))

    @property
    def param_groups(self) -> tuple[ParamGroup, ...]:
        undecayed = r"vqbet\.policy\.(lm_head|transformer)\.(.*\.)?(bias|scale|embedding)$"
        return (
            ParamGroup(VQVAE, self.optimizer_vqvae_lr, self.optimizer_vqvae_weight_decay),
            ParamGroup(undecayed, weight_decay=0.0),
        )

    @property
    def param_phases(self) -> tuple[str, ...]:
        return (VQVAE, "")

    @property
    def layer_order(self) -> tuple[str, ...]:
        return (
            r"vqbet\.rgb_encoder\.backbone\.[01]\.",
            r"vqbet\.rgb_encoder\.backbone\.(\d+)\.",
            r"vqbet\.(?:rgb_encoder\.(?:pool|out)|rgb_feature_projector|state_projector|action_token)",
            r"vqbet\.policy\.transformer\.(?:wte|wpe)\.",
            r"vqbet\.policy\.transformer\.h\.(\d+)\.",
            r"vqbet\.policy\.(?:transformer\.ln_f|lm_head)\.",
            r"vqbet\.action_head\.",
        )

    @property
    def peft_presets(self) -> Mapping[str, str]:
        layers = r"h\.\d+\.(attn\.(c_attn|c_proj)|mlp\.[02])"
        return {"transformer": rf"vqbet\.policy\.transformer\.{layers}"}

    @property
    def tensor_axes(self) -> tuple[TensorAxis, ...]:
        return (TensorAxis(r"mlp\.0\.kernel", -1), TensorAxis(r"mlp\.2\.kernel", -2))

    @property
    def optimizer_preset(self) -> Mapping[str, Any]:
        return {
            "type": "adam",
            "lr": self.optimizer_lr,
            "betas": self.optimizer_betas,
            "eps": self.optimizer_eps,
            "weight_decay": self.optimizer_weight_decay,
        }

    @property
    def scheduler_preset(self) -> Mapping[str, Any]:
        return {
            "type": "vqbet",
            "num_warmup_steps": self.scheduler_warmup_steps,
            "num_vqvae_training_steps": self.n_vqvae_training_steps,
        }

    def check_features(self) -> None:
        if not self.robot_state_feature:
            raise InputError(f"input_features: VQ-BeT needs '{OBS_STATE}'")
        if len(self.image_features) != 1:
            raise InputError(
                f"input_features: VQ-BeT needs exactly one image, not {len(self.image_features)}"
            )
        if len(self.action_feature.shape) != 1:
            raise InputError(f"output_features: the action must be a vector, not {self.action_feature.shape}")
        ((key, image),) = self.image_features.items()
        _, height, width = image.shape
        if self.crop_shape is not None and (self.crop_shape[0] > height or self.crop_shape[1] > width):
            raise InputError(f"crop_shape {self.crop_shape} does not fit into '{key}', {height} x {width}")
        if self.query_positions[-1] >= self.num_tokens:
            raise InputError(
                f"input_features: VQ-BeT sees {OBS_STATE} and '{key}' only, and stock LeRobot takes the actions "
                "from the wrong tokens if there are more inputs, or fails, as it would with these: "
                f"{', '.join(self.input_features)}"
            )

    @property
    def query_positions(self) -> list[int]:
        """From which tokens the actions of each observation step are read.

        Stock LeRobot takes every input for a token. So with one that it does not use, such as the environment's
        state, these are not the tokens that ask for actions.
        """
        num = len(self.input_features)
        return [step * (num + 1) + num for step in range(self.n_obs_steps)]

    @classmethod
    def tiny(cls) -> "VQBeTConfig":
        return cls(
            input_features={
                OBS_STATE: PolicyFeature(FeatureType.STATE, (3,)),
                "observation.images.top": PolicyFeature(FeatureType.VISUAL, (3, 32, 32)),
            },
            output_features={ACTION: PolicyFeature(FeatureType.ACTION, (2,))},
            n_obs_steps=2,
            n_action_pred_token=2,
            action_chunk_size=3,
            vision_backbone="resnet10w4",
            crop_shape=(28, 28),
            pretrained_backbone_weights=None,
            spatial_softmax_num_keypoints=3,
            vqvae_n_embed=4,
            vqvae_embedding_dim=6,
            vqvae_enc_hidden_dim=8,
            gpt_block_size=12,
            gpt_input_dim=8,
            gpt_output_dim=8,
            gpt_n_layer=2,
            gpt_n_head=2,
            gpt_hidden_dim=8,
        )
