"""Settings of Diffusion Policy. Mirrors `lerobot.policies.diffusion.configuration_diffusion.DiffusionConfig`."""

import dataclasses
from collections.abc import Mapping
from typing import Any, ClassVar

from lerobot_jax.errors import InputError
from lerobot_jax.features import ACTION, OBS_STATE, FeatureType, NormalizationMode, PolicyFeature
from lerobot_jax.nn.execution import TensorAxis
from lerobot_jax.nn.noise_schedule import NoiseSchedule
from lerobot_jax.nn.resnet import TORCHVISION_WEIGHTS, parse_resnet
from lerobot_jax.policies.config import PolicyConfig


def _normalization() -> dict[str, NormalizationMode]:
    return {
        "VISUAL": NormalizationMode.MEAN_STD,
        "STATE": NormalizationMode.MIN_MAX,
        "ACTION": NormalizationMode.MIN_MAX,
    }


@dataclasses.dataclass(frozen=True)
class DiffusionConfig(PolicyConfig):
    """Diffusion Policy, with a convolutional U-Net over time; the defaults are LeRobot's."""

    type: ClassVar[str] = "diffusion"

    n_obs_steps: int = 2
    """How many observation steps the policy sees: the current one and those before."""
    horizon: int = 64
    """How many action steps are generated at once, counted from the first observation."""
    n_action_steps: int = 32
    """How many of them are executed, from the current observation on; at most horizon - n_obs_steps + 1."""
    normalization_mapping: dict[str, NormalizationMode] = dataclasses.field(
        default_factory=_normalization, hash=False
    )
    """Feature type -> how it is normalized; a type that is not listed (ENV) is left as it is."""
    drop_n_last_frames: int = 7
    """How many frames at the end of an episode are not trained on; the paper's: those that need much padding."""
    vision_backbone: str = "resnet18"
    """The image encoder: resnet18, 34, 50, 101 or 152; the suffix wN makes it N channels wide instead of 64."""
    resize_shape: tuple[int, int] | None = None
    """Resize images to (height, width) first."""
    crop_ratio: float = 1.0
    """With resize_shape: crop to this share of its height and width; 1: no crop."""
    crop_shape: tuple[int, int] | None = None
    """Without resize_shape: crop to (height, width)."""
    crop_is_random: bool = True
    """Crop anywhere in training; else, and always when acting, crop the middle."""
    pretrained_backbone_weights: str | None = "ResNet18_Weights.IMAGENET1K_V1"
    """ImageNet weights for it: torchvision's name, a safetensors file with torchvision's keys, or a Hub name."""
    use_group_norm: bool = False
    """Group norm instead of batch norm in the image encoder; not with pretrained weights."""
    spatial_softmax_num_keypoints: int = 32
    """Keypoints that the image encoder finds."""
    use_separate_rgb_encoder_per_camera: bool = True
    """An image encoder for each camera instead of one for all."""
    down_dims: tuple[int, ...] = (512, 1024, 2048)
    """Channels of each level of the U-Net; the horizon is a multiple of 2 ** levels."""
    kernel_size: int = 5
    """Width of the U-Net's convolutions, odd."""
    n_groups: int = 8
    """Groups of the U-Net's group norms; they divide every number in down_dims."""
    diffusion_step_embed_dim: int = 128
    """Width of the embedding of the diffusion step, even."""
    use_film_scale_modulation: bool = True
    """Let the observations scale the features too, not only shift them."""
    gradient_checkpointing: bool = False
    """Recompute the U-Net's blocks in the backward pass: less memory, more time."""
    noise_scheduler_type: str = "DDPM"
    """DDPM or DDIM, which needs fewer steps; both sample from the same weights."""
    num_train_timesteps: int = 100
    """Steps of the forward process."""
    beta_schedule: str = "squaredcos_cap_v2"
    """How much noise they add: squaredcos_cap_v2, linear, scaled_linear; DDPM also sigmoid, laplace."""
    beta_start: float = 0.0001
    """Where the linear schedules begin."""
    beta_end: float = 0.02
    """Where they end."""
    prediction_type: str = "epsilon"
    """What the U-Net predicts: epsilon, the noise, or sample, the clean actions."""
    clip_sample: bool = True
    """Clip clean actions while sampling; they must be normalized to fit."""
    clip_sample_range: float = 1.0
    """To which absolute value."""
    num_inference_steps: int | None = None
    """Steps of sampling, evenly spaced; None: num_train_timesteps."""
    compile_model: bool = False
    """Whether stock LeRobot compiles the U-Net; here everything is compiled."""
    compile_mode: str = "reduce-overhead"
    """How it does."""
    do_mask_loss_for_padding: bool = False
    """Leave padded actions out of the loss; the original code does not."""
    optimizer_lr: float = 1e-4
    """Learning rate."""
    optimizer_betas: tuple[float, float] = (0.95, 0.999)
    """Adam's."""
    optimizer_eps: float = 1e-8
    """Adam's."""
    optimizer_weight_decay: float = 1e-6
    """Adam's."""
    scheduler_name: str = "cosine"
    """The learning rate's schedule, by its name in diffusers: cosine, constant or constant_with_warmup."""
    scheduler_warmup_steps: int = 500
    """Steps in which it rises."""

    def __post_init__(self):
        super().__post_init__()
        sizes = ("horizon", "n_action_steps", "spatial_softmax_num_keypoints", "kernel_size", "n_groups")
        for name in sizes:
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, not {getattr(self, name)}")
        if self.n_action_steps > (most := self.horizon - self.n_obs_steps + 1):
            raise ValueError(
                f"n_action_steps must be at most horizon - n_obs_steps + 1 = {most}, not {self.n_action_steps}"
            )
        if not self.down_dims or any(d < 1 or d % self.n_groups for d in self.down_dims):
            raise ValueError(f"down_dims must be multiples of n_groups={self.n_groups}, not {self.down_dims}")
        if self.down_dims[0] % 8:
            raise ValueError(f"down_dims must begin with a multiple of 8, not {self.down_dims[0]}")
        if self.horizon % (factor := 2 ** len(self.down_dims)):
            raise ValueError(
                f"horizon must be a multiple of {factor}, because the U-Net has {len(self.down_dims)} levels "
                f"(down_dims), not {self.horizon}"
            )
        if self.kernel_size % 2 == 0:
            raise ValueError(f"kernel_size must be odd, not {self.kernel_size}")
        if self.diffusion_step_embed_dim < 4 or self.diffusion_step_embed_dim % 2:
            raise ValueError(
                f"diffusion_step_embed_dim must be even and at least 4, not {self.diffusion_step_embed_dim}"
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
        for name in ("resize_shape", "crop_shape"):
            if (shape := getattr(self, name)) is not None and (len(shape) != 2 or min(shape) < 1):
                raise ValueError(f"{name} must be (height, width), not {shape}")
        if not 0 < self.crop_ratio <= 1:
            raise ValueError(f"crop_ratio must be in (0, 1], not {self.crop_ratio}")
        if self.resize_shape is not None and self.crop_shape not in (None, self.crop_size):
            raise ValueError(f"crop_shape {self.crop_shape} has no effect with resize_shape; give crop_ratio")
        if self.crop_size is not None and min(self.crop_size) < 1:
            raise ValueError(
                f"crop_ratio {self.crop_ratio} leaves nothing of resize_shape {self.resize_shape}"
            )
        self.noise_schedule.timesteps(self.num_sampling_steps)
        rates = ("optimizer_lr", "optimizer_eps", "optimizer_weight_decay")
        for name in (*rates, "drop_n_last_frames", "scheduler_warmup_steps"):
            if not getattr(self, name) >= 0:
                raise ValueError(f"{name} must not be negative, it is {getattr(self, name)}")
        if self.scheduler_name not in ("cosine", "constant", "constant_with_warmup"):
            raise ValueError(
                f"scheduler_name must be cosine, constant or constant_with_warmup, not '{self.scheduler_name}'"
            )

    @property
    def noise_schedule(self) -> NoiseSchedule:
        return NoiseSchedule(
            self.noise_scheduler_type,
            self.num_train_timesteps,
            self.beta_schedule,
            self.beta_start,
            self.beta_end,
            self.prediction_type,
            self.clip_sample,
            self.clip_sample_range,
        )

    @property
    def num_sampling_steps(self) -> int:
        return self.num_train_timesteps if self.num_inference_steps is None else self.num_inference_steps

    @property
    def denoising_steps(self) -> tuple[str, int]:
        return "num_inference_steps", self.num_sampling_steps

    @property
    def resize_size(self) -> tuple[int, int] | None:
        """(height, width) to which images are resized first."""
        return self.resize_shape

    @property
    def crop_size(self) -> tuple[int, int] | None:
        """(height, width) to which images are cropped then."""
        if self.resize_shape is None:
            return self.crop_shape
        if self.crop_ratio == 1:
            return None
        height, width = self.resize_shape
        return int(height * self.crop_ratio), int(width * self.crop_ratio)

    def exported(self) -> "DiffusionConfig":
        """Write the crop that stock LeRobot derives, and name backbone weights only if they are torchvision's."""
        known = self.pretrained_backbone_weights in TORCHVISION_WEIGHTS
        weights = self.pretrained_backbone_weights if known else None
        return dataclasses.replace(self, crop_shape=self.crop_size, pretrained_backbone_weights=weights)

    @property
    def observation_delta_indices(self) -> list[int]:
        return list(range(1 - self.n_obs_steps, 1))

    @property
    def action_delta_indices(self) -> list[int]:
        return list(range(1 - self.n_obs_steps, 1 - self.n_obs_steps + self.horizon))

    @property
    def sampled_delta_indices(self) -> list[int]:
        return list(range(self.n_action_steps))

    @property
    def layer_order(self) -> tuple[str, ...]:
        backbone = r"diffusion\.rgb_encoder\.(?:\d+\.)?backbone\."  # with a number if each camera has its own
        return (
            rf"{backbone}[01]\.",
            rf"{backbone}(\d+)\.",
            r"diffusion\.(?:rgb_encoder\.(?:\d+\.)?(?:pool|out)|unet\.diffusion_step_encoder)\.",
            r"diffusion\.unet\.down_modules\.(\d+)\.",
            r"diffusion\.unet\.mid_modules\.(\d+)\.",
            r"diffusion\.unet\.up_modules\.(\d+)\.",
            r"diffusion\.unet\.final_conv\.",
        )

    @property
    def peft_presets(self) -> Mapping[str, str]:
        return {"unet": r"diffusion\.unet\..*(conv[12]\.block\.0|cond_encoder\.1)"}

    @property
    def tensor_axes(self) -> tuple[TensorAxis, ...]:
        return (
            TensorAxis(r"unet\..*\.conv1\.block\.0\.kernel", -1),
            TensorAxis(r"unet\..*\.conv2\.block\.0\.kernel", -2),
        )

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
        return {"type": self.scheduler_name, "num_warmup_steps": self.scheduler_warmup_steps}

    def check_features(self) -> None:
        if not self.robot_state_feature:
            raise InputError(f"input_features: Diffusion Policy needs '{OBS_STATE}'")
        if not self.image_features and not self.env_state_feature:
            raise InputError(
                "input_features: Diffusion Policy needs at least one image or observation.environment_state"
            )
        if len(self.action_feature.shape) != 1:
            raise InputError(f"output_features: the action must be a vector, not {self.action_feature.shape}")
        shapes = {key: feature.shape for key, feature in self.image_features.items()}
        if len(set(shapes.values())) > 1:
            raise InputError(f"input_features: all images must have one shape, they have {shapes}")
        crop = self.crop_shape if self.resize_shape is None else None
        for key, (_, height, width) in shapes.items():
            if crop is not None and (crop[0] > height or crop[1] > width):
                raise InputError(f"crop_shape {crop} does not fit into '{key}', {height} x {width}")

    @classmethod
    def tiny(cls) -> "DiffusionConfig":
        return cls(
            input_features={
                OBS_STATE: PolicyFeature(FeatureType.STATE, (3,)),
                "observation.images.top": PolicyFeature(FeatureType.VISUAL, (3, 32, 32)),
            },
            output_features={ACTION: PolicyFeature(FeatureType.ACTION, (2,))},
            horizon=8,
            n_action_steps=4,
            vision_backbone="resnet18w4",
            pretrained_backbone_weights=None,
            crop_shape=(28, 28),
            spatial_softmax_num_keypoints=3,
            down_dims=(8, 16),
            kernel_size=3,
            diffusion_step_embed_dim=8,
            num_train_timesteps=10,
            num_inference_steps=3,
        )
