"""Record the compiled programs in this folder: a small FSDP step, without what the compilers note for themselves.

python -m tests.planning.programs.record v5e:2x2 ...
"""

import re
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
from jax.experimental import topologies
from jax.sharding import NamedSharding, PartitionSpec

from lerobot_jax.planning.hardware import gpu_settings, parse_topology, tpu_settings
from lerobot_jax.sharding import MeshConfig, make_mesh

LAYERS, WIDTH, BATCH = 6, 256, 64
MESHES = {"v5e:2x2": MeshConfig(fsdp=2), "2xv5e:2x2": MeshConfig(fsdp=4), "gpu:2x4xH100": MeshConfig(fsdp=4)}


def make_step(mesh):
    """Give a step of SGD on equal layers under `scan`, and the shapes of its weights and batch."""
    stored, whole = (NamedSharding(mesh, PartitionSpec(*axes)) for axes in ((None, "fsdp"), ()))

    @jax.custom_vjp
    def gather(w):
        return jax.lax.with_sharding_constraint(w, whole)

    gather.defvjp(lambda w: (gather(w), None), lambda _, g: (jax.lax.with_sharding_constraint(g, stored),))

    def loss(weights, x):
        x = jax.lax.scan(jax.checkpoint(lambda x, w: (jnp.tanh(x @ gather(w)), None)), x, weights)[0]
        return jnp.mean(x**2)

    def step(weights, x):
        return weights - 0.1 * jax.grad(loss)(weights, x)

    split = NamedSharding(mesh, PartitionSpec(None, None, "fsdp"))
    weights = jax.ShapeDtypeStruct((LAYERS, WIDTH, WIDTH), jnp.float32, sharding=split)
    rows = NamedSharding(mesh, PartitionSpec(("data", "fsdp")))
    x = jax.ShapeDtypeStruct((BATCH, WIDTH), jnp.float32, sharding=rows)
    return jax.jit(step, donate_argnums=0, out_shardings=split), weights, x


def strip(text: str) -> str:
    """Leave out the compiler's notes, except for how often a loop runs, and names of folders."""
    kept = []
    for line in text.splitlines():
        turns = re.search(r'"known_trip_count":\{"n":"\d+"\}', line)
        head, _, _ = line.partition(", backend_config=")
        kept.append(head + (f", backend_config={{{turns[0]}}}" if turns else ""))
    return re.sub(r'"/[^"\n]*/([^"/\n]+\.py)"', r'"\1"', "\n".join(kept))  # no folders of this machine


def main(names: list[str]) -> None:
    for name in names:
        topology = parse_topology(name)
        settings = gpu_settings(topology) if topology.platform == "gpu" else tpu_settings(topology)
        mesh = make_mesh(MESHES[name], topologies.get_topology_desc(**settings).devices)
        step, weights, x = make_step(mesh)
        compiled = step.lower(weights, x).compile()
        path = Path(__file__).with_name(name.replace(":", "_") + ".hlo.txt")
        path.write_text(strip(compiled.as_text()))
        print(
            path, len(compiled.as_text()), path.stat().st_size, dict(mesh.shape), compiled.memory_analysis()
        )


if __name__ == "__main__":
    main(sys.argv[1:])
