"""The norms of convolutional networks, as PyTorch computes them; channel-last. Statistics are float32.

All are called with the feature map and whether the policy is in training, so that one can stand for another.
"""

import einops
import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from lerobot_jax.nn.variables import Buffer

EPSILON = 1e-5
MOMENTUM = 0.1  # how much of a batch's statistics goes into the running ones


class FrozenBatchNorm2d(nnx.Module):
    """Batch norm with fixed statistics and fixed affine parameters (`torchvision.ops.FrozenBatchNorm2d`)."""

    def __init__(self, features: int):
        self.weight = Buffer(jnp.ones(features))
        self.bias = Buffer(jnp.zeros(features))
        self.running_mean = Buffer(jnp.zeros(features))
        self.running_var = Buffer(jnp.ones(features))

    def __call__(self, x: Float[Array, "b h w c"], train: bool = False) -> Float[Array, "b h w c"]:
        del train
        return _apply(self, x, self.running_mean[...], self.running_var[...])


class BatchNorm2d(nnx.Module):
    """`torch.nn.BatchNorm2d`: by the batch's own statistics in training, by the running ones else.

    With a batch on several devices, the statistics are those of the whole batch.
    """

    def __init__(self, features: int):
        self.weight = nnx.Param(jnp.ones(features))
        self.bias = nnx.Param(jnp.zeros(features))
        self.running_mean = Buffer(jnp.zeros(features))
        self.running_var = Buffer(jnp.ones(features))
        self.num_batches_tracked = Buffer(jnp.zeros((), jnp.int32))

    def __call__(self, x: Float[Array, "b h w c"], train: bool) -> Float[Array, "b h w c"]:
        if not train:
            return _apply(self, x, self.running_mean[...], self.running_var[...])
        values = x.astype(jnp.float32)
        mean, var = values.mean((0, 1, 2)), values.var((0, 1, 2))
        num = x.size // x.shape[-1]
        for running, new in ((self.running_mean, mean), (self.running_var, var * (num / max(1, num - 1)))):
            running[...] = (1 - MOMENTUM) * running[...] + MOMENTUM * jax.lax.stop_gradient(new)
        self.num_batches_tracked[...] = self.num_batches_tracked[...] + 1
        return _apply(self, x, mean, var)


class GroupNorm(nnx.Module):
    """`torch.nn.GroupNorm`."""

    def __init__(self, num_groups: int, features: int):
        self.weight = nnx.Param(jnp.ones(features))
        self.bias = nnx.Param(jnp.zeros(features))
        self.num_groups = num_groups

    def __call__(self, x: Float[Array, "b *space c"], train: bool = False) -> Float[Array, "b *space c"]:
        del train
        grouped = x.astype(jnp.float32).reshape(*x.shape[:-1], self.num_groups, -1)  # b *space g c
        axes = (*range(1, x.ndim - 1), x.ndim)
        mean, var = grouped.mean(axes, keepdims=True), grouped.var(axes, keepdims=True)
        normal = ((grouped - mean) * jax.lax.rsqrt(var + EPSILON)).reshape(x.shape)
        shape = (1,) * (x.ndim - 1) + (-1,)
        y = normal * self.weight[...].reshape(shape) + self.bias[...].reshape(shape)
        return y.astype(x.dtype)


def _apply(norm, x: Float[Array, "b h w c"], mean: Float[Array, " c"], var: Float[Array, " c"]):
    scale = norm.weight[...] * jax.lax.rsqrt(var + EPSILON)
    bias = norm.bias[...] - mean * scale
    scale, bias = (einops.rearrange(v.astype(x.dtype), "c -> 1 1 1 c") for v in (scale, bias))
    return x * scale + bias
