"""What a run's train step needs on some hardware: found by compiling it for that hardware."""

import dataclasses
import hashlib
import importlib.metadata
import json
import re
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
from absl import logging
from jax.experimental import topologies
from jax.sharding import NamedSharding

from lerobot_jax import hub, sharding
from lerobot_jax.config import TrainConfig
from lerobot_jax.errors import InputError
from lerobot_jax.files import write_json
from lerobot_jax.planning import inputs, memory
from lerobot_jax.planning.collectives import find_collectives, totals
from lerobot_jax.planning.flops import count_flops
from lerobot_jax.planning.hardware import Topology, gpu_settings, tpu_settings
from lerobot_jax.planning.hlo import Module
from lerobot_jax.planning.traffic import bytes_accessed
from lerobot_jax.program import Program

LARGE = 2**20  # bytes from which an array that every device has whole is worth a line
PACKAGES = ("jax", "jaxlib", "libtpu", "jax-cuda12-plugin", "jax-cuda13-plugin")
# The compiler has two sentences for it.
_NEEDED = re.compile(r"[Uu]sed ([\d.]+)([KMGT])\w* of|\(([\d.]+)([KMGT])\w*\) exceeds available")
UNITS = {"K": 2**10, "M": 2**20, "G": 2**30, "T": 2**40}


class Measurer:
    """Compiles the train step of a run for some hardware, with one batch size or another.

    Args:
        config: the run's.
        topology: the hardware.

    Raises:
        InputError: when the run cannot be on this hardware.
    """

    def __init__(self, config: TrainConfig, topology: Topology):
        self.config, self.topology = config, topology
        self.sources, self.policies = inputs.describe_run(config)
        self.pretrained = inputs.weights_at_hand(self.policies[0])
        self.mesh = sharding.make_mesh(config.mesh, devices_of(topology))

    def measure(self, batch_size: int) -> dict[str, Any]:
        """Compile the step, or read what was found the last time; give numbers that JSON can hold.

        Raises:
            InputError: when the batch cannot be divided among the devices.
        """
        config = dataclasses.replace(self.config, batch_size=batch_size)
        program = self._program(config)
        batch = inputs.batch_shapes(config, self.sources, self.policies, program.batch_sharding)
        traced = program.trace_step(batch)
        started = time.monotonic()
        lowered = traced.lower()
        path = hub.cache_home() / "plans" / f"{_fingerprint(lowered, self.topology)}.json"
        if not path.exists():
            write_json(self._compile(lowered, program, batch), path)
            logging.info("compiled for %s in %.0f s", self.topology.name, time.monotonic() - started)
        found = json.loads(path.read_text())
        per_device = self.mesh.size if program.layout.is_split else sharding.num_batch_parts(self.mesh)
        return found | {
            "batch_size": batch_size,
            "samples_per_step": program.samples_per_step * program.layout.num,
            "batch_unit": 1 if program.layout.is_split else per_device,
            "flops": dict(count_flops(traced.jaxpr.jaxpr)),
        }

    def describe(self) -> dict[str, Any]:
        """Give what does not depend on how large a batch is."""
        program = self._program(self.config)
        config = dataclasses.replace(self.config, remat="none")
        program_without = self._program(config)
        batch = inputs.batch_shapes(config, self.sources, self.policies, program.batch_sharding)
        once = count_flops(program_without.trace_step(batch).jaxpr.jaxpr)
        num_params = sum(x.size for x in jax.tree.leaves(program.init_shapes[0]))
        trained = sum(x.size for x in jax.tree.leaves(program.seed_state["params"]))
        return {
            "mesh": dict(self.mesh.shape),
            "num_parameters": num_params,
            "num_trained_parameters": trained,
            "flops_once": dict(once),
            "replicated": replicated_arrays(program.state, self.mesh),
        }

    def _program(self, config: TrainConfig) -> Program:
        names = [source.name for source in self.sources]
        return Program(config, self.policies, names, self.mesh, self.pretrained)

    def _compile(self, lowered: Any, program: Program, batch: Any) -> dict[str, Any]:
        try:
            compiled = lowered.compile()
        except jax.errors.JaxRuntimeError as error:
            if "RESOURCE_EXHAUSTED" not in str(error):
                raise
            return {"memory": self._exhausted(str(error), program, batch)}
        topology, platform = self.topology, self.topology.platform
        found = memory.step_memory(compiled, program.state, batch, platform, topology.memory)
        module = Module(compiled.as_text())
        collectives = find_collectives(
            module, self.mesh.shape, topology.num_slices, is_one_slice=platform == "tpu"
        )
        return {
            "memory": dataclasses.asdict(found),
            "bytes_accessed": bytes_accessed(module),
            "collectives": [dataclasses.asdict(each) for each in totals(collectives)],
        }

    def _exhausted(self, message: str, program: Program, batch: Any) -> dict[str, Any]:
        """Give what is known of a step that the compiler refused."""
        used = _NEEDED.search(message)
        if used is None:
            raise InputError(f"the compiler has not enough memory on {self.topology.name}: {message[:500]}")
        number, unit = (used[1], used[2]) if used[1] else (used[3], used[4])
        peak = int(float(number) * UNITS[unit])
        parts = memory.state_parts(program.state, batch)
        rest = max(0, peak - sum(parts.values()))
        found = memory.StepMemory(parts, rest, peak, self.topology.memory, is_bound=False)
        return dataclasses.asdict(found)


def devices_of(topology: Topology) -> Sequence[Any]:
    """Give the devices, which need not be there."""
    if topology.platform == "cpu":
        return jax.devices("cpu")[: topology.num_devices]
    settings = tpu_settings(topology) if topology.platform == "tpu" else gpu_settings(topology)
    try:
        return topologies.get_topology_desc(**settings).devices
    except (jax.errors.JaxRuntimeError, ValueError) as error:
        raise InputError(f"--topology: the compiler does not know {topology.name}: {error}") from None


def replicated_arrays(state: dict[str, Any], mesh: jax.sharding.Mesh) -> list[dict[str, Any]]:
    """List the large arrays that every device of a mesh with `fsdp` or `tensor` has whole, by parameter.

    Returns:
        For each: its dotted name, its shape, and the bytes of all that a device has of it (the parameter, its
        moments, its average).
    """
    if mesh.shape["fsdp"] * mesh.shape["tensor"] == 1:
        return []
    found: dict[str, dict[str, Any]] = {}
    for path, leaf in jax.tree_util.tree_leaves_with_path(state):
        assert isinstance(leaf.sharding, NamedSharding)
        size = leaf.size * leaf.dtype.itemsize
        if size <= LARGE or any(leaf.sharding.spec):
            continue
        names = [str(entry.key) for entry in path if isinstance(entry, jax.tree_util.DictKey)]
        where = {"params", "buffers", "opt_state", "ema", "frozen", "mu", "nu"}
        name = ".".join(name for name in names if name not in where)
        entry = found.setdefault(name, {"name": name, "shape": list(leaf.shape), "bytes": 0})
        entry["bytes"] += size
    return sorted(found.values(), key=lambda entry: -entry["bytes"])


def _fingerprint(lowered: Any, topology: Topology) -> str:
    """Tell one compilation from another: the program, the hardware, the versions of compilers and of us."""
    versions = {name: _version(name) for name in PACKAGES}
    readers = [path.read_text() for path in sorted(Path(__file__).parent.glob("*.py"))]
    parts = [lowered.as_text(), repr(topology), repr(versions), *readers]
    return hashlib.sha256("\0".join(parts).encode()).hexdigest()[:32]


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None
