"""A policy of pi0's size: the same matrices and the same attention, without its weights, tokenizer and details.

SigLIP So400m reads the cameras, Gemma 2B and an expert of 300M attend to each other, and flow matching gives the
actions (Black et al., arXiv:2410.24164). It serves to plan and to measure at that size, not to act.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any, ClassVar

import einops
import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, PRNGKeyArray

from lerobot_jax.features import ACTION, OBS_IMAGES, OBS_STATE, FeatureType, NormalizationMode, PolicyFeature
from lerobot_jax.nn.execution import TensorAxis
from lerobot_jax.nn.linear import Embedding, LayerNorm, Linear
from lerobot_jax.nn.stack import Stack
from lerobot_jax.policies.base import Batch, Metrics, Policy
from lerobot_jax.policies.config import PolicyConfig


@dataclasses.dataclass(frozen=True)
class Pi0SizeConfig(PolicyConfig):
    """The sizes; those of the language model come before those of the action expert."""

    type: ClassVar[str] = "benchmarks.pi0_size"

    use_amp: bool = True
    normalization_mapping: dict[str, NormalizationMode] = dataclasses.field(
        default_factory=lambda: dict.fromkeys(("STATE", "ACTION"), NormalizationMode.MEAN_STD), hash=False
    )
    num_cameras: int = 3
    image_size: int = 224
    patch: int = 14
    vision_width: int = 1152
    vision_mlp: int = 4304
    vision_depth: int = 27
    vision_heads: int = 16
    widths: tuple[int, int] = (2048, 1024)
    mlps: tuple[int, int] = (16384, 4096)
    depth: int = 18
    heads: int = 8
    head_dim: int = 256
    vocabulary: int = 257152
    num_tokens: int = 48
    chunk_size: int = 50
    num_dims: int = 32
    """Dimensions of the state and of an action."""
    num_inference_steps: int = 10

    def __post_init__(self):
        super().__post_init__()
        images = {f"{OBS_IMAGES}.{i}": (3, self.image_size, self.image_size) for i in range(self.num_cameras)}
        inputs = {key: PolicyFeature(FeatureType.VISUAL, shape) for key, shape in images.items()}
        inputs[OBS_STATE] = PolicyFeature(FeatureType.STATE, (self.num_dims,))
        object.__setattr__(self, "input_features", inputs)
        outputs = {ACTION: PolicyFeature(FeatureType.ACTION, (self.num_dims,))}
        object.__setattr__(self, "output_features", outputs)

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
    def optimizer_preset(self) -> Mapping[str, Any]:
        return {"type": "adamw", "lr": 2.5e-5, "weight_decay": 1e-10, "grad_clip_norm": 1.0}

    @property
    def tensor_axes(self) -> tuple[TensorAxis, ...]:
        return (TensorAxis(r"(q|gate|up|fc1)\.kernel", -1), TensorAxis(r"(o|down|fc2)\.kernel", -2))

    def check_features(self) -> None:
        pass

    @classmethod
    def tiny(cls) -> "Pi0SizeConfig":
        vision = {
            "image_size": 32,
            "patch": 16,
            "vision_width": 64,
            "vision_mlp": 128,
            "vision_depth": 2,
            "vision_heads": 2,
        }
        text = {"vocabulary": 512, "num_tokens": 8, "widths": (64, 32), "mlps": (128, 64), "depth": 3}
        return cls(num_cameras=2, heads=2, head_dim=16, chunk_size=4, num_dims=8, **vision, **text)


class Pi0SizePolicy(Policy):
    """Flow matching with the squared error of the velocity."""

    config: Pi0SizeConfig

    def __init__(self, config: Pi0SizeConfig, *, rngs: nnx.Rngs):
        self.config = config
        dtype, (wide, narrow) = config.compute_dtype, config.widths
        self.embedding = Embedding(config.vocabulary, wide, rngs=rngs)
        self.patches = Linear(3 * config.patch**2, config.vision_width, dtype=dtype, rngs=rngs)
        positions = ((config.image_size // config.patch) ** 2, config.vision_width)
        self.positions = nnx.Param(0.02 * jax.random.normal(rngs.params(), positions))
        self.vision = Stack(lambda rngs: VisionBlock(config, rngs=rngs), config.vision_depth, rngs=rngs)
        self.vision_norm = LayerNorm(config.vision_width, dtype=dtype, rngs=rngs)
        self.vision_proj = Linear(config.vision_width, wide, dtype=dtype, rngs=rngs)
        self.layers = Stack(lambda rngs: JointBlock(config, rngs=rngs), config.depth, rngs=rngs)
        self.state_proj = Linear(config.num_dims, narrow, dtype=dtype, rngs=rngs)
        self.action_in = Linear(config.num_dims + 1, narrow, dtype=dtype, rngs=rngs)
        self.norm = LayerNorm(narrow, dtype=dtype, rngs=rngs)
        self.action_out = Linear(narrow, config.num_dims, rngs=rngs)

    def loss(
        self,
        batch: Batch,
        *,
        key: PRNGKeyArray,
        train: bool,
        reduction: str = "mean",
    ) -> tuple[Float[Array, "..."], Metrics]:
        actions, (noise_key, time_key) = batch[ACTION], jax.random.split(key)
        noise = jax.random.normal(noise_key, actions.shape)
        time = jax.random.uniform(time_key, (len(actions), 1, 1))
        velocity = self.velocity(self.prefix(batch), batch, time * noise + (1 - time) * actions, time)
        losses = jnp.mean(jnp.square(velocity - (noise - actions)), axis=(1, 2))
        return (losses.mean() if reduction == "mean" else losses), {}

    def sample_actions(self, batch: Batch, *, key: PRNGKeyArray) -> Float[Array, "b chunk act"]:
        prefix, num_steps = self.prefix(batch), self.config.num_inference_steps
        shape = (len(prefix), self.config.chunk_size, self.config.num_dims)

        def step(i: Array, x: Float[Array, "b chunk act"]) -> Float[Array, "b chunk act"]:
            time = jnp.full((len(x), 1, 1), 1 - i / num_steps)
            return x - self.velocity(prefix, batch, x, time) / num_steps

        return jax.lax.fori_loop(0, num_steps, step, jax.random.normal(key, shape))

    def prefix(self, batch: Batch) -> Float[Array, "b l d"]:
        """Read the cameras, and tokens that are always the same."""
        images = jnp.stack([batch[key] for key in self.config.image_features], axis=1)
        num = len(images)
        patch = self.config.patch
        x = einops.rearrange(images, "b v (h p) (w q) c -> (b v) (h w) (p q c)", p=patch, q=patch)
        x = self.patches(x) + self.positions[...][None].astype(self.config.compute_dtype)
        x = self.vision_proj(self.vision_norm(self.vision(x)))
        x = einops.rearrange(x, "(b v) l d -> b (v l) d", b=num)
        tokens = jnp.broadcast_to(jnp.arange(self.config.num_tokens)[None], (num, self.config.num_tokens))
        return jnp.concatenate([x, self.embedding(tokens).astype(x.dtype)], axis=1)

    def velocity(
        self,
        prefix: Float[Array, "b l d"],
        batch: Batch,
        x_t: Float[Array, "b chunk act"],
        time: Float[Array, "b 1 1"],
    ) -> Float[Array, "b chunk act"]:
        """Let state and noisy actions attend to the prefix and to each other."""
        times = jnp.broadcast_to(time, (*x_t.shape[:2], 1))
        actions = self.action_in(jnp.concatenate([x_t, times], axis=-1))
        suffix = jnp.concatenate([self.state_proj(batch[OBS_STATE])[:, None], actions], axis=1)
        num, total = prefix.shape[1], prefix.shape[1] + suffix.shape[1]
        mask = (jnp.arange(total)[None] < num) | (jnp.arange(total)[:, None] >= num)  # l l
        _, suffix = self.layers((prefix, suffix), mask[None, None, None])
        return self.action_out(self.norm(suffix[:, 1:]).astype(jnp.float32))


class VisionBlock(nnx.Module):
    """Attention and an MLP."""

    def __init__(self, config: Pi0SizeConfig, *, rngs: nnx.Rngs):
        d, wide, dtype = config.vision_width, config.vision_mlp, config.compute_dtype
        self.norm1, self.norm2 = (LayerNorm(d, dtype=dtype, rngs=rngs) for _ in range(2))
        self.q, self.k, self.v, self.o = (Linear(d, d, dtype=dtype, rngs=rngs) for _ in range(4))
        self.fc1 = Linear(d, wide, dtype=dtype, rngs=rngs)
        self.fc2 = Linear(wide, d, dtype=dtype, rngs=rngs)
        self.heads = config.vision_heads

    def __call__(self, x: Float[Array, "b l d"]) -> Float[Array, "b l d"]:
        h = self.norm1(x)
        q, k, v = (
            einops.rearrange(layer(h), "b l (n h) -> b l n h", n=self.heads)
            for layer in (self.q, self.k, self.v)
        )
        x = x + self.o(einops.rearrange(jax.nn.dot_product_attention(q, k, v), "b l n h -> b l (n h)"))
        return x + self.fc2(jax.nn.gelu(self.fc1(self.norm2(x))))


class JointBlock(nnx.Module):
    """Two experts, each with its own weights, in one attention with a shared key and value head."""

    def __init__(self, config: Pi0SizeConfig, *, rngs: nnx.Rngs):
        self.experts = nnx.List(
            [Expert(config, *sizes, rngs=rngs) for sizes in zip(config.widths, config.mlps, strict=True)]
        )

    def __call__(self, xs: tuple[Array, Array], mask: Array) -> tuple[Array, Array]:
        parts = zip(*(expert.project(x) for expert, x in zip(self.experts, xs, strict=True)), strict=True)
        q, k, v = (jnp.concatenate(part, axis=1) for part in parts)
        attended = jax.nn.dot_product_attention(q, k, v, mask=mask[0])
        attended = einops.rearrange(attended, "b l n h -> b l (n h)")
        split = jnp.split(attended, [xs[0].shape[1]], axis=1)
        first, second = (expert(x, y) for expert, x, y in zip(self.experts, xs, split, strict=True))
        return first, second


class Expert(nnx.Module):
    """A layer of one of the two transformers."""

    def __init__(self, config: Pi0SizeConfig, d: int, wide: int, *, rngs: nnx.Rngs):
        dtype, inner = config.compute_dtype, config.heads * config.head_dim
        self.norm1, self.norm2 = (LayerNorm(d, dtype=dtype, rngs=rngs) for _ in range(2))
        self.q = Linear(d, inner, dtype=dtype, rngs=rngs)
        self.k, self.v = (Linear(d, config.head_dim, dtype=dtype, rngs=rngs) for _ in range(2))
        self.o = Linear(inner, d, dtype=dtype, rngs=rngs)
        self.gate, self.up = (Linear(d, wide, dtype=dtype, rngs=rngs) for _ in range(2))
        self.down = Linear(wide, d, dtype=dtype, rngs=rngs)
        self.heads = config.heads

    def project(self, x: Float[Array, "b l d"]) -> tuple[Array, Array, Array]:
        """Give queries, and the keys and values that all of them share."""
        h = self.norm1(x)
        q = einops.rearrange(self.q(h), "b l (n h) -> b l n h", n=self.heads)
        return q, self.k(h)[:, :, None], self.v(h)[:, :, None]

    def __call__(self, x: Float[Array, "b l d"], attended: Float[Array, "b l i"]) -> Float[Array, "b l d"]:
        x = x + self.o(attended)
        h = self.norm2(x)
        return x + self.down(jax.nn.gelu(self.gate(h)) * self.up(h))
