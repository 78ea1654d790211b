"""Settings of pi0.

Mirrors `lerobot.policies.pi0.configuration_pi0.PI0Config`. One difference, on purpose: states and actions that are
wider than `max_state_dim` and `max_action_dim` are an error that says so.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any, ClassVar

import jax.numpy as jnp

from lerobot_jax.errors import InputError
from lerobot_jax.features import (
    ACTION,
    EMPTY_CAMERA,
    OBS_STATE,
    FeatureType,
    NormalizationMode,
    PolicyFeature,
)
from lerobot_jax.nn.execution import TensorAxis
from lerobot_jax.nn.gemma import GEMMA_SIZES
from lerobot_jax.nn.paligemma import PALIGEMMA_SIZES
from lerobot_jax.policies.config import ParamGroup, PolicyConfig
from lerobot_jax.policies.rtc import RTCConfig
from lerobot_jax.processors.actions import RelativeActions
from lerobot_jax.processors.text import Pi0NewLine, TextStep, TokenizeTask

VLM = r"model\.paligemma_with_expert\.paligemma\.model"
LANGUAGE = rf"{VLM}\.language_model"
EXPERT = r"model\.paligemma_with_expert\.gemma_expert\.model"


def _normalization() -> dict[str, NormalizationMode]:
    return {
        "VISUAL": NormalizationMode.IDENTITY,
        "STATE": NormalizationMode.MEAN_STD,
        "ACTION": NormalizationMode.MEAN_STD,
    }


@dataclasses.dataclass(frozen=True)
class PI0Config(PolicyConfig):
    """A vision-language model with an action expert, trained by flow matching; the defaults are LeRobot's."""

    type: ClassVar[str] = "pi0"

    paligemma_variant: str = "gemma_2b"
    """Size of the language model: gemma_2b or gemma_300m; dummy for tests."""
    action_expert_variant: str = "gemma_300m"
    """Size of the action expert: gemma_300m or gemma_2b; dummy for tests."""
    dtype: str = "float32"
    """bfloat16: both transformers compute in it, the image tower, norms and projections in float32; with use_amp,
    everything computes in bfloat16."""
    chunk_size: int = 50
    """How many action steps are predicted at once."""
    n_action_steps: int = 50
    """How many of them are executed before the next prediction."""
    max_state_dim: int = 32
    """States are filled up with zeros to so many dimensions."""
    max_action_dim: int = 32
    """Actions, too; the dimensions added are not in the loss."""
    num_inference_steps: int = 10
    """Steps from noise to actions."""
    time_sampling_beta_alpha: float = 1.5
    """Times are drawn in training from a beta distribution: its alpha."""
    time_sampling_beta_beta: float = 1.0
    """Its beta."""
    time_sampling_scale: float = 0.999
    """What is drawn is multiplied by it,"""
    time_sampling_offset: float = 0.001
    """and this is added."""
    min_period: float = 4e-3
    """Shortest period in the embedding of the time."""
    max_period: float = 4.0
    """Longest period."""
    use_relative_actions: bool = False
    """Predict actions minus the state."""
    relative_exclude_joints: tuple[str, ...] = ("gripper",)
    """Joints that stay absolute then: all whose name contains one of these."""
    action_feature_names: tuple[str, ...] | None = None
    """The name of each action dimension; None: what the dataset says."""
    rtc_config: RTCConfig | None = None
    """Real-time chunking when acting; any of its settings turns it on. None: off."""
    rtc_training_delay: int = dataclasses.field(default=0, metadata={"in_lerobot": False})
    """In training, give up to so many of a chunk's first actions, and learn to go on from them; for
    rtc_config.guidance=trained. 0: none."""
    image_resolution: tuple[int, int] = (224, 224)
    """Images are resized to (height, width), black bars fill the rest; height and width are equal."""
    empty_cameras: int = 0
    """Add so many cameras that show nothing, for a checkpoint that expects more than there are."""
    normalization_mapping: dict[str, NormalizationMode] = dataclasses.field(
        default_factory=_normalization, hash=False
    )
    """Feature type -> how it is normalized; a type that is not listed is left as it is."""
    gradient_checkpointing: bool = False
    """Stock LeRobot's; here, layers are computed again in the backward pass anyway (see remat)."""
    compile_model: bool = False
    """Stock LeRobot's: use torch.compile."""
    compile_mode: str = "max-autotune"
    """Stock LeRobot's: its mode."""
    freeze_vision_encoder: bool = False
    """Do not train the image tower."""
    train_expert_only: bool = False
    """Train the action expert and the projections, not the vision-language model."""
    optimizer_lr: float = 2.5e-5
    """Learning rate."""
    optimizer_betas: tuple[float, float] = (0.9, 0.95)
    """AdamW's."""
    optimizer_eps: float = 1e-8
    """AdamW's."""
    optimizer_weight_decay: float = 0.01
    """AdamW's."""
    optimizer_grad_clip_norm: float = 1.0
    """Gradients are scaled down to this norm."""
    scheduler_warmup_steps: int = 1_000
    """Steps in which the learning rate rises,"""
    scheduler_decay_steps: int = 30_000
    """and after which it has fallen; both are scaled down in a shorter run."""
    scheduler_decay_lr: float = 2.5e-6
    """To which rate."""
    tokenizer_max_length: int = 48
    """Tokens of the prompt; longer ones are cut."""
    tokenizer_name: str = dataclasses.field(
        default="google/paligemma-3b-pt-224", metadata={"in_lerobot": False}
    )
    """The tokenizer: a name on the Hub, or a folder."""

    def __post_init__(self):
        super().__post_init__()
        self._check()
        self._agree_on_target()

    def _agree_on_target(self) -> None:
        """Let `action_target` say what LeRobot's settings say; but a dataset's names of joints count."""
        target = self.action_target
        if target.representation == "delta":
            return
        joints = self.relative_exclude_joints
        names = target.action_names or self.action_feature_names
        if self.use_relative_actions:
            target = dataclasses.replace(
                target, representation="relative", exclude_joints=tuple(joints), action_names=names
            )
        else:  # LeRobot's step is saved even then, with these in it
            joints = target.exclude_joints or joints
            target = dataclasses.replace(target, exclude_joints=(), action_names=None)
        object.__setattr__(self, "action_target", target)
        object.__setattr__(self, "relative_exclude_joints", tuple(joints))
        object.__setattr__(self, "action_feature_names", names)

    def _check(self) -> None:
        positive = (
            "chunk_size",
            "n_action_steps",
            "max_state_dim",
            "max_action_dim",
            "num_inference_steps",
            "tokenizer_max_length",
        )
        for name in positive:
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, not {getattr(self, name)}")
        if not 0 <= self.rtc_training_delay < self.chunk_size:
            raise ValueError(
                f"rtc_training_delay must be from 0 to chunk_size - 1 = {self.chunk_size - 1}, not "
                f"{self.rtc_training_delay}"
            )
        if self.n_action_steps > self.chunk_size:
            raise ValueError(
                f"n_action_steps ({self.n_action_steps}) must not be greater than chunk_size "
                f"({self.chunk_size})"
            )
        for name, sizes in (
            ("paligemma_variant", PALIGEMMA_SIZES),
            ("action_expert_variant", GEMMA_SIZES),
        ):
            if getattr(self, name) not in sizes:
                raise ValueError(f"{name} must be one of {', '.join(sizes)}, not '{getattr(self, name)}'")
        if self.dtype not in ("float32", "bfloat16"):
            raise ValueError(f"dtype must be float32 or bfloat16, not '{self.dtype}'")
        text, expert = PALIGEMMA_SIZES[self.paligemma_variant].text, GEMMA_SIZES[self.action_expert_variant]
        if (text.depth, text.num_heads, text.head_dim) != (expert.depth, expert.num_heads, expert.head_dim):
            raise ValueError(
                f"paligemma_variant={self.paligemma_variant} and action_expert_variant="
                f"{self.action_expert_variant} cannot attend to each other: they must have as many layers and heads"
            )
        if len(self.image_resolution) != 2 or self.image_resolution[0] != self.image_resolution[1]:
            raise ValueError(
                f"image_resolution must be two equal numbers, PaliGemma's images are square; it is "
                f"{self.image_resolution}"
            )
        if self.image_resolution[0] < (patch := PALIGEMMA_SIZES[self.paligemma_variant].vision.patch_size):
            raise ValueError(f"image_resolution must be at least {patch}, not {self.image_resolution[0]}")
        for name in ("time_sampling_beta_alpha", "time_sampling_beta_beta", "min_period", "max_period"):
            if not getattr(self, name) > 0:
                raise ValueError(f"{name} must be positive, not {getattr(self, name)}")
        for name in ("empty_cameras", "optimizer_lr", "optimizer_eps", "optimizer_weight_decay"):
            if not getattr(self, name) >= 0:
                raise ValueError(f"{name} must not be negative, it is {getattr(self, name)}")
        representation = self.action_target.representation
        if self.use_relative_actions and representation == "delta":
            raise ValueError("use_relative_actions contradicts action_target.representation=delta")
        if not self.use_relative_actions and representation == "relative":
            raise ValueError(
                "use_relative_actions=False contradicts action_target.representation=relative; say it by "
                "use_relative_actions, relative_exclude_joints and action_feature_names, or change both"
            )

    @property
    def compute_dtype(self) -> jnp.dtype:
        """The type in which the transformers compute."""
        return jnp.dtype(jnp.bfloat16 if self.use_amp or self.dtype == "bfloat16" else jnp.float32)

    @property
    def projection_dtype(self) -> jnp.dtype:
        """The type in which the rest computes: the image tower, projections, adaptive norms' layers."""
        return jnp.dtype(jnp.bfloat16 if self.use_amp else jnp.float32)

    @property
    def denoising_steps(self) -> tuple[str, int]:
        return "num_inference_steps", self.num_inference_steps

    @property
    def observation_delta_indices(self) -> None:
        return None

    @property
    def action_delta_indices(self) -> list[int]:
        return list(range(self.chunk_size))

    @property
    def resizes_images(self) -> bool:
        return True

    @property
    def pads_vectors(self) -> bool:
        return True

    @property
    def optional_cameras(self) -> bool:
        return True

    @property
    def added_inputs(self) -> Mapping[str, PolicyFeature]:
        empty = PolicyFeature(FeatureType.VISUAL, (3, *self.image_resolution))
        return {f"{EMPTY_CAMERA}{i}": empty for i in range(self.empty_cameras)}

    @property
    def disabled_relative_step(self) -> RelativeActions:
        return RelativeActions(False, self.relative_exclude_joints, self.action_feature_names)

    @property
    def text_steps(self) -> tuple[TextStep, ...]:
        return (Pi0NewLine(), self._tokenize)

    @property
    def _tokenize(self) -> TokenizeTask:
        return TokenizeTask(
            max_length=self.tokenizer_max_length,
            padding_side="right",
            padding="max_length",
            tokenizer_name=self.tokenizer_name,
        )

    @property
    def frozen_params(self) -> tuple[str, ...]:
        unused = r"model\.paligemma_with_expert\..*lm_head\."
        if self.train_expert_only:
            return (unused, rf"{VLM}\.")
        return (unused, rf"{VLM}\.vision_tower\.") if self.freeze_vision_encoder else (unused,)

    @property
    def param_groups(self) -> tuple[ParamGroup, ...]:
        # Nothing sees the last layer's output of the prefix: PyTorch leaves what has no gradient as it is.
        after_attention = r"(?:self_attn\.o_proj|mlp|post_attention_layernorm)\."
        last = ParamGroup(rf"{LANGUAGE}\.layers\.block\.{after_attention}", weight_decay=0.0, layer=-1)
        return (last, ParamGroup(rf"{LANGUAGE}\.norm\.", weight_decay=0.0))

    @property
    def layer_order(self) -> tuple[str, ...]:
        tower = rf"{VLM}\.vision_tower\.vision_model"
        inputs = rf"{LANGUAGE}\.embed_tokens\.|model\.(?:state_proj|action_in_proj|action_time_mlp|time_mlp)"
        return (
            rf"{tower}\.embeddings\.",
            rf"{tower}\.encoder\.layers\.block\.",
            rf"{tower}\.post_layernorm\.|{VLM}\.multi_modal_projector\.|{inputs}",
            rf"(?:{LANGUAGE}|{EXPERT})\.layers\.block\.",
            rf"(?:{LANGUAGE}|{EXPERT})\.norm\.|model\.action_out_proj\.|.*lm_head\.",
        )

    @property
    def default_peft_targets(self) -> Mapping[str, Any]:
        projections = "state_proj|action_in_proj|action_out_proj|action_time_mlp_in|action_time_mlp_out"
        return {
            "target_modules": rf"(.*\.gemma_expert\..*\.self_attn\.(q|v)_proj|model\.({projections}))",
            "modules_to_save": [],
        }

    @property
    def peft_presets(self) -> Mapping[str, str]:
        layer = r"layers\.\d+\.(self_attn\.[qkvo]_proj|mlp\.(gate|up|down)_proj)"
        tower = r"(self_attn\.([qkv]|out)_proj|mlp\.fc[12])"
        return {
            "vlm": rf"{LANGUAGE}\.{layer}",
            "action_expert": rf"{EXPERT}\.{layer}",
            "vision_encoder": rf"{VLM}\.vision_tower\..*\.layers\.\d+\.{tower}",
        }

    @property
    def tensor_axes(self) -> tuple[TensorAxis, ...]:
        return (
            TensorAxis(r"(q_proj|gate_proj|up_proj|fc1)\.kernel", -1),
            TensorAxis(r"(o_proj|down_proj|fc2|out_proj)\.kernel", -2),
            TensorAxis(r"vision_model\..*(k_proj|v_proj)\.kernel", -1),
        )

    @property
    def optimizer_preset(self) -> Mapping[str, Any]:
        return {
            "type": "adamw",
            "lr": self.optimizer_lr,
            "betas": self.optimizer_betas,
            "eps": self.optimizer_eps,
            "weight_decay": self.optimizer_weight_decay,
            "grad_clip_norm": self.optimizer_grad_clip_norm,
        }

    @property
    def scheduler_preset(self) -> Mapping[str, Any]:
        return {
            "type": "cosine_decay_with_warmup",
            "peak_lr": self.optimizer_lr,
            "decay_lr": self.scheduler_decay_lr,
            "num_warmup_steps": self.scheduler_warmup_steps,
            "num_decay_steps": self.scheduler_decay_steps,
        }

    def check_features(self) -> None:
        cameras = [key for key in self.image_features if not key.startswith(EMPTY_CAMERA)]
        if not cameras:
            raise InputError(f"input_features: {self.type} needs at least one camera")
        if self.robot_state_feature is None:
            raise InputError(f"input_features: {self.type} needs '{OBS_STATE}'")
        for name, feature, most in (
            ("max_state_dim", self.robot_state_feature, self.max_state_dim),
            ("max_action_dim", self.action_feature, self.max_action_dim),
        ):
            if len(feature.shape) != 1 or feature.shape[0] > most:
                raise InputError(f"{name} is {most}, too few for a vector of shape {feature.shape}")

    @classmethod
    def tiny(cls) -> "PI0Config":
        return cls(
            input_features={
                OBS_STATE: PolicyFeature(FeatureType.STATE, (3,)),
                "observation.images.top": PolicyFeature(FeatureType.VISUAL, (3, 30, 40)),
                "observation.images.wrist": PolicyFeature(FeatureType.VISUAL, (3, 28, 28)),
            },
            output_features={ACTION: PolicyFeature(FeatureType.ACTION, (2,))},
            paligemma_variant="dummy",
            action_expert_variant="dummy",
            chunk_size=6,
            n_action_steps=4,
            max_state_dim=8,
            max_action_dim=8,
            num_inference_steps=3,
            image_resolution=(28, 28),
            tokenizer_max_length=16,
        )
