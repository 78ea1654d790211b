"""A tiny run of the real program, in this process or one of its own, and how two are compared."""

import os
import subprocess
import sys
import time
from pathlib import Path

import jax
import numpy as np
import orbax.checkpoint as ocp
import safetensors.numpy

from lerobot_jax import checkpoint
from tests.compiler import XLA_FLAGS
from tests.data.recordings import record

RECIPE = """
from lerobot_jax.config import DatasetConfig, TrainConfig
from lerobot_jax.features import NormalizationMode
from lerobot_jax.policies.act import ACTConfig

def get_config(variant=""):
    return TrainConfig(
        job_name="tiny",
        dataset=DatasetConfig(repo_id="test/recorded", root="{root}", eval_split=0.3),
        policy=ACTConfig(
            normalization_mapping=dict.fromkeys(("STATE", "ENV", "ACTION"), NormalizationMode.MEAN_STD),
            chunk_size=4, n_action_steps=2, dim_model=16, n_heads=2, dim_feedforward=16, n_encoder_layers=1,
            n_vae_encoder_layers=1, latent_dim=4, optimizer_lr=1e-3,
        ),
        steps=20, batch_size=8, log_freq=5, save_freq=10, env_eval_freq=0, eval_steps=10, ema_decay=0.9,
    )
"""
FEATURES = {
    "observation.environment_state": {"dtype": "float32", "shape": (4,), "names": None},
    "observation.state": {"dtype": "float32", "shape": (3,), "names": None},
    "action": {"dtype": "float32", "shape": (2,), "names": None},
}


def record_tiny(folder: Path) -> Path:
    """Record the dataset of the recipe; give its root."""
    return record(folder / "dataset", lengths=(9, 12, 8, 11), features=FEATURES).root


def tiny_arguments(root: Path, folder: Path) -> list[str]:
    """Write the recipe; give the command line of a run in `folder`/run."""
    recipe = folder / "tiny.py"
    recipe.write_text(RECIPE.format(root=root))
    return [f"--config={recipe}", f"--config.output_dir={folder / 'run'}"]


def final_arrays(run: Path) -> dict[str, np.ndarray]:
    """Read the weights that a run exported last, and its whole train state."""
    step = checkpoint.saved_steps(run)[-1]
    folder = run / "checkpoints" / f"{step:06d}"
    with ocp.Checkpointer(ocp.PyTreeCheckpointHandler()) as checkpointer:
        path = (folder / "training_state").resolve()
        stored = checkpointer.metadata(path).item_metadata.tree
        # As numpy: the devices of other processes, which may have saved it, are not here.
        as_numpy = jax.tree.map(lambda _: ocp.RestoreArgs(restore_type=np.ndarray), stored)
        state = checkpointer.restore(path, args=ocp.args.PyTreeRestore(restore_args=as_numpy))
    named = {
        jax.tree_util.keystr(path): np.asarray(x) for path, x in jax.tree_util.tree_leaves_with_path(state)
    }
    return named | safetensors.numpy.load_file(folder / "pretrained_model/model.safetensors")


def assert_same_run(a: Path, b: Path) -> None:
    first, second = final_arrays(a), final_arrays(b)
    assert set(first) == set(second)
    for key, value in first.items():
        np.testing.assert_array_equal(value, second[key], err_msg=key)


def start(arguments: list[str], tmp_path: Path) -> subprocess.Popen:
    environment = os.environ | {"XLA_FLAGS": XLA_FLAGS}
    command = [sys.executable, "-m", "lerobot_jax.train", *arguments]
    with (tmp_path / "log.txt").open("a") as log:
        return subprocess.Popen(command, env=environment, stdout=log, stderr=log, cwd=tmp_path)


def finish(arguments: list[str], tmp_path: Path) -> None:
    assert start(arguments, tmp_path).wait(timeout=300) == 0, (tmp_path / "log.txt").read_text()[-3000:]


def wait_for(condition, process: subprocess.Popen, tmp_path: Path) -> None:
    deadline = time.monotonic() + 120
    while not condition():
        assert process.poll() is None, (tmp_path / "log.txt").read_text()[-3000:]
        assert time.monotonic() < deadline
        time.sleep(0.01)
