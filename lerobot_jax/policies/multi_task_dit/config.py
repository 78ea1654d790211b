"""Settings of the multi-task Diffusion Transformer.

Mirrors `lerobot.policies.multi_task_dit.configuration_multi_task_dit.MultiTaskDiTConfig`. One difference, on
purpose: a crop that does not fit is an error, where LeRobot warns and crops nothing.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any, ClassVar

from absl import logging

from lerobot_jax.errors import InputError
from lerobot_jax.features import ACTION, OBS_STATE, FeatureType, NormalizationMode, PolicyFeature
from lerobot_jax.nn.execution import TensorAxis
from lerobot_jax.nn.noise_schedule import NoiseSchedule
from lerobot_jax.policies.config import ParamGroup, PolicyConfig
from lerobot_jax.policies.multi_task_dit.flow_matching import FlowMatching
from lerobot_jax.processors.text import TextStep, TokenizeTask


def _normalization() -> dict[str, NormalizationMode]:
    return {
        "VISUAL": NormalizationMode.MEAN_STD,
        "STATE": NormalizationMode.MIN_MAX,
        "ACTION": NormalizationMode.MIN_MAX,
    }


@dataclasses.dataclass(frozen=True)
class MultiTaskDiTConfig(PolicyConfig):
    """A transformer that denoises actions, told by CLIP what it sees and what to do; the defaults are LeRobot's."""

    type: ClassVar[str] = "multi_task_dit"

    n_obs_steps: int = 2
    """How many observation steps the policy sees: the current one and those before."""
    horizon: int = 32
    """How many action steps are generated at once, counted from the first observation."""
    n_action_steps: int = 24
    """How many of them are executed, from the current observation on; at most horizon - n_obs_steps + 1."""
    objective: str = "diffusion"
    """How it is trained and samples: diffusion or flow_matching."""
    noise_scheduler_type: str = "DDPM"
    """Diffusion: DDPM or DDIM, which needs fewer steps; both sample from the same weights."""
    num_train_timesteps: int = 100
    """Diffusion: steps of the forward process."""
    beta_schedule: str = "squaredcos_cap_v2"
    """How much noise they add: squaredcos_cap_v2, linear, scaled_linear; DDPM also sigmoid, laplace."""
    beta_start: float = 0.0001
    """Where the linear schedules begin."""
    beta_end: float = 0.02
    """Where they end."""
    prediction_type: str = "epsilon"
    """Diffusion: what is predicted: epsilon, the noise, or sample, the clean actions."""
    clip_sample: bool = True
    """Diffusion: clip clean actions while sampling; they must be normalized to fit."""
    clip_sample_range: float = 1.0
    """To which absolute value."""
    num_inference_steps: int | None = None
    """Diffusion: steps of sampling, evenly spaced; None: num_train_timesteps."""
    sigma_min: float = 0.0
    """Flow matching: how much noise is left at time 1, where the actions are."""
    num_integration_steps: int = 100
    """Flow matching: steps of sampling."""
    integration_method: str = "euler"
    """Flow matching: euler or rk4, which calls the transformer four times a step."""
    timestep_sampling_strategy: str = "beta"
    """Flow matching: how times are drawn in training: uniform, or beta, which prefers times of much noise."""
    timestep_sampling_s: float = 0.999
    """Beta: the latest time."""
    timestep_sampling_alpha: float = 1.5
    """Beta: the distribution's alpha."""
    timestep_sampling_beta: float = 1.0
    """Beta: the distribution's beta."""
    hidden_dim: int = 512
    """Width of the transformer, and of what is made of the text."""
    num_layers: int = 6
    """Its layers."""
    num_heads: int = 8
    """Its attention heads; they divide hidden_dim."""
    dropout: float = 0.1
    """Dropout of attention weights in it."""
    use_positional_encoding: bool = False
    """Learn a vector for each step of the horizon."""
    timestep_embed_dim: int = 256
    """Width of the embedding of the diffusion step or time, even."""
    use_rope: bool = True
    """Rotate queries and keys by their step."""
    rope_base: float = 10000.0
    """The slowest rotation takes about so many steps."""
    vision_encoder_name: str = "openai/clip-vit-base-patch16"
    """The CLIP model whose image tower is fine-tuned: a name on the Hub, or a folder; 'clip' must be in it."""
    use_separate_rgb_encoder_per_camera: bool = False
    """An image tower for each camera instead of one for all."""
    vision_encoder_lr_multiplier: float = 0.1
    """Their learning rate, relative to optimizer_lr."""
    image_resize_shape: tuple[int, int] | None = None
    """Resize images to (height, width) first."""
    image_crop_shape: tuple[int, int] | None = (224, 224)
    """Crop to (height, width) then; what comes out must have the size that CLIP wants."""
    image_crop_is_random: bool = True
    """Crop anywhere in training; else, and always when acting, crop the middle."""
    text_encoder_name: str = "openai/clip-vit-base-patch16"
    """The CLIP model whose text tower, frozen, and tokenizer are used; as vision_encoder_name."""
    tokenizer_max_length: int = 77
    """Longer tasks are cut to so many tokens; CLIP reads at most 77."""
    tokenizer_padding: str = "max_length"
    """Pad tasks to max_length, or to the longest of a batch; here longest is the longest of the dataset."""
    tokenizer_padding_side: str = "right"
    """right or left."""
    tokenizer_truncation: bool = True
    """Whether longer tasks are cut; else they are an error."""
    normalization_mapping: dict[str, NormalizationMode] = dataclasses.field(
        default_factory=_normalization, hash=False
    )
    """Feature type -> how it is normalized; a type that is not listed (ENV) is left as it is."""
    optimizer_lr: float = 2e-5
    """Learning rate."""
    optimizer_betas: tuple[float, float] = (0.95, 0.999)
    """Adam's."""
    optimizer_eps: float = 1e-8
    """Adam's."""
    optimizer_weight_decay: float = 0.0
    """Adam's."""
    scheduler_name: str = "cosine"
    """The learning rate's schedule, by its name in diffusers: cosine, constant or constant_with_warmup."""
    scheduler_warmup_steps: int = 0
    """Steps in which it rises."""
    do_mask_loss_for_padding: bool = False
    """Leave padded actions out of the loss."""
    drop_n_last_frames: int | None = None
    """How many frames at the end of an episode are not trained on; None: those that need padding to act."""

    def __post_init__(self):
        super().__post_init__()
        positive = (
            "horizon",
            "n_action_steps",
            "hidden_dim",
            "num_layers",
            "num_heads",
            "tokenizer_max_length",
        )
        for name in positive:
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, not {getattr(self, name)}")
        if self.n_action_steps > (most := self.horizon - self.n_obs_steps + 1):
            raise ValueError(
                f"n_action_steps must be at most horizon - n_obs_steps + 1 = {most}, not {self.n_action_steps}"
            )
        self._check_transformer()
        self._check_encoders()
        if self.objective == "diffusion":
            if not 0 <= self.beta_start <= self.beta_end <= 1:
                raise ValueError(
                    f"beta_start and beta_end must be in order and in 0..1, not {self.beta_start}, {self.beta_end}"
                )
            self.noise_schedule.timesteps(self.num_sampling_steps)
        elif self.objective == "flow_matching":
            self.flow_matching.check()
        else:
            raise ValueError(f"objective must be diffusion or flow_matching, not '{self.objective}'")
        rates = ("optimizer_lr", "optimizer_eps", "optimizer_weight_decay", "vision_encoder_lr_multiplier")
        for name in (*rates, "scheduler_warmup_steps"):
            if not getattr(self, name) >= 0:
                raise ValueError(f"{name} must not be negative, it is {getattr(self, name)}")
        if self.drop_n_last_frames is not None and self.drop_n_last_frames < 0:
            raise ValueError(f"drop_n_last_frames must not be negative, it is {self.drop_n_last_frames}")
        if self.scheduler_name not in ("cosine", "constant", "constant_with_warmup"):
            raise ValueError(
                f"scheduler_name must be cosine, constant or constant_with_warmup, not '{self.scheduler_name}'"
            )

    def _check_transformer(self) -> None:
        if self.hidden_dim % self.num_heads:
            raise ValueError(f"num_heads={self.num_heads} must divide hidden_dim={self.hidden_dim}")
        if self.use_rope and self.hidden_dim // self.num_heads % 2:
            raise ValueError(
                f"use_rope needs an even number of dimensions a head: hidden_dim / num_heads is "
                f"{self.hidden_dim // self.num_heads}"
            )
        if self.use_rope and not self.rope_base > 0:
            raise ValueError(f"rope_base must be positive, not {self.rope_base}")
        if not 0 <= self.dropout < 1:
            raise ValueError(f"dropout must be in [0, 1), not {self.dropout}")
        if self.timestep_embed_dim < 4 or self.timestep_embed_dim % 2:
            raise ValueError(f"timestep_embed_dim must be even and at least 4, not {self.timestep_embed_dim}")

    def _check_encoders(self) -> None:
        for name in ("vision_encoder_name", "text_encoder_name"):
            if "clip" not in getattr(self, name).lower():
                raise ValueError(
                    f"{name} must be a CLIP model, with 'clip' in it, not '{getattr(self, name)}'"
                )
        for name in ("image_resize_shape", "image_crop_shape"):
            if (shape := getattr(self, name)) is not None and (len(shape) != 2 or min(shape) < 1):
                raise ValueError(f"{name} must be (height, width), not {shape}")
        resize, crop = self.image_resize_shape, self.image_crop_shape
        if resize and crop and (crop[0] > resize[0] or crop[1] > resize[1]):
            raise ValueError(f"image_crop_shape {crop} does not fit into image_resize_shape {resize}")
        if self.tokenizer_padding not in ("max_length", "longest"):
            raise ValueError(
                f"tokenizer_padding must be max_length or longest, not '{self.tokenizer_padding}'"
            )
        if self.tokenizer_padding_side not in ("right", "left"):
            raise ValueError(
                f"tokenizer_padding_side must be right or left, not '{self.tokenizer_padding_side}'"
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
        """Steps of sampling by diffusion."""
        return self.num_train_timesteps if self.num_inference_steps is None else self.num_inference_steps

    @property
    def denoising_steps(self) -> tuple[str, int]:
        if self.objective == "flow_matching":
            return "num_integration_steps", self.num_integration_steps
        return "num_inference_steps", self.num_sampling_steps

    @property
    def flow_matching(self) -> FlowMatching:
        return FlowMatching(
            self.sigma_min,
            self.num_integration_steps,
            self.integration_method,
            self.timestep_sampling_strategy,
            self.timestep_sampling_s,
            self.timestep_sampling_alpha,
            self.timestep_sampling_beta,
        )

    @property
    def text_steps(self) -> tuple[TextStep, ...]:
        return (
            TokenizeTask(
                tokenizer_name=self.text_encoder_name,
                max_length=self.tokenizer_max_length,
                padding=self.tokenizer_padding,
                padding_side=self.tokenizer_padding_side,
                truncation=self.tokenizer_truncation,
            ),
        )

    @property
    def num_dropped_frames(self) -> int:
        if self.drop_n_last_frames is None:
            return self.horizon - self.n_action_steps - self.n_obs_steps + 1
        return self.drop_n_last_frames

    def exported(self) -> "MultiTaskDiTConfig":
        """Write the number of dropped frames that LeRobot derives."""
        return dataclasses.replace(self, drop_n_last_frames=self.num_dropped_frames)

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
    def param_groups(self) -> tuple[ParamGroup, ...]:
        rate = self.optimizer_lr * self.vision_encoder_lr_multiplier
        vision = r"observation_encoder\.vision_encoder"
        # It has no gradient, because the policy does not use it; PyTorch then leaves it as it is.
        unused = ParamGroup(rf"{vision}.*\.post_layernorm\.", rate, weight_decay=0.0)
        return (unused, ParamGroup(vision, rate))

    @property
    def layer_order(self) -> tuple[str, ...]:
        vision = r"observation_encoder\.vision_encoders?\.(?:\d+\.)?model\.vision_model"
        return (
            rf"{vision}\.(?:embeddings|pre_layrnorm)\.",
            rf"{vision}\.encoder\.layers\.block\.",
            rf"{vision}\.post_layernorm\.|observation_encoder\.text_encoder\.",
            r"noise_predictor\.(?:input_proj|pos_embedding|time_mlp)",
            r"noise_predictor\.transformer_blocks\.(\d+)\.",
            r"noise_predictor\.output_proj\.",
        )

    @property
    def peft_presets(self) -> Mapping[str, str]:
        block = r"(attn\.(qkv_proj|out_proj)|multihead_attn|mlp\.[02])"
        layer = r"(self_attn\.[qkv]_proj|self_attn\.out_proj|mlp\.fc[12])"
        return {
            "transformer": rf"noise_predictor\.transformer_blocks\.\d+\.{block}",
            "vision_encoder": rf"observation_encoder\.vision_encoder\..*\.layers\.\d+\.{layer}",
        }

    @property
    def tensor_axes(self) -> tuple[TensorAxis, ...]:
        return (
            TensorAxis(r"mlp\.0\.kernel", -1),
            TensorAxis(r"mlp\.2\.kernel", -2),
            TensorAxis(r"(fc1|[qkv]_proj)\.kernel", -1),  # CLIP
            TensorAxis(r"(fc2|self_attn\.out_proj)\.kernel", -2),
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

    @property
    def seen_size(self) -> tuple[int, int] | None:
        """(height, width) of what the image tower sees; None without cameras."""
        for _, height, width in (feature.shape for feature in self.image_features.values()):
            return self.image_crop_shape or self.image_resize_shape or (height, width)
        return None

    def check_features(self) -> None:
        if not self.robot_state_feature:
            raise InputError(f"input_features: the multi-task DiT policy needs '{OBS_STATE}'")
        if len(self.action_feature.shape) != 1:
            raise InputError(f"output_features: the action must be a vector, not {self.action_feature.shape}")
        shapes = {key: feature.shape for key, feature in self.image_features.items()}
        if len(set(shapes.values())) > 1:
            raise InputError(f"input_features: all images must have one shape, they have {shapes}")
        crop = self.image_crop_shape
        for key, (_, *image) in shapes.items():
            height, width = self.image_resize_shape or image
            if crop is not None and (crop[0] > height or crop[1] > width):
                raise InputError(
                    f"image_crop_shape {crop} does not fit into '{key}', {height} x {width}; give a smaller one, "
                    "None, or image_resize_shape"
                )
        if self.env_state_feature is not None:
            logging.warning(
                "a multi_task_dit policy does not look at observation.environment_state, as in LeRobot"
            )

    @classmethod
    def tiny(cls) -> "MultiTaskDiTConfig":
        return cls(
            input_features={
                OBS_STATE: PolicyFeature(FeatureType.STATE, (3,)),
                "observation.images.top": PolicyFeature(FeatureType.VISUAL, (3, 36, 40)),
            },
            output_features={ACTION: PolicyFeature(FeatureType.ACTION, (2,))},
            horizon=8,
            n_action_steps=4,
            objective="flow_matching",
            num_integration_steps=3,
            hidden_dim=16,
            num_layers=2,
            num_heads=2,
            timestep_embed_dim=8,
            vision_encoder_name="tests/clip-tiny",
            image_crop_shape=(32, 32),
            text_encoder_name="tests/clip-tiny",
            tokenizer_max_length=24,
            drop_n_last_frames=3,
        )
