"""Every recorded policy computes what stock LeRobot computed: losses, gradients, actions, optimizer steps.

A new policy adds folders under tests/golden/, and a row to DRAWS.
"""

import dataclasses
import shutil
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from lerobot_jax import optim, torch_state
from lerobot_jax.config import TrainConfig
from lerobot_jax.policies.base import FunctionalPolicy, load_config, load_policy
from tests.goldens import ROOT, Golden

# The names of a policy's draws, in the order in which LeRobot draws them.
DRAWS = {"act": ["noise"]}

GOLDENS = sorted(path.parent for path in ROOT.glob("*/*/meta.json"))
KEY = jax.random.key(0)
# As users compile it: ResNet-18's gradients here cancel so much that rounding shows in their fourth digit.
OPTIMIZED = {"xla_backend_optimization_level": 3}


@pytest.fixture(params=GOLDENS, ids=lambda path: f"{path.parent.name}-{path.name}")
def golden(request) -> Golden:
    return Golden(request.param)


def load(golden: Golden, tmp_path: Path, **changes) -> FunctionalPolicy:
    folder = tmp_path / "model"
    shutil.copytree(golden.path / "model", folder)
    config = dataclasses.replace(load_config(folder), **changes)
    if not (folder / "model.safetensors").exists():
        constants = {"model.vae_encoder_pos_enc": _position_table(config)}
        torch_state.save(golden.stored_or_initial_weights() | constants, folder / "model.safetensors")
    return load_policy(folder, config=config)


def _position_table(config) -> np.ndarray:
    from lerobot_jax.policies.act.modeling import sinusoid_table

    return sinusoid_table(1 + (config.robot_state_feature is not None) + config.chunk_size, config.dim_model)[
        None
    ]


def draws(golden: Golden, case: str, step: int = 0) -> dict[str, np.ndarray]:
    names = DRAWS[golden.meta["policy"]]
    recorded = golden.draws(case)
    return {name: jnp.asarray(x) for name, x in zip(names, recorded[step * len(names) :], strict=False)}


def assert_close(golden: Golden, key: str, actual) -> None:
    expected = golden.expected[key]
    np.testing.assert_allclose(
        np.asarray(actual, np.float64), expected, rtol=0, atol=golden.tolerance(key), err_msg=key
    )


def packed(arrays: dict[str, np.ndarray], names: list[str]) -> dict[str, np.ndarray]:
    """Summarize arrays as the goldens do: norm, sum, first 8 entries."""
    heads = np.zeros((len(names), 8), np.float32)
    for i, name in enumerate(names):
        head = arrays[name].reshape(-1)[:8]
        heads[i, : len(head)] = head
    norms = np.array([np.linalg.norm(arrays[name]) for name in names])
    return {"norm": norms, "sum": np.array([arrays[name].sum() for name in names]), "head": heads}


def test_preprocessing(golden: Golden, tmp_path: Path):
    policy = load(golden, tmp_path)
    batch = policy.preprocess(golden.inputs("raw/"))
    recorded = golden.inputs("in/")
    for key in (*policy.config.input_features, *policy.config.output_features):
        expected = (
            np.moveaxis(recorded[key], -3, -1) if key in policy.config.image_features else recorded[key]
        )
        np.testing.assert_allclose(batch[key], expected, rtol=1e-5, atol=1e-6, err_msg=key)


@pytest.mark.parametrize("case", ["loss", "loss_train"])
def test_loss_and_gradients(golden: Golden, tmp_path: Path, case: str):
    train = case == "loss_train"
    policy = load(golden, tmp_path, dropout=0.0)  # the goldens switch dropout off
    batch = policy.preprocess(golden.inputs("raw/"))

    def loss_fn(params):
        return policy.loss_fn(params, policy.buffers, batch, KEY, train=train, **draws(golden, case))

    gradient_fn = jax.jit(jax.value_and_grad(loss_fn, has_aux=True), compiler_options=OPTIMIZED)
    (loss, (metrics, buffers)), gradients = gradient_fn(policy.params)
    assert_close(golden, f"{case}/loss", loss)
    for key in (k for k in golden.expected if k.startswith(f"{case}/info/")):
        assert_close(golden, key, metrics[key.rsplit("/", 1)[1]])
    named = torch_state.to_torch(policy.module, gradients, buffers)
    for name, values in packed(named, golden.meta["grad_names"][case]).items():
        assert_close(golden, f"{case}/grad_{name}", values)


def test_per_sample_loss_averages_to_the_loss(golden: Golden, tmp_path: Path):
    policy = load(golden, tmp_path)
    batch = policy.preprocess(golden.inputs("raw/"))
    loss_fn = jax.jit(policy.loss_fn, static_argnames=("train", "reduction"))
    losses, _ = loss_fn(policy.params, policy.buffers, batch, KEY, train=True, reduction="none")
    loss, _ = loss_fn(policy.params, policy.buffers, batch, KEY, train=True)
    assert losses.shape == (len(batch["action"]),)
    np.testing.assert_allclose(losses.mean(), loss, rtol=1e-5)


def test_chunk(golden: Golden, tmp_path: Path):
    policy = load(golden, tmp_path)
    observation = policy.preprocess(golden.inputs("obs/0/"))
    given = draws(golden, "chunk")
    actions = jax.jit(policy.sample_actions)(policy.params, policy.buffers, observation, KEY, **given)
    assert_close(golden, "chunk/action", actions)
    assert_close(golden, "chunk/post/action", policy.postprocess(actions))


def test_select_action_sequence(golden: Golden, tmp_path: Path):
    policy = load(golden, tmp_path)
    expected = golden.expected["select/post/action"]  # step b act
    runner = policy.make_runner(batch_size=expected.shape[1])
    actions = [runner.select_action(golden.inputs(f"obs/{t}/")) for t in range(len(expected))]
    assert_close(golden, "select/post/action", np.stack(actions))


def test_optimizer_steps(golden: Golden, tmp_path: Path):
    policy = load(golden, tmp_path, dropout=0.0)
    batch = policy.preprocess(golden.inputs("raw/"))
    config = TrainConfig(policy=policy.config, steps=10)
    optimizer = optim.make_optimizer(config, policy.params)
    params, opt_state = policy.params, optimizer.init(policy.params)
    losses, norms = [], []

    @jax.jit
    def train_step(params, opt_state, given):
        def loss_fn(params):
            return policy.loss_fn(params, policy.buffers, batch, KEY, train=True, **given)[0]

        loss, gradients = jax.value_and_grad(loss_fn)(params)
        updates, opt_state = optimizer.update(gradients, opt_state, params)
        return optax.apply_updates(params, updates), opt_state, loss, optax.tree.norm(gradients)

    for step in range(len(golden.expected["train_steps/loss"])):
        params, opt_state, loss, norm = train_step(params, opt_state, draws(golden, "train_steps", step))
        losses.append(loss)
        norms.append(norm)
    assert_close(golden, "train_steps/loss", losses)
    assert_close(golden, "train_steps/grad_norm", norms)
    named = torch_state.to_torch(policy.module, params, policy.buffers)
    summary = packed(named, golden.meta["grad_names"]["train_steps_state"])
    assert_close(golden, "train_steps/state_norm", summary["norm"])
    assert_close(golden, "train_steps/state_head", summary["head"])


def test_learning_rates(golden: Golden, tmp_path: Path):
    """The recorded rates are those of LeRobot's parameter groups, in their order."""
    config = load(golden, tmp_path).config
    rates = [optim.optimizer_settings(TrainConfig(policy=config))["lr"], *(g.lr for g in config.param_groups)]
    np.testing.assert_allclose(golden.expected["train_steps/lr"][0], rates)
