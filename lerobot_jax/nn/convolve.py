"""Convolution of images that stays quick on CPUs in loops, conditionals and under `jax.vmap`.

XLA computes the gradients of a convolution as convolutions with unusual axes and strides. At the top level of a
program its CPU compiler turns those into ordinary ones; inside `lax.scan` and `lax.cond` (gradient accumulation, a
phase of training) it does not, and they take up to a hundred times as long. With a kernel for each entry of a
mapped axis (several seeds), a convolution becomes a grouped one, which takes several times as long as its groups
one by one.

On CPUs, therefore, gradients are written as ordinary convolutions here, and several kernels take turns. Other
devices keep JAX's own rules.
"""

import functools

import jax
import jax.numpy as jnp
from jax.custom_batching import custom_vmap
from jaxtyping import Array, Float


@functools.partial(jax.custom_vjp, nondiff_argnums=(2, 3, 4))
def convolve(
    x: Float[Array, "b h w c"], kernel: Float[Array, "k1 k2 c c2"], stride: int, padding: int, dilation: int
) -> Float[Array, "b h2 w2 c2"]:
    """Convolve as `torch.nn.functional.conv2d` does, channel-last."""
    settings = (stride, [(padding, padding)] * 2, dilation)
    return jax.lax.platform_dependent(
        x,
        kernel,
        cpu=lambda x, kernel: _convolve_in_turns(x, kernel, *settings),
        default=lambda x, kernel: _convolve(x, kernel, *settings),
    )


def _forward(x: Array, kernel: Array, stride: int, padding: int, dilation: int):
    return convolve(x, kernel, stride, padding, dilation), (x, kernel)


def _backward(stride: int, padding: int, dilation: int, inputs: tuple[Array, Array], dy: Array):
    def on_cpu(x: Array, kernel: Array, dy: Array) -> tuple[Array, Array]:
        settings = (stride, padding, dilation)
        return _gradient_of_inputs(x, kernel, dy, *settings), _gradient_of_kernel(x, kernel, dy, *settings)

    def elsewhere(x: Array, kernel: Array, dy: Array) -> tuple[Array, Array]:
        settings = (stride, [(padding, padding)] * 2, dilation)
        return jax.vjp(lambda x, kernel: _convolve(x, kernel, *settings), x, kernel)[1](dy)

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
    return _convolve_in_turns(spread, kernel[::-1, ::-1].swapaxes(2, 3), 1, [(0, 0)] * 2, dilation)


def _gradient_of_kernel(
    x: Array, kernel: Array, dy: Array, stride: int, padding: int, dilation: int
) -> Float[Array, "k1 k2 c c2"]:
    """Convolve the inputs with the output's gradient: channels and batch change places."""
    pads = []
    for size, steps, taps in zip(x.shape[1:3], dy.shape[1:3], kernel.shape[:2], strict=True):
        pads.append((padding, stride * (steps - 1) + dilation * (taps - 1) + 1 - size - padding))
    inputs, window = x.transpose(3, 1, 2, 0), dy.transpose(1, 2, 0, 3)
    return _convolve_in_turns(inputs, window, dilation, pads, stride).transpose(1, 2, 0, 3)


def _convolve_in_turns(
    x: Array, kernel: Array, stride: int, pads: list[tuple[int, int]], dilation: int
) -> Array:
    """Convolve; under `jax.vmap`, several kernels one after another."""

    def convolve(x: Array, kernel: Array) -> Array:
        return _convolve(x, kernel, stride, pads, dilation)

    in_turns = custom_vmap(convolve)

    @in_turns.def_vmap
    def _(axis_size: int, is_mapped: list[bool], x: Array, kernel: Array) -> tuple[Array, bool]:
        x_is_mapped, kernel_is_mapped = is_mapped
        if not kernel_is_mapped:
            return jax.vmap(convolve, (0, None))(x, kernel), True
        inputs = x if x_is_mapped else jnp.broadcast_to(x, (axis_size, *x.shape))
        return jax.lax.map(lambda pair: in_turns(*pair), (inputs, kernel)), True

    return in_turns(x, kernel)


def _convolve(x: Array, kernel: Array, stride: int, pads: list[tuple[int, int]], dilation: int) -> Array:
    return jax.lax.conv_general_dilated(
        x,
        kernel,
        (stride, stride),
        pads,
        rhs_dilation=(dilation, dilation),
        dimension_numbers=("NHWC", "HWIO", "NHWC"),
    )
