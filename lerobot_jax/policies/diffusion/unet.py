"""A U-Net over time whose features are modulated by what is observed.

Mirrors `DiffusionConditionalUnet1d` of `lerobot.policies.diffusion.modeling_diffusion`; channel-last.
"""

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int

from lerobot_jax.nn.conv import Conv1d, ConvTranspose1d
from lerobot_jax.nn.execution import run_block
from lerobot_jax.nn.linear import Linear
from lerobot_jax.nn.norms import GroupNorm
from lerobot_jax.nn.sequential import Sequential
from lerobot_jax.nn.time_embedding import SinusoidalPosEmb
from lerobot_jax.policies.diffusion.config import DiffusionConfig


class DiffusionConditionalUnet1d(nnx.Module):
    """Predicts the noise in actions, or the clean actions, from noisy ones."""

    def __init__(self, config: DiffusionConfig, cond_dim: int, *, rngs: nnx.Rngs):
        """Draw the weights.

        Args:
            config: the policy's settings.
            cond_dim: width of what is observed.
            rngs: `params`.
        """
        d, dtype, dims = config.diffusion_step_embed_dim, config.compute_dtype, config.down_dims
        act = config.action_feature.shape[0]
        self.diffusion_step_encoder = Sequential(
            [
                SinusoidalPosEmb(d),
                Linear(d, 4 * d, dtype=dtype, rngs=rngs),
                jax.nn.mish,
                Linear(4 * d, d, dtype=dtype, rngs=rngs),
            ]
        )

        def block(dim_in: int, dim_out: int) -> ConditionalResidualBlock1d:
            return ConditionalResidualBlock1d(config, dim_in, dim_out, d + cond_dim, rngs=rngs)

        levels = list(zip((act, *dims[:-1]), dims, strict=True))
        self.down_modules = nnx.List([])
        for i, (dim_in, dim_out) in enumerate(levels):
            blocks = [block(dim_in, dim_out), block(dim_out, dim_out)]
            is_last = i == len(levels) - 1
            half = _identity if is_last else Conv1d(dim_out, dim_out, 3, stride=2, dtype=dtype, rngs=rngs)
            self.down_modules.append(nnx.List([*blocks, half]))
        self.mid_modules = nnx.List([block(dims[-1], dims[-1]) for _ in range(2)])
        # As many upsamplings as downsamplings: the first level has none.
        self.up_modules = nnx.List([])
        for dim_out, dim_in in reversed(levels[1:]):
            blocks = [block(2 * dim_in, dim_out), block(dim_out, dim_out)]
            upsample = ConvTranspose1d(dim_out, dtype=dtype, rngs=rngs)
            self.up_modules.append(nnx.List([*blocks, upsample]))
        self.final_conv = Sequential(
            [
                Conv1dBlock(dims[0], dims[0], config.kernel_size, 8, dtype=dtype, rngs=rngs),
                Conv1d(dims[0], act, 1, dtype=dtype, rngs=rngs),
            ]
        )
        self.config = config

    def __call__(
        self,
        x: Float[Array, "b chunk act"],
        timestep: Int[Array, " b"],
        cond: Float[Array, "b cond"],
        train: bool = False,
    ) -> Float[Array, "b chunk act"]:
        """Predict noise or clean actions.

        Args:
            x: noisy actions.
            timestep: how many steps of noise they have.
            cond: what is observed.
            train: whether gradients will be taken (for gradient checkpointing).
        """
        dtype = self.config.compute_dtype
        step = self.diffusion_step_encoder(timestep)
        cond = jnp.concatenate([step, cond.astype(dtype)], axis=-1)
        checkpointed = train and self.config.gradient_checkpointing

        def run(block: ConditionalResidualBlock1d, x: Array) -> Array:
            return jax.checkpoint(block)(x, cond) if checkpointed else run_block(block, x, cond)

        x, skipped = x.astype(dtype), []
        for block1, block2, downsample in self.down_modules:
            x = run(block2, run(block1, x))
            skipped.append(x)
            x = downsample(x)
        for block in self.mid_modules:
            x = run(block, x)
        for block1, block2, upsample in self.up_modules:
            x = jnp.concatenate([x, skipped.pop()], axis=-1)
            x = upsample(run(block2, run(block1, x)))
        return self.final_conv(x).astype(jnp.float32)


class Conv1dBlock(nnx.Module):
    """Convolution, group norm, Mish."""

    def __init__(
        self, dim_in: int, dim_out: int, kernel_size: int, n_groups: int, *, dtype: jnp.dtype, rngs: nnx.Rngs
    ):
        conv = Conv1d(dim_in, dim_out, kernel_size, dtype=dtype, rngs=rngs)
        self.block = Sequential([conv, GroupNorm(n_groups, dim_out), jax.nn.mish])

    def __call__(self, x: Float[Array, "b t c"]) -> Float[Array, "b t c2"]:
        return self.block(x)


class ConditionalResidualBlock1d(nnx.Module):
    """Two convolutions; between them, what is observed shifts and scales the channels (FiLM, arXiv:1709.07871)."""

    def __init__(self, config: DiffusionConfig, dim_in: int, dim_out: int, cond_dim: int, *, rngs: nnx.Rngs):
        dtype, scales = config.compute_dtype, config.use_film_scale_modulation
        size, groups = config.kernel_size, config.n_groups
        self.conv1 = Conv1dBlock(dim_in, dim_out, size, groups, dtype=dtype, rngs=rngs)
        self.cond_encoder = Sequential(
            [jax.nn.mish, Linear(cond_dim, dim_out * (2 if scales else 1), dtype=dtype, rngs=rngs)]
        )
        self.conv2 = Conv1dBlock(dim_out, dim_out, size, groups, dtype=dtype, rngs=rngs)
        self.residual_conv = (
            _identity if dim_in == dim_out else Conv1d(dim_in, dim_out, 1, dtype=dtype, rngs=rngs)
        )
        self.scales = scales

    def __call__(self, x: Float[Array, "b t c"], cond: Float[Array, "b cond"]) -> Float[Array, "b t c2"]:
        y, film = self.conv1(x), self.cond_encoder(cond)[:, None]
        if self.scales:
            scale, bias = jnp.split(film, 2, axis=-1)
            y = scale * y + bias
        else:
            y = y + film
        return self.conv2(y) + self.residual_conv(x)


def _identity(x: Array) -> Array:
    return x
