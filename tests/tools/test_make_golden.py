import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import safetensors.numpy

from tests.goldens import ROOT, Golden, initial_value
from tools.goldens import find_policies

TOOL = Path(__file__).parents[2] / "tools" / "make_golden.py"
VARIANTS = [(policy, name) for policy, module in find_policies().items() for name in module.VARIANTS]


def run(python: str | Path, *arguments: object) -> subprocess.CompletedProcess:
    return subprocess.run([python, TOOL, *map(str, arguments)], capture_output=True, text=True, check=False)


@pytest.fixture
def stock_python() -> str:
    python = os.environ.get("LEROBOT_PYTHON")
    if not python:
        pytest.fail("LEROBOT_PYTHON must name a Python with lerobot==0.6.1")
    return python


@pytest.mark.parametrize(("policy", "name"), VARIANTS)
def test_recorded_folders_are_what_the_variants_say(policy: str, name: str):
    """Somebody who changes a variant must record it again."""
    variant = find_policies()[policy].VARIANTS[name]
    golden = Golden(ROOT / policy / f"{name}_s0")
    config = json.loads((golden.path / "model" / "config.json").read_text())
    assert {key: config[key] for key in variant.settings} == variant.settings
    features = config["input_features"] | config["output_features"]
    shapes = {key: tuple(feature["shape"]) for key, feature in features.items()}
    assert shapes == {**variant.inputs, "action": (variant.action,)}
    assert golden.meta["cases"] == list(find_policies()[policy].CASES)
    assert (golden.path / "model" / "model.safetensors").exists() == variant.store_weights


def test_every_recorded_folder_has_a_variant():
    folders = {(path.parent.parent.name, path.parent.name) for path in ROOT.glob("*/*/meta.json")}
    folders = {
        (policy, name) for policy, name in folders if policy not in ("pi0", "pi05")
    }  # recorded elsewhere
    assert folders == {(policy, f"{name}_s0") for policy, name in VARIANTS}


def test_stored_weights_follow_from_names_and_seed():
    golden = Golden(ROOT / "act" / "vae_minmax_s0")
    stored, meta = golden.stored_or_initial_weights(), golden.meta
    assert stored.keys() == meta["param_shapes"].keys()
    assert stored.keys() - meta["init_kinds"].keys() == {"model.vae_encoder_pos_enc"}
    for name, kind in meta["init_kinds"].items():
        value = initial_value(kind, name, meta["param_shapes"][name], meta["seed"], meta["init_scale"])
        np.testing.assert_array_equal(stored[name], value, err_msg=name)


def test_variants_are_listed_without_lerobot():
    result = run(sys.executable, "--list")
    assert result.returncode == 0, result.stderr
    assert [tuple(line.split()[:3:2]) for line in result.stdout.splitlines()] == VARIANTS


def test_unknown_names_are_told_on_one_line(tmp_path: Path):
    for arguments, message in (
        (["nothing"], "no policy 'nothing' in tools/goldens; there are act"),
        (["act", "--variant", "nothing"], "no variant 'nothing'; there are vae_2cam, "),
        (["--check", "--out", tmp_path], "none of the recorded folders"),
    ):
        result = run(sys.executable, *arguments)
        assert result.returncode == 1
        assert message in result.stderr.splitlines()[-1]


@pytest.mark.lerobot
def test_recorded_numbers_are_lerobots(stock_python: str, tmp_path: Path):
    shutil.copytree(ROOT / "act" / "env_vae_s0", tmp_path / "act" / "env_vae_s0")
    arguments = ["act", "--variant", "env_vae", "--check", "--out", tmp_path]
    result = run(stock_python, *arguments)
    assert result.returncode == 0, result.stderr
    path = tmp_path / "act" / "env_vae_s0" / "expected.safetensors"
    outputs = safetensors.numpy.load_file(path)
    outputs["chunk/action"] = outputs["chunk/action"] * np.float32(1.001)
    safetensors.numpy.save_file(outputs, path)
    result = run(stock_python, *arguments)
    assert result.returncode == 1
    assert "chunk/action: differs by" in result.stderr
    assert "chunk/post/action" not in result.stderr


@pytest.mark.lerobot
def test_recording_again_gives_the_recorded_folder(stock_python: str, tmp_path: Path):
    result = run(stock_python, "act", "--variant", "env_vae", "--out", tmp_path)
    assert result.returncode == 0, result.stderr
    recorded, again = (Golden(root / "act" / "env_vae_s0") for root in (ROOT, tmp_path))
    assert again.batch.keys() == recorded.batch.keys()
    for key, value in recorded.batch.items():
        np.testing.assert_allclose(again.batch[key], value, rtol=1e-5, atol=1e-6, err_msg=key)
    for key, value in recorded.expected.items():
        np.testing.assert_allclose(again.expected[key], value, rtol=0, atol=recorded.tolerance(key))
    for name in ("config.json", "policy_preprocessor.json", "policy_postprocessor.json"):
        texts = [(golden.path / "model" / name).read_text() for golden in (recorded, again)]
        assert texts[0] == texts[1]
