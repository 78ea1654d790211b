"""Saves checkpoints in the background: each appears whole by one rename; the last ones and the best are kept."""

import dataclasses
import os
import shutil
import threading
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import orbax.checkpoint as ocp

from lerobot_jax import adapter_folder, distributed, sharding
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
from lerobot_jax.lora import Lora
from lerobot_jax.policies.base import FunctionalPolicy
from lerobot_jax.trainable import weights_of

Tree = dict[str, Any]


class CheckpointWriter:
    """Saves checkpoints in the background: training goes on as soon as the arrays are copied to the host.

    Of several processes, each writes its part of the train state, process 0 also the policy. Only when all have
    written theirs does process 0 give the checkpoint its name; if one fails, all report it.
    """

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
        self._channel = distributed.Channel(distributed.group, f"save/{config.seed}")  # that of `_thread`
        self._thread: threading.Thread | None = None
        self._error: InputError | None = None

    def save(self, step: int, state: Tree, *, is_best: bool) -> None:
        """Start saving the state after `step` updates. Waits for, and reports a failure of, the save before."""
        self.wait()
        name = f"{step:06d}"
        partial = self._folder / f".partial-{name}"
        weights = weights_of(state)
        try:
            is_new = distributed.from_first(distributed.is_first() and self._begin(name, state, weights))
            if not is_new:
                if distributed.is_first():
                    self._publish(name, is_best)
                return
            self._orbax.save(partial / TRAINING_STATE, args=ocp.args.StandardSave(state))
        except OSError as error:
            remove(partial)
            raise InputError(self._failure(name, str(error))) from None
        certified = self._certifier.act(**weights)
        weights = sharding.to_host(weights)
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

    def _begin(self, name: str, state: Tree, weights: Tree) -> bool:
        """Make a place for a checkpoint; tell whether there was none of this name."""
        if (self._folder / name).exists():
            return False
        partial = self._folder / f".partial-{name}"
        remove(partial)
        self._check_space(state, weights)
        partial.mkdir()
        return True

    def _finish(self, partial: Path, name: str, weights: Tree, certified: Tree, is_best: bool) -> None:
        def write() -> None:
            try:
                if distributed.is_first():
                    self._write_model(partial, weights, certified)
            finally:
                self._orbax.wait_until_finished()

        def publish() -> None:
            if distributed.is_first():
                _sync(partial)
                partial.rename(self._folder / name)
                self._publish(name, is_best)

        error = self._failure_of_any(write) or self._failure_of_any(publish)
        if error is not None:  # reported by the next wait()
            self._error = InputError(self._failure(name, error))
            if distributed.is_first():
                remove(partial)

    def _failure_of_any(self, work: Callable[[], None]) -> str | None:
        """Do this process's part, and wait for those of the others; give the error that one of them met."""
        error = None
        try:
            work()
        except Exception as caught:
            error = str(caught) or repr(caught)
        found = enumerate(self._channel.gather(error))
        errors = [text if i == 0 else f"process {i}: {text}" for i, text in found if text is not None]
        return errors[0] if errors else None

    def _write_model(self, partial: Path, weights: Tree, certified: Tree) -> None:
        model = partial / PRETRAINED_MODEL
        # With LoRA, weights were rounded to bfloat16; without, what is in bfloat16 came so.
        self._policy.replace(**weights).save_pretrained(model, certified, widen=self._lora is not None)
        for dataset, variant in self._variants.items():
            variant.save_processors(model / DATASETS / dataset)
        write_json(self._config.to_dict(), model / TRAIN_CONFIG_NAME, indent=2)
        if self._lora is not None:
            self._write_adapters(partial / ADAPTER, weights, self._lora)

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
        if self._config.keep_last == 0 or not distributed.is_first():
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

    def _check_space(self, *trees: Tree) -> None:
        needed = sum(leaf.nbytes for tree in trees for leaf in jax.tree.leaves(tree))
        free = shutil.disk_usage(self._folder).free
        if free < needed:
            raise OSError(f"No space left on device: {needed / 1e6:.0f} MB needed, {free / 1e6:.0f} MB free")

    def _failure(self, name: str, error: str) -> str:
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
