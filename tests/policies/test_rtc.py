import dataclasses
import functools
import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy

from lerobot_jax.errors import InputError
from lerobot_jax.policies import base
from lerobot_jax.policies.action_prefix import (
    draw_delays,
    is_known,
    loss_weights,
    times_of_actions,
    with_prefix,
)
from lerobot_jax.policies.rtc import RTCConfig, euler, guidance_weight, guided_velocity, prefix_weights
from tests.goldens import Golden
from tests.policies.flow_policy import Config
from tests.recorded_sizes import use_sizes

GOLDENS = Path(__file__).parent / "golden/rtc"
# What the recorded policies' config.json say.
CONFIGS = {
    "pi0_linear_s0": RTCConfig(execution_horizon=6),
    "pi05_exp_s0": RTCConfig(prefix_attention_schedule="EXP", execution_horizon=5, max_guidance_weight=2.0),
}


def recorded(name: str, prefix: str) -> dict[str, jax.Array]:
    arrays = safetensors.numpy.load_file(GOLDENS / name / "expected.safetensors")
    return {key.removeprefix(prefix): jnp.asarray(x) for key, x in arrays.items() if key.startswith(prefix)}


def toy_denoiser(scale: float = 0.3) -> Callable[..., jax.Array]:
    """A nonlinear one that mixes steps and dimensions and knows the time, of each sample or each action."""
    rng = np.random.default_rng(1)
    steps, dims = (jnp.asarray(rng.normal(size=(n, n)) * scale, jnp.float32) for n in (8, 5))

    def denoise(x: jax.Array, time: jax.Array) -> jax.Array:
        time = time[:, None, None] if time.ndim == 1 else time[..., None]
        return jnp.tanh(jnp.einsum("st,btd,de->bse", steps, x, dims) + time)

    return denoise


def draw(*shape: int, seed: int = 0) -> jax.Array:
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape), jnp.float32)


@pytest.mark.parametrize("traced", [False, True])
def test_prefix_weights_are_lerobots(traced: bool):
    weigh = jax.jit(prefix_weights, static_argnums=(0, 3)) if traced else prefix_weights
    cases = recorded("pi0_linear_s0", "weights/")
    assert len(cases) == 32
    for name, expected in cases.items():
        schedule, *numbers = name.split("_")
        found = weigh(schedule, *map(int, numbers))
        np.testing.assert_allclose(found, expected, rtol=2e-7, atol=1e-7, err_msg=name)


@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize("time", [1.0, 0.75, 0.5, 0.1])
def test_the_guided_velocity_is_lerobots(name: str, time: float):
    """With an old chunk of fewer steps and dimensions than the new one."""
    case, config = recorded(name, "denoise/"), CONFIGS[name]
    found = guided_velocity(
        config, lambda x: jnp.tanh(x @ case["w"]), case["x"], time, case["prev"], 2, config.execution_horizon
    )
    np.testing.assert_allclose(found, case[f"v_{time}"], rtol=1e-5, atol=2e-6)


@pytest.fixture(params=CONFIGS)
def golden(request, monkeypatch: pytest.MonkeyPatch) -> Iterator[Golden]:
    golden = Golden(GOLDENS / request.param)
    use_sizes(golden.meta["arch"], monkeypatch)
    yield golden
    base._module.cache_clear()


# Delay, and the horizon if it is not the config's.
CHUNKS = {"first": (0, None), "guided": (2, None), "guided_short": (1, None), "guided_horizon": (3, 4)}


@pytest.mark.usefixtures("stand_ins")
def test_guided_chunks_are_lerobots(golden: Golden, tmp_path: Path):
    """As the runner has them predicted: by one program, with what is left of the old chunk padded."""
    shutil.copytree(golden.path / "model", tmp_path / "model")
    policy, config = base.load_policy(tmp_path / "model"), CONFIGS[golden.path.name]
    assert policy.config.rtc_config == config  # pyright: ignore[reportAttributeAccessIssue]
    assert json.loads((tmp_path / "model/config.json").read_text()) == policy.config.to_dict()
    inputs = policy.preprocess(golden.inputs("obs/0/"))
    sample = jax.jit(functools.partial(policy.sample_actions, policy.params, policy.buffers))

    def check(case: str, left: np.ndarray, delay: int, horizon: int | None) -> None:
        (noise,) = map(jnp.asarray, golden.draws(case))
        old = {"prev_chunk_left_over": left, "inference_delay": delay, "execution_horizon": horizon}
        found = sample(inputs, jax.random.key(0), noise=noise, **old)
        key = f"{case}/action"
        np.testing.assert_allclose(found, golden.expected[key], 0, golden.tolerance(key), err_msg=case)

    for case, (delay, horizon) in CHUNKS.items():
        left = golden.expected.get(f"{case}/prev_chunk_left_over", np.zeros((2, 0, 4), np.float32))
        padded = np.pad(left, ((0, 0), (0, 8 - left.shape[1]), (0, 0)))
        check(case, padded, delay, min(horizon or config.execution_horizon, left.shape[1]))
    assert sample._cache_size() == 1  # pyright: ignore[reportAttributeAccessIssue]
    check(
        "guided_short", golden.expected["guided_short/prev_chunk_left_over"], 1, None
    )  # as LeRobot calls it


def test_guidance_weights_at_the_ends_of_time():
    """At first, infinite ones are cut; at the end, 0 times infinity is 0."""
    assert guidance_weight(10.0, 1.0) == 10.0
    assert guidance_weight(10.0, 0.0) == 0.0
    np.testing.assert_allclose(guidance_weight(10.0, 0.5), 2.0)
    np.testing.assert_allclose(guidance_weight(1.5, 0.5), 1.5)


def test_the_papers_guidance_goes_through_the_jacobian():
    """Against v - weight * J^T error with the Jacobian of x - time * v(x) in full."""
    config = RTCConfig(guidance="vjp", execution_horizon=6)
    x, old, time = draw(1, 8, 5), draw(1, 8, 5, seed=2), 0.6
    denoise = lambda x: toy_denoiser()(x, jnp.full(1, time))  # noqa: E731
    found = guided_velocity(config, denoise, x, time, old, 2, 6)
    actions = lambda flat: flat - time * denoise(flat.reshape(x.shape)).ravel()  # noqa: E731
    error = (old.ravel() - actions(x.ravel())) * jnp.repeat(prefix_weights("LINEAR", 2, 6, 8), 5)
    tau = 1 - time
    weight = min((1 - tau) / tau * ((1 - tau) ** 2 + tau**2) / (1 - tau) ** 2, 10.0)
    pulled = jax.jacobian(actions)(x.ravel()).T @ error
    expected = denoise(x) - weight * pulled.reshape(x.shape)
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-5)
    plain = guided_velocity(dataclasses.replace(config, guidance="lerobot"), denoise, x, time, old, 2, 6)
    assert np.abs(found - plain).max() > 0.1


@pytest.mark.parametrize("guidance", ["lerobot", "vjp", "trained"])
def test_one_program_serves_all_delays_and_first_chunks(guidance):
    config = RTCConfig(guidance=guidance, execution_horizon=4)
    noise, old = draw(2, 8, 5), draw(2, 8, 5, seed=2)
    sample = lambda delay, horizon: euler(  # noqa: E731
        toy_denoiser(),
        noise,
        5,
        config=config,
        prev_chunk_left_over=old,
        inference_delay=delay,
        execution_horizon=horizon,
    )
    compiled = jax.jit(sample)
    for delay, horizon in ((0, 4), (2, 6), (3, 3)):
        np.testing.assert_allclose(compiled(delay, horizon), sample(delay, horizon), rtol=1e-5, atol=1e-5)
    assert compiled._cache_size() == 1  # pyright: ignore
    free = euler(toy_denoiser(), noise, 5)
    np.testing.assert_allclose(compiled(3, 0), free, rtol=1e-5, atol=1e-5)
    error, free_error = (np.abs(x - old)[:, :2].mean() for x in (compiled(2, 4), free))
    assert error < 0.5 * free_error


def test_euler_without_an_old_chunk_is_plain():
    """x <- x - v(x, 1 - i / n) / n."""
    denoise, expected = toy_denoiser(), draw(2, 8, 5)
    for time in (1.0, 0.75, 0.5, 0.25):
        expected = expected - denoise(expected, jnp.full(2, time)) / 4
    for settings in ({}, {"config": RTCConfig()}):
        np.testing.assert_allclose(
            euler(denoise, draw(2, 8, 5), 4, **settings), expected, rtol=1e-5, atol=1e-6
        )
    off = {"config": RTCConfig(enabled=False), "prev_chunk_left_over": draw(2, 3, 5)}
    np.testing.assert_allclose(euler(denoise, draw(2, 8, 5), 4, **off), expected, rtol=1e-5, atol=1e-6)


def test_a_trained_policy_goes_on_from_the_old_chunk():
    """The old actions stay as they are, and the policy sees them at time 0 beside the others."""
    seen = []

    def denoise(x, time):
        jax.debug.callback(lambda *arrays: seen.append(arrays), x, time, ordered=True)
        return toy_denoiser()(x, time)

    old = draw(2, 4, 3, seed=2)  # fewer steps and dimensions than the new one
    found = euler(
        denoise,
        draw(2, 8, 5),
        4,
        config=RTCConfig(guidance="trained"),
        prev_chunk_left_over=old,
        inference_delay=2,
    )
    jax.effects_barrier()
    full = np.pad(old, ((0, 0), (0, 4), (0, 2)))
    np.testing.assert_array_equal(found[:, :2], full[:, :2])
    assert len(seen) == 4
    for step, (x, time) in enumerate(seen):
        np.testing.assert_array_equal(x[:, :2], full[:, :2])
        np.testing.assert_array_equal(time, [[0, 0] + [1 - step / 4] * 6] * 2)


def test_wrong_arguments_are_named():
    noise = draw(2, 8, 5)
    for old in (draw(2, 9, 5), draw(2, 8, 6)):
        with pytest.raises(ValueError, match=r"prev_chunk_left_over has . x . actions, a chunk has 8 x 5"):
            euler(toy_denoiser(), noise, 2, config=RTCConfig(), prev_chunk_left_over=old, inference_delay=1)
    with pytest.raises(ValueError, match="prev_chunk_left_over needs inference_delay"):
        euler(toy_denoiser(), noise, 2, config=RTCConfig(), prev_chunk_left_over=noise)
    for name, value in (("max_guidance_weight", 0.0), ("debug_maxlen", 0), ("execution_horizon", -1)):
        with pytest.raises(ValueError, match=f"rtc_config.{name} must"):
            RTCConfig(**{name: value})


def test_rtc_settings_in_config_json(tmp_path: Path):
    """LeRobot's, and null where there are none; ours are in train_config.json only."""
    config = dataclasses.replace(Config.tiny(), rtc_config=RTCConfig(guidance="vjp"), rtc_training_delay=3)
    data = json.loads((GOLDENS / "pi0_linear_s0/model/config.json").read_text())["rtc_config"]
    assert config.to_dict()["rtc_config"] == data | {"execution_horizon": 10}
    assert "rtc_training_delay" not in config.to_dict()
    whole = json.loads(json.dumps(config.to_dict() | config.own_settings()))
    assert whole["rtc_config"]["guidance"] == "vjp"
    assert Config.from_dict(whole) == config
    read = Config.from_dict(config.to_dict() | {"rtc_config": data}).rtc_config
    assert read == RTCConfig(execution_horizon=6)
    assert Config.from_dict(Config.tiny().to_dict()).rtc_config is None
    for wrong, message in (
        ({"horizon": 3}, "config.json, a policy of type .*: rtc_config: unknown setting 'horizon'"),
        ({"prefix_attention_schedule": "LINEAL"}, "rtc_config: prefix_attention_schedule must be of type"),
        ({"debug_maxlen": 0}, "rtc_config.debug_maxlen must be positive, not 0"),
        (3, "rtc_config must be of type"),
    ):
        with pytest.raises(InputError, match=message):
            Config.from_dict(config.to_dict() | {"rtc_config": wrong})


def test_delays_of_training():
    """All from 0 to the greatest, equally often."""
    delays = np.asarray(draw_delays(jax.random.key(0), 5000, 4))
    counts = np.bincount(delays)
    assert len(counts) == 5
    assert np.abs(counts / 5000 - 0.2).max() < 0.02
    assert (np.asarray(draw_delays(jax.random.key(0), 8, 0)) == 0).all()


def test_known_actions_have_no_noise_and_no_loss():
    delays, time = jnp.array([0, 2]), jnp.array([0.25, 0.5])
    np.testing.assert_array_equal(times_of_actions(time, delays, 4), [[0.25] * 4, [0, 0, 0.5, 0.5]])
    np.testing.assert_array_equal(is_known(delays, 4), [[False] * 4, [True, True, False, False]])
    np.testing.assert_array_equal(loss_weights(delays, 4), [[1, 1, 1, 1], [0, 0, 2, 2]])
    found = with_prefix(jnp.ones((2, 4, 1)), jnp.zeros((2, 4, 1)), delays)
    np.testing.assert_array_equal(found[..., 0], [[0, 0, 0, 0], [1, 1, 0, 0]])


def test_training_with_delays_teaches_to_go_on():
    """Chunks are lines from a random start; only who is told the first actions can know the others.

    The velocity is linear in the actions and the time, and the toy learns it by gradient descent on the loss that
    `action_prefix` specifies; it then samples a chunk that goes on where the old one is.
    """
    chunk, delay = 4, 2

    def denoise(params, x, time):
        seen = jnp.concatenate([x[..., 0], x[..., 0] * time, time], axis=1)  # b 3*chunk
        hidden = jnp.tanh(seen @ params["w1"] + params["b1"][None])
        return (hidden @ params["w2"])[..., None]

    def loss(params, key):
        keys = jax.random.split(key, 4)
        start = jax.random.normal(keys[0], (256, 1, 1))
        actions = jnp.broadcast_to(start, (256, chunk, 1))
        noise, time = jax.random.normal(keys[1], actions.shape), jax.random.uniform(keys[2], (256,))
        delays = draw_delays(keys[3], 256, delay)
        times = times_of_actions(time, delays, chunk)
        x_t = times[..., None] * noise + (1 - times[..., None]) * actions
        losses = (denoise(params, x_t, times) - (noise - actions)) ** 2
        return (losses * loss_weights(delays, chunk)[..., None]).mean()

    sizes = {"w1": (3 * chunk, 64), "b1": (64,), "w2": (64, chunk)}
    params = {name: 0.3 * draw(*shape, seed=i) for i, (name, shape) in enumerate(sizes.items())}

    @jax.jit
    def train(params):
        def update(state, key):
            params, speed = state
            gradient = jax.grad(loss)(params, key)
            speed = jax.tree.map(lambda v, g: 0.9 * v + g, speed, gradient)
            return (jax.tree.map(lambda p, v: p - 0.02 * v, params, speed), speed), None

        keys = jax.random.split(jax.random.key(1), 2000)
        return jax.lax.scan(update, (params, jax.tree.map(jnp.zeros_like, params)), keys)[0][0]

    params = train(params)
    old = jnp.broadcast_to(jnp.linspace(-1.5, 1.5, 16)[:, None, None], (16, chunk, 1))
    found = euler(
        lambda x, time: denoise(params, x, jnp.broadcast_to(time.reshape(16, -1), (16, chunk))),
        draw(16, chunk, 1),
        10,
        config=RTCConfig(guidance="trained"),
        prev_chunk_left_over=old,
        inference_delay=delay,
    )
    assert np.abs(found - old)[:, delay:].mean() < 0.25
