"""Saves checkpoints in the background: each appears whole by one rename; the last ones and the best are kept."""

import dataclasses
import os
import shutil
import threading
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp

from lerobot_jax import adapter_folder
from lerobot_jax.certificate import Certifier
from lerobot_jax.checkpoint import (
    ADAPTER,
    CHECKPOINTS,
    DATASETS,
    PRETRAINED_MODEL,
    TRAIN_CONFIG_NAME,
    TRAINING_STATE,
    common_steps,
    remove,
    saved_steps,
)
from lerobot_jax.config import TrainConfig
from lerobot_jax.errors import InputError
from lerobot_jax.files import write_json
from lerobot_jax.lora import Lora, whole_precision
from lerobot_jax.policies.base import FunctionalPolicy
from lerobot_jax.trainable import weights_of

Tree = dict[str, Any]


class CheckpointWriter:
    """Saves checkpoints in the background: training goes on as soon as the arrays are copied to the host."""

    def __init__(
        self,
        config: TrainConfig,
        policy: FunctionalPolicy,
        certifier: Certifier,
        variants: Mapping[str, FunctionalPolicy] | None = None,
        together: Sequence[TrainConfig] = (),
        lora: Lora | None = None,
    ):
        """Args:
        config: the run's.
        policy: what is saved.
        certifier: of that policy.
        variants: in a mixture, the same policy with the processors for each dataset, by the dataset's name.
        together: the runs of all seeds that are resumed together, this one among them; from the last checkpoint
            that they all have, which is kept.
        lora: the adapters that the run trains, if any.
        """
        self._config, self._policy, self._certifier = config, policy, certifier
        self._lora = lora
        self._variants, self._together = dict(variants or {}), together or [config]
        self._folder = config.run_dir.resolve() / CHECKPOINTS
        self._orbax = ocp.AsyncCheckpointer(ocp.StandardCheckpointHandler())
        self._thread: threading.Thread | None = None
        self._error: InputError | None = None

    def save(self, step: int, state: Tree, *, is_best: bool) -> None:
        """Start saving the state after `step` updates. Waits for, and reports a failure of, the save before."""
        self.wait()
        name = f"{step:06d}"
        if (self._folder / name).exists():
            self._publish(name, is_best)
            return
        partial = self._folder / f".partial-{name}"
        remove(partial)
        weights = weights_of(state)
        try:
            self._check_space(partial, state, weights)
            self._orbax.save(partial / TRAINING_STATE, args=ocp.args.StandardSave(state))
        except OSError as error:
            remove(partial)
            raise InputError(self._failure(name, error)) from None
        certified = self._certifier.act(**weights)
        # Copied, not viewed: the next step reuses the memory of these arrays.
        weights = jax.tree.map(lambda x: np.array(x, copy=True), weights)
        if self._lora is not None:
            weights["params"] = whole_precision(weights["params"])
        self._thread = threading.Thread(
            target=self._finish, args=(partial, name, weights, certified, is_best)
        )
        self._thread.start()

    def wait(self) -> None:
        """Wait until what was started is on disk; raise `InputError` if it failed."""
        if self._thread is not None:
            self._thread.join()
            self._thread = None
        if self._error is not None:
            error, self._error = self._error, None
            raise error

    def _finish(self, partial: Path, name: str, weights: Tree, certified: Tree, is_best: bool) -> None:
        try:
            try:
                model = partial / PRETRAINED_MODEL
                self._policy.replace(**weights).save_pretrained(model, certified)
                for dataset, variant in self._variants.items():
                    variant.save_processors(model / DATASETS / dataset)
                write_json(self._config.to_dict(), model / TRAIN_CONFIG_NAME, indent=2)
                if self._lora is not None:
                    self._write_adapters(partial / ADAPTER, weights, self._lora)
            finally:
                self._orbax.wait_until_finished()
            _sync(partial)
            partial.rename(self._folder / name)
            self._publish(name, is_best)
        except Exception as error:  # reported by the next wait()
            self._error = InputError(self._failure(name, error))
            remove(partial)

    def _write_adapters(self, folder: Path, weights: Tree, lora: Lora) -> None:
        """Write what stock LeRobot writes of a policy with PEFT's adapters."""
        adapter_folder.write(folder, self._policy.module, lora, **weights)
        dataclasses.replace(self._policy.config.exported(), use_peft=True).save(folder)
        self._policy.save_processors(folder)
        for dataset, variant in self._variants.items():
            variant.save_processors(folder / DATASETS / dataset)
        write_json(self._config.to_dict(), folder / TRAIN_CONFIG_NAME, indent=2)

    def _publish(self, name: str, is_best: bool) -> None:
        for link in ["last"] + ["best"] * is_best:
            temporary = self._folder / f".{link}"
            temporary.unlink(missing_ok=True)
            temporary.symlink_to(name)
            os.replace(temporary, self._folder / link)
        self.remove_old()

    def remove_old(self) -> None:
        """Remove checkpoints that are neither among the last ones, nor the best, nor what all seeds go on from."""
        if self._config.keep_last == 0:
            return
        best = self._folder / "best"
        kept = {f"{step:06d}" for step in common_steps(self._together)[-1:]}
        if best.is_symlink():
            kept.add(os.readlink(best))
        for step in saved_steps(self._config.run_dir)[: -self._config.keep_last]:
            old = self._folder / f"{step:06d}"
            if old.name not in kept:
                doomed = self._folder / f".removed-{old.name}"
                old.rename(doomed)  # first out of sight, so that no half of it is ever seen
                remove(doomed)

    def _check_space(self, partial: Path, *trees: Tree) -> None:
        needed = sum(leaf.nbytes for tree in trees for leaf in jax.tree.leaves(tree))
        free = shutil.disk_usage(self._folder).free
        if free < needed:
            raise OSError(f"No space left on device: {needed / 1e6:.0f} MB needed, {free / 1e6:.0f} MB free")

    def _failure(self, name: str, error: Exception) -> str:
        steps = saved_steps(self._config.run_dir)
        last = f"the last good one is {steps[-1]:06d}" if steps else "there is none yet"
        return (
            f"{self._folder / name}: could not save the checkpoint ({error}); {last}; make room, then continue "
            "with --config.resume=True"
        )


def _sync(folder: Path) -> None:
    """Force a folder's files to disk."""
    for path in [folder, *folder.rglob("*")]:
        descriptor = os.open(path, os.O_RDONLY)
        os.fsync(descriptor)
        os.close(descriptor)
