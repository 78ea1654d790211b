"""Train a policy: a whole run from top to bottom.

    python -m lerobot_jax.train --config=configs/act_pusht.py --config.batch_size=16

Continue a stopped run with `--config.resume=True`: it goes on exactly where its last checkpoint was. Ctrl-C and
SIGTERM save a checkpoint before they end the run. Mirrors `lerobot.scripts.lerobot_train`.
"""

import contextlib
import dataclasses
import functools
import math
import signal
import sys
import time
from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from absl import logging
from flax.traverse_util import flatten_dict, unflatten_dict

from lerobot_jax import checkpoint, optim, sharding, training_data
from lerobot_jax.compilation import compile_quickly, keep_compiled_programs
from lerobot_jax.config import TrainConfig, load_config
from lerobot_jax.data import loader
from lerobot_jax.data.mixture import DATASET_INDEX
from lerobot_jax.data.streaming import StreamedSamples
from lerobot_jax.errors import InputError, reported_on_one_line
from lerobot_jax.eval import EVAL_INFO_NAME, check_environment, describe, evaluate
from lerobot_jax.features import ACTION
from lerobot_jax.files import write_json
from lerobot_jax.logs import setup_logging
from lerobot_jax.metrics import MetricsLog, import_wandb
from lerobot_jax.policies import base
from lerobot_jax.policies.base import FunctionalPolicy
from lerobot_jax.processors import RenameObservations
from lerobot_jax.progress import progress_bar
from lerobot_jax.push_to_hub import check_before_training, push_to_hub
from lerobot_jax.transforms import random_transforms
from lerobot_jax.visualize import plot_curves

Tree = dict[str, Any]


def main(argv: Sequence[str]) -> None:
    keep_compiled_programs()
    # Everything that can be wrong with the input is checked before the run's folder is made.
    config = checkpoint.open_run(load_config(argv))
    if config.policy.push_to_hub:
        check_before_training(config)
    sources = training_data.open_sources(config)
    # What comes from the Hub is pinned: the run keeps to these commits.
    revisions = [source.meta.revision or source.config.revision for source in sources]
    config = dataclasses.replace(config, dataset=config.dataset.pinned(revisions))
    policies = training_data.build_policies(config, sources)
    policy = policies[0]
    if config.env.type is not None:
        check_environment(policy.config, config.env)
    if config.wandb.enable:
        import_wandb()
    mesh = sharding.make_mesh()
    accumulation = config.gradient_accumulation_steps
    split_over_devices = sharding.batch_sharding(mesh, config.batch_size, axis=int(accumulation > 1))
    on_every_device = sharding.replicated(mesh)
    batch_size = config.batch_size * accumulation
    flat = sharding.batch_sharding(mesh, batch_size)
    samples = training_data.training_samples(config, sources, policy, on_every_device, flat)
    checkpoint.write_train_config(config)

    # The train state: all that a step reads and changes.
    init_key, step_key, eval_key = jax.random.split(jax.random.key(config.seed), 3)
    params_shape, buffers_shape = jax.eval_shape(policy.init, init_key)
    optimizer = optim.make_optimizer(config, params_shape)

    def make_state(params: Tree, buffers: Tree) -> Tree:
        state = {"step": jnp.zeros((), jnp.int32), "params": params, "buffers": buffers}
        state["opt_state"] = optimizer.init(params)
        if config.ema_decay is not None:
            state["ema"] = jax.tree.map(jnp.copy, {"params": params, "buffers": buffers})
        return state

    saved_steps = checkpoint.saved_steps(config.run_dir)  # none unless resuming
    if saved_steps:
        target = jax.tree.map(
            lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=on_every_device),
            jax.eval_shape(make_state, params_shape, buffers_shape),
        )
        state = checkpoint.restore(config.run_dir, saved_steps[-1], target)
    else:
        arrays = (policy.params, policy.buffers)
        if config.policy.pretrained_path is None:
            arrays = base.load_pretrained_parts(policy, *compile_quickly(policy.init, init_key)(init_key))
        state = jax.jit(make_state, out_shardings=on_every_device)(*arrays)
        del arrays
    # From here on, the arrays are in the state.
    policies = [each.replace(params={}, buffers={}) for each in policies]
    policy = policies[0]
    step = first_step = int(state["step"])
    num_params = sum(x.size for x in jax.tree.leaves(state["params"]))
    logging.info(
        "%s: %s policy with %s parameters, %d episodes with %d frames, batch %d on %d %s device(s)",
        config.run_dir,
        policy.config.type,
        f"{num_params:,}",
        sum(len(source.train_episodes) for source in sources),
        sum(source.num_train_frames(policy.config.drop_n_last_frames) for source in sources),
        batch_size,
        mesh.size,
        jax.default_backend(),
    )

    # Batches, and the compiled step
    batches = loader.training_batches(
        samples,
        batch_size,
        first_step=first_step,
        num_workers=config.num_workers,
        prefetch_factor=config.prefetch_factor,
    )
    if accumulation > 1:
        shape = (accumulation, config.batch_size)
        batches = ({k: v.reshape(*shape, *v.shape[1:]) for k, v in batch.items()} for batch in batches)
    batches = loader.prefetch_to_device(batches, split_over_devices)
    batch = next(batches)
    started = time.monotonic()
    preprocess = make_preprocess(policies, is_mixture=bool(config.dataset.mixture))
    loss_fn = make_loss(policy, preprocess, [source.name for source in sources])
    train_step = make_train_step(loss_fn, optimizer, config, policy.progress)
    train_step = jax.jit(train_step, donate_argnums=0)
    train_step = train_step.lower(state, batch, step_key).compile()
    logging.info("compiled the train step in %.1f s", time.monotonic() - started)
    eval_loss = jax.jit(make_eval_loss(policy, preprocess))
    runner = policy.make_runner(config.eval.num_envs, config.seed)

    # The loop
    metrics_log = MetricsLog(config, first_step)
    variants = {source.name: each for source, each in zip(sources, policies, strict=True)}
    writer = checkpoint.CheckpointWriter(config, policy, variants if config.dataset.mixture else None)
    pending: list[dict[str, jax.Array]] = []
    data_wait, since = 0.0, time.monotonic()
    stream = samples if isinstance(samples, StreamedSamples) else contextlib.nullcontext()
    progress = progress_bar("training", config.steps, "step", initial=first_step)
    with StopRequest() as stop, stream, progress as bar:
        while step < config.steps and not stop.signal:
            state, metrics = train_step(state, batch, step_key)
            step += 1
            waiting = time.monotonic()
            batch = next(batches)
            if metrics["loss"].is_ready():  # the devices had nothing to do meanwhile
                data_wait += time.monotonic() - waiting
            pending.append(metrics)
            if len(pending) > 1:  # keep the host at most one step ahead of the devices
                jax.block_until_ready(pending[-2])
            bar.update()
            is_last = step == config.steps
            weights = state.get("ema") or {"params": state["params"], "buffers": state["buffers"]}
            is_best = False

            if not config.log_freq:
                del pending[:-2]
            if (config.log_freq and step % config.log_freq == 0) or is_last:
                means = mean_metrics(jax.device_get(pending))
                seconds = time.monotonic() - since
                means["lr"] = float(metrics["lr"])
                means["steps_per_s"] = len(pending) / seconds
                means["samples_per_s"] = means["steps_per_s"] * batch_size
                means["data_wait"] = data_wait / seconds
                check_finite(means["loss"], "loss", step, config)
                metrics_log.write(step, means)
                shown = {"loss": means["loss"], "samples/s": means["samples_per_s"]}
                bar.set_postfix(shown | {"data": f"{means['data_wait']:.0%}"}, refresh=False)
                pending, data_wait, since = [], 0.0, time.monotonic()

            if config.eval_steps and (step % config.eval_steps == 0 or is_last):
                held_out = training_data.held_out_batches(config, sources, policy, samples)
                losses = held_out_losses(eval_loss, weights, held_out, eval_key, mesh)
                is_best |= metrics_log.write_scored(step, losses)
                since = time.monotonic()

            if config.env.type and config.env_eval_freq and (step % config.env_eval_freq == 0 or is_last):
                runner.load(weights["params"], weights["buffers"])
                folder = config.run_dir / "eval" / f"step_{step:06d}"
                info = evaluate(
                    runner,
                    config.env,
                    config.eval,
                    seed=config.seed,
                    output_dir=folder,
                    should_stop=stop.requested,
                )
                if info is not None:
                    write_json(info, folder / EVAL_INFO_NAME, indent=2)
                    bar.write(f"step {step}: {describe(info)}")
                    numbers = {k: v for k, v in info["overall"].items() if isinstance(v, int | float)}
                    is_best |= metrics_log.write_scored(step, numbers)
                since = time.monotonic()

            is_due = is_last or is_best or (config.save_freq and step % config.save_freq == 0)
            if config.save_checkpoint and is_due:
                check_finite(largest_weight(state), "largest weight", step, config)
                writer.save(step, state, is_best=is_best)
                if not is_last:
                    plot_curves(config.run_dir)
                since = time.monotonic()
        if stop.signal and config.save_checkpoint:
            check_finite(largest_weight(state), "largest weight", step, config)
            writer.save(step, state, is_best=False)
    writer.wait()
    metrics_log.close()
    plot_curves(config.run_dir)
    last = config.run_dir / checkpoint.CHECKPOINTS / "last" / checkpoint.PRETRAINED_MODEL
    if stop.signal:
        logging.info("stopped at step %d; continue with --config.resume=True", step)
        sys.exit(128 + stop.signal)
    saved = f"the policy is in {last}" if config.save_checkpoint else "no policy was saved, as you wished"
    logging.info("done: %s, the curves are in %s", saved, config.run_dir / "curves.png")
    if config.policy.push_to_hub:
        repo_id, private = config.policy.repo_id, config.policy.private
        assert repo_id is not None
        logging.info(
            "uploading it, as does python -m lerobot_jax.push_to_hub %s --repo_id=%s", config.run_dir, repo_id
        )
        url = push_to_hub(config.run_dir, repo_id, private=private, dataset=sources[0].meta)
        logging.info("Model pushed to %s", url)


def make_preprocess(policies: Sequence[FunctionalPolicy], *, is_mixture: bool):
    """Give the preprocessing of raw batches; in a mixture, a sample has the statistics of its own dataset."""
    if not is_mixture:
        return functools.partial(_preprocess, policies[0])
    # The samples of a mixture have the policy's names already.
    pipelines = [each.preprocessor.replace(RenameObservations({})) for each in policies]
    policies = [each.replace(preprocessor=pre) for each, pre in zip(policies, pipelines, strict=True)]

    def preprocess(batch: Tree) -> Tree:
        which = batch[DATASET_INDEX]
        versions = [each.preprocess(batch) for each in policies]

        def select(*values: jax.Array) -> jax.Array:
            chosen = which.reshape(-1, *(1,) * (values[0].ndim - 1))
            return jax.lax.select_n(jnp.broadcast_to(chosen, values[0].shape), *values)

        return jax.tree.map(select, *versions)

    return preprocess


def _preprocess(policy: FunctionalPolicy, batch: Tree) -> Tree:
    """Restore the axis of single numbers, which LeRobot's datasets drop, and preprocess."""
    features = {**policy.config.input_features, **policy.config.output_features}
    names = {key: policy.preprocessor.rename_map.get(key, key) for key in batch}
    single = [key for key, name in names.items() if name in features and features[name].shape == (1,)]
    return policy.preprocess(batch | {key: batch[key][..., None] for key in single})


def make_loss(policy: FunctionalPolicy, preprocess: Any, names: Sequence[str]):
    """Give `loss(params, buffers, batch, key) -> (loss, (metrics, buffers))` of raw batches, in training.

    In a mixture, the metrics tell the loss of each dataset by name; NaN if a batch has none of its samples.
    """

    def mean_loss(params: Tree, buffers: Tree, batch: Tree, key: jax.Array):
        loss, (metrics, buffers) = policy.loss_fn(params, buffers, preprocess(batch), key, train=True)
        return loss, ({"loss": loss, **metrics}, buffers)

    def mixed_loss(params: Tree, buffers: Tree, batch: Tree, key: jax.Array):
        losses, (metrics, buffers) = policy.loss_fn(
            params, buffers, preprocess(batch), key, train=True, reduction="none"
        )
        loss = jnp.mean(losses)
        metrics = {"loss": loss, **metrics}
        for i, name in enumerate(names):
            metrics[f"loss/{name}"] = jnp.mean(losses, where=batch[DATASET_INDEX] == i)
        return loss, (metrics, buffers)

    return mean_loss if len(names) == 1 else mixed_loss


def make_train_step(
    loss_fn: Any,
    optimizer: optax.GradientTransformation,
    config: TrainConfig,
    progress: Collection[tuple[Any, ...]] = (),
):
    """Give `step(state, batch, key) -> (state, metrics)`: augmentation, gradients, clipping, optimizer, EMA.

    All randomness comes from `key` and the state's step count. With gradient accumulation, the batch has a leading
    axis of micro-batches, which all see the buffers in `progress` as they were before the step.
    """
    augment = random_transforms(config.dataset.image_transforms)

    def augmented_loss(params: Tree, buffers: Tree, batch: Tree, key: jax.Array):
        augment_key, key = jax.random.split(key) if config.dataset.image_transforms.enable else (key, key)
        images = {k: v for k, v in batch.items() if v.dtype == jnp.uint8 and v.ndim > 3}
        return loss_fn(params, buffers, batch | augment(augment_key, images), key)

    gradient = jax.grad(augmented_loss, has_aux=True)

    def accumulated_gradient(params: Tree, buffers: Tree, batch: Tree, key: jax.Array):
        num = config.gradient_accumulation_steps
        if num == 1:
            return gradient(params, buffers, batch, key)

        before = {path: x for path, x in flatten_dict(buffers).items() if path in progress}

        def add(carry, inputs):
            total, buffers = carry
            buffers = unflatten_dict(flatten_dict(buffers) | before)
            grads, (metrics, buffers) = gradient(params, buffers, *inputs)
            return (jax.tree.map(jnp.add, total, grads), buffers), metrics

        zeros = jax.tree.map(jnp.zeros_like, params)
        (total, buffers), metrics = jax.lax.scan(add, (zeros, buffers), (batch, jax.random.split(key, num)))
        means = {
            name: jnp.mean(x) if _is_in_every_step(name) else jnp.nanmean(x) for name, x in metrics.items()
        }
        return jax.tree.map(lambda g: g / num, total), (means, buffers)

    schedule, base_lr = optim.make_schedule(config), optim.optimizer_settings(config)["lr"]

    def train_step(state: Tree, batch: Tree, key: jax.Array) -> tuple[Tree, Tree]:
        step = state["step"]
        key = jax.random.fold_in(key, step)
        grads, (metrics, buffers) = accumulated_gradient(state["params"], state["buffers"], batch, key)
        updates, opt_state = optimizer.update(grads, state["opt_state"], state["params"])
        params = optax.apply_updates(state["params"], updates)
        new = {"step": step + 1, "params": params, "buffers": buffers, "opt_state": opt_state}
        if config.ema_decay is not None:
            values = {"params": params, "buffers": buffers}
            new["ema"] = optim.update_ema(state["ema"], values, step, config.ema_decay)
        metrics |= {"grad_norm": optax.tree.norm(grads), "lr": base_lr * schedule(step)}
        return new, metrics

    return train_step


def make_eval_loss(policy: FunctionalPolicy, preprocess: Any):
    """Give `loss(weights, batch, key)` without dropout and with noise that depends on `key` only."""

    def eval_loss(weights: Tree, batch: Tree, key: jax.Array) -> jax.Array:
        return policy.loss_fn(weights["params"], weights["buffers"], preprocess(batch), key, train=False)[0]

    return eval_loss


def held_out_losses(
    eval_loss: Any,
    weights: Tree,
    held_out: Mapping[str, Iterable[Tree]],
    key: jax.Array,
    mesh: jax.sharding.Mesh,
) -> dict[str, float]:
    """Average the loss over all held-out samples, and over those of each dataset if there are several."""
    sums, sizes = {}, {}
    for name, batches in held_out.items():
        losses, counts = [], []
        for i, batch in enumerate(batches):
            counts.append(len(batch[ACTION]))
            is_even = counts[-1] % mesh.size == 0  # the last batch may not be
            where = sharding.batch_sharding(mesh, counts[-1]) if is_even else sharding.replicated(mesh)
            losses.append(eval_loss(weights, jax.device_put(batch, where), jax.random.fold_in(key, i)))
            if i:  # read the next batch while the devices work, but no further ahead
                jax.block_until_ready(losses[-2])
        sums[name], sizes[name] = float(np.dot(jax.device_get(losses), counts)), sum(counts)
    result = {"eval_loss": sum(sums.values()) / sum(sizes.values())}
    if len(sums) > 1:
        result |= {f"eval_loss/{name}": sums[name] / size for name, size in sizes.items() if size}
    return result


def mean_metrics(steps: Sequence[Tree]) -> dict[str, float]:
    """Average the metrics of some steps; what no step has (a dataset that was not drawn) is left out."""
    found = {}
    for name in steps[0]:
        values = np.array([step[name] for step in steps])
        known = values if _is_in_every_step(name) else values[~np.isnan(values)]
        if len(known):
            found[name] = float(np.mean(known))
    return found


def _is_in_every_step(metric: str) -> bool:
    """Tell whether NaN means that training has diverged, and not that a step does not have the metric."""
    return metric in ("loss", "grad_norm")


@jax.jit
def largest_weight(state: Tree) -> jax.Array:
    """Give the largest magnitude of a parameter; NaN if there is one."""
    return jnp.max(jnp.stack([jnp.max(jnp.abs(x)) for x in jax.tree.leaves(state["params"])]))


def check_finite(value: float | jax.Array, what: str, step: int, config: TrainConfig) -> None:
    """Raise `InputError` when training has diverged, before anything of it is saved."""
    value = float(value)
    if not math.isfinite(value):
        steps = checkpoint.saved_steps(config.run_dir)
        raise InputError(
            f"the {what} is {value} at step {step}: training has diverged; lower the learning rate "
            f"(optimizer.lr) or raise warm-up; the last good checkpoint is "
            f"{f'step {steps[-1]}' if steps else 'none'}"
        )


class StopRequest:
    """Notes Ctrl-C and SIGTERM, so that the run can save and end in order; a second Ctrl-C ends it at once."""

    signal = 0

    def __enter__(self) -> "StopRequest":
        self._before = {s: signal.signal(s, self._note) for s in (signal.SIGINT, signal.SIGTERM)}
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _note(self, number: int, _: object) -> None:
        if self.signal:
            raise KeyboardInterrupt
        self.signal = number
        logging.info("stopping after this step, to save a checkpoint; once more to stop at once")

    def requested(self) -> bool:
        return bool(self.signal)


if __name__ == "__main__":
    setup_logging()
    with reported_on_one_line():
        main(sys.argv[1:])
