import json
import shutil
from pathlib import Path

import jax
import ml_dtypes
import numpy as np
import pytest
import safetensors.numpy

from lerobot_jax.errors import InputError
from lerobot_jax.features import FeatureType, NormalizationMode, PolicyFeature
from lerobot_jax.processors import (
    Normalizer,
    Pipeline,
    Unnormalizer,
    default_pipelines,
    load_pipelines,
    make_normalizers,
)
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


def test_missing_statistics_of_a_file_are_an_error_when_they_are_needed(tmp_path: Path):
    """Base models come without; they can be fine-tuned, but not run."""
    folder = shutil.copytree(ROOT / "act/env_prenorm_s0/model", tmp_path / "model")
    path = folder / "policy_preprocessor.json"
    described = json.loads(path.read_text())
    del described["steps"][-1]["state_file"]
    path.write_text(json.dumps(described))
    preprocess, _ = load_pipelines(folder)
    preprocess.save(tmp_path)
    assert json.loads((tmp_path / path.name).read_text()) == described
    with pytest.raises(InputError, match=r"'action' .*QUANTILES.*\['q01', 'q99'\] are missing"):
        preprocess({"action": np.ones((1, 3, 2), np.float32)})


def test_statistics_are_kept_as_they_were_read(tmp_path: Path):
    folder = shutil.copytree(FOLDERS[0], tmp_path / "model")
    (path,) = folder.glob("policy_preprocessor*.safetensors")
    state = safetensors.numpy.load_file(path)
    unusual = {
        "action.count": np.array([7], np.int64),
        "action.scalar": np.array(0.5, np.float64),
        "observation.other.mean": np.ones((2, 1, 3), ml_dtypes.bfloat16),
        "observation.other.empty": np.zeros((0, 2), np.float16),
    }
    safetensors.numpy.save_file(state | unusual, path)
    preprocess, _ = load_pipelines(folder)
    preprocess.save(tmp_path)
    assert (tmp_path / path.name).read_bytes() == path.read_bytes()


def test_new_statistics_are_stored_as_stock_stores_them():
    features = {"observation.image": PolicyFeature(FeatureType.VISUAL, (3, 4, 4))}
    stats = {
        "observation.image": {
            "mean": np.array([0.1, 0.2, 0.3]),
            "std": np.ones((3, 1, 1)),
            "count": np.array([5]),
        },
        "timestamp": {"mean": np.array([1.5])},
    }
    normalizer, _ = make_normalizers(features, {}, {"VISUAL": NormalizationMode.MEAN_STD}, stats)
    assert {key: (x.dtype, x.shape) for key, x in normalizer.state.items()} == {
        "observation.image.mean": (np.float32, (3, 1, 1)),
        "observation.image.std": (np.float32, (3, 1, 1)),
        "observation.image.count": (np.float32, (1, 1, 1)),
        "timestamp.mean": (np.float32, (1,)),
    }


def test_normalization_keeps_to_its_keys_and_epsilon():
    features = {
        "observation.state": PolicyFeature(FeatureType.STATE, (2,)),
        "observation.force": PolicyFeature(FeatureType.STATE, (2,)),
        "action.gripper": PolicyFeature(FeatureType.ACTION, (2,)),  # stock scales "action" alone
    }
    modes = dict.fromkeys(FeatureType, NormalizationMode.MEAN_STD)
    stats = dict.fromkeys((*features, "action"), STATS)
    normalizer = Normalizer(
        features, modes, stats, eps=0.5, normalize_observation_keys=("observation.state",)
    )
    batch = {key: np.full((1, 2), 3.0, np.float32) for key in stats}
    result = normalizer(batch)
    for key in ("observation.state", "action"):
        np.testing.assert_allclose(result[key], [[2.0, 2.0]])  # (3 - 1) / (0.5 + 0.5), (3 - 2) / (0 + 0.5)
    for key in ("observation.force", "action.gripper"):
        np.testing.assert_array_equal(result[key], batch[key])
    assert normalizer.to_config()["normalize_observation_keys"] == ["observation.state"]


def test_images_take_statistics_of_any_layout():
    features = {"observation.image": PolicyFeature(FeatureType.VISUAL, (3, 4, 5))}
    image = np.random.default_rng(0).uniform(0, 1, (2, 4, 5, 3)).astype(np.float32)
    mean = np.array([0.1, 0.2, 0.3], np.float32)
    for shape in [(3,), (3, 1, 1)]:
        stats = {"observation.image": {"mean": mean.reshape(shape), "std": np.ones(shape, np.float32)}}
        normalizer = Normalizer(features, {FeatureType.VISUAL: NormalizationMode.MEAN_STD}, stats)
        np.testing.assert_allclose(
            normalizer({"observation.image": image})["observation.image"], image - mean
        )


@pytest.mark.parametrize(
    ("name", "dtype"),
    [
        ("half", "float16"),
        ("bfloat16", "bfloat16"),
        ("float", "float32"),
        ("double", "float32"),
        (None, "float32"),
    ],
)
def test_float_types_have_stocks_names(name: str | None, dtype: str):
    device = Device("cpu", name)
    features = {"action": PolicyFeature(FeatureType.ACTION, (2,))}
    stats = {"action": {"min": np.array([-1.0, 1.0]), "max": np.array([3.0, 3.0])}}
    normalizer = Normalizer(features, {FeatureType.ACTION: NormalizationMode.MIN_MAX}, stats)
    batch = {"action": np.array([[1.0, 1.0]], np.float32), "action_is_pad": np.array([[True]])}
    result = jax.jit(Pipeline("policy_preprocessor", (device, normalizer)))(batch)
    assert result["action"].dtype == dtype  # statistics follow
    np.testing.assert_allclose(np.asarray(result["action"], np.float32), [[0.0, -1.0]])
    assert result["action_is_pad"].dtype == bool
    assert device.to_config() == {"device": "cpu", "float_dtype": name}


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

    settings = original["steps"][-1]["config"]
    beside = "the name of a safetensors file beside it"
    faults = [
        ("unknown step 'teleport'", edited(registry_name="teleport")),
        (r"unknown step \['normalizer_processor'\]", edited(registry_name=["normalizer_processor"])),
        ("unknown step None", {**original, "steps": [{}]}),
        ("step 0 must be an object, it is 'x'", {**original, "steps": ["x"]}),
        ("'steps' must be a list, it is {}", {**original, "steps": {}}),
        (r"must be an object with a 'name' and 'steps', it has \['name'\]", {"name": "policy_preprocessor"}),
        ("must be an object with a 'name' and 'steps', it has list", [original]),
        ("'name' must be 'policy_preprocessor', it is '../../x'", {**original, "name": "../../x"}),
        ("'name' must be 'policy_preprocessor', it is 1", {**original, "name": 1}),
        ("must have a 'config'", {**original, "steps": [{"registry_name": "to_batch_processor"}]}),
        ("must have a 'config'", edited(config=[])),
        ("must have a 'config'", edited(extra=1)),
        ("missing.safetensors: no such file", edited(state_file="missing.safetensors")),
        (beside, edited(state_file="../model/policy_preprocessor_step_3_normalizer_processor.safetensors")),
        (beside, edited(state_file="/etc/passwd")),
        (beside, edited(state_file=None)),
        ("two steps have the same state_file", {**original, "steps": [original["steps"][-1]] * 2}),
        ("has settings that do not fit: unknown setting 'epsilon'", edited(config={"epsilon": 1})),
        ("do not fit: eps must be of type float, it is 'small'", edited(config=settings | {"eps": "small"})),
        ("do not fit: eps must be of type float, it is True", edited(config=settings | {"eps": True})),
        ("'features' and 'norm_map' are needed", edited(config={"eps": 1e-8})),
        (r"features must be of type Mapping\[str, Mapping", edited(config=settings | {"features": [1]})),
        ("'a': shape must be of type", edited(config=settings | {"features": {"a": {"shape": "3"}}})),
        ("'a' must have a type and a shape", edited(config=settings | {"features": {"a": {"shape": [3]}}})),
        ("'LIGHT' is not a valid FeatureType", edited(config=settings | {"norm_map": {"LIGHT": "IDENTITY"}})),
        ("'MEAN' is not a valid Normal", edited(config=settings | {"norm_map": {"STATE": "MEAN"}})),
        (
            r"normalize_observation_keys must be of type Sequence\[str\] \| None, it is 'x'",
            edited(config=settings | {"normalize_observation_keys": "x"}),
        ),
        ("a step of this kind has no state", edited(registry_name="to_batch_processor", config={})),
        (
            "float_dtype must be one of float16, half, .*, not 'int8'",
            {**original, "steps": [{"registry_name": "device_processor", "config": {"float_dtype": "int8"}}]},
        ),
        (
            "padding must be one of max_length, longest, do_not_pad, True, False, not 'most'",
            {**original, "steps": [{"registry_name": "tokenizer_processor", "config": {"padding": "most"}}]},
        ),
        (
            "unknown setting 'relative'; known are enabled",
            {
                **original,
                "steps": [{"registry_name": "absolute_actions_processor", "config": {"relative": None}}],
            },
        ),
    ]
    for message, content in faults:
        path.write_text(json.dumps(content))
        with pytest.raises(InputError, match=message) as error:
            load_pipelines(folder)
        assert str(folder) in str(error.value)
    path.write_text(json.dumps(edited(state_file="bad.safetensors")))
    safetensors.numpy.save_file({"mean": np.ones(2)}, folder / "bad.safetensors")
    with pytest.raises(InputError, match=r"'mean', which is not FEATURE\.STATISTIC"):
        load_pipelines(folder)
    path.write_text("{")
    with pytest.raises(InputError, match="not valid JSON"):
        load_pipelines(folder)
    path.unlink()
    with pytest.raises(InputError, match=r"policy_preprocessor.json: no such file"):
        load_pipelines(folder)
