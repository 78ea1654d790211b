"""Optimizers that keep less: Adafactor, and Adam with moments of fewer bits."""

import dataclasses
import itertools
import json
from pathlib import Path

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import optax
import pytest
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from lerobot_jax import adam, optim, state_dict, train
from lerobot_jax.config import TrainConfig
from lerobot_jax.errors import InputError
from lerobot_jax.optim_config import OptimizerConfig
from lerobot_jax.policies.act import ACTConfig
from lerobot_jax.policies.vqbet import VQBeTConfig
from tests.data.recordings import record
from tests.runs import FEATURES, RECIPE, assert_same_run

# What PyTorch gave: tools/make_optimizer_golden.py
GOLDEN = dict(np.load(Path(__file__).parent / "golden" / "optimizers.npz"))
KINDS = [{"type": "adafactor"}, *({"type": "adamw", "moments_dtype": d} for d in ("bfloat16", "int8"))]


def config(**optimizer) -> TrainConfig:
    policy = dataclasses.replace(ACTConfig.tiny(), optimizer_lr=1e-3, optimizer_lr_backbone=1e-4)
    return TrainConfig(policy=policy, optimizer=OptimizerConfig(**optimizer))


def nested(kind: str) -> dict:
    """Give the recorded start values or gradients as a policy would have them: the layers in a stack."""
    values = {name: GOLDEN[f"{kind}/{name}"] for name in ("matrix", "vector")}
    layers = {name: [GOLDEN[f"{kind}/{name}_{i}"] for i in range(2)] for name in ("layer", "norm")}
    stacked = {name: np.stack(parts, axis=int(kind == "gradient")) for name, parts in layers.items()}
    # A kernel is PyTorch's weight transposed.
    return {"kernel": np.swapaxes(values["matrix"], -1, -2), "v": values["vector"], "s": {"block": stacked}}


@pytest.mark.parametrize("i", range(2))
def test_adafactor_is_pytorchs(i: int, monkeypatch: pytest.MonkeyPatch):
    factors = jnp.asarray(GOLDEN["factors"])
    monkeypatch.setattr(optim, "make_schedule", lambda config: lambda step: factors[step])
    settings = json.loads(str(GOLDEN["adafactor/settings"]))[i]
    params, gradients = nested("start"), nested("gradient")
    optimizer = optim.make_optimizer(config(type="adafactor", grad_clip_norm=0.0, **settings), params)
    state, update = optimizer.init(params), jax.jit(optimizer.update)
    for step in range(len(factors)):
        updates, state = update(jax.tree.map(lambda g, step=step: g[step], gradients), state, params)
        params = optax.apply_updates(params, updates)
        found = {"matrix": params["kernel"].T, "vector": params["v"]}
        for n, name in itertools.product(range(2), ("layer", "norm")):
            found[f"{name}_{n}"] = params["s"]["block"][name][n]
        for name, value in found.items():
            expected = GOLDEN[f"adafactor/{i}/{name}"][step]
            np.testing.assert_allclose(value, expected, rtol=2e-5, atol=1e-7, err_msg=f"{name}, step {step}")


def test_adafactors_rates_are_of_its_own_kind():
    """0.01, and the backbone keeps the ratio to it."""
    names = {"model": {"backbone": {"w": jnp.ones((3, 2))}, "head": {"w": jnp.ones((3, 2))}}}
    optimizer = optim.make_optimizer(config(type="adafactor"), names)
    gradients = jax.tree.map(jnp.ones_like, names)
    updates, _ = optimizer.update(gradients, optimizer.init(names), names)
    np.testing.assert_allclose(updates["model"]["head"]["w"], -0.01 - 0.01 * 1e-4, rtol=1e-5)
    np.testing.assert_allclose(
        updates["model"]["backbone"]["w"], updates["model"]["head"]["w"] / 10, rtol=1e-5
    )
    free = dataclasses.replace(config(), policy=dataclasses.replace(ACTConfig.tiny(), optimizer_lr=0.0))
    with pytest.raises(InputError, match=r"optimizer.type=adafactor: the policy's own learning rate"):
        optim.make_optimizer(dataclasses.replace(free, optimizer=OptimizerConfig("adafactor")), names)
    with pytest.raises(InputError, match=r"optimizer.moments_dtype: adafactor has no such setting"):
        optim.optimizer_settings(config(type="adafactor", moments_dtype="int8"))


PARAMS = {
    "model": {
        "w": np.zeros((64, 512), np.float32),
        "conv": np.zeros((3, 3, 16, 300), np.float32),
        "thin": np.zeros((8192, 1), np.float32),
        "small": np.zeros(4095, np.float32),
        "layers": {"block": {"w": np.zeros((4, 64, 128), np.float32)}},
    }
}
SIZES = {"w": 64 * 512, "conv": 9 * 16 * 300, "layers": 4 * 64 * 128}
SMALL = 8192 + 4095
BYTES = {
    # Two codes of a byte, and two scales of 4 bytes for each row's blocks of at most 256; the rest in float32.
    "int8": 2 * sum(SIZES.values()) + 8 * (64 * 2 + 9 * 16 * 2 + 4 * 64) + 8 * SMALL,
    "bfloat16": 4 * (sum(SIZES.values()) + SMALL),
    "float32": 8 * (sum(SIZES.values()) + SMALL),
    "adafactor": 4 * ((64 + 512) + 9 * (16 + 300) + (8192 + 1) + 4095 + 4 * (64 + 128)),
}


@pytest.mark.parametrize("kind", BYTES)
def test_the_state_is_as_small_as_promised(kind: str):
    settings = {"type": kind} if kind == "adafactor" else {"moments_dtype": kind}
    state = optim.make_optimizer(config(**settings), PARAMS).init(PARAMS)
    sizes = [x.nbytes for x in jax.tree.leaves(state)]
    assert sum(sizes) == BYTES[kind] + 2 * 4  # and two counts


def test_dynamic_numbers_are_those_of_the_paper():
    """From -1 to 1 without -1, and from 0 to 1; the decades have twice as many numbers as those below."""
    for signed, table in zip((True, False), adam.TABLES, strict=True):
        assert len(table) == len(np.unique(table)) == 256
        decades = np.floor(np.log10(table[(table > 0) & (table < 1)])).astype(int)
        assert list(np.bincount(decades + 7)) == [2**i * (1 if signed else 2) for i in range(7)]
    assert adam.SIGNED[0] == pytest.approx(-(1 - 0.9 / 128))
    np.testing.assert_array_equal(adam.SIGNED[1:127], -adam.SIGNED[128:254][::-1])
    assert adam.UNSIGNED[0] == 0


@pytest.mark.parametrize("length", [256, 300, 257, 64])
def test_numbers_become_the_nearest_of_the_table(length: int):
    """Relative to the largest of their block; a second moment never becomes 0, unless it is."""
    rng = np.random.default_rng(0)
    x = (rng.normal(size=(40, length)) * 10 ** rng.uniform(-9, 0, (40, length))).astype(np.float32)
    x[0], x[1, 5] = 0, 0
    for values, table in ((x, adam.SIGNED), (np.square(x), adam.UNSIGNED)):
        kept = jax.jit(adam.quantize, static_argnums=1)(values, Constant(table))
        assert kept.codes.shape == x.shape
        assert kept.codes.dtype == jnp.uint8
        blocks = kept.scales.shape[-1]
        assert blocks == -(-length // 256)
        size = -(-length // blocks)
        scales = np.stack(
            [np.abs(values[:, i * size : (i + 1) * size]).max(1) for i in range(blocks)], axis=1
        )
        np.testing.assert_array_equal(kept.scales, scales)
        scale = scales.repeat(size, axis=1)[:, :length]
        relative = np.divide(values, scale, out=np.zeros_like(values), where=scale > 0)
        nearest = np.abs(relative[..., None].astype(np.float64) - table).argmin(-1)
        expected = np.where((nearest == 0) & (values > 0), 1, nearest) if table[0] == 0 else nearest
        wrong = np.asarray(kept.codes) != expected
        # Both neighbours are equally far, but for float32's rounding.
        ties = np.abs(np.abs(table[kept.codes] - relative) - np.abs(table[expected] - relative))
        assert (ties[wrong] < 1e-7 * np.abs(relative[wrong])).all()
        assert wrong.mean() < 1e-3
        restored = adam.dequantize(kept, table)
        np.testing.assert_allclose(restored, table[kept.codes] * scale, rtol=1e-6)
        np.testing.assert_array_equal(restored[0], 0)


class Constant(np.ndarray):
    """A table that can be a static argument."""

    def __new__(cls, table: np.ndarray):
        return table.view(cls)

    def __hash__(self):
        return hash(self.tobytes())

    def __eq__(self, other):
        return self is other


def test_rounding_at_random_is_right_on_average():
    x = np.float32(1 + 2**-8 * 0.25)  # a quarter of the way between two bfloat16 numbers, 2**-7 apart
    bits = jax.jit(adam._hash, static_argnums=1)(jnp.uint32(7), (1000, 100))
    for part in (bits & 0xFFFF, bits >> 16):
        rounded = np.asarray(adam.round_at_random(jnp.full(bits.shape, x), part))
        assert rounded.dtype == ml_dtypes.bfloat16
        assert set(np.unique(rounded.astype(np.float32))) == {1.0, 1 + 2**-7}
        assert (rounded > 1).mean() == pytest.approx(1 / 8, abs=0.005)
    odd = jnp.array([jnp.nan, jnp.inf, -jnp.inf, 0.0, 1.0, -2.0])
    rounded = adam.round_at_random(odd, jnp.full(6, 0xFFFF, jnp.uint32))
    np.testing.assert_array_equal(rounded.astype(jnp.float32), odd)


def test_bfloat16s_second_moment_falls():
    """After the gradients have become small; rounded to the nearest it would stay as it is."""
    params = {"w": jnp.zeros(4096)}
    rule = adam.scale_by_adam((0.9, 0.999), 1e-8, "bfloat16")
    nearest = jnp.ones((), jnp.bfloat16)

    @jax.jit
    def run(state):
        def body(carry, _):
            state, nearest = carry
            _, state = rule.update({"w": jnp.zeros(4096)}, state)
            return (state, (0.999 * nearest.astype(jnp.float32)).astype(jnp.bfloat16)), None

        return jax.lax.scan(body, (state, nearest), length=700)[0]

    state = rule.init(params)._replace(nu={"w": jnp.ones(4096, jnp.bfloat16)})
    state, nearest = run(state)
    assert nearest == 1
    assert state.nu["w"].astype(jnp.float32).mean() == pytest.approx(0.999**700, rel=0.01)


def random_gradients(step: int) -> dict:
    rng = np.random.default_rng(step)
    return jax.tree.map(lambda x: rng.normal(size=x.shape).astype(np.float32), PARAMS)


def run_steps(optimizer: optax.GradientTransformation, state, num: int = 3):
    update, params = jax.jit(optimizer.update), PARAMS
    for step in range(num):
        updates, state = update(random_gradients(step), state, params)
        params = optax.apply_updates(params, updates)
    return params, state


@pytest.mark.parametrize("settings", KINDS, ids=lambda settings: [*settings.values()][-1])
def test_sharded_states_and_mapped_seeds_give_the_same(settings: dict):
    """As FSDP shards: the largest axis that can be divided, of codes and of scales each."""
    optimizer = optim.make_optimizer(config(**settings), PARAMS)
    expected, end = run_steps(optimizer, optimizer.init(PARAMS))
    mesh = Mesh(np.array(jax.devices()[:4]), ("fsdp",))

    def shard(x):
        axes = sorted(range(x.ndim), key=lambda i: -x.shape[i])
        axis = next((i for i in axes if x.shape[i] % 4 == 0 and x.shape[i] >= 16), None)
        names = ["fsdp" if i == axis else None for i in range(x.ndim)]
        return jax.device_put(x, NamedSharding(mesh, PartitionSpec(*names)))

    found, sharded_end = run_steps(optimizer, jax.tree.map(shard, optimizer.init(PARAMS)))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-7), found, expected)
    if "moments_dtype" in settings:
        same = [
            np.mean(a == b) for a, b in zip(jax.tree.leaves(end), jax.tree.leaves(sharded_end), strict=True)
        ]
        assert min(same) > 0.99  # sums of the global norm round differently

    two = jax.tree.map(lambda x: jnp.stack([x, x]), (optimizer.init(PARAMS), PARAMS))
    gradients = [random_gradients(0), random_gradients(5)]
    updates, _ = jax.jit(jax.vmap(optimizer.update))(
        jax.tree.map(lambda *x: jnp.stack(x), *gradients), two[0], two[1]
    )
    for i, gradient in enumerate(gradients):
        alone, _ = jax.jit(optimizer.update)(gradient, optimizer.init(PARAMS), PARAMS)
        jax.tree.map(
            lambda a, b, i=i: np.testing.assert_allclose(a[i], b, rtol=1e-4, atol=1e-8), updates, alone
        )


@pytest.mark.parametrize("settings", KINDS, ids=lambda settings: [*settings.values()][-1])
def test_parameters_of_another_phase_are_left_alone(settings: dict):
    policy = VQBeTConfig.tiny()
    params = {
        "vqbet": {
            "action_head": {"vqvae_model": {"w": np.ones((64, 64), np.float32)}},
            "policy": {"lm_head": {"kernel": np.ones((64, 64), np.float32)}},
        }
    }
    optimizer = optim.make_optimizer(
        TrainConfig(policy=policy, optimizer=OptimizerConfig(**settings)), params
    )
    state, zeros = optimizer.init(params), jax.tree.map(np.zeros_like, params)
    gradients = {"vqbet": zeros["vqbet"] | {"action_head": params["vqbet"]["action_head"]}}
    updates, new = jax.jit(optimizer.update)(gradients, state, params)
    assert (np.asarray(updates["vqbet"]["action_head"]["vqvae_model"]["w"]) < 0).all()
    np.testing.assert_array_equal(updates["vqbet"]["policy"]["lm_head"]["kernel"], 0)
    moved = [
        any(
            (a != b).any()
            for a, b in zip(*map(jax.tree.leaves, (state[1][phase], new[1][phase])), strict=True)
        )
        for phase in ("0", "1")
    ]
    assert moved == [True, False]


@pytest.fixture(scope="module")
def trained(tmp_path_factory) -> dict[str, tuple[dict[str, np.ndarray], float]]:
    """Weights and last losses of ACT after 60 steps on recorded episodes, by the type of the moments.

    Its matrices have 4096 to 12288 numbers, so that int8 holds for them.
    """
    folder = tmp_path_factory.mktemp("moments")
    root = record(folder / "dataset", lengths=(9, 12, 8, 11), features=FEATURES).root
    recipe = folder / "tiny.py"
    text = RECIPE.format(root=root).replace("dim_model=16", "dim_model=64, dropout=0.0")
    recipe.write_text(
        text.replace("dim_feedforward=16", "dim_feedforward=128").replace(", ema_decay=0.9", "")
    )
    found = {}
    for name in ("start", "float32", "bfloat16", "int8"):
        run = folder / name
        arguments = [f"--config={recipe}", f"--config.output_dir={run}", "--config.save_freq=0"]
        arguments += ["--config.steps=60", "--config.eval_steps=0", "--config.dataset.eval_split=0"]
        more = ["lr=0.0"] if name == "start" else [f"moments_dtype={name}"]
        train.main([*arguments, f"--config.optimizer.{more[0]}"])
        records = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
        losses = [each["loss"] for each in records if "loss" in each]
        found[name] = dict(state_dict.read(run / "checkpoints/last/pretrained_model")), np.mean(losses[-3:])
    return found


@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["bfloat16", "int8"])
def test_training_is_as_with_float32(trained, dtype: str):
    """The loss falls as far, to a percent, and the weights end where they do, to a quarter of the way they went.

    Adam's steps are as long where there is hardly a gradient as anywhere else, and there rounding errors turn them:
    that is most of this distance, and hardly changes the loss. Another seed's weights are twenty ways away.
    """
    (start, first), (weights, loss), (found, other) = trained["start"], trained["float32"], trained[dtype]

    def distance(a: dict, b: dict) -> float:
        return np.sqrt(sum(np.sum(np.square(a[key] - b[key], dtype=np.float64)) for key in a))

    assert loss < first / 10
    assert other - loss == pytest.approx(0, abs=0.01 * (first - loss))
    assert 0 < distance(found, weights) < 0.25 * distance(weights, start)


@pytest.mark.parametrize("settings", KINDS, ids=lambda settings: [*settings.values()][-1])
@pytest.mark.slow
def test_a_resumed_run_is_the_uninterrupted_one(settings: dict, tmp_path: Path):
    """With everything at once: sharded states, micro-batches, averaged weights, layer-wise decay."""
    root = record(tmp_path / "dataset", lengths=(9, 12), features=FEATURES).root
    recipe = tmp_path / "tiny.py"
    recipe.write_text(RECIPE.format(root=root).replace("dim_model=16", "dim_model=64"))
    more = [f"--config.optimizer.{name}={value}" for name, value in settings.items()]
    more += ["--config.eval_steps=0", "--config.dataset.eval_split=0", "--config.optimizer.layer_decay=0.8"]
    more += ["--config.gradient_accumulation_steps=2", "--config.save_freq=4"]
    more += ["--config.mesh.fsdp=2", "--config.mesh.min_shard_size=1024"]
    whole, half = ([f"--config={recipe}", f"--config.output_dir={tmp_path / n}", *more] for n in ("a", "b"))
    train.main([*whole, "--config.steps=8"])
    train.main([*half, "--config.steps=4"])
    train.main([*half, "--config.steps=8", "--config.resume=True"])
    assert_same_run(tmp_path / "a", tmp_path / "b")
