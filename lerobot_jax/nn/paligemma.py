"""PaliGemma, and beside it an action expert that attends to the same keys and values.

Papers: PaliGemma (https://arxiv.org/abs/2407.07726), pi0 (https://arxiv.org/abs/2410.24164).
Mirrors `PaliGemmaWithExpertModel` of `lerobot.policies.pi0.modeling_pi0`, and the parts of
`transformers.models.paligemma` that it uses; module names are theirs. The heads that give logits are in checkpoints
but are not used: pi0 writes no text.
"""

import dataclasses
from collections.abc import Sequence

import einops
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Bool, Float, Int

from lerobot_jax.nn.gemma import GEMMA_SIZES, Cache, GemmaModel, GemmaSettings, attend_jointly
from lerobot_jax.nn.linear import Linear
from lerobot_jax.nn.siglip import SO400M, SiglipSettings, SiglipVisionModel

VOCAB_SIZE = 257_152


@dataclasses.dataclass(frozen=True)
class PaliGemmaSettings:
    """The sizes of its two parts, and how many tokens it knows."""

    text: GemmaSettings
    vision: SiglipSettings = SO400M
    vocab_size: int = VOCAB_SIZE


PALIGEMMA_SIZES = {
    "gemma_2b": PaliGemmaSettings(GEMMA_SIZES["gemma_2b"]),
    "gemma_300m": PaliGemmaSettings(GEMMA_SIZES["gemma_300m"]),
    "dummy": PaliGemmaSettings(GEMMA_SIZES["dummy"], SiglipSettings(16, 24, 2, 2), 512),
}


class PaliGemmaWithExpert(nnx.Module):
    """A vision-language model that reads images and text, and an expert that reads states and actions.

    Args:
        settings: of the vision-language model.
        expert: of the expert, of equal depth.
        image_size: side of the square images.
        is_adaptive: whether the expert's norms take a condition.
        dtype: in which both transformers compute.
        vision_dtype: in which the image tower, the projection of its output and adaptive norms' layers do.
    """

    def __init__(
        self,
        settings: PaliGemmaSettings,
        expert: GemmaSettings,
        image_size: int,
        *,
        is_adaptive: bool,
        dtype: jnp.dtype,
        vision_dtype: jnp.dtype,
        rngs: nnx.Rngs,
    ):
        self.paligemma = PaliGemma(settings, image_size, dtype=dtype, vision_dtype=vision_dtype, rngs=rngs)
        self.gemma_expert = GemmaExpert(
            expert,
            settings.vocab_size,
            is_adaptive=is_adaptive,
            dtype=dtype,
            norm_dtype=vision_dtype,
            rngs=rngs,
        )
        self.dtype = dtype

    def embed_images(self, images: Sequence[Float[Array, "b h w c"]]) -> Float[Array, "b l d"]:
        """Give the tokens of images in -1..1, one image's after the other's."""
        stacked = einops.rearrange(jnp.stack(images, axis=1), "b v h w c -> (b v) h w c")
        model = self.paligemma.model
        tokens = model.multi_modal_projector(model.vision_tower(stacked))
        return einops.rearrange(tokens, "(b v) l d -> b (v l) d", v=len(images)).astype(self.dtype)

    def embed_tokens(self, tokens: Int[Array, "b l"]) -> Float[Array, "b l d"]:
        return self.paligemma.model.language_model.embed_tokens(tokens)

    def read(
        self, prefix: Float[Array, "b p d"], positions: Int[Array, "b p"], mask: Bool[Array, "b p p"]
    ) -> Cache:
        """Give the keys and values of the prefix alone, for `continue_from`."""
        language = self.paligemma.model.language_model
        return attend_jointly([language], [prefix], [None], positions, mask)[1]

    def continue_from(
        self,
        cache: Cache,
        suffix: Float[Array, "b s d"],
        condition: Float[Array, "b #s d"] | None,
        positions: Int[Array, "b s"],
        mask: Bool[Array, "b s _k"],
    ) -> Float[Array, "b s d"]:
        """Give what the expert makes of a suffix that sees the prefix in the cache."""
        expert = self.gemma_expert.model
        (result,), _ = attend_jointly(
            [expert], [suffix.astype(self.dtype)], [condition], positions, mask, cache
        )
        return result

    def __call__(
        self,
        prefix: Float[Array, "b p d"],
        suffix: Float[Array, "b s e"],
        condition: Float[Array, "b #s e"] | None,
        positions: Int[Array, "b l"],
        mask: Bool[Array, "b l l"],
    ) -> Float[Array, "b s e"]:
        """Give what the expert makes of a suffix, reading prefix and suffix at once."""
        models = [self.paligemma.model.language_model, self.gemma_expert.model]
        tokens = [prefix, suffix.astype(self.dtype)]
        (_, result), _ = attend_jointly(models, tokens, [None, condition], positions, mask)
        return result


class PaliGemma(nnx.Module):
    """`PaliGemmaForConditionalGeneration`."""

    def __init__(
        self,
        settings: PaliGemmaSettings,
        image_size: int,
        *,
        dtype: jnp.dtype,
        vision_dtype: jnp.dtype,
        rngs: nnx.Rngs,
    ):
        self.model = PaliGemmaModel(settings, image_size, dtype=dtype, vision_dtype=vision_dtype, rngs=rngs)
        self.lm_head = UnusedHead(settings.text.width, settings.vocab_size)


class PaliGemmaModel(nnx.Module):
    """The image tower, the projection of what it gives, the language model."""

    def __init__(
        self,
        settings: PaliGemmaSettings,
        image_size: int,
        *,
        dtype: jnp.dtype,
        vision_dtype: jnp.dtype,
        rngs: nnx.Rngs,
    ):
        self.vision_tower = SiglipVisionModel(settings.vision, image_size, dtype=vision_dtype, rngs=rngs)
        self.multi_modal_projector = MultiModalProjector(settings, dtype=vision_dtype, rngs=rngs)
        self.language_model = GemmaModel(
            settings.text, vocab_size=settings.vocab_size, dtype=dtype, rngs=rngs
        )


class MultiModalProjector(nnx.Module):
    """From the image tower's width to the language model's."""

    def __init__(self, settings: PaliGemmaSettings, *, dtype: jnp.dtype, rngs: nnx.Rngs):
        inits = {"kernel_init": nnx.initializers.normal(0.02), "bias_init": nnx.initializers.zeros_init()}
        self.linear = Linear(
            settings.vision.hidden_size, settings.text.width, **inits, dtype=dtype, rngs=rngs
        )

    def __call__(self, x: Float[Array, "b l v"]) -> Float[Array, "b l d"]:
        return self.linear(x)


class GemmaExpert(nnx.Module):
    """`GemmaForCausalLM` without embeddings."""

    def __init__(
        self,
        settings: GemmaSettings,
        vocab_size: int,
        *,
        is_adaptive: bool,
        dtype: jnp.dtype,
        norm_dtype: jnp.dtype,
        rngs: nnx.Rngs,
    ):
        self.model = GemmaModel(
            settings, is_adaptive=is_adaptive, dtype=dtype, norm_dtype=norm_dtype, rngs=rngs
        )
        self.lm_head = UnusedHead(settings.width, vocab_size)


class UnusedHead(nnx.Module):
    """A layer of the checkpoint that the policy does not use: loaded and saved, not trained."""

    def __init__(self, features: int, vocab_size: int):
        self.weight = nnx.Param(jnp.zeros((vocab_size, features)))
