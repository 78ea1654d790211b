"""Train a policy: a whole run from top to bottom.

    python -m lerobot_jax.train --config=configs/act_pusht.py --config.batch_size=16

Continue a stopped run with `--config.resume=True`: it goes on exactly where its last checkpoint was. Ctrl-C and
SIGTERM save a checkpoint before they end the run. Mirrors `lerobot.scripts.lerobot_train`.
"""

import contextlib
import dataclasses
import functools
import math
import sys
import time
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from absl import logging

from lerobot_jax import checkpoint, distributed, lora, sharding, training_data
from lerobot_jax.certificate import Certifier
from lerobot_jax.checkpoint_writer import CheckpointWriter
from lerobot_jax.compilation import compiling, keep_compiled_programs
from lerobot_jax.config import TrainConfig, load_config
from lerobot_jax.data import loader
from lerobot_jax.data.samples import DeviceRows
from lerobot_jax.data.streaming import StreamedSamples
from lerobot_jax.errors import InputError, reported_on_one_line
from lerobot_jax.eval import EVAL_INFO_NAME, check_environment, describe, evaluate
from lerobot_jax.files import write_json
from lerobot_jax.layer_decay import describe_layers
from lerobot_jax.logs import setup_logging
from lerobot_jax.metrics import MetricsLog, import_wandb
from lerobot_jax.planning.memory import present_limit, step_memory
from lerobot_jax.program import Program
from lerobot_jax.progress import progress_bar
from lerobot_jax.push_to_hub import check_before_training, push_to_hub
from lerobot_jax.rollout import Runner
from lerobot_jax.rtc_queue import check_delay
from lerobot_jax.seed_summary import summarize
from lerobot_jax.seeds import SeedLayout
from lerobot_jax.sharding import BatchPlacement
from lerobot_jax.stop import StopRequest
from lerobot_jax.train_step import mean_metrics
from lerobot_jax.trainable import weights_of
from lerobot_jax.visualize import plot_curves

Tree = dict[str, Any]


def main(argv: Sequence[str]) -> None:
    keep_compiled_programs()
    # Everything that can be wrong with the input is checked before the run's folder is made.
    config = load_config(argv)
    distributed.start(config.distributed, functools.partial(checkpoint.how_to_go_on, config))
    is_first = distributed.is_first()  # of several processes, this one logs and writes
    config = checkpoint.open_run(config)
    if config.policy.push_to_hub and is_first:
        check_before_training(config)
    with distributed.first_alone():  # what it makes or downloads, the others find
        sources = training_data.open_sources(config)
    # What comes from the Hub is pinned: the run keeps to these commits.
    revisions = [source.meta.revision or source.config.revision for source in sources]
    config = dataclasses.replace(config, dataset=config.dataset.pinned(revisions))
    distributed.check_same(config.to_dict(), free=checkpoint.FREE_FOR_EACH_PROCESS)
    runs = config.runs  # one for each seed; they differ in nothing but the seed and the folder
    policies = training_data.build_policies(config, sources)
    policy = policies[0]
    pretrained = training_data.open_weights(policy)
    if config.env.type is not None:
        check_environment(policy.config, config.env)
        check_delay(policy.config, config.eval.inference_delay)
    if config.wandb.enable and is_first:
        import_wandb()
    mesh = sharding.make_mesh(config.mesh)
    program = Program(config, policies, [source.name for source in sources], mesh, pretrained)
    layout, batch_size = program.layout, program.samples_per_step
    samples = training_data.training_samples(
        config, sources, policies, layout.replicated, program.samples_sharding
    )
    checkpoint.write_train_config(config)

    # The train state: all that a step reads and changes.
    step_key, eval_key = program.keys()
    saved_steps = checkpoint.common_steps(runs)  # none unless resuming
    step = first_step = saved_steps[-1] if saved_steps else 0
    if saved_steps:
        state = layout.stack([checkpoint.restore(run.run_dir, step, program.seed_state) for run in runs])
    else:
        state = program.first_state()
    num_params = sum(x.size for x in jax.tree.leaves(program.init_shapes[0]))
    if program.lora is not None:
        num_trained = sum(x.size for x in jax.tree.leaves(program.seed_state["params"]))
        num_adapters = len(program.lora.targets)
        logging.info("LoRA: %d adapters; %s of the numbers are trained", num_adapters, f"{num_trained:,}")
    logging.info(
        "%s: %s policy with %s parameters%s, %d episodes with %d frames, batch %d on %d %s device(s)",
        config.run_dir,
        policy.config.type,
        f"{num_params:,}",
        "" if len(runs) == 1 else f" for each of {len(runs)} seeds",
        sum(len(source.train_episodes) for source in sources),
        sum(source.num_train_frames(policy.config.num_dropped_frames) for source in sources),
        batch_size,
        mesh.size,
        jax.default_backend(),
    )
    if config.optimizer.layer_decay is not None:
        params = lora.as_dicts(program.init_shapes[0])
        logging.info("%s", describe_layers(config.optimizer.layer_decay, config.policy, params))

    # Batches, and the compiled step
    placement, micro = program.batch_placement, config.gradient_accumulation_steps
    reads_part = not isinstance(samples, DeviceRows)  # of the batch; these are on the devices already
    batches = loader.training_batches(
        samples,
        batch_size,
        rows=placement.rows_of_step(micro) if reads_part else None,
        first_step=first_step,
        num_workers=config.num_workers,
        prefetch_factor=config.prefetch_factor,
    )
    if micro > 1:
        shape = (*layout.lead, micro, -1)
        rest = len(layout.lead) + 1
        batches = ({k: v.reshape(*shape, *v.shape[rest:]) for k, v in batch.items()} for batch in batches)
    batches = loader.prefetch_to_device(batches, placement)
    batch = next(batches)
    with compiling("the train step"):
        train_step = program.trace_step(batch).lower().compile()
    memory = step_memory(train_step, state, batch, jax.default_backend(), present_limit())
    logging.info("memory of a device: %s", memory.describe())
    eval_loss = program.eval_loss()
    runner = policy.make_runner(config.eval.num_envs, config.seed, config.eval.inference_delay)
    if config.env.type and config.env_eval_freq:
        whole = sharding.local_copy(layout.take(weights_of(state), 0))
        if is_first:
            runner.load(**whole, seed=config.seed)
            runner.compile()

    # The loop
    logs = [MetricsLog(run, first_step) for run in runs]
    variants = {source.name: each for source, each in zip(sources, policies, strict=True)}
    variants = variants if config.dataset.mixture else None
    certifier = Certifier(policy)
    writers = [CheckpointWriter(run, policy, certifier, variants, runs, program.lora) for run in runs]

    def is_due(every: int) -> bool:
        return bool(every) and (step % every == 0 or step == config.steps)

    pending: list[dict[str, jax.Array]] = []
    logged_step, data_wait, since = step, 0.0, time.monotonic()
    stream = samples if isinstance(samples, StreamedSamples) else contextlib.nullcontext()
    progress = progress_bar("training", config.steps, "step", initial=first_step)
    with StopRequest() as stop, stream, progress as bar:
        while not (is_stopped := stop.due(step)) and step < config.steps:
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

            if not config.log_freq:
                del pending[:-2]
            if is_due(config.log_freq or config.steps):
                by_seed = zip(*(layout.each(values) for values in jax.device_get(pending)), strict=True)
                means = [mean_metrics(values) | {"lr": float(values[-1]["lr"])} for values in by_seed]
                seconds = time.monotonic() - since
                speed = {"steps_per_s": (step - logged_step) / seconds}
                speed["samples_per_s"] = speed["steps_per_s"] * batch_size
                speed["data_wait"] = data_wait / seconds
                for run, log, values in zip(runs, logs, means, strict=True):
                    check_finite(values["loss"], "loss", step, run)
                    log.write(step, values | speed)
                loss = float(np.mean([values["loss"] for values in means]))
                shown = {"loss": loss, "samples/s": speed["samples_per_s"] * len(runs)}
                bar.set_postfix(shown | {"data": f"{speed['data_wait']:.0%}"}, refresh=False)
                pending, logged_step, data_wait, since = [], step, 0.0, time.monotonic()

            # What follows is no training, and its time does not count as such.
            evaluates, simulates = is_due(config.eval_steps), config.env.type and is_due(config.env_eval_freq)
            saves = is_due(config.save_freq or config.steps)
            if not (evaluates or simulates or saves):
                continue
            jax.block_until_ready(state)
            paused = time.monotonic()
            weights = weights_of(state)
            is_best = [False] * len(runs)
            if evaluates:
                held_out = training_data.held_out_batches(
                    config, sources, policies, samples, layout.shared_batch
                )
                losses = held_out_losses(eval_loss, weights, held_out, eval_key, layout)
                is_best = [log.write_scored(step, each) for log, each in zip(logs, losses, strict=True)]
            for i, (run, log) in enumerate(zip(runs, logs, strict=True)) if simulates else ():
                whole = sharding.local_copy(layout.take(weights, i))
                info = simulate(runner, whole, run, step, stop) if is_first else None
                if info is not None:
                    bar.write(f"{run.name}, seed {run.seed}, step {step}: {describe(info)}")
                    numbers = {k: v for k, v in info["overall"].items() if isinstance(v, int | float)}
                    is_best[i] |= log.write_scored(step, numbers)
            is_best = distributed.from_first(is_best)
            for i, (run, writer) in enumerate(zip(runs, writers, strict=True)):
                if config.save_checkpoint and (saves or is_best[i]):
                    save(writer, run, step, layout.take(state, i), is_best=is_best[i])
            if config.save_checkpoint and (saves or any(is_best)) and step < config.steps and is_first:
                plot_curves(config.run_dir)
            since += time.monotonic() - paused
        if is_stopped and config.save_checkpoint:
            for i, (run, writer) in enumerate(zip(runs, writers, strict=True)):
                save(writer, run, step, layout.take(state, i), is_best=False)
    for log, writer in zip(logs, writers, strict=True):
        writer.wait()
        log.close()
    for writer in writers:  # what was kept until all seeds had a later one
        writer.remove_old()
    for folder in {config.run_dir, *(run.run_dir for run in runs)} if is_first else ():
        plot_curves(folder)
    if len(runs) > 1:
        logging.info("%s", summarize(runs, config.run_dir))
    if is_stopped:
        logging.info("stopped at step %d; continue with --config.resume=True", step)
        sys.exit(128 + stop.signal)
    last = config.run_dir / checkpoint.CHECKPOINTS / "last" / checkpoint.PRETRAINED_MODEL
    place = f"the policy is in {last}" if len(runs) == 1 else f"the policies are in {config.run_dir}/seed_*"
    saved = place if config.save_checkpoint else "no policy was saved, as you wished"
    logging.info("done: %s, the curves are in %s", saved, config.run_dir / "curves.png")
    if config.policy.push_to_hub and is_first:
        repo_id, private = config.policy.repo_id, config.policy.private
        assert repo_id is not None
        logging.info(
            "uploading it, as does python -m lerobot_jax.push_to_hub %s --repo_id=%s", config.run_dir, repo_id
        )
        url = push_to_hub(config.run_dir, repo_id, private=private, dataset=sources[0].meta)
        logging.info("Model pushed to %s", url)


def held_out_losses(
    eval_loss: Any,
    weights: Tree,
    held_out: Mapping[str, Iterable[tuple[BatchPlacement, Tree]]],
    key: jax.Array,
    layout: SeedLayout,
) -> list[dict[str, float]]:
    """Average each seed's loss over all held-out samples, and over those of each dataset if there are several."""
    sums: dict[str, np.ndarray] = {}
    sizes: dict[str, int] = {}
    for name, batches in held_out.items():
        losses, counts = [], []
        for i, (placement, part) in enumerate(batches):
            counts.append(placement.size)
            losses.append(eval_loss(weights, placement.put(part), key, i))
            if i:  # read the next batch while the devices work, but no further ahead
                jax.block_until_ready(losses[-2])
        sums[name] = np.dot(counts, np.reshape(jax.device_get(losses), (-1, layout.num)))  # one a seed
        sizes[name] = sum(counts)
    means = {"eval_loss": np.sum([*sums.values()], axis=0) / sum(sizes.values())}
    if len(sums) > 1:
        means |= {f"eval_loss/{name}": sums[name] / size for name, size in sizes.items() if size}
    return [{name: float(values[i]) for name, values in means.items()} for i in range(layout.num)]


def simulate(
    runner: Runner, weights: Tree, run: TrainConfig, step: int, stop: StopRequest
) -> dict[str, Any] | None:
    """Evaluate a seed's policy in the environment; None when stopped."""
    runner.load(**weights, seed=run.seed)
    folder = run.run_dir / "eval" / f"step_{step:06d}"
    info = evaluate(runner, run.env, run.eval, seed=run.seed, output_dir=folder, should_stop=stop.requested)
    if info is not None:
        write_json(info, folder / EVAL_INFO_NAME, indent=2)
    return info


def save(writer: CheckpointWriter, run: TrainConfig, step: int, state: Tree, *, is_best: bool) -> None:
    """Save a seed's train state, unless training has diverged."""
    check_finite(largest_weight(state), "largest weight", step, run)
    writer.save(step, state, is_best=is_best)


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
            f"with seed {config.seed}, the {what} is {value} at step {step}: training has diverged; lower the "
            f"learning rate (optimizer.lr) or raise warm-up; the last good checkpoint is "
            f"{f'step {steps[-1]}' if steps else 'none'}"
        )


if __name__ == "__main__":
    setup_logging()
    with reported_on_one_line(), distributed.ended_together():
        main(sys.argv[1:])
