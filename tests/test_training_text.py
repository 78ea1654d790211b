"""Training with prompts that tell the state of the sample."""

import dataclasses
import functools
import shutil
from pathlib import Path
from typing import Any, Literal

import huggingface_hub.constants
import jax
import numpy as np
import pytest

from lerobot_jax import sharding, train, train_step, training_data
from lerobot_jax.config import DatasetConfig, SourceConfig, TrainConfig
from lerobot_jax.data.dataset import LeRobotDataset
from lerobot_jax.data.samples import DeviceRows
from lerobot_jax.data.streaming import StreamedSamples
from lerobot_jax.features import FeatureType, PolicyFeature
from lerobot_jax.metrics import read_metrics
from lerobot_jax.planning.inputs import batch_shapes
from lerobot_jax.policies.base import FunctionalPolicy, load_config, load_policy, make_policy
from lerobot_jax.processors import OBS_LANGUAGE_ATTENTION_MASK, OBS_LANGUAGE_TOKENS, load_pipelines
from lerobot_jax.seeds import SeedLayout
from lerobot_jax.training_text import make_tokenize
from tests.data.recordings import FEATURES, record
from tests.goldens import ROOT, Golden
from tests.runs import assert_same_run
from tests.toy_vla import SIDE, TOP, Config

TOKENIZERS = Path(__file__).parent / "processors/golden/tokenizers"
LENGTHS = (9, 12, 8, 11)
STATE, JOINT = "observation.state", "observation.joint"
TOKENS = (OBS_LANGUAGE_TOKENS, OBS_LANGUAGE_ATTENTION_MASK)
RECIPE = """
from lerobot_jax.config import DatasetConfig, TrainConfig
from tests.toy_vla import Config

def get_config(variant=""):
    return TrainConfig(
        job_name="toy", dataset=DatasetConfig("test/recorded", root="{root}", eval_split=0.3), policy=Config(),
        steps=8, batch_size=8, log_freq=2, save_freq=4, env_eval_freq=0, eval_steps=4,
    )
"""


@pytest.fixture(autouse=True)
def _tokenizers(monkeypatch, tmp_path: Path):
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(TOKENIZERS))
    monkeypatch.setenv("LEROBOT_JAX_CACHE", str(tmp_path / "cache"))


@pytest.fixture(scope="module")
def root(tmp_path_factory) -> Path:
    tasks = ("pick_up the red cube", "open the drawer\nnow")
    return record(tmp_path_factory.mktemp("data") / "one", LENGTHS, tasks=tasks).root


@pytest.fixture(scope="module")
def other(tmp_path_factory) -> Path:
    """Another robot: one joint, under another name, and another camera of the same size."""
    features = {key: FEATURES[key] for key in ("action",)}
    features |= {JOINT: {"dtype": "float32", "shape": (1,), "names": None}, SIDE: FEATURES[TOP]}
    return record(tmp_path_factory.mktemp("data") / "two", LENGTHS, features, tasks=("stack", "sort")).root


def two(root: Path, other: Path) -> DatasetConfig:
    narrow = SourceConfig("test/two", root=str(other), rename_map={JOINT: STATE})
    return DatasetConfig(mixture=(SourceConfig("test/one", root=str(root)), narrow), eval_split=0.3)


def opened(config: TrainConfig, batch_size: int = 32) -> tuple[list[Any], list[FunctionalPolicy], Any]:
    sources = training_data.open_sources(config)
    policies = training_data.build_policies(config, sources)
    layout = SeedLayout(config.num_seeds, sharding.make_mesh())
    places = layout.replicated, layout.batches(batch_size)
    return sources, policies, training_data.training_samples(config, sources, policies, *places)


def told(policy: FunctionalPolicy, dataset: LeRobotDataset, rows: np.ndarray) -> dict[str, np.ndarray]:
    """Give the tokens of rows one by one, as a robot would be told."""
    frames = [dataset[int(i)] for i in rows]
    shape = policy.config.input_features[STATE].shape
    rename = {new: old for old, new in policy.preprocessor.rename_map.items()}
    key = rename.get(STATE, STATE)
    one_by_one = [
        policy.tokenize({key: np.resize(frame[key], shape)[None], "task": [frame["task"]]})
        for frame in frames
    ]
    return {name: np.concatenate([each[name] for each in one_by_one]) for name in TOKENS}


def assert_tokens(batch: dict[str, Any], expected: dict[str, np.ndarray]) -> None:
    for key in TOKENS:
        np.testing.assert_array_equal(batch[key], expected[key], err_msg=key)


@pytest.mark.parametrize("folder", sorted((ROOT / "pi05").iterdir()), ids=lambda path: path.name)
def test_tokens_are_those_of_stock(folder: Path, stand_ins: None):
    """Of images, actions and states as a dataset gives them."""
    golden = Golden(folder)
    model = folder / "model"
    policy = FunctionalPolicy(load_config(model), None, *load_pipelines(model))
    tokenize = make_tokenize(policy, is_mixture=False)
    assert tokenize is not None
    raw, expected = golden.inputs("raw/"), golden.inputs("in/")
    batch = tokenize(raw)
    assert_tokens(batch, expected)
    assert "task" not in batch
    assert all(batch[key] is raw[key] for key in raw if key != "task")


@pytest.mark.parametrize("mode", ["decode", "cache", "device", "streaming", "seeds", "device seeds"])
def test_each_sample_comes_with_the_prompt_that_tells_its_state(root: Path, mode: str):
    dataset: dict[str, Any] = {"streaming": True, "buffer_size": 20}
    if mode != "streaming":
        dataset = {"frame_mode": mode.split()[0] if mode != "seeds" else "decode"}
    config = TrainConfig(
        policy=Config(),
        dataset=DatasetConfig("test/recorded", root=str(root), eval_split=0.3, **dataset),
        batch_size=32,
        num_seeds=2 if "seeds" in mode else 1,
    )
    sources, policies, samples = opened(config)
    assert isinstance(samples, DeviceRows) == ("device" in mode)
    batch = {key: np.asarray(value) for key, value in samples.read(np.arange(32)).items()}
    placed = functools.partial(sharding.BatchPlacement.of, sharding.replicated(sharding.make_mesh()))
    held_out = training_data.held_out_batches(config, sources, policies, samples, placed)
    batches = [batch, *(part for _, part in held_out["test/recorded"])]
    if "seeds" in mode:
        batches = [jax.tree.map(lambda x, i=i: x[i], batch) for i in range(2)] + batches[1:]
        assert (batches[0][STATE] != batches[1][STATE]).any()
    whole = LeRobotDataset("test/recorded", root)
    for each in batches:
        rows = [np.flatnonzero((whole.columns[STATE] == s).all(1))[0] for s in np.asarray(each[STATE])]
        assert_tokens(each, told(policies[0], whole, np.array(rows)))
        assert "task" not in each
    seen = jax.jit(train_step.make_preprocess(policies, is_mixture=False))(batches[0])
    assert_tokens(seen, batches[0])
    assert len(np.unique(seen[TOKENS[0]], axis=0)) > 10
    if mode == "decode":
        shapes = batch_shapes(config, sources, policies)
        assert {k: (x.shape, x.dtype) for k, x in shapes.items()} == {
            k: (x.shape, x.dtype) for k, x in batch.items()
        }
    if isinstance(samples, StreamedSamples):
        samples.close()


@pytest.mark.parametrize("mode", ["decode", "device"])
def test_a_single_joint_under_another_name_is_told_too(
    other: Path, mode: Literal["decode", "device"], tmp_path: Path
):
    """LeRobot's datasets give single numbers without an axis."""
    joint = PolicyFeature(FeatureType.STATE, (1,))
    settings = dataclasses.replace(
        Config.tiny(), input_features={**Config.tiny().input_features, STATE: joint}
    )
    stats = {key: {"q01": np.full(n, -1.0), "q99": np.ones(n)} for key, n in ((STATE, 1), ("action", 2))}
    policy = make_policy(settings, stats)
    params, buffers = policy.init(jax.random.key(0))
    policy.replace(params=params, buffers=buffers).save_pretrained(tmp_path / "policy")
    settings = dataclasses.replace(settings, pretrained_path=str(tmp_path / "policy"))
    dataset = DatasetConfig("test/two", root=str(other), frame_mode=mode)
    config = TrainConfig(policy=settings, dataset=dataset, rename_map={JOINT: STATE})
    sources, policies, samples = opened(config, 16)
    batch = samples.read(np.arange(16))
    assert batch[JOINT].shape == (16,)
    column = sources[0].dataset.columns[JOINT]
    rows = np.array([np.flatnonzero(column == number)[0] for number in np.asarray(batch[JOINT])])
    assert_tokens(batch, told(policies[0], sources[0].dataset, rows))
    assert train_step.make_preprocess(policies, is_mixture=False)(batch)[STATE].shape == (16, 1)


def test_in_a_mixture_each_prompt_has_the_statistics_of_its_dataset(root: Path, other: Path, caplog):
    config = TrainConfig(policy=Config(empty_cameras=1), dataset=two(root, other), batch_size=32)
    sources, policies, samples = opened(config)
    assert list(policies[0].config.image_features) == [TOP, SIDE, "observation.images.empty_camera_0"]
    logged = [record.getMessage() for record in caplog.records if "lacks" in record.getMessage()]
    assert logged == [
        f"test/one lacks {SIDE}, which will be masked",
        f"test/two lacks {TOP}, which will be masked",
    ]
    batch = samples.read(np.arange(32))
    placed = functools.partial(sharding.BatchPlacement.of, sharding.replicated(sharding.make_mesh()))
    held_out = training_data.held_out_batches(config, sources, policies, samples, placed)
    for each in [batch, *(next(iter(batches))[1] for batches in held_out.values())]:
        assert "observation.images.empty_camera_0" not in each
        for i, (source, key, here) in enumerate(zip(sources, (STATE, JOINT), (TOP, SIDE), strict=True)):
            chosen = each["dataset_index"] == i
            for camera in (TOP, SIDE):
                np.testing.assert_array_equal(each[f"{camera}_is_pad"][chosen], camera != here)
            if not chosen.any():
                continue
            states = each[STATE][chosen]  # a robot of the second dataset pads its own with zeros, too
            column = source.dataset.columns[key].reshape(len(source.dataset), -1)
            rows = [np.flatnonzero((column == s[: column.shape[1]]).all(1))[0] for s in states]
            tasks = [source.dataset[int(r)]["task"] for r in rows]
            assert_tokens(
                {k: each[k][chosen] for k in TOKENS}, policies[i].tokenize({key: states, "task": tasks})
            )
    seen = jax.jit(train_step.make_preprocess(policies, is_mixture=True))(batch)
    assert_tokens(seen, batch)
    shapes = batch_shapes(config, sources, policies)
    assert {k: x.shape for k, x in shapes.items()} == {k: x.shape for k, x in batch.items()}


def test_a_run_resumes_exactly_in_every_frame_mode(root: Path, tmp_path: Path):
    recipe = tmp_path / "toy.py"
    recipe.write_text(RECIPE.format(root=root))
    runs = []
    for mode in ("decode", "cache", "device", "streaming"):
        where = (
            "--config.dataset.streaming=True"
            if mode == "streaming"
            else f"--config.dataset.frame_mode={mode}"
        )
        arguments = [f"--config={recipe}", where]
        runs.append(tmp_path / mode)
        train.main([*arguments, f"--config.output_dir={runs[-1]}"])
    stopped = [
        *arguments[:1],
        "--config.dataset.frame_mode=device",
        f"--config.output_dir={tmp_path / 'stopped'}",
    ]
    train.main([*stopped, "--config.steps=4"])
    train.main([*stopped, "--config.resume=True", "--config.num_workers=3"])
    assert_same_run(runs[0], runs[1])
    assert_same_run(runs[0], runs[2])
    assert_same_run(runs[0], tmp_path / "stopped")
    for run in runs:
        records = read_metrics(run / "metrics.jsonl")
        losses = [r["loss"] for r in records if "loss" in r]
        assert losses[-1] < losses[0]
        assert len([r for r in records if "eval_loss" in r]) == 2
    policy = load_policy(runs[0] / "checkpoints/last/pretrained_model")
    names = [step.registry_name for step in policy.preprocessor.steps]
    assert names[2:] == [
        "relative_actions_processor",
        "normalizer_processor",
        "pi05_prepare_state_tokenizer_processor_step",
        "tokenizer_processor",
        "device_processor",
    ]


@pytest.mark.slow
def test_pi05_resumes_exactly_wherever_its_frames_are(root: Path, tmp_path: Path):
    recipe = tmp_path / "pi05.py"
    policy = "replace(Config.tiny(), input_features={{}}, output_features={{}}, optimizer_lr=1e-3, empty_cameras=1)"
    text = RECIPE.replace("tests.toy_vla", "lerobot_jax.policies.pi05").replace("Config()", policy)
    recipe.write_text("from dataclasses import replace" + text.format(root=root))
    whole, device, stopped = (tmp_path / name for name in ("whole", "device", "stopped"))
    train.main([f"--config={recipe}", f"--config.output_dir={whole}", "--config.dataset.frame_mode=cache"])
    on_device = [f"--config={recipe}", "--config.dataset.frame_mode=device"]
    train.main([*on_device, f"--config.output_dir={device}"])
    assert_same_run(whole, device)
    shutil.copytree(device, stopped, symlinks=True)
    shutil.rmtree(stopped / "checkpoints/000008")
    for name in ("best", "last"):
        (stopped / "checkpoints" / name).unlink()
        (stopped / "checkpoints" / name).symlink_to("000004")
    train.main([*on_device, f"--config.output_dir={stopped}", "--config.resume=True"])
    assert_same_run(whole, stopped)
    losses = [r["loss"] for r in read_metrics(whole / "metrics.jsonl") if "loss" in r]
    assert losses[-1] < losses[0]
