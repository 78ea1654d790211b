"""The plugins of examples/, installed as a user would: a new policy here, and JAX in stock LeRobot."""

import dataclasses
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest

from lerobot_jax.data.dataset import LeRobotDataset
from lerobot_jax.errors import InputError
from lerobot_jax.features import FeatureType, PolicyFeature
from lerobot_jax.policies.act import ACTConfig
from lerobot_jax.policies.base import FunctionalPolicy, config_class, make_policy, policy_class
from tests.data.recordings import record

ROOT = Path(__file__).parent.parent
RECIPE = ROOT / "examples/lerobot_policy_flow_mlp/configs/flow_mlp_pusht.py"
STATE = PolicyFeature(FeatureType.STATE, (3,))
IMAGE = PolicyFeature(FeatureType.VISUAL, (3, 32, 48))
FEATURES = {
    "observation.environment_state": {"dtype": "float32", "shape": (16,), "names": None},
    "observation.state": {"dtype": "float32", "shape": (2,), "names": None},
    "action": {"dtype": "float32", "shape": (2,), "names": None},
}

CONTRACT = """
import inspect
import jax, numpy as np, pytest
from tests.policies import test_contract as contract

for name, value in list(vars(contract).items()):
    if name == "policy" or (name.startswith("test_") and "policy" in inspect.signature(value).parameters):
        globals()[name] = value
pytestmark = pytest.mark.parametrize("policy", ["flow_mlp"], indirect=True)

def test_noise_can_be_given(policy):
    observation, key = policy.preprocess(contract.make_batch(policy)), jax.random.key(3)
    draws = policy.module.sampling_draws(3, key)
    assert list(draws) == ["noise"]
    sample = jax.jit(policy.sample_actions)
    drawn = sample(policy.params, policy.buffers, observation, key)
    np.testing.assert_array_equal(
        drawn, sample(policy.params, policy.buffers, observation, jax.random.key(4), **draws)
    )
    other = sample(policy.params, policy.buffers, observation, jax.random.key(4))
    assert not np.allclose(drawn, other)
"""
TRAIN = """
import sys
from lerobot_jax import eval, train

arguments = sys.argv[1:]
train.main([*arguments, "--config.output_dir=run"])
train.main([*arguments, "--config.output_dir=half", "--config.steps=2"])
train.main([*arguments, "--config.output_dir=half", "--config.resume=True"])
eval.main([
    "--policy.path=half/checkpoints/last/pretrained_model", "--policy.n_action_steps=3", "--output_dir=eval",
    "--env.type=pusht", "--env.episode_length=5", "--eval.n_episodes=2", "--eval.max_episodes_rendered=0",
])
"""


@pytest.fixture(scope="module")
def plugins(tmp_path_factory) -> Path:
    """Install both packages into a folder of their own, without network."""
    target = tmp_path_factory.mktemp("plugins")
    pip = [sys.executable, "-m", "pip", "install", "--quiet", "--disable-pip-version-check", "--no-deps"]
    for name in ("lerobot_policy_flow_mlp", "lerobot_policy_jax"):
        run([*pip, "--no-build-isolation", f"--target={target}", ROOT / "examples" / name], target)
    return target


def run(command: list[Any], plugins: Path, cwd: Path = ROOT, **environment: str) -> str:
    """Run a program that finds the plugins; give its output."""
    python_path = os.pathsep.join([str(plugins), str(ROOT)])
    program = subprocess.run(
        command,
        env=os.environ | {"PYTHONPATH": python_path} | environment,
        cwd=cwd,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=600,
        check=False,
    )
    assert program.returncode == 0, program.stdout[-5000:]
    return program.stdout


def test_the_new_policy_keeps_the_contract(plugins: Path, tmp_path: Path):
    (tmp_path / "test_flow_mlp.py").write_text(CONTRACT)
    options = ["-p", "tests.conftest", "-c", ROOT / "pyproject.toml", "--rootdir", ROOT]
    output = run([sys.executable, "-m", "pytest", *options, tmp_path / "test_flow_mlp.py"], plugins)
    assert " passed" in output


def test_the_new_policy_trains_resumes_and_is_evaluated(plugins: Path, tmp_path: Path):
    root = record(tmp_path / "dataset", lengths=(9, 12), features=FEATURES).root
    settings = {"dataset.repo_id": "test/recorded", "dataset.root": root, "steps": 4, "save_freq": 2}
    settings |= {"batch_size": 8, "log_freq": 2, "env_eval_freq": 0, "scheduler.num_warmup_steps": 1}
    settings |= {"policy.chunk_size": 4, "policy.n_action_steps": 2, "policy.hidden_dim": 16}
    arguments = [f"--config.{name}={value}" for name, value in settings.items()]
    # As users compile it: the schedules have other constants, which the tests' compiler would round elsewhere.
    run([sys.executable, "-c", TRAIN, f"--config={RECIPE}", *arguments], plugins, tmp_path, XLA_FLAGS="")
    folders = [tmp_path / name / "checkpoints/000004/pretrained_model" for name in ("run", "half")]
    weights = [(folder / "model.safetensors").read_bytes() for folder in folders]
    assert weights[0] == weights[1]
    assert json.loads((folders[0] / "config.json").read_text())["type"] == "flow_mlp"
    assert json.loads((tmp_path / "eval/eval_info.json").read_text())["overall"]["n_episodes"] == 2


def install_by_hand(folder: Path, name: str, code: str) -> None:
    """Write what an installed distribution of one module consists of."""
    (folder / f"{name}-1.dist-info").mkdir(parents=True)
    (folder / f"{name}-1.dist-info/METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: 1\n")
    (folder / f"{name}.py").write_text(code)


def test_plugins_that_offer_nothing_here_do_no_harm_and_are_named_when_a_policy_is_missing(
    tmp_path: Path, monkeypatch
):
    install_by_hand(tmp_path, "lerobot_policy_a_broken", "import a_framework_that_is_not_installed")
    install_by_hand(tmp_path, "lerobot_policy_b_stock", "")
    working = "from lerobot_jax.policies.act import Config as C, Policy\nclass Config(C): type = 'working'"
    install_by_hand(tmp_path, "lerobot_policy_c", working)
    monkeypatch.syspath_prepend(tmp_path)
    assert config_class("working").type == "working"
    with pytest.raises(InputError) as error:
        policy_class("worknig")
    for words in (
        "no policy of type 'worknig'",
        "lerobot_jax has act",
        "lerobot_policy_a_broken cannot be imported (ModuleNotFoundError: No module named 'a_framework",
        "lerobot_policy_b_stock has no Config and Policy",
        "lerobot_policy_c is of type 'working'",
    ):
        assert words in str(error.value)


def new_policy(config: Any, std: float = 0.7) -> FunctionalPolicy:
    """Make a policy with random weights, for data with this standard deviation."""
    rng = np.random.default_rng(1)
    stats = {}
    for key, feature in {**config.input_features, **config.output_features}.items():
        shape = (3, 1, 1) if feature.type == FeatureType.VISUAL else feature.shape
        mean = std * rng.uniform(0, 3, shape).astype(np.float32)
        stats[key] = {"mean": mean, "std": np.full(shape, std, np.float32)}
    policy = make_policy(config, stats)
    params, buffers = policy.init(jax.random.key(0))
    return policy.replace(params=params, buffers=buffers)


def small_act(
    inputs: dict[str, PolicyFeature], num_actions: int, n_action_steps: int = 4, **settings: Any
) -> ACTConfig:
    actions = {"action": PolicyFeature(FeatureType.ACTION, (num_actions,))}
    return ACTConfig(
        input_features=inputs,
        output_features=actions,
        vision_backbone="resnet18",
        pretrained_backbone_weights=None,
        device="cpu",
        dim_model=32,
        n_heads=2,
        dim_feedforward=64,
        chunk_size=6,
        n_action_steps=n_action_steps,
        **settings,
    )


def stock_python() -> str:
    python = os.environ.get("LEROBOT_PYTHON")
    if not python:
        pytest.fail("LEROBOT_PYTHON must name a Python with lerobot==0.6.1 and this package")
    return python


def stock(plugins: Path, tmp_path: Path, command: list[Any]) -> str:
    """Run a program in LeRobot's environment, on the CPU, with caches of its own."""
    environment = {"CUDA_VISIBLE_DEVICES": "", "JAX_PLATFORMS": "cpu", "XLA_FLAGS": ""}
    environment |= dict.fromkeys(("HF_LEROBOT_HOME", "LEROBOT_JAX_CACHE"), str(tmp_path / "home"))
    return run([stock_python(), *command], plugins, tmp_path, **environment)


def peer(plugins: Path, tmp_path: Path, command: str, **arguments: Any) -> dict[str, np.ndarray]:
    """Run a command of lerobot_plugin_peer.py; give its result."""
    (tmp_path / "arguments.json").write_text(json.dumps(arguments))
    script = Path(__file__).parent / "lerobot_plugin_peer.py"
    stock(plugins, tmp_path, [script, command, tmp_path / "arguments.json"])
    with np.load(tmp_path / "result.npz") as file:
        return dict(file)


CAMERAS = {"observation.state": STATE, "observation.images.a": IMAGE, "observation.images.b": IMAGE}


@pytest.mark.lerobot
@pytest.mark.parametrize("settings", [{}, {"n_action_steps": 1, "temporal_ensemble_coeff": 0.01}])
def test_jax_acts_like_torch_in_stock_lerobot(plugins: Path, tmp_path: Path, settings: dict[str, Any]):
    policy = new_policy(small_act(CAMERAS, 2, **settings))
    policy.save_pretrained(tmp_path / "policy")
    rng = np.random.default_rng(2)
    episodes, batch = [6, 3], 2
    observations: dict[str, Any] = {
        key: rng.uniform(0, 1, (sum(episodes), batch, *feature.shape)).astype(np.float32)
        for key, feature in CAMERAS.items()
    }
    np.savez(tmp_path / "observations.npz", **observations)
    paths = {"folder": str(tmp_path / "policy"), "observations": str(tmp_path / "observations.npz")}
    found = peer(plugins, tmp_path, "act", episodes=episodes, **paths)
    assert found["actions/jax"].shape == (9, 2, 2)
    assert found["chunk/jax"].shape == (2, 6, 2)
    assert np.ptp(found["actions/act"], axis=0).min() > 1e-2
    for name in ("actions", "chunk"):
        np.testing.assert_allclose(found[f"{name}/jax"], found[f"{name}/act"], rtol=1e-4, atol=1e-5)


WAYS = {"torch": ["--policy.path=policy"], "jax": ["--policy.type=jax", "--policy.pretrained_path=policy"]}
PUSHT = {
    "observation.state": PolicyFeature(FeatureType.STATE, (2,)),
    "observation.environment_state": PolicyFeature(FeatureType.ENV, (16,)),
}
ENV = ["--env.type=pusht", "--env.obs_type=environment_state_agent_pos", "--env.episode_length=12"]
EVAL = ["--eval.n_episodes=2", "--eval.batch_size=2", "--eval.use_async_envs=false"]


@pytest.mark.lerobot
def test_lerobot_eval_gives_the_same_episodes_with_jax(plugins: Path, tmp_path: Path):
    new_policy(small_act(PUSHT, 2), std=150.0).save_pretrained(tmp_path / "policy")
    for name, policy in WAYS.items():
        output = [f"--output_dir={name}", "--policy.device=cpu", "--eval.recording=true"]
        stock(plugins, tmp_path, ["-m", "lerobot.scripts.lerobot_eval", *ENV, *EVAL, *policy, *output])
    for env in ("env_0", "env_1"):
        folders = [tmp_path / name / "recordings/pusht_0" / env for name in WAYS]
        by_torch, by_jax = (dataset.read(np.arange(12)) for dataset in map(open_recorded, folders))
        assert np.ptp(by_torch["action"], axis=0).min() > 1
        for key in ("action", "agent_pos", "environment_state", "next.reward"):
            np.testing.assert_allclose(by_jax[key], by_torch[key], rtol=1e-4, atol=1e-4, err_msg=key)


def open_recorded(folder: Path) -> LeRobotDataset:
    return LeRobotDataset("test/recorded", folder)


@pytest.mark.lerobot
def test_a_policy_that_only_jax_has_acts_in_stock_lerobot_as_in_ours(plugins: Path, tmp_path: Path):
    """Its noise too follows from the seed and the episode's number alone."""
    save = "from tests import test_plugins; test_plugins.save_flow_mlp('policy')"
    run([sys.executable, "-c", save], plugins, tmp_path)
    rng = np.random.default_rng(2)
    observations: dict[str, Any] = {
        key: np.repeat(rng.normal(0, 1, (9, 1, *feature.shape)).astype(np.float32), 2, axis=1)
        for key, feature in PUSHT.items()
    }
    np.savez(tmp_path / "observations.npz", **observations)
    paths = {"folder": str(tmp_path / "policy"), "observations": str(tmp_path / "observations.npz")}
    found = peer(plugins, tmp_path, "act_as_ours", seed=7, episodes=[4, 5], **paths)
    np.testing.assert_allclose(found["stock"], found["ours"], rtol=1e-4, atol=1e-5)
    assert np.abs(found["stock"][:, 0] - found["stock"][:, 1]).min() > 1e-3  # equal observations, other noise


def save_flow_mlp(folder: str) -> None:
    """Save a random policy; its plugin must be installed."""
    action = {"action": PolicyFeature(FeatureType.ACTION, (2,))}
    tiny = config_class("flow_mlp").tiny()
    config = dataclasses.replace(tiny, input_features=PUSHT, output_features=action)
    new_policy(config).save_pretrained(Path(folder))


@pytest.mark.lerobot
def test_lerobot_rollout_moves_a_robot_alike_with_jax(plugins: Path, tmp_path: Path):
    robot = {"observation.state": STATE, "observation.images.top": IMAGE}
    new_policy(small_act(robot, 3)).save_pretrained(tmp_path / "policy")
    options = ["--fps=50", "--return_to_initial_position=false", "--device=cpu"]
    by_torch, by_jax = (
        peer(plugins, tmp_path, "rollout", arguments=[*policy, *options])["actions"]
        for policy in WAYS.values()
    )
    assert by_torch.shape == (10, 3)
    np.testing.assert_allclose(by_jax, by_torch, rtol=1e-4, atol=1e-5)
