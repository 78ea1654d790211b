"""Convolutions as PyTorch initializes and computes them; channel-last.

Those over time are matrix products of all windows of the input with the kernel: XLA computes these several times as
fast as one-dimensional convolutions, on CPUs above all.
"""

from typing import Any

import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from lerobot_jax.nn import initializers
from lerobot_jax.nn.convolve import convolve


class Conv2d(nnx.Conv):
    """`torch.nn.Conv2d(in_channels, out_channels, kernel_size, stride, padding, dilation)`."""

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int,
        *,
        stride: int = 1,
        padding: int = 0,
        dilation: int = 1,
        use_bias: bool = True,
        kernel_init: nnx.Initializer = initializers.torch_uniform,
        dtype: jnp.dtype = jnp.float32,
        rngs: nnx.Rngs,
    ):
        super().__init__(
            in_channels,
            out_channels,
            (kernel_size, kernel_size),
            use_bias=use_bias,
            kernel_init=kernel_init,
            bias_init=initializers.torch_bias(in_channels * kernel_size**2),
            dtype=dtype,
            rngs=rngs,
        )
        self.settings = (stride, padding, dilation)

    def __call__(self, inputs: Float[Array, "b h w c"]) -> Float[Array, "b h2 w2 c2"]:
        y: Any = convolve(inputs.astype(self.dtype), self.kernel[...].astype(self.dtype), *self.settings)
        return y if self.bias is None else y + self.bias[...].astype(self.dtype)[None, None, None]


class Conv1d(nnx.Conv):
    """`torch.nn.Conv1d(in_channels, out_channels, kernel_size, stride, padding=kernel_size // 2)`."""

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int,
        *,
        stride: int = 1,
        dtype: jnp.dtype = jnp.float32,
        rngs: nnx.Rngs,
    ):
        super().__init__(
            in_channels,
            out_channels,
            (kernel_size,),
            strides=stride,
            kernel_init=initializers.torch_uniform,
            bias_init=initializers.torch_bias(in_channels * kernel_size),
            dtype=dtype,
            rngs=rngs,
        )
        self.stride = stride

    def __call__(self, inputs: Float[Array, "b t c"]) -> Float[Array, "b t2 c2"]:
        return _convolve(self, inputs, self.stride, self.kernel_size[0] // 2)


class ConvTranspose1d(nnx.ConvTranspose):
    """`torch.nn.ConvTranspose1d(channels, channels, 4, stride=2, padding=1)`: twice as many steps."""

    def __init__(self, channels: int, *, dtype: jnp.dtype = jnp.float32, rngs: nnx.Rngs):
        super().__init__(
            channels,
            channels,
            (4,),
            strides=2,
            kernel_init=initializers.torch_uniform,
            bias_init=initializers.torch_bias(4 * channels),
            dtype=dtype,
            rngs=rngs,
        )

    def __call__(self, inputs: Float[Array, "b t c"]) -> Float[Array, "b t2 c"]:
        b, t, c = inputs.shape
        spread = jnp.stack([inputs, jnp.zeros_like(inputs)], axis=2).reshape(b, 2 * t, c)[:, :-1]
        return _convolve(self, spread, 1, 2)


def _convolve(
    layer: nnx.Conv | nnx.ConvTranspose, x: Float[Array, "b t c"], stride: int, padding: int
) -> Array:
    assert layer.bias is not None
    x, kernel, bias = (v.astype(layer.dtype) for v in (x, layer.kernel[...], layer.bias[...]))
    size, _, out = kernel.shape
    x = jnp.pad(x, ((0, 0), (padding, padding), (0, 0)))
    length = (x.shape[1] - size) // stride + 1
    windows = [x[:, i : i + stride * (length - 1) + 1 : stride] for i in range(size)]
    return jnp.concatenate(windows, axis=-1) @ kernel.reshape(-1, out)[None] + bias[None, None]
