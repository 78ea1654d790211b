"""The first train state: where its arrays come from, in which types they are kept, and that each is there once."""

import dataclasses
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax.traverse_util import flatten_dict

from lerobot_jax import sharding, state_dict, torch_state, trainable
from lerobot_jax.config import DatasetConfig, TrainConfig
from lerobot_jax.policies.act import ACTConfig
from lerobot_jax.policies.base import FunctionalPolicy, load_policy, open_policy
from lerobot_jax.program import Program
from lerobot_jax.sharding import MeshConfig, make_mesh
from tests.stock.policies import new_policy

FROZEN = (r"model\.encoder\.layers\.", r"model\.decoder_pos_embed\.")


@pytest.fixture(scope="module")
def policy() -> FunctionalPolicy:
    return new_policy(ACTConfig.tiny(), action=3)


@pytest.fixture(scope="module")
def half(policy: FunctionalPolicy, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The policy in bfloat16."""
    folder = tmp_path_factory.mktemp("half")
    params = jax.tree.map(lambda x: x.astype(jnp.bfloat16), policy.params)
    policy.replace(params=params).save_pretrained(folder)
    return folder


def make_program(folder: Path, freeze: tuple[str, ...] = FROZEN, num_devices: int = 4) -> Program:
    start = load_policy(folder)
    config = TrainConfig(
        policy=dataclasses.replace(start.config, pretrained_path=str(folder)),
        dataset=DatasetConfig(repo_id="none/none"),
        mesh=MeshConfig(data=1, fsdp=num_devices, min_shard_size=16),
        batch_size=num_devices,
        freeze=freeze,
        ema_decay=0.9,
    )
    bare, weights = open_policy(folder, config.policy)
    mesh = make_mesh(config.mesh, jax.devices()[:num_devices])
    return Program(config, [bare], ["none"], mesh, weights)


def test_what_comes_in_bfloat16_and_is_not_trained_stays_so_and_is_exported_as_it_came(
    half: Path, tmp_path: Path
):
    program = make_program(half)
    state = program.first_state()
    assert jax.tree.map(jnp.shape, state) == jax.tree.map(lambda x: x.shape, program.state)
    types = jax.tree.map(lambda x: x.dtype, program.state)
    assert jax.tree.map(lambda x: x.dtype, state) == types
    places = jax.tree.map(lambda x: x.sharding, program.state)
    assert jax.tree.map(lambda x: x.sharding, state) == places
    kernels = {path for path in flatten_dict(state["frozen"]) if path[-1] in ("kernel", "in_proj_weight")}
    for path, array in flatten_dict(state["frozen"]).items():
        # Norms and biases compute in float32, and a table that is read past its layer is not cast by it.
        assert array.dtype == (jnp.bfloat16 if path in kernels else jnp.float32), path
    assert {x.dtype for x in jax.tree.leaves(state["params"])} == {jnp.dtype(jnp.float32)}
    assert kernels

    program.policy.replace(**trainable.weights_of(state)).save_pretrained(tmp_path)
    before, after = state_dict.read(half), state_dict.read(tmp_path)
    module = program.policy.module
    kept = {entry.keys[0] for entry in torch_state.entries(module) if entry.path in kernels}
    assert kept
    for key in before:
        assert (after[key].dtype == jnp.bfloat16) == (key in kept), key
        np.testing.assert_array_equal(after[key], before[key].astype(after[key].dtype), err_msg=key)


def test_what_comes_in_float32_stays_so(policy: FunctionalPolicy, tmp_path: Path):
    policy.save_pretrained(tmp_path)
    state = make_program(tmp_path).first_state()
    assert {x.dtype for x in jax.tree.leaves(state["frozen"])} == {jnp.dtype(jnp.float32)}
    params = flatten_dict(trainable.combine(state["params"], state["frozen"]))
    for path, value in flatten_dict(policy.params).items():
        np.testing.assert_array_equal(sharding.host_view(params[path]), value, err_msg=str(path))


@pytest.mark.parametrize("num_devices", [1, 4])
def test_a_step_may_use_the_memory_of_every_array_again(half: Path, num_devices: int):
    """No two arrays have the same memory: to donate it twice is an error, or ends the process."""
    program = make_program(half, num_devices=num_devices)
    state = program.first_state()
    places = jax.tree.map(lambda x: x.sharding, program.state)
    add_one = jax.jit(
        lambda state: jax.tree.map(lambda x: x + 1, state), donate_argnums=0, out_shardings=places
    )
    before = jax.tree.map(sharding.host_copy, state)
    after = add_one(add_one(state))
    jax.tree.map(
        lambda x, y: np.testing.assert_array_equal(x + x.dtype.type(1) + x.dtype.type(1), y), before, after
    )


def test_arrays_of_which_devices_have_parts_come_to_the_host_whole():
    mesh = make_mesh(MeshConfig(data=2, fsdp=4))
    array = np.arange(64, dtype=np.float32).reshape(8, 8)
    for spec in (jax.sharding.PartitionSpec("fsdp"), jax.sharding.PartitionSpec(None, "fsdp")):
        placed = jax.device_put(array, jax.sharding.NamedSharding(mesh, spec))
        for read in (sharding.host_view, sharding.host_copy):
            np.testing.assert_array_equal(read(placed), array)
    assert not np.shares_memory(sharding.host_copy(placed), sharding.host_view(placed))
