import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from lerobot_jax import optim
from lerobot_jax.config import OptimizerConfig, SchedulerConfig, TrainConfig
from lerobot_jax.errors import InputError
from lerobot_jax.policies.act import ACTConfig
from lerobot_jax.policies.vqbet import VQBeTConfig

PARAMS = {"model": {"backbone": {"w": jnp.array([1.0, -2.0])}, "head": {"w": jnp.array([[3.0]])}}}
GRADS = {"model": {"backbone": {"w": jnp.array([3.0, 0.5])}, "head": {"w": jnp.array([[-4.0]])}}}


def config(**optimizer) -> TrainConfig:
    policy = dataclasses.replace(ACTConfig.tiny(), optimizer_lr=0.1, optimizer_lr_backbone=0.01)
    return TrainConfig(policy=policy, optimizer=OptimizerConfig(**optimizer), steps=100)


def steps(config: TrainConfig, num: int = 3) -> list[np.ndarray]:
    optimizer = optim.make_optimizer(config, PARAMS)
    params, state, found = PARAMS, optimizer.init(PARAMS), []
    for i in range(num):
        updates, state = optimizer.update(jax.tree.map(lambda g, i=i: g * (i + 1), GRADS), state, params)
        params = optax.apply_updates(params, updates)
        found.append(np.concatenate([np.ravel(x) for x in jax.tree.leaves(params)]))
    return found


def by_hand(kind: str, clip: float, decay: float, num: int = 3) -> list[np.ndarray]:
    """PyTorch's update rules, written out, in float64."""
    p, g0, lr = np.array([1.0, -2.0, 3.0]), np.array([3.0, 0.5, -4.0]), np.array([0.01, 0.01, 0.1])
    m, v, found = np.zeros(3), np.zeros(3), []
    for i in range(num):
        g = g0 * (i + 1)
        g = g * min(1.0, clip / (np.linalg.norm(g) + 1e-6)) if clip else g
        if kind != "adamw":
            g = g + decay * p
        if kind == "sgd":
            m = 0.9 * m + g
            p = p - lr * m
        else:
            m, v = 0.9 * m + 0.1 * g, 0.99 * v + 0.01 * g**2
            step = (m / (1 - 0.9 ** (i + 1))) / (np.sqrt(v / (1 - 0.99 ** (i + 1))) + 1e-6)
            p = p * (1 - lr * decay) if kind == "adamw" else p
            p = p - lr * step
        found.append(p)
    return found


@pytest.mark.parametrize("clip", [0.0, 2.0])
@pytest.mark.parametrize("kind", ["adamw", "adam", "sgd"])
def test_updates_are_pytorchs(kind: str, clip: float):
    more = {"momentum": 0.9} if kind == "sgd" else {"betas": (0.9, 0.99), "eps": 1e-6}
    found = steps(config(type=kind, grad_clip_norm=clip, weight_decay=0.3, **more))
    np.testing.assert_allclose(found, by_hand(kind, clip, 0.3), rtol=1e-5)


def test_settings_come_from_the_policy_unless_given():
    assert optim.optimizer_settings(config()) == {
        "type": "adamw",
        "lr": 0.1,
        "betas": (0.9, 0.999),
        "eps": 1e-8,
        "weight_decay": 1e-4,
        "grad_clip_norm": 10.0,
        "moments_dtype": "float32",
    }
    assert optim.optimizer_settings(config(lr=0.5, grad_clip_norm=0.0))["lr"] == 0.5
    with pytest.raises(InputError, match=r"optimizer.momentum: adamw has no such setting"):
        optim.optimizer_settings(config(momentum=0.9))


def schedule(**settings) -> list[float]:
    made = optim.make_schedule(dataclasses.replace(config(), scheduler=SchedulerConfig(**settings)))
    return [float(made(jnp.asarray(step))) for step in (0, 5, 10, 55, 100)]


def test_schedules():
    """Values of LeRobot's formulas at steps 0, 5, 10, 55 and 100 of 100."""
    assert schedule() == [1, 1, 1, 1, 1]
    assert schedule(type="constant_with_warmup", num_warmup_steps=10) == pytest.approx([0, 0.5, 1, 1, 1])
    for kind in ("cosine", "cosine_annealing_with_warmup"):
        assert schedule(type=kind, num_warmup_steps=10) == pytest.approx([0, 0.5, 1, 0.5, 0], abs=1e-6)
    decay = {"type": "cosine_decay_with_warmup", "num_warmup_steps": 10, "peak_lr": 1.0, "decay_lr": 0.1}
    cos = [0.5 * (1 + np.cos(np.pi * step / 100)) for step in (10, 55, 100)]
    expected = [1 / 11, 1 / 11 + 10 / 11 / 2, *(0.9 * c + 0.1 for c in cos)]
    assert schedule(**decay, num_decay_steps=100) == pytest.approx(expected, abs=1e-6)
    # Planned for 200 steps, but the run has 100: warm-up and decay are halved.
    cos = [0.5 * (1 + np.cos(np.pi * step / 100)) for step in (5, 10, 55, 100)]
    expected = [1 / 6, *(0.9 * c + 0.1 for c in cos)]
    assert schedule(**decay, num_decay_steps=200) == pytest.approx(expected, abs=1e-6)
    with pytest.raises(InputError, match=r"scheduler.num_decay_steps is needed"):
        schedule(type="cosine_decay_with_warmup")


def test_vqbets_schedule_waits_and_then_falls_as_if_it_had_not():
    policy = dataclasses.replace(VQBeTConfig.tiny(), n_vqvae_training_steps=20, scheduler_warmup_steps=10)
    made = optim.make_schedule(TrainConfig(policy=policy, steps=100))
    found = [float(made(jnp.asarray(step))) for step in (0, 19, 20, 25, 30, 75, 100)]
    falling = [0.5 * (1 + np.cos(np.pi * progress / 90)) for progress in (45, 70)]
    assert found == pytest.approx([1, 1, 0, 0.5, 1, *falling], abs=1e-6)
    waves = schedule(type="vqbet", num_warmup_steps=0, num_vqvae_training_steps=5, num_cycles=2.0)
    expected = [1, *(0.5 * (1 + np.cos(np.pi * 4 * step / 100)) for step in (0, 5, 50, 95))]
    assert waves == pytest.approx(expected, abs=1e-6)
    with pytest.raises(InputError, match=r"scheduler.num_vqvae_training_steps is needed by vqbet"):
        schedule(type="vqbet")


@dataclasses.dataclass(frozen=True)
class PhasedConfig(ACTConfig):
    param_phases = (r"model\.backbone", "")


@pytest.mark.parametrize("kind", ["adamw", "adam", "sgd"])
def test_parameters_of_another_phase_are_left_alone(kind: str):
    """Values, moments and step counts; as PyTorch, which has no gradient for them."""
    base = config(type=kind, weight_decay=0.3)
    fields = {f.name: getattr(base.policy, f.name) for f in dataclasses.fields(base.policy) if f.init}
    phased = dataclasses.replace(base, policy=PhasedConfig(**fields))
    zeros = jax.tree.map(jnp.zeros_like, GRADS)["model"]
    only = {name: {"model": zeros | {name: GRADS["model"][name]}} for name in ("backbone", "head")}
    # Of two parts that are trained in turn, each moves as if it were trained alone.
    together, alone = optim.make_optimizer(phased, PARAMS), optim.make_optimizer(base, PARAMS)
    params, state = PARAMS, together.init(PARAMS)
    expected = {name: (PARAMS, alone.init(PARAMS)) for name in only}
    for name in ("backbone", "backbone", "head", "backbone", "head"):
        updates, state = jax.jit(together.update)(only[name], state, params)
        params = optax.apply_updates(params, updates)
        own_params, own_state = expected[name]
        updates, own_state = alone.update(only[name], own_state, own_params)
        expected[name] = optax.apply_updates(own_params, updates), own_state
        for part in only:
            np.testing.assert_allclose(
                params["model"][part]["w"], expected[part][0]["model"][part]["w"], rtol=1e-6
            )
