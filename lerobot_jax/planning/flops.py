"""Floating-point operations of a program: those of matrix products and convolutions, counted in its jaxpr.

A compiler's own count has the body of a loop once only, however often it runs. Here, the body of a `scan` counts as
often as it runs, of a `cond` the branch that costs the most, of a `while` one turn. What a convolution multiplies
with padding or with the holes of a dilated input does not count. Element-wise work does not count either.
"""

import math
from collections import Counter
from collections.abc import Iterator
from typing import Any

import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.extend import core

PASSES = {lax.Precision.HIGH: " high", lax.Precision.HIGHEST: " highest"}


def count_flops(jaxpr: core.Jaxpr) -> Counter[str]:
    """Count operations (a multiplication and an addition are two) by the type of number.

    The types are those of the factors: `bfloat16`, `float32`, ...; `float32 high` and `float32 highest` where that
    precision is asked for. The counts are those of all devices together.
    """
    total: Counter[str] = Counter()
    for equation in jaxpr.eqns:
        name, params = equation.primitive.name, equation.params
        if name in ("dot_general", "conv_general_dilated"):
            flops = _dot_flops(equation) if name == "dot_general" else _conv_flops(equation)
            total[_number_type(equation)] += flops
        elif name == "cond":
            total += max((count_flops(branch.jaxpr) for branch in params["branches"]), key=Counter.total)
        else:
            inside = sum((count_flops(each) for each in _jaxprs(params)), Counter())
            times = params["length"] if name == "scan" else 1
            if name == "shard_map":  # whose shapes are those of one device
                times = math.prod(params["mesh"].shape[axis] for axis in params["newly_manual_axes"])
            total += Counter({kind: flops * times for kind, flops in inside.items()})
    return total


def _jaxprs(params: dict[str, Any]) -> Iterator[core.Jaxpr]:
    for value in params.values():
        for each in value if isinstance(value, tuple | list) else (value,):
            if isinstance(each, core.ClosedJaxpr):
                yield each.jaxpr
            elif isinstance(each, core.Jaxpr):
                yield each


def _number_type(equation: Any) -> str:
    left, right = (each.aval.dtype for each in equation.invars[:2])
    number = jnp.promote_types(left, right)
    precision = equation.params["precision"]
    asked = precision if isinstance(precision, tuple) else (precision,)
    is_split = number == jnp.float32  # smaller numbers are exact in one pass
    return number.name + (next((PASSES[each] for each in asked if each in PASSES), "") if is_split else "")


def _dot_flops(equation: Any) -> int:
    (contracted, _), _ = equation.params["dimension_numbers"]
    left, out = equation.invars[0].aval.shape, equation.outvars[0].aval.shape
    return 2 * math.prod(out) * math.prod(left[axis] for axis in contracted)


def _conv_flops(equation: Any) -> int:
    """Count what a convolution multiplies: for each output channel and sample, taps that meet an input."""
    params = equation.params
    numbers = params["dimension_numbers"]
    left, kernel = (each.aval.shape for each in equation.invars)
    out = equation.outvars[0].aval.shape
    taps = 1
    for axis, (low, _) in enumerate(params["padding"]):
        size, holes = left[numbers.lhs_spec[2 + axis]], params["lhs_dilation"][axis]
        starts = np.arange(out[numbers.out_spec[2 + axis]]) * params["window_strides"][axis] - low
        offsets = np.arange(kernel[numbers.rhs_spec[2 + axis]]) * params["rhs_dilation"][axis]
        places = starts[:, None] + offsets
        taps *= int(np.sum((places >= 0) & (places <= (size - 1) * holes) & (places % holes == 0)))
    inputs_per_output = kernel[numbers.rhs_spec[1]]
    return 2 * out[numbers.out_spec[0]] * out[numbers.out_spec[1]] * inputs_per_output * taps
