"""Every recorded policy computes what stock LeRobot computed: losses, gradients, actions, optimizer steps.

A new policy adds folders under tests/golden/, and a row to DRAWS.
"""

import dataclasses
import functools
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

from lerobot_jax import optim, state_dict, torch_state
from lerobot_jax.config import TrainConfig
from lerobot_jax.nn.variables import Buffer
from lerobot_jax.policies.base import FunctionalPolicy, load_config, load_policy, policy_class
from tests.goldens import ROOT, Golden

# The names of a policy's draws, in the order in which LeRobot draws them.
DRAWS = {"act": ["noise"]}

# Those that compile long and differ in settings only.
SLOW = ("three_cameras_s0", "deep_raw_s0", "resnet34_te_s0", "dilated_te_s0")
GOLDENS = [
    pytest.param(path.parent, marks=[pytest.mark.slow] * (path.parent.name in SLOW))
    for path in sorted(ROOT.glob("*/*/meta.json"))
]
KEY = jax.random.key(0)
# As users compile it: this one's gradients cancel so much that rounding shows in their fourth digit.
OPTIMIZED = {"full_resnet18": {"xla_backend_optimization_level": 3}}


@pytest.fixture(params=GOLDENS, ids=lambda path: f"{path.parent.name}-{path.name}")
def golden(request) -> Golden:
    return Golden(request.param)


def load(golden: Golden, tmp_path: Path, with_dropout: bool = True) -> FunctionalPolicy:
    folder = tmp_path / "model"
    shutil.copytree(golden.path / "model", folder)
    config = load_config(folder)
    if not with_dropout:
        rates = [field.name for field in dataclasses.fields(config) if "dropout" in field.name]
        config = dataclasses.replace(config, **dict.fromkeys(rates, 0.0))
    if not (folder / state_dict.MODEL_NAME).exists():
        state_dict.write(initial_weights(golden.path), folder / state_dict.MODEL_NAME)
    return load_policy(folder, config=config)


@functools.cache
def initial_weights(path: Path) -> dict[str, np.ndarray]:
    """Give the weights by names and seed; constants, such as position tables, are those of a new policy here."""
    golden, config = Golden(path), load_config(path / "model")
    module = policy_class(config.type)(config, rngs=nnx.Rngs(params=0))
    arrays = (nnx.to_pure_dict(nnx.state(module, kind)) for kind in (nnx.Param, Buffer))
    new = torch_state.to_torch(module, *arrays)
    return {name: new[name] for name in golden.meta["param_shapes"]} | golden.stored_or_initial_weights()


def draws(golden: Golden, case: str, step: int = 0) -> dict[str, Any]:
    names = DRAWS[golden.meta["policy"]]
    recorded = golden.draws(case)
    return {name: jnp.asarray(x) for name, x in zip(names, recorded[step * len(names) :], strict=False)}


def assert_close(golden: Golden, key: str, actual) -> None:
    expected = golden.expected[key]
    np.testing.assert_allclose(
        np.asarray(actual, np.float64), expected, rtol=0, atol=golden.tolerance(key), err_msg=key
    )


def packed(arrays: Mapping[str, np.ndarray], names: list[str]) -> dict[str, np.ndarray]:
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
    for key in (*policy.config.input_features, *policy.config.output_features):
        expected = golden.batch[f"in/{key}"]
        if key in policy.config.image_features:
            expected = np.moveaxis(expected, -3, -1)
        actual = batch[key][: len(expected)]  # of images, the first sample is recorded
        np.testing.assert_allclose(actual, expected, rtol=1e-5, atol=1e-6, err_msg=key)
    observation = policy.preprocess(golden.inputs("obs/1/"))
    for key in policy.config.input_features.keys() - policy.config.image_features.keys():
        expected = golden.batch[f"obs_in/1/{key}"]
        np.testing.assert_allclose(observation[key], expected, rtol=1e-5, atol=1e-6, err_msg=key)


@pytest.mark.parametrize("case", ["loss", "loss_train"])
def test_loss_and_gradients(golden: Golden, tmp_path: Path, case: str):
    train = case == "loss_train"
    policy = load(golden, tmp_path, with_dropout=False)
    batch = policy.preprocess(golden.inputs("raw/"))

    def loss_of(params):
        return policy.loss_fn(params, policy.buffers, batch, KEY, train=train, **draws(golden, case))

    options = OPTIMIZED.get(golden.meta["variant"])
    gradient_fn = jax.jit(jax.value_and_grad(loss_of, has_aux=True), compiler_options=options)
    (loss, (metrics, buffers)), gradients = gradient_fn(policy.params)
    assert_close(golden, f"{case}/loss", loss)
    for key in (k for k in golden.expected if k.startswith(f"{case}/info/")):
        assert_close(golden, key, metrics[key.rsplit("/", 1)[1]])
    named = torch_state.to_torch(policy.module, gradients, buffers)
    for name, values in packed(named, golden.meta["grad_names"][case]).items():
        assert_close(golden, f"{case}/grad_{name}", values)
    for key in (k for k in golden.expected if k.startswith(f"{case}/buffers_after/")):
        assert_close(golden, key, named[key.rsplit("/", 1)[1]])
    if case == "loss" and "loss_none/loss" in golden.expected:
        loss_fn = jax.jit(policy.loss_fn, static_argnames=("train", "reduction"))
        settings = {"train": False, "reduction": "none", **draws(golden, "loss_none")}
        losses, _ = loss_fn(policy.params, policy.buffers, batch, KEY, **settings)
        assert_close(golden, "loss_none/loss", losses)


def test_chunk(golden: Golden, tmp_path: Path):
    policy = load(golden, tmp_path)
    windows = policy.config.observation_delta_indices is not None
    observation = golden.inputs("raw/" if windows else "obs/0/")
    given, inputs = draws(golden, "chunk"), policy.preprocess(observation)
    actions = jax.jit(policy.sample_actions)(policy.params, policy.buffers, inputs, KEY, **given)
    assert_close(golden, "chunk/action", actions)
    assert_close(golden, "chunk/post/action", policy.postprocess(actions, observation))


def test_select_action_sequence(golden: Golden, tmp_path: Path):
    policy = load(golden, tmp_path)
    expected = golden.expected["select/post/action"]  # step b act
    runner = policy.make_runner(batch_size=expected.shape[1])
    actions = [runner.select_action(golden.inputs(f"obs/{t}/")) for t in range(len(expected))]
    assert_close(golden, "select/post/action", np.stack(actions))


def test_optimizer_steps(golden: Golden, tmp_path: Path):
    policy = load(golden, tmp_path, with_dropout=False)
    batch = policy.preprocess(golden.inputs("raw/"))
    config = TrainConfig(policy=policy.config, steps=10)
    optimizer = optim.make_optimizer(config, policy.params)
    params, buffers, opt_state = policy.params, policy.buffers, optimizer.init(policy.params)
    losses, norms = [], []

    @jax.jit
    def train_step(params, buffers, opt_state, given):
        def loss_fn(params):
            return policy.loss_fn(params, buffers, batch, KEY, train=True, **given)

        (loss, (_, buffers)), gradients = jax.value_and_grad(loss_fn, has_aux=True)(params)
        updates, opt_state = optimizer.update(gradients, opt_state, params)
        return optax.apply_updates(params, updates), buffers, opt_state, loss, optax.tree.norm(gradients)

    for step in range(len(golden.expected["train_steps/loss"])):
        given = draws(golden, "train_steps", step)
        params, buffers, opt_state, loss, norm = train_step(params, buffers, opt_state, given)
        losses.append(loss)
        norms.append(norm)
    assert_close(golden, "train_steps/loss", losses)
    assert_close(golden, "train_steps/grad_norm", norms)
    named = torch_state.to_torch(policy.module, params, buffers)
    summary = packed(named, golden.meta["grad_names"]["train_steps_state"])
    assert_close(golden, "train_steps/state_norm", summary["norm"])
    assert_close(golden, "train_steps/state_head", summary["head"])


def test_learning_rates(golden: Golden, tmp_path: Path):
    """The recorded rates are those of LeRobot's parameter groups, in their order."""
    config = load(golden, tmp_path).config
    rates = [optim.optimizer_settings(TrainConfig(policy=config))["lr"], *(g.lr for g in config.param_groups)]
    np.testing.assert_allclose(golden.expected["train_steps/lr"][0], rates)
