"""Training on several datasets: the real program, resumed, and its policies for each of them."""

import dataclasses
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest

from lerobot_jax import convert, sharding, train, train_step, training_data
from lerobot_jax.config import DatasetConfig, SourceConfig, TrainConfig, load_config
from lerobot_jax.data.dataset import LeRobotDataset
from lerobot_jax.errors import InputError
from lerobot_jax.features import FeatureType, PolicyFeature
from lerobot_jax.metrics import read_metrics
from lerobot_jax.policies.act import ACTConfig
from lerobot_jax.policies.base import load_policy
from tests.data.recordings import record
from tests.runs import FEATURES, assert_same_run

RECIPE = """
from lerobot_jax.config import DatasetConfig, SourceConfig, TrainConfig
from lerobot_jax.features import NormalizationMode
from lerobot_jax.policies.act import ACTConfig

def get_config(variant=""):
    wide = SourceConfig("test/wide", root="{wide}", weight=3)
    narrow = SourceConfig("test/narrow", root="{narrow}", rename_map={{"observation.joints": "observation.state"}})
    return TrainConfig(
        job_name="mixed",
        dataset=DatasetConfig(mixture=(wide, narrow), eval_split=0.3),
        policy=ACTConfig(
            normalization_mapping=dict.fromkeys(("STATE", "ENV", "ACTION"), NormalizationMode.MEAN_STD),
            chunk_size=4, n_action_steps=2, dim_model=16, n_heads=2, dim_feedforward=16, n_encoder_layers=1,
            n_vae_encoder_layers=1, latent_dim=4, optimizer_lr=1e-3,
        ),
        steps=20, batch_size=8, log_freq=5, save_freq=10, env_eval_freq=0, eval_steps=10,
    )
"""
STATE, ENV = "observation.state", "observation.environment_state"


@pytest.fixture(scope="module")
def roots(tmp_path_factory) -> dict[str, Path]:
    """Two robots: one with 3 joints and 2 actions, one with 2 joints under another name and 1 action."""
    folder = tmp_path_factory.mktemp("data")
    narrow: dict[str, dict[str, Any]] = {ENV: FEATURES[ENV]}
    narrow |= {"observation.joints": {"dtype": "float32", "shape": (2,), "names": None}}
    narrow |= {"action": {"dtype": "float32", "shape": (1,), "names": None}}
    wide_root = record(folder / "wide", lengths=(9, 12, 8, 11), features=FEATURES).root
    return {
        "wide": wide_root,
        "narrow": record(folder / "narrow", lengths=(10, 7, 9, 8), features=narrow).root,
    }


@pytest.fixture
def arguments(roots: dict[str, Path], tmp_path: Path) -> list[str]:
    recipe = tmp_path / "mixed.py"
    recipe.write_text(RECIPE.format(**roots))
    return [f"--config={recipe}", f"--config.output_dir={tmp_path / 'run'}"]


def test_each_sample_is_normalized_with_its_own_datasets_statistics(arguments: list[str]):
    config = load_config(arguments)
    sources = training_data.open_sources(config)
    policies = training_data.build_policies(config, sources)
    assert policies[0].config.input_features[STATE].shape == (3,)
    assert policies[0].config.output_features["action"].shape == (2,)
    mesh = sharding.make_mesh()
    whole, split = sharding.replicated(mesh), sharding.batch_sharding(mesh, 64)
    batch = training_data.training_samples(config, sources, policies, whole, split).read(np.arange(64))
    assert np.bincount(batch["dataset_index"])[1] in range(8, 25)
    seeds = dataclasses.replace(config, num_seeds=2, seed=config.seed - 1)
    both = training_data.training_samples(seeds, sources, policies, whole, split).read(np.arange(64))
    jax.tree.map(lambda values, expected: np.testing.assert_array_equal(values[1], expected), both, batch)
    assert (both["action"][0] != both["action"][1]).any()
    seen = jax.jit(train_step.make_preprocess(policies, is_mixture=True))(batch)
    for i, source in enumerate(sources):
        stats = source.dataset.meta.stats
        of_dataset = batch["dataset_index"] == i
        for key in (STATE, ENV, "action"):
            own = "observation.joints" if source.name == "test/narrow" and key == STATE else key
            mean, std = stats[own]["mean"].astype(np.float32), stats[own]["std"].astype(np.float32)
            raw = batch[key][of_dataset].reshape(int(of_dataset.sum()), -1, batch[key].shape[-1])
            values = np.asarray(seen[key])[of_dataset].reshape(raw.shape)
            np.testing.assert_allclose(
                values[..., : len(mean)], (raw[..., : len(mean)] - mean) / std, atol=1e-5
            )
            assert not values[..., len(mean) :].any()


@pytest.mark.slow
def test_a_mixture_trains_resumes_exactly_and_tells_the_loss_of_each_dataset(
    arguments: list[str], roots: dict[str, Path], tmp_path: Path
):
    train.main(arguments)
    run = tmp_path / "run"
    records = read_metrics(run / "metrics.jsonl")
    last = [r for r in records if "loss" in r][-1]
    losses = {last["loss/test/wide"], last["loss/test/narrow"], last["loss"]}
    assert len(losses) == 3
    assert min(losses) < last["loss"] < max(losses)
    held_out = [r for r in records if "eval_loss" in r][-1]
    pair = sorted([held_out["eval_loss/test/wide"], held_out["eval_loss/test/narrow"]])
    assert pair[0] < held_out["eval_loss"] < pair[1]

    other = [a for a in arguments if "output_dir" not in a] + [f"--config.output_dir={tmp_path / 'stopped'}"]
    train.main([*other, "--config.steps=10"])
    train.main([*other, "--config.resume=True", "--config.num_workers=3"])
    assert_same_run(run, tmp_path / "stopped")

    model = run / "checkpoints/last/pretrained_model"
    convert.main(["to-torch", str(run), "--dataset=test/narrow", f"--output_dir={tmp_path / 'narrow'}"])
    first, narrow = load_policy(model), load_policy(tmp_path / "narrow")
    np.testing.assert_array_equal(
        first.params["model"]["action_head"]["bias"], narrow.params["model"]["action_head"]["bias"]
    )
    for policy, name, key in ((first, "wide", STATE), (narrow, "narrow", "observation.joints")):
        dataset = LeRobotDataset(f"test/{name}", roots[name])
        stats, frame = dataset.meta.stats[key], dataset[3]
        width = len(stats["mean"])
        state = np.pad(frame[key], (0, 3 - width))
        seen = policy.preprocess({key: state[None], ENV: frame[ENV][None]})[STATE][0]
        np.testing.assert_allclose(seen[:width], (frame[key] - stats["mean"]) / stats["std"], rtol=1e-4)
    with pytest.raises(
        InputError, match="no processors for dataset 'test/other'; it has test/narrow, test/wide"
    ):
        convert.main(["to-torch", str(run), "--dataset=test/other", f"--output_dir={tmp_path / 'other'}"])


def test_a_mixture_of_one_trains_as_that_dataset_alone(arguments: list[str], roots: dict[str, Path]):
    """The order of a dataset's samples does not depend on the others."""
    config = load_config(arguments)
    sources = training_data.open_sources(config)
    policies = training_data.build_policies(config, sources)
    mesh = sharding.make_mesh()
    whole, split = sharding.replicated(mesh), sharding.batch_sharding(mesh, 8)
    mixed = training_data.training_samples(config, sources, policies, whole, split).read(np.arange(100))
    alone_dataset = DatasetConfig("test/wide", root=str(roots["wide"]), eval_split=0.3)
    alone = dataclasses.replace(config, dataset=alone_dataset)
    source = training_data.open_sources(alone)
    samples = training_data.training_samples(
        alone, source, training_data.build_policies(alone, source), whole, split
    )
    wide = mixed["action"][mixed["dataset_index"] == 0]
    np.testing.assert_array_equal(wide, samples.read(np.arange(len(wide)))["action"])


def test_names_that_would_train_on_nothing_are_refused(arguments: list[str]):
    config = load_config(arguments)
    wide, narrow = config.dataset.mixture

    def error(**changes: Any) -> str:
        mixture = (wide, dataclasses.replace(narrow, **changes))
        changed = dataclasses.replace(config, dataset=dataclasses.replace(config.dataset, mixture=mixture))
        with pytest.raises(InputError) as caught:
            training_data.build_policies(changed, training_data.open_sources(changed))
        return str(caught.value)

    assert "rename_map: test/narrow has no ['observation.joint']; it has" in error(
        rename_map={"observation.joint": STATE}
    )
    assert "rename_map: two features of test/narrow would be called ['observation.joints']" in error(
        rename_map={ENV: "observation.joints"}
    )
    for wrong in ({"root": "elsewhere"}, {"episodes": (0,)}, {"revision": "main"}):
        with pytest.raises(
            ValueError, match="each of its datasets has root, episodes and revision of its own"
        ):
            dataclasses.replace(config.dataset, **wrong)
    with pytest.raises(ValueError, match="'/data/foo' is a path; give that as root"):
        dataclasses.replace(config.dataset, mixture=(SourceConfig("/data/foo"),))


def test_a_camera_that_only_some_datasets_have(tmp_path: Path, caplog):
    """It is black for the others; a dataset without any camera of the policy is refused."""
    image = {"dtype": "image", "shape": (8, 8, 3), "names": ["height", "width", "channels"]}
    numbers = {"action": FEATURES["action"], STATE: FEATURES[STATE]}
    cameras = (("front",), ("front", "wrist"), ("other",))
    sources = tuple(
        SourceConfig(
            f"test/{i}",
            root=str(
                record(
                    tmp_path / str(i), (5, 6), {f"observation.images.{c}": image for c in some} | numbers
                ).root
            ),
        )
        for i, some in enumerate(cameras)
    )
    for chosen, policy_cameras in (((0, 1), ("front", "wrist")), ((0, 2), ("front",))):
        inputs = {
            f"observation.images.{c}": PolicyFeature(FeatureType.VISUAL, (3, 8, 8)) for c in policy_cameras
        }
        policy = dataclasses.replace(
            ACTConfig.tiny(),
            input_features={STATE: PolicyFeature(FeatureType.STATE, (3,)), **inputs},
            output_features={"action": PolicyFeature(FeatureType.ACTION, (2,))},
        )
        config = TrainConfig(policy=policy, dataset=DatasetConfig(mixture=tuple(sources[i] for i in chosen)))
        opened = training_data.open_sources(config)
        if chosen == (0, 1):
            training_data.build_policies(config, opened)
            assert "test/0: lacks ['observation.images.wrist'], which will be black" in caplog.text
        else:
            with pytest.raises(InputError, match="test/2: has none of the cameras"):
                training_data.build_policies(config, opened)
