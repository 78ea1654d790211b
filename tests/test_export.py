"""Exported policies give the policy's own actions in a process that has nothing of this package."""

import dataclasses
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest
import safetensors

from lerobot_jax import export, exported, sharding, state_dict
from lerobot_jax.certificate import make_observations
from lerobot_jax.errors import InputError
from lerobot_jax.policies.act import ACTConfig
from lerobot_jax.policies.base import FunctionalPolicy, load_policy
from lerobot_jax.policies.registry import config_class
from lerobot_jax.policies.rtc import RTCConfig
from tests.stock.policies import new_policy

pytestmark = pytest.mark.usefixtures("stand_ins")

SEEDS = (0, 1, 2**31)
# The copied file runs where no module of this package, and none that policies are made of, can be imported.
ALONE = """
import importlib.abc, json, sys

class Refusal(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in ("lerobot_jax", "flax", "optax", "orbax", "einops", "jaxtyping"):
            raise ImportError(f"{name} must not be needed")

sys.meta_path.insert(0, Refusal())
import numpy as np
from exported import ExportedPolicy

for name in json.loads(sys.argv[1]):
    policy = ExportedPolicy(f"{name}.safetensors")
    given = dict(np.load(f"{name}.npz"))
    np.save(f"{name}.npy", np.stack([policy(given, seed) for seed in json.loads(sys.argv[2])]))
"""


def make(kind: str) -> FunctionalPolicy:
    return new_policy(config_class(kind).tiny(), action=3)


def observe(policy: FunctionalPolicy) -> dict[str, np.ndarray]:
    """Draw one raw observation, with tokens in the place of a text."""
    return {k: np.asarray(v[:1]) for k, v in policy.tokenize(make_observations(policy)).items()}


def chunk(policy: FunctionalPolicy, observation: dict[str, np.ndarray], seed: int) -> np.ndarray:
    @jax.jit
    def sample(params, buffers, observation, key):
        normalized = policy.sample_actions(params, buffers, policy.preprocess(observation), key)
        return policy.postprocess(normalized, observation)

    return np.asarray(sample(policy.params, policy.buffers, observation, jax.random.key(seed)))


KINDS = ["act", "pi0", *(pytest.param(k, marks=pytest.mark.slow) for k in ("diffusion", "multi_task_dit"))]


@pytest.mark.parametrize("kind", KINDS)
def test_a_process_without_the_package_gives_the_same_actions(kind: str, tmp_path: Path):
    policy = make(kind)
    export.export_policy(policy, tmp_path / f"{kind}.safetensors", ["cpu"])
    observation = observe(policy)
    np.savez(tmp_path / f"{kind}.npz", **observation)
    shutil.copy(exported.__file__, tmp_path)
    (tmp_path / "alone.py").write_text(ALONE)
    process = subprocess.run(
        [sys.executable, "alone.py", json.dumps([kind]), json.dumps(SEEDS)],
        cwd=tmp_path,
        env={**os.environ, "JAX_DEFAULT_MATMUL_PRECISION": "default"},  # what it was exported with counts
        capture_output=True,
        text=True,
        check=False,
    )
    assert process.returncode == 0, process.stderr
    expected = [chunk(policy, observation, seed) for seed in SEEDS]
    np.testing.assert_array_equal(np.load(tmp_path / f"{kind}.npy"), expected)
    if policy.sampling_draws(1, jax.random.key(0)):
        assert not np.array_equal(expected[0], expected[1])


@pytest.fixture(scope="module")
def act() -> FunctionalPolicy:
    config = dataclasses.replace(ACTConfig.tiny(), use_vae=True)
    return new_policy(config, action=3)


@pytest.fixture(scope="module")
def file(act: FunctionalPolicy, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A policy that was exported by the command."""
    folder = tmp_path_factory.mktemp("exported")
    act.save_pretrained(folder / "policy")
    path = folder / "act.safetensors"
    export.main([f"--policy.path={folder / 'policy'}", f"--output={path}", "--platforms=cpu,tpu"])
    return path


def test_the_file_has_what_the_sampler_uses_and_says_how(act: FunctionalPolicy, file: Path):
    stored = state_dict.read(file)
    names = {name.removeprefix("weights/") for name in stored} - {"program"}
    assert "params.model.action_head.kernel" in names
    assert not any("vae_encoder" in name for name in names)  # only training uses it
    described = exported.describe(file)
    assert described["platforms"] == ["cpu", "tpu"]
    assert described["inputs"] == {
        name: {"shape": list(value.shape), "dtype": value.dtype.name} for name, value in observe(act).items()
    }
    policy = exported.ExportedPolicy(file)
    key = np.asarray(jax.random.key_data(jax.random.key(3)))
    np.testing.assert_array_equal(policy(observe(act), key), chunk(act, observe(act), 3))


def test_bfloat16_weights_stay_so(act: FunctionalPolicy, tmp_path: Path):
    half = jax.tree.map(lambda x: x.astype("bfloat16"), act.params)
    policy = act.replace(params=half)
    export.export_policy(policy, tmp_path / "half.safetensors", ["cpu"])
    stored = state_dict.read(tmp_path / "half.safetensors")
    kernel = stored["weights/params.model.action_head.kernel"]
    np.testing.assert_array_equal(kernel, sharding.host_view(half["model"]["action_head"]["kernel"]))
    found = exported.ExportedPolicy(tmp_path / "half.safetensors")(observe(act), 0)
    np.testing.assert_array_equal(found, chunk(policy, observe(act), 0))


def test_how_tokens_are_made_is_in_the_file(tmp_path: Path):
    policy = make("multi_task_dit")
    described = export.export_policy(policy, tmp_path / "dit.safetensors", ["cpu"])
    (step,) = described["tokens"]["steps"]
    assert step["name"] == "tokenizer_processor"
    example = described["tokens"]["example"]
    tokens = policy.tokenize(make_observations(policy) | {"task": [example["task"]] * 2})
    for name in set(example) - {"task"}:
        np.testing.assert_array_equal(tokens[name][0], example[name])


def test_wrong_observations_are_named(act: FunctionalPolicy, file: Path):
    policy = exported.ExportedPolicy(file)
    observation = observe(act)
    name = next(iter(observation))
    faults = {
        f"'{name}' is missing": {k: v for k, v in observation.items() if k != name},
        "'extra' is unknown": observation | {"extra": np.zeros(1)},
        f"'{name}' must be .* it is .* of shape \\(2,": observation
        | {name: np.repeat(observation[name], 2, 0)},
        f"'{name}' must be .* it is float64": observation | {name: observation[name].astype(np.float64)},
    }
    for message, wrong in faults.items():
        with pytest.raises(ValueError, match=message):
            policy(wrong, 0)
    with pytest.raises(ValueError, match="key must be an int or two uint32"):
        policy(observation, np.zeros(2, np.float32))


def test_wrong_files_are_named(act: FunctionalPolicy, file: Path, tmp_path: Path):
    for_tpu = tmp_path / "tpu.safetensors"
    export.export_policy(act, for_tpu, ["tpu"])
    with pytest.raises(
        ValueError, match=r"exported for tpu, and this device is a cpu; .*--platforms=tpu,cpu"
    ):
        exported.ExportedPolicy(for_tpu)
    with pytest.raises(ValueError, match="no such file"):
        exported.ExportedPolicy(tmp_path / "nothing")
    (tmp_path / "text").write_text("no safetensors file")
    with pytest.raises(ValueError, match="not a safetensors file"):
        exported.ExportedPolicy(tmp_path / "text")
    state_dict.write({"x": np.zeros(1)}, tmp_path / "other.safetensors")
    with pytest.raises(ValueError, match="not an exported policy"):
        exported.ExportedPolicy(tmp_path / "other.safetensors")
    stored = state_dict.read(file)
    damaged = dict(stored) | {"program": np.zeros(100, np.uint8)}
    with safetensors.safe_open(file, framework="numpy") as opened:
        metadata = opened.metadata()
    state_dict.write(state_dict.StateDict.of(damaged, metadata), tmp_path / "damaged.safetensors")
    with pytest.raises(ValueError, match=r"cannot read the program .*; JAX \d.* wrote it"):
        exported.ExportedPolicy(tmp_path / "damaged.safetensors")


def test_a_wrong_command_is_refused_before_anything_is_written(file: Path, tmp_path: Path):
    policy = f"--policy.path={file.parent / 'policy'}"
    faults = {
        r"--policy\.path=FOLDER_OR_HUB_NAME is missing": ["--output=x"],
        r"--output=FILE is missing": [policy],
        r"platforms: 'gpu' is unknown; known are cpu, cuda, rocm, tpu": [
            policy,
            "--output=x",
            "--platforms=gpu",
        ],
        r"batch_size must be at least 1": [policy, "--output=x", "--batch_size=0"],
        r"exists already": [policy, f"--output={file}"],
        r"is in no folder that there is": [policy, f"--output={tmp_path / 'none' / 'x'}"],
    }
    for message, arguments in faults.items():
        with pytest.raises(InputError, match=message):
            export.main(arguments)
    assert load_policy(file.parent / "policy").config.type == "act"


def test_what_an_exported_program_cannot_do_is_refused(tmp_path: Path):
    policy = make("pi0").with_settings(rtc_config=RTCConfig())
    policy.save_pretrained(tmp_path / "policy")
    with pytest.raises(InputError, match=r"takes no old chunk; give --policy.rtc_config.enabled=False"):
        export.main([f"--policy.path={tmp_path / 'policy'}", f"--output={tmp_path / 'x'}"])
    assert not (tmp_path / "x").exists()


def test_a_gpu_can_be_exported_for_from_here(act: FunctionalPolicy, tmp_path: Path):
    described = export.export_policy(act, tmp_path / "act.safetensors", ["cuda"], batch_size=2)
    assert described["output"]["shape"][0] == 2
