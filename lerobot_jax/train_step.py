"""The train step: preprocessing, augmentation, loss, gradients, optimizer, EMA, as pure functions to jit."""

import functools
from collections.abc import Collection, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax.traverse_util import flatten_dict, unflatten_dict
from jaxtyping import Array, Float

from lerobot_jax import averaging, optim
from lerobot_jax.config import TrainConfig
from lerobot_jax.data.mixture import DATASET_INDEX
from lerobot_jax.data.sample_weights import SAMPLE_WEIGHT, SampleWeightingConfig
from lerobot_jax.policies.base import FunctionalPolicy
from lerobot_jax.trainable import combine
from lerobot_jax.training_text import with_own_names, with_single_axes
from lerobot_jax.transforms import random_transforms

Tree = dict[str, Any]


def make_preprocess(policies: Sequence[FunctionalPolicy], *, is_mixture: bool):
    """Give the preprocessing of raw batches; in a mixture, a sample has the statistics of its own dataset."""
    if not is_mixture:
        return functools.partial(_preprocess, policies[0])
    # The samples of a mixture have the policy's names already.
    policies = [with_own_names(each) for each in policies]

    def preprocess(batch: Tree) -> Tree:
        which = batch[DATASET_INDEX]
        versions = [each.preprocess(batch) for each in policies]

        def select(*values: jax.Array) -> jax.Array:
            chosen = which.reshape(-1, *(1,) * (values[0].ndim - 1))
            return jax.lax.select_n(jnp.broadcast_to(chosen, values[0].shape), *values)

        return jax.tree.map(select, *versions)

    return preprocess


def _preprocess(policy: FunctionalPolicy, batch: Tree) -> Tree:
    return policy.preprocess(with_single_axes(policy, batch))


def make_loss(
    policy: FunctionalPolicy,
    preprocess: Any,
    names: Sequence[str],
    weighting: SampleWeightingConfig | None = None,
):
    """Give `loss(params, buffers, batch, key) -> (loss, (metrics, buffers))` of raw batches, in training.

    In a mixture, the metrics tell the loss of each dataset by name; NaN if a batch has none of its samples, or none
    that counts.
    """

    def mean_loss(params: Tree, buffers: Tree, batch: Tree, key: jax.Array):
        loss, (metrics, buffers) = policy.loss_fn(params, buffers, preprocess(batch), key, train=True)
        return loss, ({"loss": loss, **metrics}, buffers)

    def loss_of_samples(params: Tree, buffers: Tree, batch: Tree, key: jax.Array):
        losses, (metrics, buffers) = policy.loss_fn(
            params, buffers, preprocess(batch), key, train=True, reduction="none"
        )
        if weighting is None:
            loss, weights = jnp.mean(losses), None
        else:
            weights = jnp.ones_like(losses) if weighting.type == "uniform" else batch[SAMPLE_WEIGHT]
            loss, of_weights = weighted_mean(losses, weights, weighting)
            metrics = {**metrics, **of_weights}
        metrics = {"loss": loss, **metrics}
        for i, name in enumerate(names) if len(names) > 1 else ():
            is_of = batch[DATASET_INDEX] == i
            if weights is None:
                metrics[f"loss/{name}"] = jnp.mean(losses, where=is_of)
            else:
                metrics[f"loss/{name}"] = jnp.sum(losses * weights, where=is_of) / jnp.sum(
                    weights, where=is_of
                )
        return loss, (metrics, buffers)

    return mean_loss if len(names) == 1 and weighting is None else loss_of_samples


def weighted_mean(
    losses: Float[Array, " b"], weights: Float[Array, " b"], weighting: SampleWeightingConfig
) -> tuple[Float[Array, ""], Tree]:
    """Average losses by weights as LeRobot's training does; tell, under its names, what the weights are like.

    0 if all weights are.
    """
    metrics = {"mean_weight": jnp.mean(weights)}
    if weighting.type == "rabc":
        metrics["num_zero_weight"] = jnp.sum(weights == 0).astype(jnp.float32)
        metrics["num_full_weight"] = jnp.sum(weights == 1).astype(jnp.float32)
        weights = weights * len(weights) / (jnp.sum(weights) + weighting.epsilon)
    loss = jnp.sum(losses * weights) / (jnp.sum(weights) + 1e-6)
    return loss, {f"sample_weight_{name}": value for name, value in metrics.items()}


def make_train_step(
    loss_fn: Any,
    optimizer: optax.GradientTransformation,
    config: TrainConfig,
    progress: Collection[tuple[Any, ...]] = (),
):
    """Give `step(state, batch, key) -> (state, metrics)`: augmentation, gradients, clipping, optimizer, EMA.

    What is in the state's `frozen` is used, but has no gradient.

    All randomness comes from `key` and the state's step count. With gradient accumulation, the batch has a leading
    axis of micro-batches, which all see the buffers in `progress` as they were before the step.
    """
    augment = random_transforms(config.dataset.image_transforms)
    if config.num_seeds > 1 and config.dataset.image_transforms.enable:
        # Mapped over seeds, this takes one seed after another: so its branches stay branches.
        augment = jax.custom_batching.sequential_vmap(augment)

    def augmented_loss(params: Tree, frozen: Tree, buffers: Tree, batch: Tree, key: jax.Array):
        augment_key, key = jax.random.split(key) if config.dataset.image_transforms.enable else (key, key)
        images = {k: v for k, v in batch.items() if v.dtype == jnp.uint8 and v.ndim > 3}
        return loss_fn(combine(params, frozen), buffers, batch | augment(augment_key, images), key)

    gradient = jax.grad(augmented_loss, has_aux=True)

    def accumulated_gradient(params: Tree, frozen: Tree, buffers: Tree, batch: Tree, key: jax.Array):
        num = config.gradient_accumulation_steps
        if num == 1:
            return gradient(params, frozen, buffers, batch, key)

        before = {path: x for path, x in flatten_dict(buffers).items() if path in progress}

        def add(carry, inputs):
            total, buffers = carry
            buffers = unflatten_dict(flatten_dict(buffers) | before)
            grads, (metrics, buffers) = gradient(params, frozen, buffers, *inputs)
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
        frozen = state.get("frozen", {})
        grads, (metrics, buffers) = accumulated_gradient(
            state["params"], frozen, state["buffers"], batch, key
        )
        updates, opt_state = optimizer.update(grads, state["opt_state"], state["params"])
        params = optax.apply_updates(state["params"], updates)
        new = state | {"step": step + 1, "params": params, "buffers": buffers, "opt_state": opt_state}
        if averaging.is_averaged(config):
            values = {"params": params, "buffers": buffers}
            new["ema"] = averaging.update_average(config, state["ema"], values, step)
        metrics |= {"grad_norm": optax.tree.norm(grads), "lr": base_lr * schedule(step)}
        return new, metrics

    return train_step


def make_eval_loss(policy: FunctionalPolicy, preprocess: Any):
    """Give `loss(weights, batch, key, i)` without dropout and with noise that depends on `key` and `i` only."""

    def eval_loss(weights: Tree, batch: Tree, key: jax.Array, i: jax.Array) -> jax.Array:
        key = jax.random.fold_in(key, i)
        return policy.loss_fn(weights["params"], weights["buffers"], preprocess(batch), key, train=False)[0]

    return eval_loss


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
