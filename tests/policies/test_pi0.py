"""What the contract and the goldens do not say about pi0 and pi0.5."""

import dataclasses
import functools
from collections.abc import Iterator
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from flax.traverse_util import flatten_dict

from lerobot_jax import lora, optim, state_dict, torch_state, trainable
from lerobot_jax.certificate import make_observations
from lerobot_jax.config import TrainConfig
from lerobot_jax.errors import InputError
from lerobot_jax.features import ACTION, OBS_STATE, FeatureType, PolicyFeature
from lerobot_jax.nn.time_embedding import embed_time
from lerobot_jax.peft_targets import PeftConfig
from lerobot_jax.policies import base
from lerobot_jax.policies.action_prefix import draw_delays
from lerobot_jax.policies.base import FunctionalPolicy, load_config, load_policy
from lerobot_jax.policies.pi0 import PI0Config
from lerobot_jax.policies.pi0.modeling import PI0Policy, resize_with_pad
from lerobot_jax.policies.pi05 import PI05Config
from lerobot_jax.policies.rtc import RTCConfig
from lerobot_jax.processors.actions import ABSOLUTE, ActionTarget
from tests.goldens import ROOT, Golden
from tests.recorded_sizes import use_sizes
from tests.test_golden import KEY, draws, optimizer_steps, packed

TINY = PI0Config.tiny()
HALF = ROOT / "pi0" / "bf16_s0"

pytestmark = pytest.mark.usefixtures("stand_ins")


@pytest.fixture(params=["pi0/2cam_empty_s0", "pi0/relative_expert_only_s0", "pi05/2cam_empty_s0"])
def golden(request, monkeypatch: pytest.MonkeyPatch) -> Iterator[Golden]:
    golden = Golden(ROOT / request.param)
    use_sizes(golden.meta["arch"], monkeypatch)
    yield golden
    base._module.cache_clear()


@pytest.fixture
def half_golden(monkeypatch: pytest.MonkeyPatch) -> Iterator[Golden]:
    golden = Golden(HALF)
    use_sizes(golden.meta["arch"], monkeypatch)
    yield golden
    base._module.cache_clear()


def bound(policy: FunctionalPolicy) -> PI0Policy:
    """Give the policy's module with its arrays."""
    module = policy._merge(policy.params, policy.buffers)
    assert isinstance(module, PI0Policy)
    return module


def test_what_the_networks_read_is_stock_s(golden: Golden):
    policy = load_policy(golden.path / "model")
    batch, module = policy.preprocess(golden.inputs("raw/")), bound(policy)
    internals = {k.removeprefix("internals/"): v for k, v in golden.expected.items() if "internals/" in k}
    cameras = [key for key in policy.config.image_features if key in batch]
    for key, expected in zip(cameras, internals["images"], strict=False):
        seen = resize_with_pad(batch[key], *module.config.image_resolution) * 2 - 1
        np.testing.assert_allclose(seen, np.moveaxis(expected, 1, -1), atol=1e-6)
    embedded, is_token = jax.jit(lambda params: bound(policy.replace(params=params))._prefix(batch))(
        policy.params
    )
    # Stock embeds cameras that are not there, too, and masks them.
    num_patches = (module.config.image_resolution[0] // 14) ** 2
    is_there = np.repeat(internals["img_masks"][:, 0], num_patches)
    is_there = np.concatenate([is_there, np.ones(internals["prefix_embs"].shape[1] - len(is_there), bool)])
    np.testing.assert_allclose(embedded, internals["prefix_embs"][:, is_there], rtol=0, atol=1e-5)
    np.testing.assert_array_equal(is_token, internals["prefix_pad"][:, is_there])
    suffix, condition = module._suffix(
        batch, jnp.asarray(internals["suffix_x"]), jnp.asarray(internals["suffix_t"])
    )
    np.testing.assert_allclose(suffix, internals["suffix_embs"], rtol=0, atol=1e-6)
    if condition is not None:
        np.testing.assert_allclose(condition[:, 0], internals["adarms_cond"], rtol=0, atol=1e-6)
    blocks = np.cumsum(internals["suffix_att"][0])
    parts = module.model._parts(suffix)
    np.testing.assert_array_equal(parts - parts[0], blocks - blocks[0])


def test_a_cached_prefix_and_a_time_for_each_action_give_the_same_velocity(golden: Golden):
    policy = load_policy(golden.path / "model")
    batch = policy.preprocess(golden.inputs("raw/"))
    chunk, width = policy.config.chunk_size, policy.config.max_action_dim  # pyright: ignore
    noisy, time = jax.random.normal(KEY, (2, chunk, width)), jnp.array([0.3, 0.9])

    @jax.jit
    def velocities(params):
        module = bound(policy.replace(params=params))
        model, prefix = module.model, module._prefix(batch)
        suffix = module._suffix(batch, noisy, time)
        of_each = module._suffix(batch, noisy, jnp.broadcast_to(time[:, None], (2, chunk)))
        after = model.velocity_after(model.read(prefix), prefix[1], suffix)
        return model.velocity(prefix, suffix), model.velocity(prefix, of_each), after

    at_once, of_each, after = velocities(policy.params)
    np.testing.assert_allclose(of_each, at_once, rtol=0, atol=1e-6)
    np.testing.assert_allclose(after, at_once, rtol=0, atol=5e-6)


def test_times_are_embedded_as_in_float64():
    times = np.random.default_rng(0).uniform(0, 1, 1000).astype(np.float32)
    periods = 4e-3 * (4.0 / 4e-3) ** np.linspace(0, 1, 512)
    phases = 2 * np.pi / periods[None] * times[:, None].astype(np.float64)
    expected = np.concatenate([np.sin(phases), np.cos(phases)], axis=1)
    embedded = jax.jit(functools.partial(embed_time, features=1024, min_period=4e-3, max_period=4.0))(times)
    np.testing.assert_allclose(embedded, expected, atol=1e-6)


def test_a_checkpoint_is_saved_as_it_was(golden: Golden, tmp_path: Path):
    policy = load_policy(golden.path / "model")
    policy.save_pretrained(tmp_path)
    before, after = (state_dict.read(folder) for folder in (golden.path / "model", tmp_path))
    assert set(before) == set(after)
    for key in before:
        assert before[key].dtype == after[key].dtype
        np.testing.assert_array_equal(before[key], after[key], err_msg=key)
    assert load_config(tmp_path).to_dict() == load_config(golden.path / "model").to_dict()


def computed(golden: Golden, dtype: str) -> dict[str, np.ndarray]:
    """Compute a golden's loss, gradients, actions and updates from its weights in another type."""
    folder = golden.path / "model"
    policy = load_policy(folder, config=dataclasses.replace(load_config(folder), dtype=dtype))
    if dtype == "float32":
        policy = policy.replace(params=jax.tree.map(lambda x: x.astype(jnp.float32), policy.params))
    batch = policy.preprocess(golden.inputs("raw/"))

    def losses_of(params, reduction="mean", case="loss"):
        given = draws(golden, case)
        return policy.loss_fn(params, {}, batch, KEY, train=False, reduction=reduction, **given)

    (_, (metrics, _)), gradients = jax.jit(jax.value_and_grad(losses_of, has_aux=True))(policy.params)
    losses, _ = jax.jit(lambda params: losses_of(params, "none", "loss_none"))(policy.params)
    inputs = policy.preprocess(golden.inputs("obs/0/"))
    actions = jax.jit(policy.sample_actions)(policy.params, {}, inputs, KEY, **draws(golden, "chunk"))
    named = torch_state.to_torch(policy.module, gradients, {})
    grads = packed(named, golden.meta["grad_names"]["loss"])
    found = {"loss/info/loss_per_dim": np.stack([*metrics.values()]), "loss_none/loss": losses}
    found |= {f"loss/grad_{name}": values for name, values in grads.items()} | {"chunk/action": actions}
    masters = jax.tree.map(lambda x: x.astype(jnp.float32), policy.params)
    losses, norms, *_ = optimizer_steps(golden, policy.replace(params=masters))
    found |= {"train_steps/loss": np.stack(losses), "train_steps/grad_norm": np.stack(norms)}
    return {key: np.asarray(value, np.float64) for key, value in found.items()}


def test_in_bfloat16_we_are_as_near_to_float32_as_stock_is(half_golden: Golden):
    """What bfloat16 explains: stock's own distance from what float32 gives for the same weights.

    Two such results differ by both distances, and neither is more right.
    """
    ours, exact = computed(half_golden, "bfloat16"), computed(half_golden, "float32")

    def distance(a, b):
        return np.sqrt(np.mean(np.square(a - b)))

    for key, value in exact.items():
        stock = half_golden.expected[key]
        costs = distance(stock, value)
        assert 0 < distance(ours[key], value) < 2 * costs, key
        assert distance(ours[key], stock) < 3 * costs, key


def test_bfloat16_keeps_types(half_golden: Golden, tmp_path: Path):
    policy = load_policy(half_golden.path / "model")
    policy.save_pretrained(tmp_path)
    before, after = (state_dict.read(folder) for folder in (half_golden.path / "model", tmp_path))
    assert {key: x.dtype for key, x in before.items()} == {key: x.dtype for key, x in after.items()}


def trained_names(**settings) -> set[str]:
    policy = dataclasses.replace(TINY, **settings)
    params = nnx.to_pure_dict(nnx.state(base._module(policy), nnx.Param))
    trained, _ = trainable.split(TrainConfig(policy=policy), params)
    return {".".join(map(str, path)) for path in flatten_dict(trained)}


def test_what_is_trained():
    everything = trained_names()
    assert not any("lm_head" in name for name in everything)
    assert {name.split(".")[2] for name in everything if "paligemma_with_expert" in name} == {
        "paligemma",
        "gemma_expert",
    }
    without_tower = trained_names(freeze_vision_encoder=True)
    assert everything - without_tower == {name for name in everything if "vision_tower" in name}
    expert = trained_names(train_expert_only=True)
    assert not any(".paligemma." in name for name in expert)
    assert any("gemma_expert" in name for name in expert)
    assert any("state_proj" in name for name in expert)


def test_adapters_on_what_is_frozen_are_trained():
    """As in LeRobot, which freezes first."""
    config = dataclasses.replace(TINY, train_expert_only=True, pretrained_path="base")
    peft = PeftConfig(target_modules=config.peft_presets["vlm"], full_training_modules=("state_proj",))
    plan = lora.plan(peft, config, base._module(config))
    shapes = nnx.to_pure_dict(nnx.state(base._module(config), nnx.Param))
    adapted = jax.eval_shape(plan.attach, shapes, KEY)
    trained, _ = trainable.split(TrainConfig(policy=config, peft=peft), adapted, plan.whole)
    names = {".".join(map(str, path)) for path in flatten_dict(trained)}
    assert any("language_model" in name and name.endswith(".left") for name in names)
    assert all(name.endswith((".left", ".right")) or ".state_proj." in name for name in names)


def test_a_runner_computes_the_same_with_half_of_the_memory():
    policy = dataclasses.replace(TINY, dtype="bfloat16", normalization_mapping={})
    policy = base.make_policy(policy, {})
    params, buffers = jax.jit(policy.init)(KEY)
    policy = policy.replace(params=params, buffers=buffers)
    made = policy.tokenize(make_observations(policy))
    observation = {key: np.asarray(value[:1]) for key, value in made.items()}
    runner = policy.make_runner()
    held = flatten_dict(runner._arrays[0])
    kernels = {path: x for path, x in held.items() if "language_model" in path and path[-1] == "kernel"}
    assert kernels
    assert {x.dtype for x in kernels.values()} == {jnp.dtype(jnp.bfloat16)}
    weights = [(params, buffers), runner._arrays]
    chunks = [runner._predict(*each, observation, jax.random.key(0), 0, 0) for each in weights]
    np.testing.assert_array_equal(*chunks)


def test_weights_that_nothing_sees_are_not_decayed():
    policy = dataclasses.replace(TINY, optimizer_weight_decay=0.1, optimizer_lr=1.0)
    config = TrainConfig(policy=policy, steps=10)
    params = {"model": {"paligemma_with_expert": {"paligemma": {"model": {"language_model": {}}}}}}
    language = params["model"]["paligemma_with_expert"]["paligemma"]["model"]["language_model"]
    language["layers"] = {"block": {"mlp": {"up_proj": {"kernel": jnp.ones((3, 2, 2))}}}}
    language["layers"]["block"]["self_attn"] = {"q_proj": {"kernel": jnp.ones((3, 2, 2))}}
    optimizer = optim.make_optimizer(config, params)
    zeros = jax.tree.map(jnp.zeros_like, params)
    updates, _ = optimizer.update(zeros, optimizer.init(params), params)
    moved = {path[-2]: np.asarray(x).any((1, 2)) for path, x in flatten_dict(updates).items()}
    np.testing.assert_array_equal(moved["up_proj"], [True, True, False])
    np.testing.assert_array_equal(moved["q_proj"], [True, True, True])


def test_impossible_settings_are_named():
    for settings, message in (
        ({"n_action_steps": 7}, "n_action_steps"),
        ({"paligemma_variant": "gemma_9b"}, "paligemma_variant must be one of gemma_2b"),
        ({"action_expert_variant": "gemma_2b"}, "cannot attend to each other"),
        ({"dtype": "float16"}, "dtype"),
        ({"image_resolution": (28, 30)}, "image_resolution"),
        ({"min_period": 0.0}, "min_period"),
        ({"rtc_training_delay": TINY.chunk_size}, "rtc_training_delay must be from 0 to chunk_size - 1"),
    ):
        with pytest.raises(ValueError, match=message):
            dataclasses.replace(TINY, **settings)
    wide = dataclasses.replace(TINY, output_features={ACTION: PolicyFeature(FeatureType.ACTION, (9,))})
    with pytest.raises(InputError, match=r"max_action_dim is 8, too few for a vector of shape \(9,\)"):
        wide.check_features()
    blind = dataclasses.replace(TINY, input_features={OBS_STATE: PolicyFeature(FeatureType.STATE, (3,))})
    with pytest.raises(InputError, match="at least one camera"):
        blind.check_features()


def test_the_target_is_what_lerobot_s_settings_say():
    relative = dataclasses.replace(TINY, use_relative_actions=True, relative_exclude_joints=("gripper",))
    assert relative.action_target.representation == "relative"
    assert relative.action_target.exclude_joints == ("gripper",)
    for other in ((), ("wrist", "gripper")):
        changed = dataclasses.replace(relative, relative_exclude_joints=other)
        assert changed.action_target.exclude_joints == other
    for settings in ({"action_target": relative.action_target}, {}):
        with pytest.raises(ValueError, match="use_relative_actions=False contradicts"):
            dataclasses.replace(TINY if settings else relative, use_relative_actions=False, **settings)
    named = dataclasses.replace(TINY, action_target=ActionTarget("absolute", ("x",), action_names=("x", "y")))
    assert (named.relative_exclude_joints, named.action_feature_names) == (("x",), ("x", "y"))
    assert named.action_target == ABSOLUTE
    with pytest.raises(ValueError, match="contradicts"):
        dataclasses.replace(relative, action_target=ActionTarget("delta"))


@pytest.mark.parametrize("golden", ["pi0/2cam_empty_s0", "pi05/2cam_empty_s0"], indirect=True)
def test_training_with_delays(golden: Golden):
    """Given actions have neither noise nor loss; without any, the loss is LeRobot's."""
    policy = load_policy(golden.path / "model")
    batch, chunk = policy.preprocess(golden.inputs("raw/")), policy.config.chunk_size  # pyright: ignore
    noise = jax.random.normal(KEY, (2, chunk, policy.config.max_action_dim))  # pyright: ignore

    def losses(policy, noise, **delays):
        given = delays | {"noise": noise, "time": jnp.array([0.4, 0.7])}
        each = policy.loss_fn(policy.params, policy.buffers, batch, KEY, reduction="none", **given)[0]
        return each.sum(), each

    measure = jax.jit(jax.value_and_grad(functools.partial(losses, policy), has_aux=True))
    (_, with_some), gradient = measure(noise, delays=jnp.array([0, 3]))
    is_used = np.abs(gradient).max(-1) > 0
    np.testing.assert_array_equal(is_used, np.arange(chunk)[None] >= np.array([[0], [3]]))
    (_, without), _ = measure(noise, delays=jnp.array([0, 0]))
    plain = jax.jit(functools.partial(losses, policy))(noise)[1]
    np.testing.assert_allclose(without, plain, rtol=1e-6)
    np.testing.assert_allclose(with_some[0], plain[0], rtol=1e-6)
    assert abs(with_some[1] / plain[1] - 1) > 1e-3
    drawn = jax.jit(functools.partial(losses, policy.with_settings(rtc_training_delay=3)))(noise)[1]
    delays = draw_delays(jax.random.split(KEY, 3)[2], 2, 3)
    np.testing.assert_allclose(drawn, measure(noise, delays=delays)[0][1], rtol=1e-6)
    assert delays.any()


def test_config_json_has_lerobot_s_fields(golden: Golden):
    for config in (PI0Config(), PI05Config()):
        path = ROOT / config.type / "2cam_empty_s0" / "model"
        assert set(config.to_dict()) == set(base.read_config(path))
    changed = dataclasses.replace(TINY, rtc_config=RTCConfig(prefix_attention_schedule="EXP"))
    data = changed.to_dict()
    assert data["rtc_config"]["prefix_attention_schedule"] == "EXP"
    assert PI0Config.from_dict(data).rtc_config == changed.rtc_config


def test_a_camera_is_masked_where_a_sample_lacks_it():
    """As in a mixture of datasets: what such a sample shows there does not count, and others see it."""
    config = dataclasses.replace(TINY, normalization_mapping={})
    policy = base.make_policy(config, {})
    params, buffers = jax.jit(policy.init)(KEY)
    rng = np.random.default_rng(0)
    top, wrist = config.image_features
    rows = {
        OBS_STATE: rng.normal(size=(2, 3)).astype(np.float32),
        top: rng.integers(0, 256, (2, 30, 40, 3)).astype(np.uint8),
        wrist: rng.integers(0, 256, (2, 28, 28, 3)).astype(np.uint8),
        ACTION: rng.normal(size=(2, config.chunk_size, 2)).astype(np.float32),
    }
    told = policy.tokenize(rows | {"task": ["go", "stop"]})
    lacks = {f"{wrist}_is_pad": np.array([True, False])}

    @jax.jit
    def run(batch):
        batch = policy.preprocess(batch)
        loss, _ = policy.loss_fn(params, buffers, batch, KEY, reduction="none")
        return loss, policy.sample_actions(params, buffers, batch, KEY)

    whole, mixed = run(told), run(told | lacks)
    without = run({key: value for key, value in told.items() if key != wrist})
    other = run(told | lacks | {wrist: rows[wrist] // 2 + np.array([9, 0], np.uint8)[:, None, None, None]})
    for i, (all_seen, mix, none_seen, changed) in enumerate(zip(whole, mixed, without, other, strict=True)):
        np.testing.assert_allclose(mix[0], none_seen[0], rtol=0, atol=1e-6, err_msg=str(i))
        np.testing.assert_allclose(mix[1], all_seen[1], rtol=0, atol=1e-6, err_msg=str(i))
        np.testing.assert_array_equal(changed[0], mix[0])
        assert (np.abs(mix - none_seen)[1] > 1e-5).any()
        assert (np.abs(changed - mix)[1] > 1e-5).any()


def test_a_policy_trained_on_known_actions_keeps_them(golden: Golden):
    policy = load_policy(golden.path / "model").with_settings(rtc_config=RTCConfig(guidance="trained"))
    batch = policy.preprocess(golden.inputs("obs/0/"))
    chunk, act = policy.config.chunk_size, policy.config.action_feature.shape[0]
    old = jax.random.normal(KEY, (2, chunk, act))
    sample = jax.jit(policy.sample_actions)
    told = {"prev_chunk_left_over": old, "execution_horizon": chunk}
    actions = sample(policy.params, {}, batch, KEY, **told, inference_delay=2)
    np.testing.assert_array_equal(actions[:, :2], old[:, :2])
    plain = sample(policy.params, {}, batch, KEY, **told, inference_delay=0)
    assert not np.allclose(actions[:, 2:], plain[:, 2:], atol=1e-3)
