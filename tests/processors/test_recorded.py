"""Every recorded pipeline is read, run and written as stock LeRobot did (tools/make_processor_golden.py)."""

import json
from pathlib import Path

import huggingface_hub.constants
import jax
import numpy as np
import pytest
import safetensors.numpy

from lerobot_jax.processors import (
    ACTION_TOKENS,
    OBS_LANGUAGE_TOKENS,
    Device,
    Normalizer,
    RelativeActions,
    Unnormalizer,
    default_pipelines,
    load_pipelines,
)
from lerobot_jax.processors.text import TextStep

GOLDEN = Path(__file__).parent / "golden"
FOLDERS = sorted(path.parent for path in GOLDEN.glob("*/tasks.json"))
IDS = [folder.name for folder in FOLDERS]


@pytest.fixture(autouse=True)
def _tokenizers(monkeypatch):
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(GOLDEN / "tokenizers"))


def read(folder: Path, name: str) -> dict[str, np.ndarray]:
    """Read recorded arrays; images become channel-last."""
    arrays = safetensors.numpy.load_file(folder / f"{name}.safetensors")
    return {k: np.moveaxis(v, -3, -1) if ".images." in k else v for k, v in arrays.items()}


def raw_batch(folder: Path) -> dict:
    batch = read(folder, "raw") | {"task": json.loads((folder / "tasks.json").read_text())}
    return {key: value for key, value in batch.items() if key != "predicted"}


def tokenized(folder: Path, pipeline) -> dict:
    batch = pipeline.tokenize(raw_batch(folder))
    return {key: value for key, value in batch.items() if key != "task"}


@pytest.mark.parametrize("folder", FOLDERS, ids=IDS)
def test_files_are_written_back_equal(folder: Path, tmp_path: Path):
    for pipeline in load_pipelines(folder):
        pipeline.save(tmp_path)
    assert_same_files(tmp_path, folder)


@pytest.mark.parametrize("name", [name for name in IDS if name.startswith(("pi", "smolvla", "multi", "act"))])
def test_new_pipelines_are_those_of_stock(name: str, tmp_path: Path):
    folder = GOLDEN / name
    pre, post = load_pipelines(folder)
    (normalizer,) = (step for step in pre.steps if isinstance(step, Normalizer))
    (device,) = (step for step in pre.steps if isinstance(step, Device))
    unnormalizer = post.steps[0]
    assert isinstance(unnormalizer, Unnormalizer)
    outputs = unnormalizer.features
    made = default_pipelines(
        {key: feature for key, feature in normalizer.features.items() if key not in outputs},
        outputs,
        normalization={kind.value: mode for kind, mode in normalizer.norm_map.items()},
        stats=unnormalizer.stats,
        device=device.device or "cpu",
        rename_map=pre.rename_map,
        target=pre.action_target,
        text_steps=[step for step in pre.steps if isinstance(step, TextStep)],
        disabled_relative_step=next((step for step in pre.steps if isinstance(step, RelativeActions)), None),
    )
    for pipeline in made:
        pipeline.save(tmp_path)
    assert_same_files(tmp_path, folder)


def assert_same_files(tmp_path: Path, folder: Path) -> None:
    written = {path.name for path in tmp_path.iterdir()}
    assert written == {path.name for path in folder.glob("policy_*")}
    for name in written:
        ours, theirs = (tmp_path / name).read_bytes(), (folder / name).read_bytes()
        if name.endswith(".json"):
            # repr tells 1 from 1.0 and True
            assert repr(sorted_json(ours)) == repr(sorted_json(theirs))
        else:
            assert ours == theirs


def sorted_json(text: bytes) -> dict:
    return json.loads(json.dumps(json.loads(text), sort_keys=True))


@pytest.mark.parametrize("folder", FOLDERS, ids=IDS)
def test_preprocessing_gives_what_stock_gave(folder: Path):
    preprocess, _ = load_pipelines(folder)
    batch = tokenized(folder, preprocess)
    expected = read(folder, "expected")
    for result in (preprocess(batch), jax.jit(preprocess)(batch)):
        assert set(result) == set(expected)
        for key, value in expected.items():
            if value.dtype.kind == "f":
                np.testing.assert_allclose(result[key], value, rtol=1e-5, atol=1e-6, err_msg=key)
            else:
                np.testing.assert_array_equal(result[key], value, err_msg=key)
                assert result[key].dtype.kind == value.dtype.kind


@pytest.mark.parametrize("folder", FOLDERS, ids=IDS)
def test_postprocessing_gives_what_stock_gave(folder: Path):
    _, postprocess = load_pipelines(folder)
    raw = read(folder, "raw")
    batch = {"action": raw["predicted"], "observation.state": raw["observation.state"]}
    expected = read(folder, "expected_post")["action"]
    for result in (postprocess(batch), jax.jit(postprocess)(batch)):
        np.testing.assert_allclose(result["action"], expected, rtol=1e-5, atol=1e-6)
        np.testing.assert_array_equal(result["observation.state"], raw["observation.state"])


@pytest.mark.parametrize("folder", FOLDERS, ids=IDS)
def test_one_observation_is_tokenized_like_a_batch_of_one(folder: Path):
    preprocess, _ = load_pipelines(folder)
    batch = raw_batch(folder)
    one = {key: value[1] for key, value in batch.items() if not key.startswith("action")}
    result = preprocess(preprocess.tokenize(one))
    whole = preprocess(preprocess.tokenize(batch))
    for key in result:
        if key == OBS_LANGUAGE_TOKENS:
            length = min(result[key].shape[1], whole[key].shape[1])  # "longest" in the batch
            np.testing.assert_array_equal(result[key][:, :length], whole[key][1:2, :length])
        elif key == "task":
            assert result[key] == whole[key][1:2]
        elif "attention_mask" not in key:
            np.testing.assert_allclose(result[key], whole[key][1:2], rtol=1e-6, err_msg=key)
    assert ACTION_TOKENS not in result


def test_recordings_cover_what_they_should():
    lengths = {}
    for folder in FOLDERS:
        expected = read(folder, "expected")
        if "observation.language.attention_mask" in expected:
            lengths[folder.name] = expected["observation.language.attention_mask"].sum(axis=1)
    assert all(len(set(counts)) > 1 for counts in lengths.values())  # tasks of different length
    assert max(lengths["pi0"]) == 24  # cut
    assert max(lengths["smolvla"]) == 20
    assert max(lengths["pi05"]) == 45
    assert not read(FOLDERS[IDS.index("pi0_fast")], "expected")["action.token_mask"].all()
    assert read(FOLDERS[IDS.index("pi0_fast_relative")], "expected")["action.token_mask"].all()  # cut
