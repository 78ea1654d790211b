import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lerobot_jax.nn.convolve import convolve

# size, kernel size, stride, padding, dilation: those of ResNets, and some in which the strides leave pixels over
CASES = [
    ((9, 12), 7, 2, 3, 1),
    ((6, 5), 3, 1, 1, 1),
    ((7, 8), 3, 2, 1, 1),
    ((7, 8), 1, 2, 0, 1),
    ((6, 6), 3, 1, 2, 2),
    ((11, 10), 3, 3, 0, 2),
    ((5, 5), 1, 1, 2, 1),
]


def reference(x, kernel, stride, padding, dilation):
    return jax.lax.conv_general_dilated(
        x,
        kernel,
        (stride, stride),
        [(padding, padding)] * 2,
        rhs_dilation=(dilation, dilation),
        dimension_numbers=("NHWC", "HWIO", "NHWC"),
    )


def gradients(function, x, kernel, dy, *settings):
    return jax.vjp(lambda x, kernel: function(x, kernel, *settings), x, kernel)[1](dy)


@pytest.mark.parametrize(("size", "kernel_size", "stride", "padding", "dilation"), CASES)
def test_gradients_are_those_of_jax(size, kernel_size, stride, padding, dilation):
    keys, settings = jax.random.split(jax.random.key(0), 3), (stride, padding, dilation)
    x = jax.random.normal(keys[0], (3, *size, 4))
    kernel = jax.random.normal(keys[1], (kernel_size, kernel_size, 4, 5))
    y = convolve(x, kernel, *settings)
    np.testing.assert_array_equal(y, reference(x, kernel, *settings))
    dy = jax.random.normal(keys[2], y.shape)
    expected = gradients(reference, x, kernel, dy, *settings)
    for ours, theirs in zip(gradients(convolve, x, kernel, dy, *settings), expected, strict=True):
        np.testing.assert_allclose(ours, theirs, atol=1e-5)


@pytest.mark.parametrize("mapped", [(0, 0), (0, None), (None, 0)])
def test_several_kernels_take_turns(mapped):
    shapes = [((2,) if axis == 0 else ()) for axis in mapped]
    keys = jax.random.split(jax.random.key(0), 2)
    x = jax.random.normal(keys[0], (*shapes[0], 3, 6, 5, 4))
    kernel = jax.random.normal(keys[1], (*shapes[1], 3, 3, 4, 2))

    def mapped_gradients(function):
        def loss(x, kernel):
            return (function(x, kernel, 2, 1, 1) ** 2).sum()

        return jax.jit(jax.vmap(jax.grad(loss, (0, 1)), mapped))

    expected = mapped_gradients(reference)(x, kernel)
    step = mapped_gradients(convolve)
    for ours, theirs in zip(step(x, kernel), expected, strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=1e-5, atol=1e-4)
    text = step.lower(x, kernel).as_text()
    groups = {line.split("feature_group_count = ")[1][0] for line in text.splitlines() if "_group_c" in line}
    assert groups == {"1"}


def test_other_devices_keep_the_rule_of_jax():
    """On GPUs the gradients must reach cuDNN as what they are."""
    x, kernel, dy = jnp.ones((2, 8, 8, 3)), jnp.ones((3, 3, 3, 4)), jnp.ones((2, 4, 4, 4))

    def program(function, platform: str) -> str:
        step = jax.jit(lambda *args: gradients(function, *args, 2, 1, 1))
        return str(step.trace(x, kernel, dy).lower(lowering_platforms=(platform,)).as_text())

    convolutions = {  # their axes and strides
        (name, platform): sorted(
            line.split("dim_numbers")[1].split(" : ")[0]
            for line in program(function, platform).splitlines()
            if "stablehlo.convolution" in line
        )
        for name, function in (("ours", convolve), ("jax", reference))
        for platform in ("cpu", "cuda")
    }
    assert convolutions["ours", "cuda"] == convolutions["jax", "cuda"]
    assert convolutions["ours", "cpu"] != convolutions["jax", "cpu"]
