"""SigLIP's image tower: a transformer over the patches of an image.

Paper: "Sigmoid Loss for Language Image Pre-Training" (https://arxiv.org/abs/2303.15343).
Mirrors `SiglipVisionModel` (without its pooling head) of `transformers.models.siglip.modeling_siglip`; module names
are theirs. Images are channel-last, the layers are one block under `lax.scan`.
"""

import dataclasses

import einops
import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from lerobot_jax.nn.activations import gelu_tanh
from lerobot_jax.nn.linear import LayerNorm, Linear
from lerobot_jax.nn.stack import Stack

NORM_EPSILON = 1e-6


@dataclasses.dataclass(frozen=True)
class SiglipSettings:
    """The sizes of an image tower."""

    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    patch_size: int = 14


SO400M = SiglipSettings(1152, 4304, 27, 16)  # PaliGemma's


class SiglipVisionModel(nnx.Module):
    """Gives a vector for each patch of an image."""

    def __init__(self, settings: SiglipSettings, image_size: int, *, dtype: jnp.dtype, rngs: nnx.Rngs):
        self.vision_model = SiglipVisionTransformer(settings, image_size, dtype=dtype, rngs=rngs)

    def __call__(self, images: Float[Array, "b h w c"]) -> Float[Array, "b l d"]:
        return self.vision_model(images)


class SiglipVisionTransformer(nnx.Module):
    """Patches, positions, layers, a norm."""

    def __init__(self, settings: SiglipSettings, image_size: int, *, dtype: jnp.dtype, rngs: nnx.Rngs):
        self.embeddings = SiglipVisionEmbeddings(settings, image_size, dtype=dtype, rngs=rngs)
        self.encoder = SiglipEncoder(settings, dtype=dtype, rngs=rngs)
        self.post_layernorm = LayerNorm(settings.hidden_size, epsilon=NORM_EPSILON, dtype=dtype, rngs=rngs)

    def __call__(self, images: Float[Array, "b h w c"]) -> Float[Array, "b l d"]:
        return self.post_layernorm(self.encoder(self.embeddings(images)))


class SiglipVisionEmbeddings(nnx.Module):
    """The patches of a square image, with learnt positions."""

    def __init__(self, settings: SiglipSettings, image_size: int, *, dtype: jnp.dtype, rngs: nnx.Rngs):
        d, patch = settings.hidden_size, settings.patch_size
        # LeCun's normal without its cut at two deviations, which transformers makes up for but does not make
        init = nnx.initializers.normal((3 * patch**2) ** -0.5 / 0.87962566103423978)
        self.patch_embedding = nnx.Conv(3, d, (patch, patch), kernel_init=init, dtype=dtype, rngs=rngs)
        self.position_embedding = nnx.Embed(
            (image_size // patch) ** 2, d, embedding_init=nnx.initializers.normal(d**-0.5), rngs=rngs
        )
        self.image_size, self.patch_size, self.dtype = image_size, patch, dtype

    def __call__(self, images: Float[Array, "b h w c"]) -> Float[Array, "b l d"]:
        size, patch = self.image_size, self.patch_size
        if images.shape[1:] != (size, size, 3):
            raise ValueError(f"SigLIP's images are {size} x {size} x 3, not {images.shape[1:]}")
        whole = size // patch * patch  # pixels that fill no patch are not seen
        images = images[:, :whole, :whole].astype(self.dtype)
        # A convolution whose windows do not overlap is one matrix product.
        patches = einops.rearrange(images, "b (gh ph) (gw pw) c -> b (gh gw) (ph pw c)", ph=patch, pw=patch)
        kernel, bias = (getattr(self.patch_embedding, name)[...] for name in ("kernel", "bias"))
        x = patches @ kernel.astype(self.dtype).reshape(1, -1, kernel.shape[-1])
        x = x + bias.astype(self.dtype)[None, None]
        return x + self.position_embedding.embedding[...].astype(self.dtype)[None]


class SiglipEncoder(nnx.Module):
    """The layers of the tower."""

    def __init__(self, settings: SiglipSettings, *, dtype: jnp.dtype, rngs: nnx.Rngs):
        def make_layer(rngs: nnx.Rngs) -> SiglipEncoderLayer:
            return SiglipEncoderLayer(settings, dtype=dtype, rngs=rngs)

        self.layers = Stack(make_layer, settings.num_hidden_layers, rngs=rngs)

    def __call__(self, x: Float[Array, "b l d"]) -> Float[Array, "b l d"]:
        return self.layers(x)


class SiglipEncoderLayer(nnx.Module):
    """Attention and two linear layers, each after its norm."""

    def __init__(self, settings: SiglipSettings, *, dtype: jnp.dtype, rngs: nnx.Rngs):
        d = settings.hidden_size
        self.layer_norm1, self.layer_norm2 = (
            LayerNorm(d, epsilon=NORM_EPSILON, dtype=dtype, rngs=rngs) for _ in range(2)
        )
        self.self_attn = SiglipAttention(d, settings.num_attention_heads, dtype=dtype, rngs=rngs)
        self.mlp = SiglipMLP(d, settings.intermediate_size, dtype=dtype, rngs=rngs)

    def __call__(self, x: Float[Array, "b l d"]) -> Float[Array, "b l d"]:
        x = x + self.self_attn(self.layer_norm1(x))
        return x + self.mlp(self.layer_norm2(x))


class SiglipAttention(nnx.Module):
    """Every patch attends to all."""

    def __init__(self, features: int, num_heads: int, *, dtype: jnp.dtype, rngs: nnx.Rngs):
        self.q_proj, self.k_proj, self.v_proj, self.out_proj = (
            _linear(features, features, dtype, rngs) for _ in range(4)
        )
        self.num_heads = num_heads

    def __call__(self, x: Float[Array, "b l d"]) -> Float[Array, "b l d"]:
        q, k, v = (
            einops.rearrange(project(x), "b l (n h) -> b l n h", n=self.num_heads)
            for project in (self.q_proj, self.k_proj, self.v_proj)
        )
        attended = jax.nn.dot_product_attention(q, k, v)
        return self.out_proj(einops.rearrange(attended, "b l n h -> b l (n h)"))


class SiglipMLP(nnx.Module):
    """Two linear layers with a GELU between."""

    def __init__(self, features: int, hidden: int, *, dtype: jnp.dtype, rngs: nnx.Rngs):
        self.fc1, self.fc2 = _linear(features, hidden, dtype, rngs), _linear(hidden, features, dtype, rngs)

    def __call__(self, x: Float[Array, "b l d"]) -> Float[Array, "b l d"]:
        return self.fc2(gelu_tanh(self.fc1(x)))


def _linear(features: int, new_features: int, dtype: jnp.dtype, rngs: nnx.Rngs) -> Linear:
    xavier, zeros = nnx.initializers.xavier_uniform(), nnx.initializers.zeros_init()
    return Linear(features, new_features, kernel_init=xavier, bias_init=zeros, dtype=dtype, rngs=rngs)
