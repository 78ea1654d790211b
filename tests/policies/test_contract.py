"""What every policy promises; a new policy folder is found by itself."""

import dataclasses
import functools
import importlib
import pkgutil
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax.traverse_util import flatten_dict

import lerobot_jax.policies
from lerobot_jax.errors import InputError
from lerobot_jax.features import TASK, FeatureType
from lerobot_jax.layer_decay import layer_factors
from lerobot_jax.nn.execution import Execution, Remat
from lerobot_jax.nn.weights import is_stacked
from lerobot_jax.policies.base import FunctionalPolicy, config_class, load_policy, make_policy, policy_class
from lerobot_jax.policies.config import group_of
from lerobot_jax.sharding import MeshConfig, make_mesh, state_shardings

NAMES = [module.name for module in pkgutil.iter_modules(lerobot_jax.policies.__path__) if module.ispkg]

# They denoise, or encode, whole chunks with what pads them; at most their loss leaves it out.
PADDING_IS_SEEN = ("diffusion", "multi_task_dit", "pi0", "pi05", "vqbet")

pytestmark = pytest.mark.usefixtures("stand_ins")


@pytest.fixture(params=NAMES)
def policy(request) -> FunctionalPolicy:
    return tiny_policy(request.param)


@functools.cache
def tiny_policy(name: str) -> FunctionalPolicy:
    config = config_class(name).tiny()
    stats = {}
    for key, feature in {**config.input_features, **config.output_features}.items():
        shape = (3, 1, 1) if feature.type == FeatureType.VISUAL else feature.shape
        names = {
            "mean": 0.2,
            "std": 0.7,
            "min": -1.0,
            "max": 1.0,
            "q01": -0.9,
            "q10": -0.5,
            "q90": 0.5,
            "q99": 0.9,
        }
        stats[key] = {name: np.full(shape, value, np.float32) for name, value in names.items()}
    policy = make_policy(config, stats)
    params, buffers = policy.init(jax.random.key(0))
    return policy.replace(params=params, buffers=buffers)


def make_batch(policy: FunctionalPolicy, batch_size: int = 3) -> dict:
    rng = np.random.default_rng(0)
    config = policy.config
    steps = len(config.action_delta_indices or [0])
    past = () if config.observation_delta_indices is None else (len(config.observation_delta_indices),)
    batch = {}
    for key, feature in config.input_features.items():
        if feature.type == FeatureType.VISUAL:
            channels, *size = feature.shape
            batch[key] = rng.integers(0, 256, (batch_size, *past, *size, channels)).astype(np.uint8)
        else:
            batch[key] = rng.normal(size=(batch_size, *past, *feature.shape)).astype(np.float32)
    batch["action"] = rng.normal(size=(batch_size, steps, *config.action_feature.shape)).astype(np.float32)
    batch["action_is_pad"] = np.arange(steps)[None] >= steps - np.arange(batch_size)[:, None] % 3
    if policy.preprocessor.has_text:
        batch = policy.tokenize(batch | {TASK: [f"pick up {i} cubes" for i in range(batch_size)]})
    return batch


def test_names_and_registration():
    for name in NAMES:
        assert config_class(name).type == name
        assert issubclass(policy_class(name), lerobot_jax.policies.base.Policy)
        module = importlib.import_module(f"lerobot_jax.policies.{name}")
        assert {"Config", "Policy"} <= set(module.__all__)


def test_loss_and_gradients_are_finite(policy: FunctionalPolicy):
    def loss_fn(params, batch, key):
        return policy.loss_fn(params, policy.buffers, policy.preprocess(batch), key, train=True)

    (loss, (metrics, buffers)), gradients = jax.jit(jax.value_and_grad(loss_fn, has_aux=True))(
        policy.params, make_batch(policy), jax.random.key(1)
    )
    assert loss.shape == ()
    assert all(np.isfinite(x).all() for x in jax.tree.leaves((loss, gradients, buffers)))
    known = [x for x in metrics.values() if not np.isnan(x)]  # the others are of another phase of training
    assert np.isfinite(known).all()
    assert bool(known) == bool(metrics)
    assert jax.tree.structure(buffers) == jax.tree.structure(policy.buffers)
    assert jax.tree.structure(gradients) == jax.tree.structure(policy.params)


@pytest.mark.parametrize(
    ("mesh", "remat"),
    [
        (MeshConfig(data=2, fsdp=2, tensor=2, min_shard_size=1), "full"),
        pytest.param(None, "dots", marks=pytest.mark.slow),
    ],
)
def test_devices_and_recomputation_do_not_change_the_gradients(
    policy: FunctionalPolicy, mesh: MeshConfig | None, remat: Remat
):
    batch = make_batch(policy, 8)

    def loss_fn(params, buffers, batch, key):
        return policy.loss_fn(params, buffers, policy.preprocess(batch), key, train=True)

    def gradients(execution: Execution):
        def place(tree):
            return tree if execution.mesh is None else jax.device_put(tree, state_shardings(execution, tree))

        function = jax.jit(execution(jax.value_and_grad(loss_fn, has_aux=True)))
        return function(place(policy.params), place(policy.buffers), batch, jax.random.key(1))

    (loss, (_, buffers)), wanted = gradients(Execution())
    devices = mesh and make_mesh(mesh)
    (loss2, (_, buffers2)), found = gradients(Execution(devices, policy.config.tensor_axes, 1, remat))
    np.testing.assert_allclose(loss2, loss, rtol=1e-5)
    largest = max(np.abs(x).max() for x in jax.tree.leaves(jax.device_get(wanted)))
    assert_same = functools.partial(np.testing.assert_allclose, rtol=1e-4, atol=1e-5 * largest)
    jax.tree.map(assert_same, (found, buffers2), (wanted, buffers))


def test_tensor_axes_name_parameters(policy: FunctionalPolicy):
    names = {".".join(map(str, path)): x.shape for path, x in flatten_dict(policy.params).items()}
    for pattern, axis in policy.config.tensor_axes:
        shapes = [shape for name, shape in names.items() if re.search(f"(?:{pattern})$", name)]
        assert shapes, pattern
        assert all(len(shape) >= abs(axis) for shape in shapes), pattern


def test_padded_steps_have_no_influence(policy: FunctionalPolicy):
    if policy.config.type in PADDING_IS_SEEN:
        pytest.skip("as in LeRobot, padded actions are an input of the network")
    batch = make_batch(policy)
    other = dict(batch)
    other["action"] = np.where(batch["action_is_pad"][..., None], 1e3, batch["action"]).astype(np.float32)

    @jax.jit
    def loss_of(params, buffers, batch, key):
        return policy.loss_fn(params, buffers, policy.preprocess(batch), key, train=True)[0]

    losses = [loss_of(policy.params, policy.buffers, b, jax.random.key(1)) for b in (batch, other)]
    np.testing.assert_allclose(*losses, rtol=1e-5)


def test_per_sample_losses(policy: FunctionalPolicy):
    @jax.jit  # both in one program, which has what they share once
    def losses_of(params, buffers, batch, key):
        batch = policy.preprocess(batch)
        return [
            policy.loss_fn(params, buffers, batch, key, train=True, reduction=reduction)[0]
            for reduction in ("none", "mean")
        ]

    losses, loss = losses_of(policy.params, policy.buffers, make_batch(policy), jax.random.key(1))
    assert losses.shape == (3,)
    np.testing.assert_allclose(losses.mean(), loss, rtol=1e-5)


def test_a_choice_of_denoising_steps_is_told(policy: FunctionalPolicy):
    """Under LeRobot's names for it; another number acts with the same weights."""
    names = {field.name for field in dataclasses.fields(policy.config)}
    if policy.config.denoising_steps is None:
        assert not names & {
            "num_inference_steps",
            "num_integration_steps",
            "num_denoising_steps",
            "num_steps",
        }
        return
    name, steps = policy.config.denoising_steps
    assert steps == getattr(policy.config, name) or getattr(policy.config, name) is None
    other = policy.with_settings(**{name: steps - 1})
    assert other.config.denoising_steps == (name, steps - 1)
    batch = policy.preprocess(make_batch(policy))
    before, after = (
        jax.make_jaxpr(each.sample_actions)(policy.params, policy.buffers, batch, jax.random.key(0))
        for each in (policy, other)
    )
    assert after.out_avals == before.out_avals
    assert str(after) != str(before)


def test_the_order_of_layers_leaves_no_parameter_out(policy: FunctionalPolicy):
    if not policy.config.layer_order:  # then there is no layer-wise decay for this policy
        with pytest.raises(InputError, match=r"optimizer.layer_decay: .* give it the property layer_order"):
            layer_factors(0.5, policy.config, policy.params)
        return
    factors = [
        np.ravel(factor) for factor in jax.tree.leaves(layer_factors(0.5, policy.config, policy.params))
    ]
    found = sorted(set(np.concatenate(factors)), reverse=True)
    assert found == [0.5**i for i in range(len(found))]
    assert len(found) > 2


def test_samples_have_the_chunks_shape_and_depend_on_the_key_only(policy: FunctionalPolicy):
    observation = make_batch(policy)

    @jax.jit
    def sample(params, buffers, observation, key, **draws):
        return policy.sample_actions(params, buffers, policy.preprocess(observation), key, **draws)

    actions = [sample(policy.params, policy.buffers, observation, jax.random.key(2)) for _ in range(2)]
    assert actions[0].shape == (
        3,
        len(policy.config.sampled_delta_indices),
        *policy.config.action_feature.shape,
    )
    np.testing.assert_array_equal(*actions)
    assert np.isfinite(actions[0]).all()
    draws = policy.sampling_draws(3, jax.random.key(2))
    given = sample(policy.params, policy.buffers, observation, jax.random.key(3), **draws)
    np.testing.assert_allclose(given, actions[0], rtol=1e-5, atol=1e-6)


def test_half_precision_computes_nearly_the_same(policy: FunctionalPolicy):
    config = dataclasses.replace(policy.config, use_amp=True)
    half = policy.replace(config=config, graphdef=lerobot_jax.policies.base._graphdef(config))

    @functools.partial(jax.jit, static_argnums=0)
    def loss_of(p, params, buffers, batch, key):
        return p.loss_fn(params, buffers, p.preprocess(batch), key, train=False)[0]

    arguments = (policy.params, policy.buffers, make_batch(policy), jax.random.key(1))
    losses = [loss_of(p, *arguments) for p in (policy, half)]
    assert losses[1].dtype == jnp.float32
    np.testing.assert_allclose(*losses, rtol=0.05)


def test_saved_policies_load_unchanged(policy: FunctionalPolicy, tmp_path):
    policy.save_pretrained(tmp_path)
    loaded = load_policy(tmp_path)
    assert loaded.config == policy.config
    assert loaded.config.to_dict() == policy.config.to_dict()
    for a, b in zip(jax.tree.leaves(policy.params), jax.tree.leaves(loaded.params), strict=True):
        np.testing.assert_array_equal(a, b)
    observation = make_batch(policy)

    @functools.partial(jax.jit, static_argnums=0)
    def act(p, params, buffers, observation):
        inputs = p.preprocess(observation)
        return p.postprocess(p.sample_actions(params, buffers, inputs, jax.random.key(0)))

    expected, found = (act(p, p.params, p.buffers, observation) for p in (policy, loaded))
    np.testing.assert_array_equal(expected, found)


def test_parameter_groups_name_parameters(policy: FunctionalPolicy):
    """Every pattern of a group matches something, so that none is a typing error."""
    groups, matched = policy.config.param_groups, set()
    for path, x in flatten_dict(policy.params).items():
        name = ".".join(map(str, path))
        layers = range(len(x)) if is_stacked(name) else [None]
        matched |= {group_of(name, groups, layer, len(layers)) for layer in layers}
    assert set(policy.config.param_groups) <= matched
