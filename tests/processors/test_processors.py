import json
import shutil
from pathlib import Path

import jax
import numpy as np
import pytest
import safetensors.numpy

from lerobot_jax.errors import InputError
from lerobot_jax.features import FeatureType, NormalizationMode, PolicyFeature
from lerobot_jax.processors import Normalizer, Unnormalizer, default_pipelines, load_pipelines
from lerobot_jax.processors.steps import AddBatchDimension, Device, RenameObservations
from tests.goldens import ROOT

FOLDERS = sorted(path.parent for path in ROOT.glob("act/*/model/config.json"))
STATS = {
    "mean": np.array([1.0, 2.0], np.float32),
    "std": np.array([0.5, 0.0], np.float32),
    "min": np.array([-1.0, 2.0], np.float32),
    "max": np.array([3.0, 2.0], np.float32),
    "q01": np.array([-0.5, 2.0], np.float32),
    "q99": np.array([2.5, 2.0], np.float32),
    "q10": np.array([0.0, 1.0], np.float32),
    "q90": np.array([2.0, 3.0], np.float32),
}


@pytest.mark.parametrize("folder", FOLDERS, ids=lambda p: p.parent.name)
def test_files_are_written_as_they_were_read(folder: Path, tmp_path: Path):
    for pipeline in load_pipelines(folder):
        pipeline.save(tmp_path)
        written, original = (
            json.loads((f / f"{pipeline.name}.json").read_text()) for f in (tmp_path, folder)
        )
        assert written == original
    for path in folder.glob("policy_*.safetensors"):
        written, original = (
            safetensors.numpy.load_file(tmp_path / path.name),
            safetensors.numpy.load_file(path),
        )
        assert set(written) == set(original)
        for key, value in original.items():
            np.testing.assert_array_equal(written[key], value)


@pytest.mark.parametrize("mode", NormalizationMode)
def test_unnormalizing_inverts_normalizing(mode: NormalizationMode):
    features = {"action": PolicyFeature(FeatureType.ACTION, (2,))}
    settings = (features, {FeatureType.ACTION: mode}, {"action": STATS})
    batch = {"action": np.array([[[0.3, 2.0], [1.7, 2.0]]], np.float32), "other": np.ones(3)}
    normalized = jax.jit(Normalizer(*settings))(batch)
    restored = jax.jit(Unnormalizer(*settings))(normalized)
    np.testing.assert_allclose(restored["action"], batch["action"], rtol=1e-6)
    np.testing.assert_array_equal(restored["other"], batch["other"])
    if mode == NormalizationMode.MEAN_STD:
        np.testing.assert_allclose(normalized["action"][..., 0], [[-1.4, 1.4]], rtol=1e-6)
    if mode == NormalizationMode.MIN_MAX:
        np.testing.assert_allclose(normalized["action"][..., 0], [[-0.35, 0.35]], rtol=1e-5)
        np.testing.assert_allclose(normalized["action"][..., 1], -1)  # a range of zero


def test_types_without_a_mode_are_left_alone():
    features = {"observation.environment_state": PolicyFeature(FeatureType.ENV, (2,))}
    batch = {"observation.environment_state": np.ones((1, 2), np.float32)}
    normalizer = Normalizer(features, {FeatureType.STATE: NormalizationMode.MEAN_STD}, {})
    np.testing.assert_array_equal(normalizer(batch)["observation.environment_state"], np.ones((1, 2)))


def test_missing_statistics_are_an_error():
    inputs = {"observation.state": PolicyFeature(FeatureType.STATE, (2,))}
    outputs = {"action": PolicyFeature(FeatureType.ACTION, (2,))}
    modes = {"STATE": NormalizationMode.QUANTILES, "ACTION": NormalizationMode.MEAN_STD}
    default_pipelines(inputs, outputs, modes, {"observation.state": STATS, "action": STATS}, "cpu")
    without = {"observation.state": {"q01": STATS["q01"]}, "action": STATS}
    with pytest.raises(InputError, match=r"'observation.state' .*QUANTILES.*\['q99'\] are missing"):
        default_pipelines(inputs, outputs, modes, without, "cpu")


def test_small_steps():
    batch = {
        "observation.state": np.ones(3),
        "observation.image": np.ones((4, 4, 3)),
        "task": "push",
        "index": np.int64(3),
    }
    batched = AddBatchDimension()(batch)
    assert {k: np.shape(v) for k, v in batched.items()} == {
        "observation.state": (1, 3),
        "observation.image": (1, 4, 4, 3),
        "task": (1,),
        "index": (1,),
    }
    assert {k: np.shape(v) for k, v in AddBatchDimension()(batched).items()} == {
        k: np.shape(v) for k, v in batched.items()
    }
    assert set(RenameObservations({"observation.image": "observation.images.top"})(batch)) >= {
        "observation.images.top"
    }
    halved = Device("cuda", "float16")(batched)
    assert (halved["observation.state"].dtype, halved["index"].dtype) == (np.float16, np.int64)


def test_unreadable_pipelines_are_reported(tmp_path: Path):
    folder = shutil.copytree(FOLDERS[0], tmp_path / "model")
    path = folder / "policy_preprocessor.json"
    original = json.loads(path.read_text())

    def edited(**changes) -> dict:
        steps = [*original["steps"][:-1], original["steps"][-1] | changes]
        return {**original, "steps": steps}

    faults = {
        "policy_preprocessor.json: unknown step 'teleport'": edited(registry_name="teleport"),
        "missing.safetensors: no such file": edited(state_file="missing.safetensors"),
        "has settings that do not fit": edited(config={"epsilon": 1}),
    }
    for message, content in faults.items():
        path.write_text(json.dumps(content))
        with pytest.raises(InputError, match=message):
            load_pipelines(folder)
    path.write_text("{")
    with pytest.raises(InputError, match="not valid JSON"):
        load_pipelines(folder)
    path.unlink()
    with pytest.raises(InputError, match=r"policy_preprocessor.json: no such file"):
        load_pipelines(folder)
