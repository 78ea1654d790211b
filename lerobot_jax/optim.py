"""Optimizers and learning-rate schedules with the arithmetic of PyTorch and LeRobot, as optax transformations.

Mirrors `lerobot.optim.{optimizers, schedulers}` and `torch.optim`. Steps count optimizer updates, from 0.
"""

import math
import re
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax.traverse_util import flatten_dict, unflatten_dict

from lerobot_jax import torch_state
from lerobot_jax.adafactor import scale_by_adafactor
from lerobot_jax.adam import scale_by_adam
from lerobot_jax.config import TrainConfig
from lerobot_jax.errors import InputError
from lerobot_jax.layer_decay import layer_factors
from lerobot_jax.nn.weights import is_stacked
from lerobot_jax.policies.config import ParamGroup, group_of

Tree = dict[str, Any]
Schedule = Callable[[Any], Any]  # step -> factor of the learning rate

_ADAM: dict[str, Any] = {"lr": 1e-3, "betas": (0.9, 0.999), "eps": 1e-8, "moments_dtype": "float32"}
DEFAULTS: dict[str, dict[str, Any]] = {
    "adamw": _ADAM | {"weight_decay": 1e-2, "grad_clip_norm": 10.0},
    "adam": _ADAM | {"weight_decay": 0.0, "grad_clip_norm": 10.0},
    "sgd": {"lr": 1e-3, "momentum": 0.0, "weight_decay": 0.0, "grad_clip_norm": 10.0},
    "adafactor": {"lr": 1e-2, "beta2_decay": -0.8, "weight_decay": 0.0, "grad_clip_norm": 10.0},
}


def optimizer_settings(config: TrainConfig) -> dict[str, Any]:
    """Combine LeRobot's defaults, the policy's preset and what the config sets, the last one counts."""
    given = {name: value for name, value in vars(config.optimizer).items() if value is not None}
    given.pop("layer_decay", None)  # not the optimizer's, but of the rates
    preset = dict(config.policy.optimizer_preset)
    kind: str = given.get("type", preset["type"])
    if kind != preset["type"]:  # another optimizer keeps only what every optimizer has
        shared = ("weight_decay",) if kind == "adafactor" else ("lr", "weight_decay")
        preset = {name: preset[name] for name in shared if name in preset}
    settings = DEFAULTS[kind] | preset | given | {"type": kind}
    unknown = sorted(set(settings) - set(DEFAULTS[kind]) - {"type"})
    if unknown:
        raise InputError(f"optimizer.{unknown[0]}: {kind} has no such setting")
    return settings


def make_optimizer(
    config: TrainConfig, params: Tree, all_params: Tree | None = None
) -> optax.GradientTransformation:
    """Build clipping, the optimizer with its parameter groups, and the schedule for parameters of these names.

    Args:
        config: the run's.
        params: what is trained, as arrays or shapes.
        all_params: all parameters of the policy, if others are frozen: they count for `optimizer.layer_decay`.
    """
    settings, names = optimizer_settings(config), torch_state.dotted_names(params)
    groups = config.policy.param_groups

    def per_leaf(setting: str, unit: float = 1.0) -> Tree:
        """Give a tree with each parameter's own value of a setting; those of groups are in units."""

        def value(group: ParamGroup) -> float:
            own = getattr(group, setting)
            return settings[setting] if own is None else own * unit

        def of_parameter(name: str, x: Any) -> float | np.ndarray:
            if not is_stacked(name) or all(group.layer is None for group in groups):
                return value(group_of(name, groups))
            values = [value(group_of(name, groups, i, len(x))) for i in range(len(x))]
            if len(set(values)) == 1:
                return values[0]
            return np.array(values, np.float32).reshape(-1, *[1] * (x.ndim - 1))

        return jax.tree.map(of_parameter, names, params)

    rates, decays = per_leaf("lr", _unit_of_rates(config, settings)), per_leaf("weight_decay")
    if config.optimizer.layer_decay is not None:
        factors = layer_factors(config.optimizer.layer_decay, config.policy, params, all_params)
        rates = jax.tree.map(lambda rate, factor: rate * factor, rates, factors)
    schedule = make_schedule(config)

    def rule(part: Callable[[Tree], Tree]) -> list[optax.GradientTransformation]:
        return update_rule(settings, part(names), part(decays), part(rates), schedule)

    phases = config.policy.param_phases
    parts = [in_phases(phases, names, lambda part: optax.chain(*rule(part)))] if phases else rule(lambda x: x)
    clip = clip_by_global_norm(settings["grad_clip_norm"])
    return optax.chain(clip, *parts, scale_by_rates(rates, schedule))


def _unit_of_rates(config: TrainConfig, settings: dict[str, Any]) -> float:
    """Give what the learning rates of parameter groups are multiplied by: Adafactor's rates are of another kind."""
    preset = config.policy.optimizer_preset
    if settings["type"] != "adafactor" or preset["type"] == "adafactor":
        return 1.0
    usual = preset.get("lr", DEFAULTS[preset["type"]]["lr"])
    if not usual:
        raise InputError("optimizer.type=adafactor: the policy's own learning rate must not be 0")
    return settings["lr"] / usual


def update_rule(
    settings: dict[str, Any], names: Tree, decays: Tree, rates: Tree, schedule: Schedule
) -> list[optax.GradientTransformation]:
    """Give what the optimizer makes of gradients before they are multiplied by the learning rate."""
    if settings["type"] == "adafactor":
        return [scale_by_adafactor(settings["beta2_decay"], names, decays, rates, schedule)]
    decay = add_decayed_weights(decays)
    if settings["type"] == "sgd":
        return [decay, optax.trace(settings["momentum"]) if settings["momentum"] else optax.identity()]
    adam = scale_by_adam(settings["betas"], settings["eps"], settings["moments_dtype"])
    return [adam, decay] if settings["type"] == "adamw" else [decay, adam]


def in_phases(
    patterns: Sequence[str], names: Tree, make_rule: Callable[[Callable[[Tree], Tree]], Any]
) -> optax.GradientTransformation:
    """Update the parameters of each phase of training only in steps in which any of them has a gradient.

    So do PyTorch's optimizers: a parameter without gradient (None) keeps its value, its moments and its own count
    of steps, and is not decayed. Here, a phase has no gradient if all of its gradients are exactly 0.

    Args:
        patterns: of dotted names, one a phase; the first match counts.
        names: the tree of the parameters' dotted names.
        make_rule: builds the transformation for a phase, given a function that gives its part of a tree.
    """
    phase_of = {
        path: next(str(i) for i, pattern in enumerate(patterns) if re.match(pattern, str(name)))
        for path, name in flatten_dict(names).items()
    }

    def part_of(phase: str) -> Callable[[Tree], Tree]:
        return lambda tree: unflatten_dict(
            {path: leaf for path, leaf in flatten_dict(tree).items() if phase_of[path] == phase}
        )

    parts = {phase: part_of(phase) for phase in sorted(set(phase_of.values()))}
    rules = {phase: make_rule(part) for phase, part in parts.items()}

    def init(params):
        return {phase: rule.init(parts[phase](params)) for phase, rule in rules.items()}

    def update(updates, state, params: Any = None):
        moves, states = {}, {}
        for phase, rule in rules.items():
            gradients = parts[phase](updates)
            is_trained = jnp.any(jnp.stack([jnp.any(g != 0) for g in jax.tree.leaves(gradients)]))
            move, states[phase] = jax.lax.cond(
                is_trained,
                rule.update,
                lambda gradients, state, params: (gradients, state),
                *(gradients, state[phase], parts[phase](params)),
            )
            moves |= flatten_dict(move)
        return unflatten_dict(moves), states

    return optax.GradientTransformation(init, update)


def _no_state(params: optax.Params) -> optax.EmptyState:
    del params
    return optax.EmptyState()


def clip_by_global_norm(max_norm: float) -> optax.GradientTransformation:
    """Scale gradients down to a global norm as `torch.nn.utils.clip_grad_norm_` does; 0: leave them."""

    def update(updates, state, params=None):
        del params
        if max_norm <= 0:
            return updates, state
        factor = jnp.minimum(max_norm / (optax.tree.norm(updates) + 1e-6), 1.0)
        return jax.tree.map(lambda g: g * factor.astype(g.dtype), updates), state

    return optax.GradientTransformation(_no_state, update)


def add_decayed_weights(decays: Tree) -> optax.GradientTransformation:
    """Add each parameter times its own weight decay."""

    def update(updates, state, params=None):
        return jax.tree.map(lambda g, p, decay: g + decay * p, updates, params, decays), state

    return optax.GradientTransformation(_no_state, update)


def scale_by_rates(rates: Tree, schedule: Schedule) -> optax.GradientTransformation:
    """Multiply by minus each parameter's own learning rate and by the schedule's factor."""

    def init(params):
        del params
        return optax.ScaleByScheduleState(count=jnp.zeros((), jnp.int32))

    def update(updates, state, params=None):
        del params
        factor = schedule(state.count)
        updates = jax.tree.map(lambda u, rate: u * (-rate * factor).astype(u.dtype), updates, rates)
        return updates, optax.ScaleByScheduleState(count=state.count + 1)

    return optax.GradientTransformation(init, update)


def make_schedule(config: TrainConfig) -> Schedule:
    """Build the schedule: the factor on every group's learning rate at an update."""
    given = {name: value for name, value in vars(config.scheduler).items() if value is not None}
    preset = dict(config.policy.scheduler_preset or {"type": "constant"})
    if "type" in given and given["type"] != preset["type"]:
        preset = {}
    settings = preset | given
    kind = settings.get("type")
    warmup = settings.get("num_warmup_steps", 0)
    if kind == "constant":
        return lambda step: jnp.ones((), jnp.float32)
    if kind == "constant_with_warmup":
        return lambda step: jnp.minimum(step / max(1, warmup), 1.0)
    if kind in ("cosine", "cosine_annealing_with_warmup"):
        return _cosine(warmup, config.steps)
    if kind == "vqbet":
        waiting, cycles = settings.get("num_vqvae_training_steps"), settings.get("num_cycles", 0.5)
        if waiting is None:
            raise InputError("scheduler.num_vqvae_training_steps is needed by vqbet")
        return _vqbet(warmup, waiting, cycles, config.steps)
    missing = [name for name in ("num_decay_steps", "peak_lr", "decay_lr") if name not in settings]
    if missing:
        raise InputError(f"scheduler.{missing[0]} is needed by {kind}")
    return _cosine_decay(
        warmup, settings["num_decay_steps"], settings["decay_lr"] / settings["peak_lr"], config.steps
    )


def _cosine(warmup: int, steps: int) -> Schedule:
    """Rise linearly, then fall to 0 along half a cosine (diffusers' `cosine`, LeRobot's annealing)."""

    def factor(step):
        progress = (step - warmup) / max(1, steps - warmup)
        return jnp.where(step < warmup, step / max(1, warmup), _half_cosine(progress))

    return factor


def _cosine_decay(warmup: int, decay_steps: int, final: float, steps: int) -> Schedule:
    """LeRobot's `CosineDecayWithWarmupSchedulerConfig`, scaled down when the run is shorter than the decay."""
    if steps < decay_steps:
        warmup, decay_steps = int(warmup * steps / decay_steps), steps

    def factor(step):
        start = 1 / (warmup + 1)
        rising = start + (1 - start) * step / max(1, warmup)
        falling = (1 - final) * _half_cosine(step / decay_steps) + final
        return jnp.where(step < warmup, rising, falling)

    return factor


def _vqbet(warmup: int, waiting: int, cycles: float, steps: int) -> Schedule:
    """LeRobot's `VQBeTSchedulerConfig`: a cosine whose warm-up begins after `waiting` steps at the full rate.

    As in LeRobot, the cosine is as long as if it began at step 0, so that the rate does not reach 0.
    """

    def factor(step):
        step = step - waiting
        progress = (step - warmup) / max(1, steps - warmup)
        falling = jnp.maximum(0.5 * (1 + jnp.cos(math.pi * cycles * 2 * progress)), 0.0)
        return jnp.where(step < 0, 1.0, jnp.where(step < warmup, step / max(1, warmup), falling))

    return factor


def _half_cosine(progress):
    return jnp.maximum(0.5 * (1 + jnp.cos(math.pi * jnp.minimum(progress, 1.0))), 0.0)
