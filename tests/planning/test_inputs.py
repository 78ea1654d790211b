"""The shapes of batches that a plan expects are those of real batches."""

import dataclasses
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest

from lerobot_jax import training_data
from lerobot_jax.config import DatasetConfig, SourceConfig, TrainConfig
from lerobot_jax.errors import InputError
from lerobot_jax.features import FeatureType, PolicyFeature
from lerobot_jax.planning.inputs import batch_shapes, describe_run
from lerobot_jax.policies.act import ACTConfig
from lerobot_jax.policies.base import config_class
from lerobot_jax.program import Program
from lerobot_jax.sharding import make_mesh
from tests.data.recordings import record
from tests.policies.test_contract import NAMES

pytestmark = pytest.mark.usefixtures("stand_ins")


def _shapes(batch: dict[str, Any]) -> dict[str, tuple]:
    return {key: (x.shape, jax.dtypes.canonicalize_dtype(x.dtype)) for key, x in batch.items()}


def _real_batch(config: TrainConfig) -> dict[str, Any]:
    """Read a batch as train.py does."""
    config = dataclasses.replace(config, dataset=dataclasses.replace(config.dataset, frame_mode="decode"))
    sources = training_data.open_sources(config)
    policies = training_data.build_policies(config, sources)
    program = Program(config, policies, [source.name for source in sources], make_mesh())
    where = program.layout.replicated
    samples = training_data.training_samples(config, sources, policies, where, program.samples_sharding)
    batch = samples.read(np.arange(program.samples_per_step))
    if config.gradient_accumulation_steps == 1:
        return batch
    lead = program.layout.lead
    shape = (*lead, config.gradient_accumulation_steps, config.batch_size)
    return {key: x.reshape(*shape, *x.shape[len(lead) + 1 :]) for key, x in batch.items()}


def _expected(config: TrainConfig) -> dict[str, Any]:
    sources, policies = describe_run(config)
    return batch_shapes(config, sources, policies)


def _dataset_features(policy: Any) -> dict[str, dict[str, Any]]:
    result: dict[str, dict[str, Any]] = {}
    for key, feature in {**policy.input_features, **policy.output_features}.items():
        if feature.type == FeatureType.VISUAL:
            channels, height, width = feature.shape
            names = ["height", "width", "channels"]
            result[key] = {"dtype": "image", "shape": (height, width, channels), "names": names}
        else:
            result[key] = {"dtype": "float32", "shape": feature.shape, "names": None}
    return result


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("is_there", [True, False])
def test_every_policys_batches(name: str, is_there: bool, tmp_path: Path):
    policy = config_class(name).tiny()
    root = record(tmp_path / "data", (40, 50), _dataset_features(policy)).root
    config = TrainConfig(policy=policy, dataset=DatasetConfig("test/recorded", root=str(root)), batch_size=16)
    real = _shapes(_real_batch(config))
    if not is_there:  # planned from the policy's features
        missing = DatasetConfig("test/recorded", root=str(tmp_path / "nowhere"))
        config = dataclasses.replace(config, dataset=missing)
    assert _shapes(_expected(config)) == real


@pytest.mark.parametrize("name", ["pi0", "pi05"])
def test_a_plan_needs_no_tokenizer(name: str, tmp_path: Path):
    policy: Any = config_class(name).tiny()
    shapes = []
    for tokenizer in (policy.tokenizer_name, "nobody/nothing"):
        config = dataclasses.replace(policy, tokenizer_name=tokenizer)
        dataset = DatasetConfig("test/recorded", root=str(tmp_path / "nowhere"))
        shapes.append(_shapes(_expected(TrainConfig(policy=config, dataset=dataset, batch_size=8))))
    assert shapes[0] == shapes[1]


@pytest.mark.parametrize(
    "changes",
    [
        {"num_seeds": 2},
        {"gradient_accumulation_steps": 3},
        {"num_seeds": 8, "gradient_accumulation_steps": 2},
        {"image_size": (24, 40)},
    ],
)
def test_seeds_micro_batches_and_resized_frames(changes: dict[str, Any], tmp_path: Path):
    root = record(tmp_path / "data", (20, 20)).root
    size = changes.pop("image_size", None)
    dataset = DatasetConfig("test/recorded", root=str(root), image_size=size)
    policy = dataclasses.replace(ACTConfig.tiny(), input_features={}, output_features={})
    config = TrainConfig(policy=policy, dataset=dataset, batch_size=8, **changes)
    assert _shapes(_expected(config)) == _shapes(_real_batch(config))


def test_mixtures_and_renamed_and_missing_cameras(tmp_path: Path):
    image = {"dtype": "image", "shape": (8, 8, 3), "names": ["height", "width", "channels"]}
    vectors = {"action": 2, "observation.joints": 3}
    numbers = {k: {"dtype": "float32", "shape": (n,), "names": None} for k, n in vectors.items()}
    sources = tuple(
        SourceConfig(
            f"test/{i}",
            root=str(
                record(
                    tmp_path / str(i), (20, 20), {f"observation.images.{c}": image for c in cameras} | numbers
                ).root
            ),
            rename_map={"observation.joints": "observation.state"},
        )
        for i, cameras in enumerate((("front",), ("front", "wrist")))
    )
    inputs = {
        f"observation.images.{c}": PolicyFeature(FeatureType.VISUAL, (3, 8, 8)) for c in ("front", "wrist")
    }
    policy = dataclasses.replace(
        ACTConfig.tiny(),
        input_features={"observation.state": PolicyFeature(FeatureType.STATE, (4,)), **inputs},
        output_features={"action": PolicyFeature(FeatureType.ACTION, (2,))},
    )
    config = TrainConfig(policy=policy, dataset=DatasetConfig(mixture=sources), batch_size=8)
    expected = _shapes(_expected(config))
    assert expected == _shapes(_real_batch(config))
    assert expected["observation.state"] == ((8, 4), np.float32)


def test_builtin_datasets_are_not_made_for_a_plan(tmp_path: Path, monkeypatch):
    pytest.importorskip("gym_pusht")
    monkeypatch.setenv("HF_LEROBOT_HOME", str(tmp_path))
    policy = dataclasses.replace(ACTConfig.tiny(), input_features={}, output_features={})
    shapes = _expected(TrainConfig(policy=policy, batch_size=8))
    assert shapes["observation.image"].shape == (8, 96, 96, 3)
    assert not list(tmp_path.iterdir())


def test_without_a_dataset_the_policy_must_name_its_features(tmp_path: Path):
    policy = dataclasses.replace(ACTConfig.tiny(), input_features={}, output_features={})
    dataset = DatasetConfig("test/recorded", root=str(tmp_path))
    with pytest.raises(InputError, match=r"no such file.*to plan without it, name .*policy\.input_features"):
        _expected(TrainConfig(policy=policy, dataset=dataset))
