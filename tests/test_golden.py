"""Every recorded policy computes what stock LeRobot computed: losses, gradients, actions, optimizer steps.

A new policy adds folders under tests/golden/, and a row to DRAWS.
"""

import dataclasses
import functools
import math
import re
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

from lerobot_jax import optim, state_dict, torch_state, trainable
from lerobot_jax.compilation import compile_quickly
from lerobot_jax.config import TrainConfig
from lerobot_jax.nn.variables import Buffer
from lerobot_jax.policies import base
from lerobot_jax.policies.base import FunctionalPolicy, load_config, load_policy, policy_class
from lerobot_jax.policies.multi_task_dit import MultiTaskDiTConfig
from lerobot_jax.policies.pi0 import PI0Config
from lerobot_jax.rollout import Runner
from tests.goldens import ROOT, Golden
from tests.recorded_sizes import use_sizes


def act_draws(recorded: list[np.ndarray], golden: Golden) -> dict[str, np.ndarray]:
    return dict(zip(["noise"], recorded, strict=False))


def vqbet_draws(recorded: list[np.ndarray], golden: Golden) -> dict[str, np.ndarray]:
    crops = [draw for draw in recorded if draw.shape == (1,)]
    choices = [draw.astype(np.int32) for draw in recorded if draw.shape != (1,)]
    if not choices:  # codes are learned
        return {}
    # Both codebooks' at once, or those of the first before those of the second.
    codes = np.concatenate(choices, axis=1).reshape(len(golden.batch["raw/action"]), -1, 2)
    return {"codes": codes} | ({"crop": np.reshape(crops, 2).astype(np.int32)} if crops else {})


def diffusion_draws(recorded: list[np.ndarray], golden: Golden) -> dict[str, np.ndarray]:
    if recorded[-1].dtype == np.int64:  # a loss
        *crops, noise, timestep = recorded
        given = {"noise": noise, "timestep": timestep.astype(np.int32)}
        return given | ({"crop": np.reshape(crops, (-1, 2)).astype(np.int32)} if crops else {})
    noise, *steps = recorded
    return {"noise": noise, "step_noise": np.reshape(steps, (-1, *noise.shape)).astype(np.float32)}


def multi_task_dit_draws(recorded: list[np.ndarray], golden: Golden) -> dict[str, np.ndarray]:
    config = load_config(golden.path / "model")
    assert isinstance(config, MultiTaskDiTConfig)
    if config.objective == "diffusion" or recorded[-1].ndim == 3:  # or a sample, from noise alone
        return diffusion_draws(recorded, golden)
    *crops, noise, time = recorded
    if config.timestep_sampling_strategy == "beta":  # drawn as the first of two shares that sum to 1
        time = np.float32(config.timestep_sampling_s) * (1 - (time[:, 0] if time.ndim == 2 else time))
    given = {"noise": noise, "time": time}
    return given | ({"crop": np.reshape(crops, (-1, 2)).astype(np.int32)} if crops else {})


def pi0_draws(recorded: list[np.ndarray], golden: Golden) -> dict[str, np.ndarray]:
    config = load_config(golden.path / "model")
    assert isinstance(config, PI0Config)
    if len(recorded) == 1:
        return {"noise": recorded[0]}
    noise, time = recorded
    scale, offset = np.float32(config.time_sampling_scale), np.float32(config.time_sampling_offset)
    return {"noise": noise, "time": time * scale + offset}


# From what LeRobot draws, in its order, to a policy's named draws.
DRAWS = {
    "act": act_draws,
    "diffusion": diffusion_draws,
    "multi_task_dit": multi_task_dit_draws,
    "pi0": pi0_draws,
    "pi05": pi0_draws,
    "vqbet": vqbet_draws,
}

# Those that compile long and differ in settings only.
SLOW = {
    "act": (
        "three_cameras_s0",
        "deep_raw_s0",
        "resnet34_te_s0",
        "dilated_te_s0",
        "full_resnet18_s0",
        "vae_minmax_s0",
    ),
    "diffusion": ("full_resnet18_s0", "ddim_two_encoders_s0", "ddim_shared_s0", "ddpm_gn_s0"),
    "multi_task_dit": ("ddim_shared_s0", "flow_rk4_two_encoders_s0"),
    "pi0": (),
    "pi05": (),
    "vqbet": ("one_step_s0",),
}
GOLDENS = [
    pytest.param(path.parent, marks=[pytest.mark.slow] * (path.parent.name in SLOW[path.parent.parent.name]))
    for path in sorted(ROOT.glob("*/*/meta.json"))
    if not path.parent.name.startswith("bf16")  # compared in tests/policies/test_pi0.py
]
KEY = jax.random.key(0)
# A softmax does not see it. If its gradient is rounding noise indeed, Adam makes whole steps of that.
NO_GRADIENT = r".*\.pool\.nets\.bias"
pytestmark = pytest.mark.usefixtures("stand_ins")
# As users compile it: this one's gradients cancel so much that rounding shows in their fourth digit.
OPTIMIZED = {"full_resnet18": {"xla_backend_optimization_level": 3}}


@pytest.fixture(params=GOLDENS, ids=lambda path: f"{path.parent.name}-{path.name}")
def golden(request, monkeypatch) -> Iterator[Golden]:
    golden = Golden(request.param)
    use_sizes(golden.meta.get("arch", {}), monkeypatch)
    yield golden
    base._module.cache_clear()


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

    def new_state(kind: type[nnx.Variable]) -> dict[str, Any]:
        module = policy_class(config.type)(config, rngs=nnx.Rngs(params=0))
        return nnx.to_pure_dict(nnx.state(module, kind))

    params = jax.eval_shape(functools.partial(new_state, nnx.Param))
    params = jax.tree.map(lambda x: np.broadcast_to(np.zeros((), x.dtype), x.shape), params)
    buffers = compile_quickly(functools.partial(new_state, Buffer))()
    module = nnx.eval_shape(lambda: policy_class(config.type)(config, rngs=nnx.Rngs(params=0)))
    new = torch_state.to_torch(module, params, buffers)
    given = golden.stored_or_initial_weights()
    return {name: given[name] if name in given else new[name] for name in golden.meta["param_shapes"]}


def draws(golden: Golden, case: str, step: int = 0, num_steps: int = 1) -> dict[str, Any]:
    """Give the draws of one of the steps of a case."""
    recorded = golden.draws(case)
    num = len(recorded) // num_steps
    given = DRAWS[golden.meta["policy"]](recorded[step * num : (step + 1) * num], golden)
    return {name: jnp.asarray(x) for name, x in given.items()}


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
    doubles = [arrays[name].astype(np.float64) for name in names]
    norms, sums = np.array([np.linalg.norm(x) for x in doubles]), np.array([x.sum() for x in doubles])
    return {"norm": norms, "sum": sums, "head": heads}


def test_preprocessing(golden: Golden, tmp_path: Path):
    policy = load(golden, tmp_path)
    batch = policy.preprocess(golden.inputs("raw/"))
    recorded = {key.removeprefix("in/") for key in golden.batch if key.startswith("in/")}
    features = {*policy.config.input_features, *policy.config.output_features}
    assert all("empty_camera" in key for key in features - recorded)
    for key in features & recorded:
        expected = golden.batch[f"in/{key}"]
        if key in policy.config.image_features:
            expected = np.moveaxis(expected, -3, -1)
        actual = batch[key][: len(expected)]  # of images, the first sample is recorded
        np.testing.assert_allclose(actual, expected, rtol=1e-5, atol=1e-6, err_msg=key)
    for key in ("observation.language.tokens", "observation.language.attention_mask"):
        assert (key in batch) == (f"in/{key}" in golden.batch)
        np.testing.assert_array_equal(batch.get(key, ()), golden.batch.get(f"in/{key}", ()))
    observation = policy.preprocess(golden.inputs("obs/1/"))
    for key in policy.config.input_features.keys() - policy.config.image_features.keys():
        expected = golden.batch[f"obs_in/1/{key}"]
        np.testing.assert_allclose(observation[key], expected, rtol=1e-5, atol=1e-6, err_msg=key)


@pytest.mark.parametrize("case", ["loss", "loss_train"])
def test_loss_and_gradients(golden: Golden, tmp_path: Path, case: str):
    train = case == "loss_train"
    if case not in golden.meta["cases"]:
        pytest.skip("LeRobot's policy computes the same in training")
    policy = load(golden, tmp_path, with_dropout=False)
    batch = policy.preprocess(golden.inputs("raw/"))

    def loss_of(params):
        return policy.loss_fn(params, policy.buffers, batch, KEY, train=train, **draws(golden, case))

    options = OPTIMIZED.get(golden.meta["variant"])
    gradient_fn = jax.jit(jax.value_and_grad(loss_of, has_aux=True), compiler_options=options)
    (loss, (metrics, buffers)), gradients = gradient_fn(policy.params)
    assert_close(golden, f"{case}/loss", loss)
    for key in (k for k in golden.expected if k.startswith(f"{case}/info/")):
        name = key.rsplit("/", 1)[1]
        parts = [value for each, value in metrics.items() if each.startswith(f"{name}/")]
        assert_close(golden, key, parts or {"loss": loss, **metrics}[name])
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
    if "chunk" not in golden.meta["cases"]:
        pytest.skip("LeRobot's policy gives chunks to its own queue only")
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
    runner = RecordedRunner(policy, expected.shape[1], golden)
    observations = [golden.inputs(f"obs/{t}/") for t in range(len(expected))]
    actions = np.stack([runner.select_action(each) for each in observations])
    if policy.config.action_target.representation == "absolute":
        assert_close(golden, "select/post/action", actions)
        return
    # Stock adds the state at the time of execution, here it is that of the chunk's observation.
    predicted = golden.expected["select/action"]  # step b act
    in_stock = [
        policy.postprocess(jnp.asarray(each), seen)
        for each, seen in zip(predicted, observations, strict=True)
    ]
    assert_close(golden, "select/post/action", np.stack(in_stock))
    first = [observations[t - t % policy.config.n_action_steps] for t in range(len(expected))]
    here = [policy.postprocess(jnp.asarray(each), seen) for each, seen in zip(predicted, first, strict=True)]
    np.testing.assert_allclose(actions, here, rtol=0, atol=golden.tolerance("select/post/action"))


class RecordedRunner(Runner):
    """Takes what LeRobot drew for each chunk in the place of its own draws."""

    def __init__(self, policy: FunctionalPolicy, batch_size: int, golden: Golden):
        super().__init__(policy, batch_size)
        if not golden.draws("select"):
            self._given = {}
            return
        num_chunks = math.ceil(len(golden.expected["select/post/action"]) / policy.config.n_action_steps)
        chunks = [draws(golden, "select", i, num_chunks) for i in range(num_chunks)]
        self._given = {name: jnp.stack([chunk[name] for chunk in chunks]) for name in chunks[0]}

    def _predict_chunk(self, params, buffers, observation, seed_key, episode, step):
        chunk = step // self.policy.config.n_action_steps
        axes = {"noise": 0, "step_noise": 1, "codes": 0}  # of the samples
        given = {
            name: jax.lax.dynamic_slice_in_dim(x[chunk], episode, 1, axes[name])
            for name, x in self._given.items()
        }
        if "codes" in given:  # LeRobot draws those of all steps
            now = self.policy.config.n_obs_steps - 1
            given["codes"] = given["codes"][:, now : now + 1]
        inputs = self.policy.preprocess(observation)
        actions = self.policy.sample_actions(params, buffers, inputs, seed_key, **given)
        return self.policy.postprocess(actions, observation)


def optimizer_steps(
    golden: Golden, policy: FunctionalPolicy
) -> tuple[list[jax.Array], list[jax.Array], dict[str, Any], dict[str, Any]]:
    """Make the recorded updates; give losses, norms of gradients, parameters and buffers."""
    batch = policy.preprocess(golden.inputs("raw/"))
    config = TrainConfig(policy=policy.config, steps=10)
    params, frozen = trainable.split(config, policy.params)
    optimizer = optim.make_optimizer(config, params)
    buffers, opt_state = policy.buffers, optimizer.init(params)
    losses, norms = [], []

    @jax.jit
    def train_step(params, buffers, opt_state, given):
        def loss_fn(params):
            whole = trainable.combine(params, frozen)
            return policy.loss_fn(whole, buffers, batch, KEY, train=True, **given)

        (loss, (_, buffers)), gradients = jax.value_and_grad(loss_fn, has_aux=True)(params)
        updates, opt_state = optimizer.update(gradients, opt_state, params)
        return optax.apply_updates(params, updates), buffers, opt_state, loss, optax.tree.norm(gradients)

    num_steps = len(golden.expected["train_steps/loss"])
    num_idle = steps_without_draws(golden, policy)
    for step in range(num_steps):
        given = draws(golden, "train_steps", max(0, step - num_idle), num_steps - num_idle)
        params, buffers, opt_state, loss, norm = train_step(params, buffers, opt_state, given)
        losses.append(loss)
        norms.append(norm)
    return losses, norms, trainable.combine(params, frozen), buffers


def test_optimizer_steps(golden: Golden, tmp_path: Path):
    policy = load(golden, tmp_path, with_dropout=False)
    losses, norms, params, buffers = optimizer_steps(golden, policy)
    assert_close(golden, "train_steps/loss", losses)
    assert_close(golden, "train_steps/grad_norm", norms)
    named = torch_state.to_torch(policy.module, params, buffers)
    summary = packed(named, golden.meta["grad_names"]["train_steps_state"])
    names = golden.meta["grad_names"]["train_steps_state"]
    is_noise = np.array([name in without_gradient(golden) for name in names])
    farthest = 2 * golden.expected["train_steps/lr"].max(axis=1).sum()
    for name in ("norm", "head"):
        expected, tolerance = golden.expected[key := f"train_steps/state_{name}"], golden.tolerance(key)
        for rows, limit in ((~is_noise, tolerance), (is_noise, max(farthest, tolerance))):
            found = np.asarray(summary[name][rows], np.float64)
            np.testing.assert_allclose(found, expected[rows], rtol=0, atol=limit, err_msg=key)


def without_gradient(golden: Golden) -> set[str]:
    """Name what has a gradient that is 0 up to rounding, for a reason."""
    if "loss_train" not in golden.meta["cases"]:
        return set()
    rounding, _ = golden.meta["noise_floor"][key := "loss_train/grad_norm"]
    norms = zip(golden.meta["grad_names"]["loss_train"], golden.expected[key], strict=True)
    return {name for name, norm in norms if re.fullmatch(NO_GRADIENT, name) and norm <= rounding}


def steps_without_draws(golden: Golden, policy: FunctionalPolicy) -> int:
    """Tell in how many of the recorded updates LeRobot drew nothing: while VQ-BeT learns codes."""
    buffers = torch_state.to_torch(policy.module, policy.params, policy.buffers)
    flag = "vqbet.action_head.vqvae_model.discretized"
    if golden.meta["policy"] != "vqbet" or buffers[flag]:
        return 0
    config: Any = policy.config
    return min(config.n_vqvae_training_steps, len(golden.expected["train_steps/loss"]) - 1)


def test_learning_rates(golden: Golden, tmp_path: Path):
    """The recorded rates are those of LeRobot's parameter groups, in their order."""
    config = TrainConfig(policy=load(golden, tmp_path).config, steps=10)
    base = optim.optimizer_settings(config)["lr"]
    # LeRobot's groups are told apart by rate; those that differ in weight decay only are ours.
    rates = dict.fromkeys(group.lr for group in config.policy.param_groups)
    groups = [base if rate is None else rate for rate in rates if rate is not None or len(rates) > 1]
    factor = optim.make_schedule(config)
    for step, expected in enumerate(golden.expected["train_steps/lr"]):
        np.testing.assert_allclose(expected, [rate * factor(step) for rate in (base, *groups)], rtol=1e-6)
