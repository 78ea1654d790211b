"""The command, on processors and, with TPU's compiler (libtpu), for TPUs."""

import importlib.util
import json
import math
from pathlib import Path

import pytest

from lerobot_jax import plan
from lerobot_jax.errors import InputError
from lerobot_jax.planning.advice import advise
from lerobot_jax.planning.estimates import roofline
from lerobot_jax.planning.hardware import parse_topology

RECIPE = """
from lerobot_jax.config import DatasetConfig, TrainConfig
from lerobot_jax.policies.act import ACTConfig

def get_config(variant=""):
    policy = ACTConfig.tiny()
    return TrainConfig(policy=policy, dataset=DatasetConfig("none/none", root="none"), batch_size=16, ema_decay=0.9)
"""
needs_libtpu = pytest.mark.skipif(not importlib.util.find_spec("libtpu"), reason="needs libtpu")


@pytest.fixture
def recipe(tmp_path: Path) -> str:
    path = tmp_path / "tiny.py"
    path.write_text(RECIPE)
    return str(path)


def _plan(recipe: str, tmp_path: Path, *arguments: str) -> dict:
    path = tmp_path / "plan.json"
    plan.main([f"--config={recipe}", f"--json={path}", *arguments])
    return json.loads(path.read_text())


def test_a_plan_for_virtual_devices(recipe: str, tmp_path: Path, capfd):
    mesh = ("--config.mesh.fsdp=4", "--config.mesh.min_shard_size=256")
    arguments = ("--topology=cpu:8", "--largest_batch=False", *mesh)
    found = _plan(recipe, tmp_path, *arguments)
    assert found["mesh"] == {"data": 2, "fsdp": 4, "tensor": 1}
    assert found["fits"]
    assert found["estimates"] is None  # of hardware of unknown speed
    parts = found["memory"]["parts"]
    assert parts["optimizer"] == pytest.approx(2 * parts["parameters"], rel=0.05)
    assert found["num_parameters"] * 4 / 4 <= parts["parameters"] < found["num_parameters"] * 4
    assert {("all-gather", "fsdp")} <= {(each["kind"], *each["axes"]) for each in found["collectives"]}
    assert found["flops"] == found["flops_once"]
    assert math.isclose(sum(found["flops"].values()), 3.2e8, rel_tol=0.9)
    printed = capfd.readouterr()
    assert "act on cpu:8" not in printed.err
    assert "act with" in printed.out
    assert "It fits" in printed.out

    # The second time, nothing is compiled.
    assert _plan(recipe, tmp_path, *arguments) == found
    assert "compiled for" not in capfd.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--topology=cpu:8", "--config.mesh.fsdp=3"), "cannot be made of 8 devices"),
        (("--topology=cpu:8", "--config.batch_size=12"), "must be a multiple of the 8 devices"),
        (("--topology=v5e:3x3",), "cannot be; a host has"),
        ((), "--topology is missing"),
        (("--topology=cpu:8", "--largest=3"), "largest"),
    ],
)
def test_impossible_plans_are_told_so(arguments: tuple[str, ...], message: str, recipe: str):
    with pytest.raises(InputError, match=message):
        plan.main([f"--config={recipe}", *arguments])


@pytest.mark.slow
@needs_libtpu
def test_a_plan_for_tpus_and_their_largest_batch(recipe: str, tmp_path: Path, capfd):
    found = _plan(recipe, tmp_path, "--topology=v5e:2x2", "--config.mesh.fsdp=2", "--largest_batch=False")
    assert found["fits"]
    assert not found["memory"]["is_bound"]
    assert found["memory"]["limit"] == 15.75 * 2**30
    assert (
        found["memory"]["peak"]
        >= sum(found["memory"]["parts"].values()) - found["memory"]["parts"]["padding"]
    )
    estimates = found["estimates"]
    assert estimates["step"] == max(estimates["seconds"].values()) > 0
    assert 0 < estimates["mfu"] <= 1
    assert "Estimates" in capfd.readouterr().out


@needs_libtpu
def test_what_does_not_fit_ends_with_its_own_code_and_says_by_how_much(recipe: str, tmp_path: Path, capfd):
    path = tmp_path / "plan.json"
    arguments = ["--topology=v5e:2x2", "--largest_batch=False", "--config.batch_size=8000000"]
    with pytest.raises(SystemExit) as ended:
        plan.main([f"--config={recipe}", f"--json={path}", *arguments])
    assert ended.value.code == plan.DOES_NOT_FIT
    found = json.loads(path.read_text())
    missing = found["memory"]["peak"] - found["memory"]["limit"]
    assert missing > 0
    printed = capfd.readouterr().out
    assert "It does not fit: each device lacks" in printed
    assert "--config.gradient_accumulation_steps=2" in printed
    assert "--config.mesh.fsdp=4" in printed
    assert "--config.optimizer.type=adafactor" in printed


def test_advice_names_what_saves_most_first():
    memory = {"parts": {"parameters": 100, "optimizer": 200, "EMA": 100, "batch": 1}, "temporaries": 10_000}
    found = {"memory": memory, "mesh": {"data": 4, "fsdp": 2, "tensor": 1}, "batch_unit": 8}
    settings = {"remat": None, "batch_size": 64, "gradient_accumulation_steps": 1}
    advice = advise(settings, found, largest=20)
    assert advice[0].startswith("--config.batch_size=16 --config.gradient_accumulation_steps=4")
    assert advice[1].startswith("--config.remat=full")
    assert advice[2].startswith("--config.mesh.fsdp=8")
    settings["remat"], found["mesh"] = "full", {"data": 1, "fsdp": 8, "tensor": 1}
    assert not any("remat" in text or "fsdp" in text for text in advise(settings, found, largest=None))


def test_the_roofline_is_the_slowest_part():
    chip = parse_topology("v5e:4x4").chip
    assert chip is not None
    sent = [{"link": "links", "sent": 200e9}, {"link": "network", "sent": 3.125e9 / 2}]
    found = roofline(chip, 16, {"bfloat16": 16 * 197 * 10**12}, {"bfloat16": 8 * 197 * 10**12}, 0, sent, 32)
    assert found.seconds == {"compute": 1.0, "memory": 0.0, "links": 1.0, "network": 0.5}
    assert (found.step, found.samples_per_second, found.mfu) == (1.0, 32, 0.5)
    assert found.bound == "compute"
