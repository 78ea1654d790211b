"""CLIP's two towers: a transformer over the patches of an image, and one over the tokens of a text.

Paper: "Learning Transferable Visual Models From Natural Language Supervision" (https://arxiv.org/abs/2103.00020).
Mirrors `CLIPVisionModel` and `CLIPTextModel` of `transformers.models.clip.modeling_clip`; module names are theirs
(`pre_layrnorm` too). Images are channel-last, the layers are one block under `lax.scan`.
"""

import functools
from collections.abc import Callable

import einops
import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Bool, Float, Int

from lerobot_jax.nn.attention import attend
from lerobot_jax.nn.clip_settings import CLIPSettings, CLIPTextSettings, CLIPVisionSettings
from lerobot_jax.nn.linear import LayerNorm, Linear
from lerobot_jax.nn.stack import Stack

OLD_EOS = 2  # what config.json says of models that were published with a wrong eos_token_id


class CLIPVisionModel(nnx.Module):
    """Gives a vector for the whole image (the class token) and one for each patch."""

    def __init__(self, settings: CLIPVisionSettings, *, dtype: jnp.dtype, rngs: nnx.Rngs):
        self.vision_model = CLIPVisionTransformer(settings, dtype=dtype, rngs=rngs)

    def __call__(self, images: Float[Array, "b h w c"]) -> Float[Array, "b l d"]:
        """Give the last layer's vectors, the class token's first; `post_layernorm` is not applied."""
        return self.vision_model(images)


class CLIPVisionTransformer(nnx.Module):
    """Patches, positions, layers."""

    def __init__(self, settings: CLIPVisionSettings, *, dtype: jnp.dtype, rngs: nnx.Rngs):
        norm = functools.partial(
            LayerNorm, settings.hidden_size, epsilon=settings.layer_norm_eps, dtype=dtype, rngs=rngs
        )
        self.embeddings = CLIPVisionEmbeddings(settings, dtype=dtype, rngs=rngs)
        self.pre_layrnorm = norm()
        self.encoder = CLIPEncoder(settings, dtype=dtype, rngs=rngs)
        self.post_layernorm = norm()

    def __call__(self, images: Float[Array, "b h w c"]) -> Float[Array, "b l d"]:
        return self.encoder(self.pre_layrnorm(self.embeddings(images)))


class CLIPVisionEmbeddings(nnx.Module):
    """A class token and the patches of an image, with learnt positions."""

    def __init__(self, settings: CLIPVisionSettings, *, dtype: jnp.dtype, rngs: nnx.Rngs):
        d = settings.hidden_size
        self.class_embedding = nnx.Param(jax.random.normal(rngs.params(), (d,)) * d**-0.5)
        self.patch_embedding = PatchEmbedding(settings, dtype=dtype, rngs=rngs)
        self.position_embedding = _embedding(settings.grid_size**2 + 1, d, rngs)
        self.dtype = dtype

    def __call__(self, images: Float[Array, "b h w c"]) -> Float[Array, "b l d"]:
        patches = self.patch_embedding(images)  # b patches d
        first = jnp.broadcast_to(
            self.class_embedding[...].astype(self.dtype), (len(images), 1, patches.shape[-1])
        )
        positions = self.position_embedding.embedding[...].astype(self.dtype)
        return jnp.concatenate([first, patches], axis=1) + positions[None]


class PatchEmbedding(nnx.Conv):
    """A convolution whose windows do not overlap: one matrix product."""

    def __init__(self, settings: CLIPVisionSettings, *, dtype: jnp.dtype, rngs: nnx.Rngs):
        super().__init__(
            settings.num_channels,
            settings.hidden_size,
            (settings.patch_size, settings.patch_size),
            use_bias=False,
            kernel_init=nnx.initializers.normal(0.02),
            dtype=dtype,
            rngs=rngs,
        )
        self.settings = settings

    def __call__(self, images: Float[Array, "b h w c"]) -> Float[Array, "b patches d"]:
        size, grid, patch = self.settings.image_size, self.settings.grid_size, self.settings.patch_size
        if images.shape[1:] != (size, size, self.settings.num_channels):
            raise ValueError(f"CLIP's images are {size} x {size}, not {images.shape[1]} x {images.shape[2]}")
        images = images[:, : grid * patch, : grid * patch].astype(self.dtype)
        patches = einops.rearrange(images, "b (gh ph) (gw pw) c -> b (gh gw) (ph pw c)", ph=patch, pw=patch)
        kernel = self.kernel[...].astype(self.dtype)  # ph pw c d
        return patches @ kernel.reshape(1, -1, kernel.shape[-1])


class CLIPTextModel(nnx.Module):
    """Gives one vector for a text."""

    def __init__(self, settings: CLIPTextSettings, *, dtype: jnp.dtype, rngs: nnx.Rngs):
        self.text_model = CLIPTextTransformer(settings, dtype=dtype, rngs=rngs)

    def __call__(self, tokens: Int[Array, "b l"], mask: Bool[Array, "b l"]) -> Float[Array, "b d"]:
        """Give the vector at the text's end; `mask` is True for tokens and False for padding."""
        return self.text_model(tokens, mask)


class CLIPTextTransformer(nnx.Module):
    """Tokens, positions, layers in which a token sees those before it."""

    def __init__(self, settings: CLIPTextSettings, *, dtype: jnp.dtype, rngs: nnx.Rngs):
        d, epsilon = settings.hidden_size, settings.layer_norm_eps
        self.embeddings = CLIPTextEmbeddings(settings, dtype=dtype, rngs=rngs)
        self.encoder = CLIPEncoder(settings, dtype=dtype, rngs=rngs)
        self.final_layer_norm = LayerNorm(d, epsilon=epsilon, dtype=dtype, rngs=rngs)
        self.settings = settings

    def __call__(self, tokens: Int[Array, "b l"], mask: Bool[Array, "b l"]) -> Float[Array, "b d"]:
        causal = jnp.tri(tokens.shape[1], dtype=bool)[None, None]  # 1 1 l l
        x = self.encoder(self.embeddings(tokens), causal & mask[:, None, None, :])
        eos = self.settings.eos_token_id
        # With the old number, the end is the largest token; else the first of its number. Padding may have it too.
        end = jnp.argmax(tokens if eos == OLD_EOS else tokens == eos, axis=1)
        last = jnp.take_along_axis(x, end[:, None, None], axis=1)[:, 0]
        return self.final_layer_norm(last)


class CLIPTextEmbeddings(nnx.Module):
    """Tokens with learnt positions."""

    def __init__(self, settings: CLIPTextSettings, *, dtype: jnp.dtype, rngs: nnx.Rngs):
        self.token_embedding = _embedding(settings.vocab_size, settings.hidden_size, rngs)
        self.position_embedding = _embedding(settings.max_position_embeddings, settings.hidden_size, rngs)
        self.dtype = dtype

    def __call__(self, tokens: Int[Array, "b l"]) -> Float[Array, "b l d"]:
        positions = self.position_embedding.embedding[...]
        if tokens.shape[1] > len(positions):
            raise ValueError(f"CLIP reads at most {len(positions)} tokens, these are {tokens.shape[1]}")
        x = self.token_embedding.embedding[...][tokens] + positions[None, : tokens.shape[1]]
        return x.astype(self.dtype)


class CLIPEncoder(nnx.Module):
    """The layers of a tower."""

    def __init__(self, settings: CLIPSettings, *, dtype: jnp.dtype, rngs: nnx.Rngs):
        def make_layer(rngs: nnx.Rngs) -> CLIPEncoderLayer:
            return CLIPEncoderLayer(settings, dtype=dtype, rngs=rngs)

        self.layers = Stack(make_layer, settings.num_hidden_layers, rngs=rngs)

    def __call__(
        self, x: Float[Array, "b l d"], mask: Bool[Array, "b 1 l l"] | None = None
    ) -> Float[Array, "b l d"]:
        return self.layers(x, mask)


class CLIPEncoderLayer(nnx.Module):
    """Attention and two linear layers, each after its norm."""

    def __init__(self, settings: CLIPSettings, *, dtype: jnp.dtype, rngs: nnx.Rngs):
        d, epsilon = settings.hidden_size, settings.layer_norm_eps
        self.self_attn = CLIPAttention(settings, dtype=dtype, rngs=rngs)
        self.layer_norm1 = LayerNorm(d, epsilon=epsilon, dtype=dtype, rngs=rngs)
        self.mlp = CLIPMLP(settings, dtype=dtype, rngs=rngs)
        self.layer_norm2 = LayerNorm(d, epsilon=epsilon, dtype=dtype, rngs=rngs)

    def __call__(
        self, x: Float[Array, "b l d"], mask: Bool[Array, "b 1 l l"] | None = None
    ) -> Float[Array, "b l d"]:
        x = x + self.self_attn(self.layer_norm1(x), mask)
        return x + self.mlp(self.layer_norm2(x))


class CLIPAttention(nnx.Module):
    """Self-attention with a linear layer each for queries, keys and values."""

    def __init__(self, settings: CLIPSettings, *, dtype: jnp.dtype, rngs: nnx.Rngs):
        d, layers = settings.hidden_size, settings.num_hidden_layers
        narrow = _linear(d, d, d**-0.5 * (2 * layers) ** -0.5, dtype, rngs)
        self.k_proj, self.v_proj, self.q_proj = narrow(), narrow(), narrow()
        self.out_proj = _linear(d, d, d**-0.5, dtype, rngs)()
        self.num_heads = settings.num_attention_heads

    def __call__(
        self, x: Float[Array, "b l d"], mask: Bool[Array, "b 1 l l"] | None
    ) -> Float[Array, "b l d"]:
        q, k, v = (
            einops.rearrange(project(x), "b l (n h) -> b n l h", n=self.num_heads)
            for project in (self.q_proj, self.k_proj, self.v_proj)
        )
        return self.out_proj(einops.rearrange(attend(q, k, v, mask), "b n l h -> b l (n h)"))


class CLIPMLP(nnx.Module):
    """Two linear layers."""

    def __init__(self, settings: CLIPSettings, *, dtype: jnp.dtype, rngs: nnx.Rngs):
        d, wide, layers = settings.hidden_size, settings.intermediate_size, settings.num_hidden_layers
        self.fc1 = _linear(d, wide, (2 * d) ** -0.5, dtype, rngs)()
        self.fc2 = _linear(wide, d, d**-0.5 * (2 * layers) ** -0.5, dtype, rngs)()
        self.activation = {"quick_gelu": quick_gelu, "gelu": _gelu}[settings.hidden_act]

    def __call__(self, x: Float[Array, "b l d"]) -> Float[Array, "b l d"]:
        return self.fc2(self.activation(self.fc1(x)))


def quick_gelu(x: Float[Array, "..."]) -> Float[Array, "..."]:
    """Approximate the GELU by a sigmoid."""
    return x * jax.nn.sigmoid(1.702 * x)


def _gelu(x: Float[Array, "..."]) -> Float[Array, "..."]:
    return jax.nn.gelu(x, approximate=False)


def _embedding(num: int, features: int, rngs: nnx.Rngs) -> nnx.Embed:
    return nnx.Embed(num, features, embedding_init=nnx.initializers.normal(0.02), rngs=rngs)


def _linear(
    features: int, new_features: int, std: float, dtype: jnp.dtype, rngs: nnx.Rngs
) -> Callable[[], Linear]:
    kernel_init, bias_init = nnx.initializers.normal(std), nnx.initializers.zeros_init()
    return functools.partial(
        Linear, features, new_features, kernel_init=kernel_init, bias_init=bias_init, dtype=dtype, rngs=rngs
    )
