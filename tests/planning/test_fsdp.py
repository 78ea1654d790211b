"""What TPU's compiler makes of a train state in parts, without a TPU: who sends what to whom."""

import dataclasses
import math

import jax
import numpy as np
import pytest
from jax.experimental import topologies

from lerobot_jax.config import DatasetConfig, TrainConfig
from lerobot_jax.features import FeatureType
from lerobot_jax.nn.gemma import GEMMA_SIZES, GemmaSettings
from lerobot_jax.nn.paligemma import PALIGEMMA_SIZES, PaliGemmaSettings
from lerobot_jax.nn.siglip import SiglipSettings
from lerobot_jax.planning.collectives import find_collectives
from lerobot_jax.planning.hardware import parse_topology, tpu_settings
from lerobot_jax.planning.hlo import Module
from lerobot_jax.policies.base import make_policy
from lerobot_jax.policies.pi0 import PI0Config
from lerobot_jax.processors import OBS_LANGUAGE_ATTENTION_MASK, OBS_LANGUAGE_TOKENS
from lerobot_jax.program import Program
from lerobot_jax.sharding import MeshConfig, make_mesh

BATCH = 16
TEXT, EXPERT = GemmaSettings(256, 3, 512, 2, 128), GemmaSettings(128, 3, 256, 2, 128)


@pytest.fixture(scope="module")
def compiled(request) -> tuple[Program, jax.stages.Compiled]:
    """The step of a small pi0, in bfloat16 on four chips that share one state."""
    pytest.importorskip("libtpu")
    vision = SiglipSettings(64, 128, 2, 2)
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(GEMMA_SIZES, "small", EXPERT)
        patch.setitem(PALIGEMMA_SIZES, "small", PaliGemmaSettings(TEXT, vision, 512))
        sizes = {"paligemma_variant": "small", "action_expert_variant": "small"}
        return compile_step(dataclasses.replace(PI0Config.tiny(), use_amp=True, dtype="bfloat16", **sizes))


def compile_step(policy_config: PI0Config) -> tuple[Program, jax.stages.Compiled]:
    mesh_config = MeshConfig(fsdp=4, min_shard_size=2**14)
    config = TrainConfig(
        policy=policy_config,
        dataset=DatasetConfig(repo_id="none/none"),
        batch_size=BATCH,
        mesh=mesh_config,
        ema_decay=0.99,
    )
    features = {**policy_config.input_features, **policy_config.output_features}
    stats = {
        key: {"mean": np.zeros(f.shape, np.float32), "std": np.ones(f.shape, np.float32)}
        for key, f in features.items()
    }
    devices = topologies.get_topology_desc(**tpu_settings(parse_topology("v5e:2x2"))).devices
    program = Program(config, [make_policy(policy_config, stats)], ["none"], make_mesh(mesh_config, devices))
    shapes = {}
    for key, feature in features.items():
        shape, dtype = feature.shape, np.float32
        if feature.type == FeatureType.VISUAL:
            shape, dtype = (*shape[1:], 3), np.uint8
        elif key == "action":
            shape = (policy_config.chunk_size, *shape)
        shapes[key] = jax.ShapeDtypeStruct((BATCH, *shape), dtype, sharding=program.batch_sharding)
    for key, dtype in ((OBS_LANGUAGE_TOKENS, np.int32), (OBS_LANGUAGE_ATTENTION_MASK, bool)):
        shape = (BATCH, policy_config.tokenizer_max_length)
        shapes[key] = jax.ShapeDtypeStruct(shape, dtype, sharding=program.batch_sharding)
    return program, program.trace_step(shapes).lower().compile()


def layer_sizes(program: Program) -> set[int]:
    """Give the bytes that whole weights take, of one layer of stacks, in 16 and in 32 bits."""
    flat = jax.tree_util.tree_leaves_with_path(program.seed_state["params"])
    sizes = set()
    for path, leaf in flat:
        shape = leaf.shape[1:] if "block" in jax.tree_util.keystr(path) else leaf.shape
        sizes |= {2 * math.prod(shape), 4 * math.prod(shape)}
    return sizes


def sharded_numbers(program: Program) -> int:
    """Count the parameters of which each device has a part."""
    return sum(x.size for x in jax.tree.leaves(program.seed_state["params"]) if any(x.sharding.spec))


def test_gradients_are_scattered_and_not_summed_everywhere(compiled):
    program, step = compiled
    found = find_collectives(Module(step.as_text()), program.layout.mesh.shape, is_one_slice=True)
    bytes_of = {
        kind: sum(each.size * each.times for each in found if each.kind == kind)
        for kind in ("reduce-scatter", "all-reduce")
    }
    gradients = 2 * sharded_numbers(program)
    assert bytes_of["reduce-scatter"] > 0.9 * gradients
    assert bytes_of["all-reduce"] < 0.1 * gradients


def test_weights_are_gathered_and_no_activation(compiled):
    program, step = compiled
    found = find_collectives(Module(step.as_text()), program.layout.mesh.shape, is_one_slice=True)
    gathered = [each for each in found if each.kind == "all-gather"]
    weights = layer_sizes(program)
    others = [each for each in gathered if each.size not in weights]
    assert sum(each.size * each.times for each in gathered) > 2 * sharded_numbers(program)
    assert sum(each.size * each.times for each in others) < 2**14, others  # numbers of tokens, rows of tables
    assert not [each for each in found if each.kind == "all-to-all"]


def test_the_state_is_updated_in_place_and_divided(compiled):
    program, step = compiled
    stats = step.memory_analysis()
    state = sum(
        math.prod(x.sharding.shard_shape(x.shape)) * x.dtype.itemsize for x in jax.tree.leaves(program.state)
    )
    whole = sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(program.state))
    assert stats.alias_size_in_bytes >= state
    assert state < 0.3 * whole
