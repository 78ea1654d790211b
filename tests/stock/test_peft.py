"""Adapters go both ways: trained on, and giving the same actions, whichever framework wrote them."""

import json
import re
from pathlib import Path

import jax
import numpy as np
import pytest
import safetensors.numpy

from lerobot_jax.policies.base import load_policy
from tests.stock.conftest import Peer, lerobot_python, run_command
from tests.stock.test_commands import LENGTHS, RECIPE, record_noise, train_ours

pytestmark = pytest.mark.lerobot

PEER = Path(__file__).with_name("peft_peer.py")
TARGETS = r"model\.(encoder|decoder)\..*(self_attn|multihead_attn|linear[12])|model\.backbone\..*conv1"
SETTINGS = {"r": "4", "lora_alpha": "6"}


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with `dataset`, `recipe.py`, and a policy of one step in the run `base`."""
    folder = tmp_path_factory.mktemp("peft")
    record_noise(folder / "dataset")
    recipe = RECIPE.format(root=folder / "dataset", frames=sum(LENGTHS))
    (folder / "recipe.py").write_text(recipe)
    train_ours(folder / "recipe.py", folder / "base", "--config.steps=1")
    return folder


def pretrained(run: Path) -> Path:
    return run / "checkpoints/last/pretrained_model"


def ours(place: Path, name: str, start: Path, steps: int, *arguments: str) -> list[tuple[float, float]]:
    """Train from a policy; give each step's loss and gradient norm."""
    settings = (f"--config.policy.pretrained_path={start}", f"--config.steps={steps}", *arguments)
    _, logged = train_ours(place / "recipe.py", place / name, *settings)
    return [(record["loss"], record["grad_norm"]) for record in logged]


def theirs(place: Path, name: str, start: Path, steps: int, *arguments: str) -> list[tuple[float, float]]:
    output = run_command(
        "lerobot-train",
        f"--policy.path={start}",
        "--dataset.repo_id=test/recorded",
        f"--dataset.root={place / 'dataset'}",
        "--dataset.video_backend=pyav",
        f"--batch_size={sum(LENGTHS)}",
        "--num_workers=0",
        f"--steps={steps}",
        "--save_freq=2",
        "--log_freq=1",
        "--env_eval_freq=0",
        f"--output_dir={place / name}",
        *arguments,
        folder=place,
    )
    return [(float(a), float(b)) for a, b in re.findall(r"loss:([\d.]+) grdn:([\d.]+)", output)]


def actions(place: Path, adapters: Path) -> dict[str, np.ndarray]:
    """Give chunks for the same observations: ours, and stock's with the adapters beside the weights and merged."""
    rng = np.random.default_rng(3)
    observations = {
        "observation.images.top": rng.random((2, 3, 32, 48), np.float32),
        "observation.state": rng.normal(size=(2, 3)).astype(np.float32),
    }
    path = place / "observations.npz"
    np.savez(path, allow_pickle=False, **observations)
    run_command(lerobot_python(), PEER, adapters, place / "dataset", path, place / "out.npz", folder=place)
    policy = load_policy(adapters)
    inputs = policy.preprocess(observations)
    chunk = policy.sample_actions(policy.params, policy.buffers, inputs, jax.random.key(0))
    with np.load(place / "out.npz") as file:
        return {"ours": np.asarray(policy.postprocess(chunk, observations)), **file}


def assert_same_actions(found: dict[str, np.ndarray]) -> None:
    for value in found.values():
        np.testing.assert_allclose(value, found["ours"], rtol=0, atol=1e-4)


def test_stock_uses_and_trains_on_our_adapters(place: Path, stock: Peer):
    base = pretrained(place / "base")
    arguments = [f"--config.peft.{key}={value}" for key, value in SETTINGS.items()]
    ours(place, "ours", base, 2, f"--config.peft.target_modules={TARGETS}", *arguments)
    adapters = place / "ours/checkpoints/last/adapter"
    found = actions(place, adapters)
    assert_same_actions(found)
    # Without PEFT, stock has the policy with the adapters merged.
    with np.load(place / "observations.npz") as file:
        np.savez(place / "steps.npz", **{key: value[None] for key, value in file.items()})
    plain = stock("act", folder=pretrained(place / "ours"), observations=place / "steps.npz")
    np.testing.assert_allclose(plain["chunk"], found["ours"], rtol=0, atol=1e-4)
    mine = ours(place, "ours later", adapters, 3)
    steps = theirs(place, "stock later", adapters, 3, "--peft.method_type=LORA")
    np.testing.assert_allclose(mine, steps, rtol=2e-3)
    assert steps[2][0] < steps[0][0]


def test_we_use_and_train_on_stock_s_adapters(place: Path):
    base = pretrained(place / "base")
    arguments = [f"--peft.{key}={value}" for key, value in SETTINGS.items()]
    steps = theirs(
        place,
        "stock",
        base,
        3,
        "--peft.method_type=LORA",
        f"--peft.target_modules={TARGETS}",
        "--peft.full_training_modules=['action_head']",
        *arguments,
    )
    adapters = place / "stock/checkpoints/000002/pretrained_model"
    assert json.loads((adapters / "config.json").read_text())["use_peft"]
    assert_same_actions(actions(place, adapters))
    next_step = ours(place, "next", adapters, 1)
    np.testing.assert_allclose(next_step[0], steps[2], rtol=2e-3)
    written = [
        safetensors.numpy.load_file(folder / "adapter_model.safetensors")
        for folder in (adapters, place / "next/checkpoints/last/adapter")
    ]
    assert written[0].keys() == written[1].keys()
