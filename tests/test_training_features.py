"""Training and rollout of a policy that takes images of any size and does without cameras."""

import dataclasses
from pathlib import Path
from typing import Any

import huggingface_hub.constants
import jax
import numpy as np
import pytest

from lerobot_jax import certificate, state_dict, train, train_step, training_data
from lerobot_jax.config import DatasetConfig, SourceConfig, TrainConfig
from lerobot_jax.errors import InputError
from lerobot_jax.features import FeatureType, PolicyFeature
from lerobot_jax.policies.base import FunctionalPolicy, load_policy, make_policy
from lerobot_jax.policies.pi0 import PI0Config
from lerobot_jax.training_features import policy_features
from tests.data.recordings import FEATURES, record
from tests.test_training_text import RECIPE, STATE, TOKENIZERS, opened
from tests.toy_vla import SIDE, TOP, Config

EMPTY = "observation.images.empty_camera_0"


@pytest.fixture(autouse=True)
def _tokenizers(monkeypatch, tmp_path: Path):
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(TOKENIZERS))
    monkeypatch.setenv("LEROBOT_JAX_CACHE", str(tmp_path / "cache"))


@pytest.fixture(scope="module")
def root(tmp_path_factory) -> Path:
    return record(tmp_path_factory.mktemp("data") / "one", (9, 12, 8, 11)).root


@pytest.fixture
def policy() -> FunctionalPolicy:
    stats = {key: {"q01": np.full(n, -1.0), "q99": np.ones(n)} for key, n in ((STATE, 3), ("action", 2))}
    policy = make_policy(Config.tiny(), stats)
    params, buffers = policy.init(jax.random.key(0))
    return policy.replace(params=params, buffers=buffers)


def observation(num: int, **sizes: tuple[int, int]) -> dict[str, Any]:
    rng = np.random.default_rng(0)
    images = {
        f"observation.images.{camera}": rng.integers(0, 256, (num, *size, 3)).astype(np.uint8)
        for camera, size in sizes.items()
    }
    return {STATE: rng.uniform(size=(num, 3)).astype(np.float32), "task": ["go", "stop"][:num], **images}


def log_of(caplog) -> list[str]:
    return [message for record in caplog.records if "masked" in (message := record.getMessage())]


def test_a_policy_is_trained_on_images_of_another_size_without_a_camera(root: Path, tmp_path: Path, caplog):
    """The dataset's images are 32 x 48; the settings say 16 x 16, and a second camera."""
    recipe = tmp_path / "toy.py"
    made = RECIPE.replace("Config()", "dataclasses.replace(Config.tiny(), empty_cameras=1)")
    recipe.write_text("import dataclasses" + made.format(root=root))
    train.main([f"--config={recipe}", f"--config.output_dir={tmp_path / 'run'}"])
    assert log_of(caplog) == [f"test/recorded lacks {SIDE}, which will be masked"]
    trained = load_policy(tmp_path / "run/checkpoints/last/pretrained_model")
    shapes = {key: feature.shape for key, feature in trained.config.image_features.items()}
    assert shapes == dict.fromkeys((TOP, SIDE, EMPTY), (3, 16, 16))


def test_a_mixture_has_images_as_large_as_its_datasets(root: Path, tmp_path: Path):
    features = {SIDE if key == TOP else key: feature for key, feature in FEATURES.items()}
    other = record(tmp_path / "two", (9, 12), features).root
    sources = (SourceConfig("test/one", root=str(root)), SourceConfig("test/two", root=str(other)))
    config = TrainConfig(policy=Config.tiny(), dataset=DatasetConfig(mixture=sources), batch_size=32)
    _, policies, samples = opened(config)
    batch = samples.read(np.arange(32))
    seen = jax.jit(train_step.make_preprocess(policies, is_mixture=True))(batch)
    for number, camera in enumerate((TOP, SIDE)):
        assert seen[camera].shape == (32, 32, 48, 3)
        is_here = batch["dataset_index"] == number
        np.testing.assert_array_equal(seen[f"{camera}_is_pad"], ~is_here)
        assert [image.any() for image in np.asarray(seen[camera])] == is_here.tolist()
    small = {"dtype": "image", "shape": (8, 8, 3), "names": ["height", "width", "channels"]}
    third = record(tmp_path / "three", (9, 12), {**FEATURES, TOP: small}).root
    sources = (sources[0], SourceConfig("test/three", root=str(third)))
    with pytest.raises(InputError, match=r"dataset.image_size can make images equal"):
        opened(dataclasses.replace(config, dataset=DatasetConfig(mixture=sources)))


def test_a_base_model_of_wider_robots_takes_the_datasets_widths(root: Path):
    tiny = PI0Config.tiny()
    wide = {STATE: PolicyFeature(FeatureType.STATE, (8,)), TOP: tiny.image_features[TOP]}
    policy = dataclasses.replace(
        tiny, input_features=wide, output_features={"action": PolicyFeature(FeatureType.ACTION, (8,))}
    )
    config = TrainConfig(policy=policy, dataset=DatasetConfig(repo_id="test/recorded", root=str(root)))
    inputs, outputs = policy_features(config, training_data.open_sources(config))
    assert (inputs[STATE].shape, outputs["action"].shape) == ((3,), (2,))
    assert inputs[TOP] == wide[TOP]


def test_a_dataset_without_any_camera_is_refused(tmp_path: Path):
    features = {key: feature for key, feature in FEATURES.items() if key != TOP}
    root = record(tmp_path / "blind", (9, 12), features).root
    with pytest.raises(InputError, match=r"test/blind: has none of the cameras .*side.*top"):
        opened(TrainConfig(policy=Config.tiny(), dataset=DatasetConfig("test/blind", root=str(root))))


def test_a_robot_may_lack_cameras_but_not_all(policy: FunctionalPolicy, caplog):
    runner = policy.make_runner(2)
    runner.compile()
    both = runner.select_action(observation(2, top=(30, 44), side=(8, 8)))
    assert not log_of(caplog)
    runner = policy.make_runner(2)
    rows = observation(2, top=(30, 44))
    one = runner.select_action(rows)
    assert (one != both).any()
    runner.select_action(rows)
    runner.select_action(rows)
    assert log_of(caplog) == [f"the observation lacks {SIDE}, which will be masked"]
    with pytest.raises(
        InputError, match=rf"the policy needs '{TOP}', the observation has \['{STATE}', 'task'\]"
    ):
        runner.select_action(observation(2))
    with pytest.raises(InputError, match=r"the policy needs one of \[.*side', .*top'\], the batch has"):
        policy.preprocess(observation(2))
    with pytest.raises(InputError, match=r"needs 'observation.images.side' of shape .* it has \(2, 8, 8\)"):
        runner.select_action(rows | {SIDE: np.zeros((2, 8, 8), np.uint8)})


def test_the_runner_tokenizes_when_it_needs_a_chunk(policy: FunctionalPolicy, monkeypatch):
    told, tokenize = [], FunctionalPolicy.tokenize
    monkeypatch.setattr(
        FunctionalPolicy, "tokenize", lambda *args: told.append(args[1]["task"]) or tokenize(*args)
    )
    runner, rows = policy.make_runner(2), observation(2, top=(16, 16))
    for _ in range(4):
        runner.select_action(rows)
    assert told == [["go"], ["stop"]] * 2  # n_action_steps is 2
    with pytest.raises(InputError, match="2 samples but 3 texts in 'task'"):
        runner.select_action({**rows, "task": ["go", "stop", "go"], STATE: rows[STATE]})


def test_certificates_have_no_cameras_that_are_never_there(policy: FunctionalPolicy, tmp_path: Path):
    feature = PolicyFeature(FeatureType.VISUAL, (3, 16, 16))
    config = dataclasses.replace(
        policy.config, input_features={**policy.config.input_features, EMPTY: feature}
    )
    policy.replace(config=config).save_pretrained(tmp_path)
    seen = certificate.preprocess(policy, state_dict.read(tmp_path / certificate.CERTIFICATE_NAME))
    assert set(seen) == {STATE, TOP, SIDE}
    load_policy(tmp_path)
