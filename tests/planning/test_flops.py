"""FLOPs against numbers known by arithmetic, and against the compiler's where there are no loops."""

from collections import Counter

import jax
import jax.numpy as jnp
import pytest
from jax import lax

from lerobot_jax.planning.flops import count_flops


@pytest.fixture(autouse=True)
def _default_precision():
    with jax.default_matmul_precision("default"):
        yield


def _count(function, *shapes, dtype=jnp.float32, **options) -> Counter[str]:
    arguments = [jax.ShapeDtypeStruct(shape, dtype) for shape in shapes]
    return count_flops(jax.jit(function, **options).trace(*arguments).jaxpr.jaxpr)


def test_a_matrix_product_is_two_for_each_term():
    product = 2 * 5 * 7 * 11
    assert _count(lambda a, b: jnp.tanh(a @ b), (5, 7), (7, 11), dtype=jnp.bfloat16) == {"bfloat16": product}
    batched = _count(lambda a, b: jnp.einsum("nij,njk->nik", a, b), (3, 5, 7), (3, 7, 11))
    assert batched == {"float32": 3 * product}
    exact = _count(lambda a, b: jnp.matmul(a, b, precision="highest"), (5, 7), (7, 11))
    assert exact == {"float32 highest": product}


def test_the_gradient_of_a_matrix_product_is_two_more():
    def loss(a, b):
        return jnp.sum((a @ b) ** 2)

    assert _count(jax.grad(loss, (0, 1)), (5, 7), (7, 11)) == {"float32": 3 * 2 * 5 * 7 * 11}


@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize("groups", [1, 2, 8])
@pytest.mark.parametrize("dilation", [1, 2])
def test_convolutions_cost_as_much_in_each_direction_as_the_compiler_says(stride, groups, dilation):
    def convolve(x, w):
        return lax.conv_general_dilated(
            x,
            w,
            (stride, stride),
            [(0, 0), (0, 0)],
            rhs_dilation=(dilation, dilation),
            feature_group_count=groups,
            dimension_numbers=("NHWC", "HWIO", "NHWC"),
        )

    shapes = (3, 17, 13, 8), (3, 3, 8 // groups, 16)
    height, width = ((n - 2 * dilation - 1) // stride + 1 for n in (17, 13))
    expected = 2 * (3 * height * width * 16) * (3 * 3 * 8 // groups)
    assert _count(convolve, *shapes) == {"float32": expected}
    both_ways = _count(jax.grad(lambda *args: jnp.sum(convolve(*args) ** 2), (0, 1)), *shapes)
    assert both_ways == {"float32": 3 * expected}
    arguments = [jax.ShapeDtypeStruct(shape, jnp.float32) for shape in shapes]
    if groups == 1:  # of groups, the compiler on CPUs makes something else
        assert jax.jit(convolve).lower(*arguments).compile().cost_analysis()["flops"] == expected


def test_padding_does_not_count():
    def convolve(x, w):
        return lax.conv_general_dilated(x, w, (1,), [(1, 1)], dimension_numbers=("NWC", "WIO", "NWC"))

    assert _count(convolve, (1, 10, 1), (3, 1, 1)) == {"float32": 2 * (3 * 10 - 2)}


def test_loops_count_as_often_as_they_run():
    def layers(x, stack):
        return lax.scan(lambda x, w: (jnp.tanh(x @ w), None), x, stack)[0]

    product = 2 * 5 * 7 * 7
    assert _count(layers, (5, 7), (6, 7, 7)) == {"float32": 6 * product}
    gradient = jax.grad(lambda *args: jnp.sum(layers(*args)), (0, 1))
    assert _count(gradient, (5, 7), (6, 7, 7)) == {"float32": 3 * 6 * product}


def test_what_is_computed_again_counts_again():
    def loss(x, w):
        return jnp.sum(jnp.tanh(jnp.tanh(x @ w) @ w))

    product = 2 * 5 * 7 * 7
    again = _count(jax.grad(jax.checkpoint(loss), (0, 1)), (5, 7), (7, 7))
    once = _count(jax.grad(loss, (0, 1)), (5, 7), (7, 7))
    assert once == {"float32": 6 * product}
    assert again == {"float32": 8 * product}


def test_of_branches_the_dearest_counts():
    def branches(x, w):
        return lax.cond(x[0, 0] > 0, lambda: x @ w, lambda: x)

    assert _count(branches, (5, 7), (7, 7)) == {"float32": 2 * 5 * 7 * 7}


def test_every_device_counts_in_shard_map():
    mesh = jax.make_mesh((4,), ("data",), axis_types=(jax.sharding.AxisType.Auto,), devices=jax.devices()[:4])
    spec = jax.sharding.PartitionSpec("data")
    mapped = jax.shard_map(
        lambda x, w: x @ w, mesh=mesh, in_specs=(spec, jax.sharding.PartitionSpec()), out_specs=spec
    )
    assert _count(mapped, (8, 7), (7, 7)) == {"float32": 2 * 8 * 7 * 7}
