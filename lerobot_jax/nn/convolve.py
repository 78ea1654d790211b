"""Convolution of images whose gradients are quick in loops and conditionals too, on CPUs.

XLA computes the gradients of a convolution as convolutions with unusual axes and strides. At the top level of a
program its CPU compiler turns those into ordinary ones; inside `lax.scan` and `lax.cond` (gradient accumulation, a
phase of training) it does not, and they take up to a hundred times as long. On CPUs, therefore, they are written as
ordinary convolutions here. Other devices keep JAX's own rule.
"""

import functools

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float


@functools.partial(jax.custom_vjp, nondiff_argnums=(2, 3, 4))
def convolve(
    x: Float[Array, "b h w c"], kernel: Float[Array, "k1 k2 c c2"], stride: int, padding: int, dilation: int
) -> Float[Array, "b h2 w2 c2"]:
    """Convolve as `torch.nn.functional.conv2d` does, channel-last."""
    return _convolve(x, kernel, (stride, stride), ((padding, padding), (padding, padding)), dilation)


def _forward(x: Array, kernel: Array, stride: int, padding: int, dilation: int):
    return convolve(x, kernel, stride, padding, dilation), (x, kernel)


def _backward(stride: int, padding: int, dilation: int, inputs: tuple[Array, Array], dy: Array):
    def on_cpu(x: Array, kernel: Array, dy: Array) -> tuple[Array, Array]:
        settings = (stride, padding, dilation)
        return _gradient_of_inputs(x, kernel, dy, *settings), _gradient_of_kernel(x, kernel, dy, *settings)

    def elsewhere(x: Array, kernel: Array, dy: Array) -> tuple[Array, Array]:
        pads = ((padding, padding), (padding, padding))
        return jax.vjp(lambda x, w: _convolve(x, w, (stride, stride), pads, dilation), x, kernel)[1](dy)

    return jax.lax.platform_dependent(*inputs, dy, cpu=on_cpu, default=elsewhere)


convolve.defvjp(_forward, _backward)


def _gradient_of_inputs(
    x: Array, kernel: Array, dy: Array, stride: int, padding: int, dilation: int
) -> Float[Array, "b h w c"]:
    """Convolve the output's gradient, with zeros for the steps between its pixels, with the reversed kernel."""
    pads = [(0, 0, 0)]
    for size, steps, taps in zip(x.shape[1:3], dy.shape[1:3], kernel.shape[:2], strict=True):
        reach = dilation * (taps - 1)
        before = reach - padding
        pads.append((before, size + reach - before - (stride * (steps - 1) + 1), stride - 1))
    spread = jax.lax.pad(dy, jnp.zeros((), dy.dtype), (*pads, (0, 0, 0)))
    return _convolve(spread, kernel[::-1, ::-1].swapaxes(2, 3), (1, 1), ((0, 0), (0, 0)), dilation)


def _gradient_of_kernel(
    x: Array, kernel: Array, dy: Array, stride: int, padding: int, dilation: int
) -> Float[Array, "k1 k2 c c2"]:
    """Convolve the inputs with the output's gradient: channels and batch change places."""
    pads = []
    for size, steps, taps in zip(x.shape[1:3], dy.shape[1:3], kernel.shape[:2], strict=True):
        pads.append((padding, stride * (steps - 1) + dilation * (taps - 1) + 1 - size - padding))
    inputs, window = x.transpose(3, 1, 2, 0), dy.transpose(1, 2, 0, 3)
    return _convolve(inputs, window, (dilation, dilation), tuple(pads), stride).transpose(1, 2, 0, 3)


def _convolve(
    x: Array,
    kernel: Array,
    strides: tuple[int, int],
    padding: tuple[tuple[int, int], tuple[int, int]],
    dilation: int,
) -> Array:
    return jax.lax.conv_general_dilated(
        x,
        kernel,
        strides,
        padding,
        rhs_dilation=(dilation, dilation),
        dimension_numbers=("NHWC", "HWIO", "NHWC"),
    )
