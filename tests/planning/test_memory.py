"""The memory of a step, against sizes known by arithmetic."""

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from lerobot_jax.planning.memory import device_bytes, present_limit, step_memory


def _step(state, batch):
    def loss(params):
        return jnp.sum(jnp.tanh(batch["x"] @ params["w"]) ** 2)

    grads = jax.grad(loss)(state["params"])
    moved = jax.tree.map(lambda m, g: 0.9 * m + g, state["opt_state"], grads)
    return {
        "step": state["step"] + 1,
        "params": jax.tree.map(jnp.subtract, state["params"], moved),
        "opt_state": moved,
    }


def _shapes():
    mesh = jax.make_mesh((2, 4), ("data", "fsdp"), axis_types=(AxisType.Auto,) * 2)

    def shape(sizes, *axes):
        return jax.ShapeDtypeStruct(sizes, jnp.float32, sharding=NamedSharding(mesh, PartitionSpec(*axes)))

    w = {"w": shape((64, 256), None, "fsdp")}
    step = jax.ShapeDtypeStruct((), jnp.int32, sharding=NamedSharding(mesh, PartitionSpec()))
    return {"step": step, "params": w, "opt_state": w}, {"x": shape((32, 64), ("data", "fsdp"))}


def test_parts_of_a_step_are_counted_by_device():
    state, batch = _shapes()
    compiled = jax.jit(_step, donate_argnums=0).lower(state, batch).compile()
    memory = step_memory(compiled, state, batch, "cpu", limit=2**20)
    assert memory.parts == {
        "parameters": 64 * 256 * 4 // 4,
        "optimizer": 64 * 256 * 4 // 4,
        "batch": 32 * 64 * 4 // 8,
        "padding": 0,
    }
    assert memory.peak >= sum(memory.parts.values()) + memory.temporaries
    assert memory.fits
    assert memory.is_bound
    assert "parameters 16.0 KiB, optimizer 16.0 KiB, batch 1.00 KiB, activations" in memory.describe()
    assert "of 1.00 MiB" in memory.describe()
    assert not step_memory(compiled, state, batch, "cpu", limit=30_000).fits


def test_arrays_of_the_host_count_whole():
    assert device_bytes({"a": np.zeros((3, 5), np.int16), "b": jnp.zeros(2)}) == 30 + 8


def test_the_devices_here_have_a_limit():
    limit = present_limit()
    assert limit is not None
    assert 2**26 < limit < 2**50
