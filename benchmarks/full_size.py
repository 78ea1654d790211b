"""Create, save, restore, convert and run a policy of full size on this machine; report what memory each step takes.

    python benchmarks/full_size.py [--config=configs/pi0_libero.py] [--devices=8] [--folder=FOLDER]

Random weights in bfloat16, divided among virtual devices (`mesh.fsdp`), one array after the other. Each step is a
process of its own and takes what the one before left on the disk:

    create   draw the weights, in their parts                              8 devices
    save     a checkpoint as training saves it: Orbax's state, and LeRobot's folder with its certificate
    restore  Orbax's state to the devices, compared with LeRobot's folder  8 devices
    export   convert to-torch: a LeRobot folder of Orbax's state
    import   convert from-torch: read that folder, check its certificate, write it again
    compare  convert diff: both folders are equal, bit for bit
    sample   load the folder as a robot does, and give one chunk of actions

The state holds parameters and buffers, nothing of an optimizer. A certificate takes a chunk of actions for two
observations each time that it is written or checked. Needs a disk with room for four times the weights.
"""

import argparse
import dataclasses
import functools
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import tokenizers
from flax.traverse_util import flatten_dict, unflatten_dict
from tokenizers import models, pre_tokenizers

from lerobot_jax import checkpoint, convert, sharding, state_dict, torch_state
from lerobot_jax.certificate import TASKS, Certifier, make_observations
from lerobot_jax.checkpoint_writer import CheckpointWriter
from lerobot_jax.config import TrainConfig, load_recipe
from lerobot_jax.data import mixture
from lerobot_jax.features import FeatureType
from lerobot_jax.files import write_json
from lerobot_jax.policies.base import FunctionalPolicy, load_policy, make_policy
from lerobot_jax.program import Program
from lerobot_jax.sharding import MeshConfig

DTYPE = jnp.dtype(jnp.bfloat16)
GROUP = 200_000_000  # numbers that are drawn together: their random bits are several times as large
# Processors multiply in float32: else the compiler widens the weights of all layers before it goes through them.
ONE_LAYER_AT_A_TIME = "--xla_disable_hlo_passes=while-loop-invariant-code-motion"
SHARDED = ("create", "restore")  # what runs on several devices
STAGES = ("create", "restore", "export", "import", "compare", "sample")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--config", default="configs/pi0_libero.py", help="default: %(default)s")
    parser.add_argument("--devices", type=int, default=8, help="virtual devices (default: %(default)s)")
    parser.add_argument("--folder", type=Path, help="for the files; by default a temporary one")
    parser.add_argument("--stage", choices=STAGES, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.stage:
        return run_stage(args.stage, args.config, args.devices, args.folder)
    folder = args.folder or Path(tempfile.mkdtemp())
    print(f"{'step':<10} {'s':>6} {'peak, GiB':>10}  ", flush=True)
    try:
        for stage in STAGES:
            num = args.devices if stage in SHARDED else 1
            flags = f"{ONE_LAYER_AT_A_TIME} --xla_force_host_platform_device_count={num}"
            root = str(Path(__file__).parents[1])
            environment = {"JAX_PLATFORMS": "cpu", "PYTHONPATH": root, "XLA_FLAGS": flags}
            command = [sys.executable, __file__, f"--config={args.config}", f"--devices={args.devices}"]
            command += [f"--folder={folder}", f"--stage={stage}"]
            subprocess.run(command, env=os.environ | environment, check=True)
    finally:
        shutil.rmtree(folder)
    return None


def run_stage(stage: str, recipe: str, devices: int, folder: Path) -> None:
    run, exported, imported = (folder / name for name in ("run", "exported", "imported"))
    if stage in SHARDED:
        program, policy = make_program(make_config(recipe, devices, run))
        {"create": create, "restore": restore}[stage](program, policy)
    elif stage == "export":
        with measured(stage):
            convert.to_torch(convert.ToTorch(str(run), str(exported)))
    elif stage == "import":
        with measured(stage):
            convert.from_torch(convert.FromTorch(str(exported), str(imported)))
    elif stage == "compare":
        with measured(stage):
            convert.diff(convert.Diff(str(exported), str(imported)))
    else:
        sample(imported)


def create(program: Program, policy: FunctionalPolicy) -> None:
    with measured("create") as notes:
        state = draw_state(program, policy)
        leaves = jax.tree.leaves(state)
        notes.append(f"{sum(x.size for x in leaves) / 1e9:.2f} G numbers")
        notes.append(f"{sum(x.nbytes for x in leaves) / 2**30:.2f} GiB")
    with measured("save"):
        checkpoint.write_train_config(program.config)
        writer = CheckpointWriter(program.config, policy, Certifier(policy))
        writer.save(0, state, is_best=False)
        writer.wait()


def draw_state(program: Program, policy: FunctionalPolicy) -> dict[str, Any]:
    """Draw a new policy where training keeps it, a few arrays at a time, the largest first."""
    shapes = dict(zip(("params", "buffers"), jax.eval_shape(policy.init, jax.random.key(0)), strict=True))
    where = flatten_dict(sharding.state_shardings(program.execution, shapes))
    key = np.asarray(jax.random.key_data(jax.random.key(0)))

    def draw(paths: list[Any], key: jax.Array) -> dict[Any, jax.Array]:
        params, buffers = policy.init(jax.random.wrap_key_data(key))
        arrays: dict[Any, Any] = {**flatten_dict({"params": params, "buffers": buffers})}
        return {path: arrays[path].astype(kept_type(arrays[path].dtype)) for path in paths}

    drawn = {}
    for paths in in_groups(flatten_dict(shapes)):
        init = jax.jit(functools.partial(draw, paths), out_shardings={path: where[path] for path in paths})
        drawn |= jax.block_until_ready(init(key))
    return {"step": jnp.zeros((), jnp.int32), "buffers": {}} | unflatten_dict(drawn)


def in_groups(shapes: dict[Any, Any]) -> Iterator[list[Any]]:
    """Divide paths into groups of arrays with not many more than `GROUP` numbers together, the largest first."""
    group, size = [], 0
    for path in sorted(shapes, key=lambda path: -shapes[path].size):
        group.append(path)
        size += shapes[path].size
        if size > GROUP:
            yield group
            group, size = [], 0
    if group:
        yield group


def kept_type(dtype: jnp.dtype) -> jnp.dtype:
    """Give the type in which numbers of a type are kept."""
    return DTYPE if jnp.issubdtype(dtype, jnp.floating) else dtype


def restore(program: Program, policy: FunctionalPolicy) -> None:
    with measured("restore") as notes:
        run = program.config.run_dir
        stored = state_dict.read(checkpoint.find_pretrained_model(run))
        params, buffers = jax.eval_shape(policy.init, jax.random.key(0))
        shapes = {"params": params, "buffers": buffers, "step": jax.ShapeDtypeStruct((), jnp.int32)}
        where = sharding.state_shardings(program.execution, shapes)
        target = jax.tree.map(
            lambda x, s: jax.ShapeDtypeStruct(x.shape, kept_type(x.dtype), sharding=s),
            shapes,
            where,
        )
        state = checkpoint.restore(run, 0, target)
        found = torch_state.to_torch(policy.module, state["params"], state["buffers"])
        different = [key for key, array in found.read_ahead() if array.tobytes() != stored[key].tobytes()]
        assert not different, different
        notes.append(f"{len(found)} arrays as in LeRobot's folder")


def sample(folder: Path) -> None:
    with measured("sample") as notes:
        policy = load_policy(folder)
        made = policy.tokenize(make_observations(policy))
        observation = {key: np.asarray(value[:1]) for key, value in made.items()}

        @jax.jit
        def predict(params: Any, buffers: Any, observation: Any, key: jax.Array) -> jax.Array:
            chunk = policy.sample_actions(params, buffers, policy.preprocess(observation), key)
            return policy.postprocess(chunk, observation)

        actions = np.asarray(predict(policy.params, policy.buffers, observation, jax.random.key(0)))
        assert np.isfinite(actions).all()
        notes.append(f"actions of shape {actions.shape}")


def make_config(recipe: str, devices: int, run: Path) -> TrainConfig:
    """Give the recipe's settings, with new weights and the words of the certificate's tasks as tokens."""
    config, folder = load_recipe(recipe), run.with_name("tokenizer")
    vocabulary = ["<pad>", "<unk>", *" ".join(TASKS).replace(".", " .").split()]
    model = models.WordLevel({word: i for i, word in enumerate(vocabulary)}, "<unk>")
    tokenizer = tokenizers.Tokenizer(model)
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()  # type: ignore[assignment]
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(folder / "tokenizer.json"))
    write_json({"pad_token": "<pad>", "unk_token": "<unk>"}, folder / "tokenizer_config.json")
    policy = dataclasses.replace(config.policy, pretrained_path=None, tokenizer_name=str(folder))
    return dataclasses.replace(
        config,
        policy=policy,
        mesh=MeshConfig(data=1, fsdp=devices),
        output_dir=str(run),
        batch_size=devices,
        ema_decay=None,
    )


def make_program(config: TrainConfig) -> tuple[Program, FunctionalPolicy]:
    features = {**config.policy.input_features, **config.policy.output_features}
    shapes = {k: (3, 1, 1) if f.type == FeatureType.VISUAL else f.shape for k, f in features.items()}
    stats = {key: mixture.neutral_statistics(shape) for key, shape in shapes.items()}
    policy = make_policy(config.policy, stats)
    return Program(config, [policy], ["none"], sharding.make_mesh(config.mesh)), policy


@contextmanager
def measured(what: str) -> Iterator[list[str]]:
    """Print the seconds and the largest resident memory of a step, and what is noted of it."""
    Path("/proc/self/clear_refs").write_text("5")  # forget the peak until now
    started, notes = time.monotonic(), []
    yield notes
    seconds = time.monotonic() - started
    status = Path("/proc/self/status").read_text()
    peak = next(int(line.split()[1]) for line in status.splitlines() if line.startswith("VmHWM")) / 2**20
    print(f"{what:<10} {seconds:6.0f} {peak:10.2f}  {', '.join(notes)}", flush=True)


if __name__ == "__main__":
    main()
