"""Averages of the weights over training: exponential (EMA) and equal (SWA), as one rule.

After each optimizer update, the average moves by a part of its distance to the new weights; this part, the rate, is
a function of the step alone. So the train state holds the average and nothing else, under the name `ema`.
BatchNorm's statistics and codebooks are averaged as the weights are: as `torch.optim.swa_utils.AveragedModel` does
with `use_buffers=True`, instead of one more pass over the data (`update_bn`) before each evaluation.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from lerobot_jax.config import TrainConfig
from lerobot_jax.optim_config import EMAConfig, SWAConfig

Tree = dict[str, Any]


def is_averaged(config: TrainConfig) -> bool:
    """Tell whether the run keeps an average of the weights."""
    return config.ema_decay is not None or config.swa.start is not None


def update_average(config: TrainConfig, average: Tree, new: Tree, step: Any) -> Tree:
    """Move the average towards the values after an optimizer update.

    Whole numbers, which are counts, are those of the new values.

    Args:
        config: the run's, which has an average.
        average: what has been averaged so far; at the beginning the initial values.
        new: the values after the update.
        step: how many updates there were before this one.
    """
    decay = config.ema_decay
    rate = swa_rate(config.swa, step) if decay is None else ema_rate(config.ema, decay, step)

    def move(old: jax.Array, value: jax.Array) -> jax.Array:
        if not jnp.issubdtype(old.dtype, jnp.floating):
            return value
        # Where the rate is 1, the bits are those of the value, which the sum would round.
        return jnp.where(rate == 1, value, old + (value - old) * rate.astype(old.dtype))

    return jax.tree.map(move, average, new)


def ema_rate(ema: EMAConfig, decay: float, step: Any) -> Float[Array, ""]:
    """Give 1 - the decay rate of the exponential moving average; 0 where it is not updated, 1 where it begins.

    `power` is diffusers' `EMAModel(use_ema_warmup=True)` with its `step` called every `update_every` steps.
    """
    done = jnp.asarray(step) + 1 - ema.update_after_step
    n = (done // ema.update_every - 1).astype(jnp.float32)
    now = _decay_rules(ema, decay)[ema.schedule](n)
    is_due = done % ema.update_every == 0
    return jnp.where(done <= 0, 1.0, jnp.where(is_due, 1 - now, 0.0))


def _decay_rules(ema: EMAConfig, decay: float) -> dict[str, Callable[[Any], Any]]:
    """Give the decay rate of the n-th update of the average, n = 0, 1, ...."""
    gamma, power, least = ema.inv_gamma or 1.0, ema.power or 2 / 3, ema.min_decay or 0.0

    def rising(n):
        value = jnp.clip(1 - (1 + n / gamma) ** -power, least, decay)
        return jnp.where(n == 0, 0.0, value)

    return {
        "warmup": lambda n: jnp.minimum(decay, (1 + n) / (10 + n)),
        "constant": lambda n: jnp.full((), decay, jnp.float32),
        "power": rising,
    }


def swa_rate(swa: SWAConfig, step: Any) -> Float[Array, ""]:
    """Give the weight of the new values among all that have been averaged; 1 until the average begins."""
    assert swa.start is not None
    since = jnp.asarray(step) + 1 - swa.start
    rate = 1 / (since // swa.freq + 1).astype(jnp.float32)
    return jnp.where(since <= 0, 1.0, jnp.where(since % swa.freq == 0, rate, 0.0))
