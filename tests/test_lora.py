"""LoRA: which weights get adapters, what stock LeRobot computes with PEFT's, what is trained and exported."""

import dataclasses
import functools
import json
import re
import shutil
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import safetensors.numpy
from flax import nnx
from flax.traverse_util import flatten_dict, unflatten_dict

from lerobot_jax import (
    adapter_folder,
    checkpoint,
    convert,
    lora,
    optim,
    state_dict,
    torch_state,
    train,
    trainable,
    training_data,
)
from lerobot_jax.compilation import compile_quickly
from lerobot_jax.config import TrainConfig, load_config
from lerobot_jax.errors import InputError
from lerobot_jax.nn.attention import MultiheadAttention
from lerobot_jax.nn.linear import Linear
from lerobot_jax.nn.stack import Stack
from lerobot_jax.nn.weights import LoraWeight, ready
from lerobot_jax.peft_targets import PeftConfig, Target, find_targets, lora_settings
from lerobot_jax.policies.base import FunctionalPolicy, config_class, load_policy, policy_class
from lerobot_jax.policies.config import ParamGroup
from tests.data.recordings import record
from tests.goldens import ROOT, Golden
from tests.runs import FEATURES, RECIPE, assert_same_run, final_arrays
from tests.test_golden import draws, initial_weights

pytestmark = pytest.mark.usefixtures("stand_ins")

KEY = jax.random.key(0)
SLOW = ("act_camera", "diffusion", "multi_task_dit", "vqbet")
ADAPTERS = [
    pytest.param(path.name, marks=[pytest.mark.slow] * (path.name in SLOW))
    for path in sorted((ROOT / "peft").iterdir())
]


class Recorded:
    """A recorded policy with what stock LeRobot computed with adapters on it; dropout is off."""

    def __init__(self, name: str, tmp_path: Path):
        self.folder = tmp_path / name
        shutil.copytree(ROOT / "peft" / name, self.folder)
        settings = json.loads((self.folder / "adapter_config.json").read_text())
        source = ROOT.parents[1] / settings["base_model_name_or_path"]
        self.golden = Golden(source.parent)
        base = tmp_path / "base"
        shutil.copytree(source, base)
        if not (base / state_dict.MODEL_NAME).exists():
            state_dict.write(initial_weights(self.golden.path), base / state_dict.MODEL_NAME)
        settings["base_model_name_or_path"] = str(base)
        (self.folder / "adapter_config.json").write_text(json.dumps(settings))
        for path in base.glob("policy_*"):
            shutil.copy(path, self.folder)
        self.expected = safetensors.numpy.load_file(self.folder / "expected.safetensors")

    @functools.cached_property
    def policy(self) -> FunctionalPolicy:
        policy = load_policy(self.folder, merge_adapters=False)
        rates = [field.name for field in dataclasses.fields(policy.config) if "dropout" in field.name]
        config = dataclasses.replace(policy.config, **dict.fromkeys(rates, 0.0))
        return load_policy(self.folder, config=config, merge_adapters=False)

    def stored(self, params: dict[str, Any], folder: Path) -> dict[str, np.ndarray]:
        """Give arrays in the place of the parameters under the names that PEFT's file has."""
        module = self.policy.module
        adapters = adapter_folder.read(self.folder, module)
        plan = lora.Lora.of(module, adapters.settings, adapters.targets)
        adapter_folder.write(folder, module, plan, params, self.policy.buffers)
        return safetensors.numpy.load_file(folder / "adapter_model.safetensors")


@pytest.fixture(params=ADAPTERS)
def recorded(request: pytest.FixtureRequest, tmp_path: Path) -> Recorded:
    return Recorded(request.param, tmp_path)


def test_loss_gradients_and_updates_are_stock_s(recorded: Recorded, tmp_path: Path):
    policy, golden, expected = recorded.policy, recorded.golden, recorded.expected
    config = TrainConfig(policy=policy.config, steps=10)
    settings = adapter_folder.read_settings(recorded.folder)
    trained, frozen = trainable.split(config, policy.params, lora.whole_paths(policy.module, settings))
    batch = policy.preprocess(golden.inputs("raw/"))

    def loss_of(trained, given):
        params = trainable.combine(trained, frozen)
        return policy.loss_fn(params, policy.buffers, batch, KEY, train=True, **given)

    value_and_grad = jax.jit(jax.value_and_grad(loss_of, has_aux=True))
    (loss, _), gradients = value_and_grad(trained, draws(golden, "loss_train"))
    np.testing.assert_allclose(loss, expected["loss"], rtol=1e-5)
    in_place = trainable.combine(gradients, frozen)
    found = recorded.stored(in_place, tmp_path / "gradients")
    wanted = {k.removeprefix("grad/"): v for k, v in expected.items() if k.startswith("grad/")}
    assert found.keys() <= wanted.keys()
    scale = max(np.abs(value).max() for value in wanted.values())
    for key, value in wanted.items():
        if key in found:
            np.testing.assert_allclose(found[key], value, rtol=0, atol=1e-4 * scale, err_msg=key)
        else:  # of a module that the policy never trains
            assert not value.any(), key
    if "step_loss" not in expected:
        return
    base_lr = optim.optimizer_settings(config)["lr"]
    optimizer = optim.make_optimizer(config, trained)
    opt_state, losses, norms = optimizer.init(trained), [], []
    num = len(expected["step_loss"])
    for step in range(num):
        (loss, _), gradients = value_and_grad(trained, draws(golden, "train_steps", step, num))
        updates, opt_state = optimizer.update(gradients, opt_state, trained)
        trained = optax.apply_updates(trained, updates)
        losses.append(loss)
        norms.append(optax.tree.norm(gradients))
    np.testing.assert_allclose(losses, expected["step_loss"], rtol=1e-4)
    np.testing.assert_allclose(norms, expected["step_norm"], rtol=1e-3)
    after = recorded.stored(trainable.combine(trained, frozen), tmp_path / "after")
    # Adam makes whole steps of gradients that are rounding noise.
    farthest = (
        2 * num * max(group.lr or 0 for group in (*policy.config.param_groups, ParamGroup("", base_lr)))
    )
    for key, value in after.items():
        is_noise = np.abs(wanted[key]) < 1e-4 * scale
        limit = 1e-4 * np.abs(value).max() + farthest * is_noise
        assert (np.abs(value - expected[f"after/{key}"]) <= limit).all(), key


def test_actions_are_stock_s_merged_or_not(recorded: Recorded):
    policy, golden = recorded.policy, recorded.golden
    if "action" not in recorded.expected:
        pytest.skip("LeRobot's policy gives chunks to its own queue only")
    windows = policy.config.observation_delta_indices is not None
    inputs = policy.preprocess(golden.inputs("raw/" if windows else "obs/0/"))
    sample = jax.jit(policy.sample_actions)
    expected, given = recorded.expected["action"], draws(golden, "chunk")
    for params in (policy.params, lora.merged(policy.params)):
        actions = sample(params, policy.buffers, inputs, KEY, **given)
        np.testing.assert_allclose(actions, expected, rtol=0, atol=1e-4 * np.abs(expected).max())


def test_a_folder_of_adapters_is_converted_to_a_policy(tmp_path: Path):
    folder = Recorded("act", tmp_path).folder
    convert.main(["from-torch", str(folder), f"--output_dir={tmp_path / 'whole'}"])
    whole, adapted = load_policy(tmp_path / "whole"), load_policy(folder)
    assert not whole.config.use_peft
    jax.tree.map(np.testing.assert_array_equal, whole.params, adapted.params)


# Which weights


def targets_of(policy: str, **settings: Any) -> list[str]:
    config = config_class(policy).tiny()
    module = nnx.eval_shape(lambda: policy_class(policy)(config, rngs=nnx.Rngs(params=0)))
    chosen = lora_settings(PeftConfig(**settings), config)
    return [target.name for target in find_targets(module, chosen)]


def test_targets_are_chosen_as_peft_does():
    assert targets_of("act", target_modules=r".*\.encoder\.layers\.0\.linear1") == [
        "model.encoder.layers.0.linear1"
    ]
    attention = "model.encoder.layers.0.self_attn"
    found = targets_of("act", target_modules=r"model\.encoder\..*self_attn")
    assert found == [attention, f"{attention}.base_layer.out_proj"]
    assert set(found) < set(targets_of("act", target_modules=("self_attn", "no such name")))
    assert "model.action_head" in targets_of("act", target_modules="all-linear")
    whole = ("action_head",)
    assert "model.action_head" not in targets_of(
        "act", target_modules="all-linear", full_training_modules=whole
    )
    for policy in ("act", "diffusion", "vqbet"):
        for preset in config_class(policy).tiny().peft_presets:
            assert targets_of(policy, target_modules=preset)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({}, "a act policy has no default; give .* all-linear, transformer, vision_encoder"),
        ({"target_modules": "linear1"}, "linear1 matches no module that is trained; near are linear1"),
        ({"target_modules": r"model\.decodr\.layers\.0\.linear1"}, r"near are model\.decoder\.layers"),
        ({"target_modules": ("norm1",)}, "'model.decoder.layers.0.norm1' is a LayerNorm; adapters are for"),
        ({"target_modules": ("out_proj",)}, "PyTorch's attention does not call it; name the attention"),
        ({"target_modules": ("decoder_pos_embed",)}, "PyTorch's policy reads its weight past it"),
        ({"target_modules": "("}, "peft.target_modules is no regular expression"),
        ({"method_type": "DORA"}, "only LORA is supported"),
        ({"init_type": "pissa"}, "None and gaussian are supported, not 'pissa'"),
        ({"r": 0}, "must be positive"),
    ],
)
def test_what_cannot_be_adapted_is_refused(settings: dict[str, Any], message: str):
    with pytest.raises(ValueError, match=message):
        targets_of("act", **settings)


def test_adapters_begin_as_peft_s():
    linear, conv = ("a", "kernel"), ("b", "kernel")
    table, packed = ("c", "embedding"), ("d", "in_proj_weight")
    params = unflatten_dict(
        {linear: jnp.zeros((64, 90)), conv: jnp.zeros((3, 3, 20, 30)), table: jnp.zeros((50, 70))}
        | {packed: jnp.zeros((3, 120, 40))}
    )
    kinds = {linear: nnx.Linear, conv: nnx.Conv, table: nnx.Embed}
    targets = [Target(path[0], path, None, kind, 16, 0.5) for path, kind in kinds.items()]
    targets += [Target("d.1", packed, 1, MultiheadAttention, 16, 0.25)]
    for init in (True, "gaussian"):
        found = flatten_dict(lora.attach(tuple(targets), params, KEY, init))
        random = {
            linear: (found[linear].left, 64),
            conv: (found[conv].left, 180),
            packed: (found[packed].right[1], 40),
        }
        for values, fan_in in random.values():
            if init is True:
                bound = 1 / np.sqrt(fan_in)
                assert bound * 0.97 < np.abs(values).max() <= bound
            else:
                np.testing.assert_allclose(np.std(values), 1 / 16, rtol=0.1)
        np.testing.assert_allclose(np.std(found[table].right), 1, rtol=0.1)
        assert not found[table].left.any()
        assert not found[linear].right.any()
        assert found[packed].scale.tolist() == [0, 0.25, 0]
        for path, weight in found.items():
            np.testing.assert_array_equal(weight.merge(), flatten_dict(params)[path])


def test_a_layer_of_a_stack_can_have_adapters_alone():
    stack = Stack(lambda rngs: Linear(4, 4, rngs=rngs), 3, rngs=nnx.Rngs(params=0))
    graphdef, state = nnx.split(stack, nnx.Param)
    params = nnx.to_pure_dict(state)
    rng = np.random.default_rng(0)
    factors = {
        Target("1", ("block", "kernel"), 1, nnx.Linear, 2, 0.5): rng.normal(size=(2, 4, 4)),
        Target("2", ("block", "kernel"), 2, nnx.Linear, 1, 3.0): rng.normal(size=(2, 4, 4)),
    }
    factors = {t: (f[0][:, : t.r], f[1][: t.r]) for t, f in factors.items()}
    adapted = lora.with_factors(factors, params)
    plain = np.array(params["block"]["kernel"])
    for target, (left, right) in factors.items():
        plain[target.layer] += target.scale * left @ right
    np.testing.assert_allclose(lora.merged(adapted)["block"]["kernel"], plain, rtol=1e-6)

    @jax.jit
    def apply(params, x):
        return nnx.merge(graphdef, nnx.State(params))(x)

    x = jnp.ones((2, 4))
    np.testing.assert_allclose(apply(adapted, x), apply(lora.merged(adapted), x), rtol=1e-5)
    gradient = jax.grad(lambda params: apply(params, x).sum())(adapted)["block"]["kernel"]
    assert gradient.left[1].any()
    assert not gradient.left[0].any()
    assert not gradient.left[2, :, 1].any()  # beyond the rank of that layer


def test_a_list_named_block_is_no_stack():
    weight = LoraWeight(jnp.zeros((3, 2)), jnp.ones((3, 1)), jnp.ones((1, 2)), jnp.float32(0.5))
    ready_weights = ready(
        {"conv1": {"block": {0: {"kernel": weight}}}, "stack": {"block": {"kernel": weight}}}, {}
    )
    np.testing.assert_array_equal(ready_weights["conv1"]["block"][0]["kernel"], np.full((3, 2), 0.5))
    assert ready_weights["stack"]["block"]["kernel"] is weight  # left to the stack


# Training


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return record(tmp_path_factory.mktemp("data") / "dataset", lengths=(9, 12, 8, 11), features=FEATURES).root


@pytest.fixture(scope="module")
def base(root: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A policy to fine-tune."""
    folder = tmp_path_factory.mktemp("base")
    (folder / "tiny.py").write_text(RECIPE.format(root=root))
    config = load_config([f"--config={folder / 'tiny.py'}"])
    (policy,) = training_data.build_policies(config, training_data.open_sources(config))
    params, buffers = compile_quickly(policy.init, KEY)(KEY)
    rng = np.random.default_rng(0)  # a new policy has zeros that leave some weights without gradient
    params = jax.tree.map(lambda x: x + rng.normal(0, 0.02, x.shape).astype(np.float32), params)
    policy.replace(params=params, buffers=buffers).save_pretrained(folder / "policy")
    return folder / "policy"


@pytest.fixture
def arguments(root: Path, base: Path, tmp_path: Path) -> list[str]:
    recipe = tmp_path / "tiny.py"
    recipe.write_text(RECIPE.format(root=root))
    return [
        f"--config={recipe}",
        f"--config.output_dir={tmp_path / 'run'}",
        f"--config.policy.pretrained_path={base}",
        "--config.gradient_accumulation_steps=2",
    ]


PEFT = [
    "--config.peft.r=3",
    "--config.peft.target_modules",
    "self_attn",
    "linear1",
    "--config.peft.full_training_modules",
    "action_head",
]


def weights(folder: Path) -> dict[str, np.ndarray]:
    return safetensors.numpy.load_file(folder / "model.safetensors")


def test_a_run_trains_adapters_and_exports_them_merged_and_alone(
    arguments: list[str], base: Path, tmp_path: Path
):
    train.main([*arguments, *PEFT])
    last = tmp_path / "run/checkpoints/last"
    before, after = weights(base), weights(last / "pretrained_model")
    names = {name for name in before if not np.array_equal(before[name], after[name])}
    adapted = {
        name for name in before if re.search(r"self_attn\.(in_proj_|out_proj\.)weight|linear1\.weight", name)
    }
    assert names == adapted | {"model.action_head.weight", "model.action_head.bias"}
    for name in adapted:
        assert np.linalg.matrix_rank(after[name] - before[name], tol=1e-5) <= 3, name
    # Read back, the adapters give the policy that was exported, bit for bit.
    assert not json.loads((last / "pretrained_model/config.json").read_text())["use_peft"]
    assert json.loads((last / "adapter/config.json").read_text())["use_peft"]
    policy = load_policy(last / "adapter")
    found = torch_state.to_torch(policy.module, policy.params, policy.buffers)
    for name, value in after.items():
        np.testing.assert_array_equal(found[name], value, err_msg=name)
    # Resumed, it is the same run.
    first = [*arguments, *PEFT, f"--config.output_dir={tmp_path / 'resumed'}"]
    train.main([*first, "--config.steps=10"])
    train.main([*first, "--config.resume=True"])
    assert_same_run(tmp_path / "run", tmp_path / "resumed")
    # The state has no more than what is trained, and gives the weights of the last step too.
    state = final_arrays(tmp_path / "run")
    moments = {name for name in state if name.startswith("['opt_state']") and "linear2" in name}
    assert not moments
    averaged = checkpoint.restore_weights(policy, last / "training_state", "ema")
    for path, value in flatten_dict(averaged.params).items():
        np.testing.assert_array_equal(value, flatten_dict(policy.params)[path], err_msg=str(path))


def test_adapters_are_trained_on(arguments: list[str], base: Path, tmp_path: Path):
    train.main([*arguments, *PEFT, "--config.steps=2"])
    adapter = tmp_path / "run/checkpoints/last/adapter"
    later = [f"--config.output_dir={tmp_path / 'later'}", f"--config.policy.pretrained_path={adapter}"]
    later = [arguments[0], *later, "--config.steps=2"]
    with pytest.raises(InputError, match=r"has adapters already, .* leave peft out"):
        train.main([*later, "--config.peft.r=3"])
    train.main(later)
    again = tmp_path / "later/checkpoints/last"
    first, second = (
        safetensors.numpy.load_file(folder / "adapter_model.safetensors")
        for folder in (adapter, again / "adapter")
    )
    assert first.keys() == second.keys()
    assert all(not np.array_equal(first[key], second[key]) for key in first)
    settings = [json.loads((f / "adapter_config.json").read_text()) for f in (adapter, again / "adapter")]
    assert settings[0] == settings[1]
    merged = weights(again / "pretrained_model")
    policy = load_policy(again / "adapter")
    found = torch_state.to_torch(policy.module, policy.params, policy.buffers)
    assert all(np.array_equal(found[name], value) for name, value in merged.items())
    with pytest.raises(InputError, match=r"give one with policy\.pretrained_path"):
        train.main([arguments[0], f"--config.output_dir={tmp_path / 'x'}", *PEFT])


def test_the_base_is_kept_in_bfloat16_where_layers_cast_to_it(
    arguments: list[str], base: Path, tmp_path: Path
):
    half = [*arguments, *PEFT, "--config.steps=1", "--config.ema_decay=None", "--config.policy.use_amp=True"]
    train.main([*half, "--config.optimizer.layer_decay=0.5"])
    last = tmp_path / "run/checkpoints/last"
    state = final_arrays(tmp_path / "run")
    layers = "['frozen']['model']['encoder']['layers']['0']"
    half = {
        f"{layers}['linear1']['kernel']['base']",
        f"{layers}['linear2']['kernel']",
        f"{layers}['self_attn']['in_proj_weight']['base']",
        f"{layers}['self_attn']['out_proj']['kernel']['base']",
    }
    assert {name for name in state if name.startswith(layers) and state[name].dtype == jnp.bfloat16} == half
    assert all(value.dtype != jnp.bfloat16 for name, value in state.items() if "'frozen'" not in name)
    before, after = weights(base), weights(last / "pretrained_model")
    name = "model.encoder.layers.0.linear2.weight"
    np.testing.assert_array_equal(after[name], before[name].astype(jnp.bfloat16).astype(np.float32))
    assert {value.dtype for value in after.values()} == {np.dtype(np.float32)}


@pytest.mark.slow
@pytest.mark.parametrize("options", [["--config.mesh.fsdp=4"], ["--config.num_seeds=2"]], ids="".join)
def test_devices_and_seeds_change_nothing(options: list[str], arguments: list[str], tmp_path: Path):
    common = [*arguments, *PEFT, "--config.steps=3", "--config.mesh.min_shard_size=16"]
    train.main(common)
    train.main([*common, f"--config.output_dir={tmp_path / 'other'}", *options])
    other = tmp_path / "other" / ("seed_1000" if "num_seeds" in options[0] else "")
    found, expected = (
        safetensors.numpy.load_file(run / "checkpoints/last/adapter/adapter_model.safetensors")
        for run in (other, tmp_path / "run")
    )
    for key, value in expected.items():
        np.testing.assert_allclose(found[key], value, rtol=0, atol=2e-5, err_msg=key)
