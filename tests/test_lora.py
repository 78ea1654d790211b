"""LoRA: which weights get adapters, what stock LeRobot computes with PEFT's, what is trained and exported."""

import dataclasses
import functools
import json
import shutil
from pathlib import Path
from typing import Any

import jax
import numpy as np
import optax
import pytest
import safetensors.numpy
from flax.traverse_util import flatten_dict, unflatten_dict

from lerobot_jax import adapter_folder, lora, optim, state_dict
from lerobot_jax.config import TrainConfig
from lerobot_jax.policies.base import FunctionalPolicy, load_policy
from lerobot_jax.policies.config import ParamGroup
from tests.goldens import ROOT, Golden
from tests.test_golden import draws, initial_weights

pytestmark = pytest.mark.usefixtures("stand_ins")

KEY = jax.random.key(0)
ADAPTERS = sorted(path.name for path in (ROOT / "peft").iterdir())


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


def split(policy: FunctionalPolicy, settings: dict[str, Any]) -> tuple[Any, Any]:
    whole = lora.whole_paths(policy.module, settings)
    arrays = flatten_dict(lora.as_dicts(policy.params))
    parts = [{}, {}]
    for path, x in arrays.items():
        parts[not lora.is_trained(path, whole)][path] = x
    return unflatten_dict(parts[0]), unflatten_dict(parts[1])


def combine(trained: Any, frozen: Any) -> Any:
    return lora.from_dicts(unflatten_dict(flatten_dict(trained) | flatten_dict(frozen)))


def test_loss_gradients_and_updates_are_stock_s(recorded: Recorded, tmp_path: Path):
    policy, golden, expected = recorded.policy, recorded.golden, recorded.expected
    trained, frozen = split(policy, adapter_folder.read_settings(recorded.folder))
    batch = policy.preprocess(golden.inputs("raw/"))

    def loss_of(trained, given):
        params = combine(trained, frozen)
        return policy.loss_fn(params, policy.buffers, batch, KEY, train=True, **given)

    value_and_grad = jax.jit(jax.value_and_grad(loss_of, has_aux=True))
    (loss, _), gradients = value_and_grad(trained, draws(golden, "loss_train"))
    np.testing.assert_allclose(loss, expected["loss"], rtol=1e-5)
    in_place = combine(gradients, frozen)
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
    base_lr = optim.optimizer_settings(TrainConfig(policy=policy.config))["lr"]
    optimizer = optim.make_optimizer(TrainConfig(policy=policy.config, steps=10), trained)
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
    after = recorded.stored(combine(trained, frozen), tmp_path / "after")
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
