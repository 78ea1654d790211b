"""Collectives and memory traffic of recorded programs, whose sizes are known, and of one compiled here."""

from pathlib import Path

import jax
import pytest

from lerobot_jax.planning.collectives import Total, find_collectives, totals
from lerobot_jax.planning.hlo import Module, shape_bytes
from lerobot_jax.planning.traffic import bytes_accessed
from lerobot_jax.sharding import MeshConfig, make_mesh
from tests.planning.programs.record import LAYERS, WIDTH, make_step

PROGRAMS = Path(__file__).with_name("programs")
WEIGHTS = (
    LAYERS * WIDTH * WIDTH * 4
)  # bytes; gathered forward, and again for the backward pass, which sums once


def _module(name: str) -> Module:
    return Module((PROGRAMS / f"{name}.hlo.txt").read_text())


@pytest.mark.parametrize(
    ("name", "data", "fsdp", "slices", "link"),
    [
        ("v5e_2x2", 2, 2, 1, "links"),
        ("2xv5e_2x2", 2, 4, 2, "network"),
        ("gpu_2x4xH100", 2, 4, 2, "network"),
    ],
)
def test_recorded_programs_gather_weights_and_sum_gradients(name, data, fsdp, slices, link):
    shape = {"data": data, "fsdp": fsdp, "tensor": 1}
    found = totals(find_collectives(_module(name), shape, slices, is_one_slice="v5e" in name))
    part = WEIGHTS // fsdp
    assert {(each.kind, each.axes): each for each in found} == {
        ("all-gather", ("fsdp",)): Total(
            "all-gather", ("fsdp",), "links", 2, 2 * LAYERS, 2 * WEIGHTS, 2 * (WEIGHTS - part)
        ),
        ("reduce-scatter", ("fsdp",)): Total(
            "reduce-scatter", ("fsdp",), "links", 1, LAYERS, WEIGHTS, WEIGHTS - part
        ),
        ("all-reduce", ("data",)): Total("all-reduce", ("data",), link, 1, LAYERS, part, part),
    }


def test_a_program_compiled_here_gathers_as_much():
    mesh = make_mesh(MeshConfig(fsdp=4))
    step, weights, x = make_step(mesh)
    module = Module(step.lower(weights, x).compile().as_text())
    found = find_collectives(module, mesh.shape)
    gathered = [each for each in found if each.kind == "all-gather"]
    assert sum(each.size * each.times for each in gathered) == 2 * WEIGHTS
    assert {each.axes for each in gathered} == {("fsdp",)}
    # On CPUs, a sum of which each device keeps a part is a whole sum.
    assert {each.kind for each in found} == {"all-gather", "all-reduce"}


@pytest.mark.parametrize(
    ("groups", "axes", "sent"),
    [
        ("{{0,1},{2,3},{4,5},{6,7}}", ("fsdp",), 4 * 1024),
        ("{{0,2,4,6},{1,3,5,7}}", ("data",), 6 * 1024),
        ("{}", ("data", "fsdp"), 7 * 1024),
        ("[4,2]<=[8]", ("fsdp",), 4 * 1024),
        ("[2,4]<=[4,2]T(1,0)", ("data",), 6 * 1024),
        ("mesh['a'=4,'b'=2] {'a'}", ("data",), 6 * 1024),
        ("mesh['a'=2,'b'=4], device_ids=([4,2]T(1,0)) {'a'}", ("fsdp",), 4 * 1024),
        ("what=8", ("?",), 7 * 1024),
    ],
)
def test_groups_of_devices_are_axes_of_the_mesh(groups, axes, sent):
    module = Module(
        "ENTRY %main (p: f32[2048]) -> f32[2048] {\n"
        "  %p = f32[2048]{0} parameter(0)\n"
        f"  ROOT %r = f32[256]{{0}} reduce-scatter(%p), channel_id=1, replica_groups={groups}, to_apply=%add\n"
        "}\n"
    )
    (found,) = find_collectives(module, {"data": 4, "fsdp": 2})
    assert (found.axes, found.sent, found.size) == (axes, sent, 8192)


def test_permutations_have_the_axis_along_which_they_go():
    module = Module(
        "ENTRY %main (p: bf16[8]) -> bf16[8] {\n"
        "  %p = bf16[8]{0} parameter(0)\n"
        "  ROOT %r = bf16[8]{0} collective-permute(%p), source_target_pairs={{0,1},{1,0},{2,3},{3,2}}\n"
        "}\n"
    )
    (found,) = find_collectives(module, {"data": 2, "fsdp": 2})
    assert (found.axes, found.sent, found.dtype) == (("fsdp",), 16, "bf16")


def test_memory_traffic_counts_what_is_read_and_written():
    matrices = [jax.ShapeDtypeStruct((64, 64), "float32")] * 2
    text = jax.jit(lambda a, b: a @ b).lower(*matrices).compile().as_text()
    assert bytes_accessed(Module(text)) == 3 * 64 * 64 * 4


def test_loops_read_a_slice_each_turn():
    def layers(x, stack):
        return jax.lax.scan(lambda x, w: (x @ w, None), x, stack)[0]

    arguments = [jax.ShapeDtypeStruct(shape, "float32") for shape in ((64, 64), (50, 64, 64))]
    text = jax.jit(layers).lower(*arguments).compile().as_text()
    matrix = 64 * 64 * 4
    # Each turn at least reads two matrices and writes one; all of the stack each turn would be 50 more.
    assert 50 * 3 * matrix <= bytes_accessed(Module(text)) <= 50 * 10 * matrix


def test_sizes_of_shapes():
    assert shape_bytes("(bf16[3,8,128]{2,1,0:T(8,128)(2,1)}, u32[]{:S(2)}, token[])") == 3 * 8 * 128 * 2 + 4
    assert shape_bytes("f32[8]{0:T(128)S(1)}", main_memory_only=True) == 0
    assert shape_bytes("s4[8]{0}") == 4
    assert shape_bytes("f8e4m3fn[8]{0}") == 8
