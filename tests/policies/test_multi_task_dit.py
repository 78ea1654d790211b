"""What the contract and the goldens do not say about the multi-task DiT policy, and training on tasks."""

import dataclasses
import functools
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
import safetensors.numpy

from lerobot_jax import sharding, state_dict, torch_state, train_step, training_data, visualize
from lerobot_jax.comparison import latency
from lerobot_jax.config import DatasetConfig, EnvConfig, EvalConfig, SourceConfig, TrainConfig
from lerobot_jax.envs import pusht
from lerobot_jax.errors import InputError
from lerobot_jax.eval import check_environment, evaluate
from lerobot_jax.features import ACTION, OBS_STATE, TASK, FeatureType, PolicyFeature
from lerobot_jax.metrics import read_metrics
from lerobot_jax.policies.base import FunctionalPolicy, load_policy, load_pretrained_parts, make_policy
from lerobot_jax.policies.multi_task_dit import MultiTaskDiTConfig
from lerobot_jax.policies.multi_task_dit.flow_matching import FlowMatching
from lerobot_jax.processors import OBS_LANGUAGE_ATTENTION_MASK, OBS_LANGUAGE_TOKENS, TokenizeTask
from lerobot_jax.processors.tokenizer import find_tokenizer
from tests.data.recordings import record
from tests.goldens import CLIP
from tests.runs import assert_same_run

RECIPE = """
from lerobot_jax.comparison import latency
from lerobot_jax.config import DatasetConfig, TrainConfig
from lerobot_jax.policies.multi_task_dit import MultiTaskDiTConfig

def get_config(variant=""):
    return TrainConfig(
        job_name="tiny",
        dataset=DatasetConfig(repo_id="test/recorded", root="{root}", eval_split=0.3),
        policy=MultiTaskDiTConfig(
            horizon=8, n_action_steps=4, objective="flow_matching", num_integration_steps=2, hidden_dim=16,
            num_layers=1, num_heads=2, timestep_embed_dim=8, image_crop_shape=(32, 32), tokenizer_max_length=24,
            vision_encoder_name="tests/clip-tiny", text_encoder_name="tests/clip-tiny", optimizer_lr=1e-3,
            scheduler_name="constant",
        ),
        steps=4, batch_size=8, log_freq=2, save_freq=2, env_eval_freq=0, eval_steps=2, ema_decay=0.9,
    )
"""
LENGTHS = (12, 15, 13, 14)
TINY = MultiTaskDiTConfig.tiny()
PUSHT = {
    OBS_STATE: PolicyFeature(FeatureType.STATE, (2,)),
    "observation.image": PolicyFeature(FeatureType.VISUAL, (3, 96, 96)),
}

pytestmark = pytest.mark.usefixtures("stand_ins")


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return record(tmp_path_factory.mktemp("data") / "dataset", LENGTHS).root


def new_policy(config: MultiTaskDiTConfig) -> FunctionalPolicy:
    """Build a policy that starts from the stand-in's weights."""
    stats = {}
    for key, feature in {**config.input_features, **config.output_features}.items():
        shape = (3, 1, 1) if feature.type == FeatureType.VISUAL else feature.shape
        values = {"mean": 0.5, "std": 0.3, "min": 0.0, "max": 1.0}
        stats[key] = {name: np.full(shape, value, np.float32) for name, value in values.items()}
    policy = make_policy(config, stats)
    params, buffers = load_pretrained_parts(policy, *policy.init(jax.random.key(0)))
    return policy.replace(params=params, buffers=buffers)


@pytest.mark.slow
def test_a_run_on_tasks_resumes_exactly(root: Path, tmp_path: Path):
    recipe = tmp_path / "tiny.py"
    recipe.write_text(RECIPE.format(root=root))
    whole, half = (
        [f"--config={recipe}", f"--config.output_dir={tmp_path / name}"] for name in ("whole", "half")
    )
    train.main(whole)
    train.main([*half, "--config.steps=2"])
    train.main([*half, "--config.resume=True"])
    assert_same_run(tmp_path / "whole", tmp_path / "half")
    assert [r["step"] for r in read_metrics(tmp_path / "whole/metrics.jsonl") if "eval_loss" in r] == [2, 4]
    folder = tmp_path / "whole/checkpoints/last/pretrained_model"
    saved = safetensors.numpy.load_file(folder / "model.safetensors")
    published = state_dict.read(find_tokenizer(CLIP, state_dict.MODEL_NAME))
    towers = {"text_model": "text_encoder.text_encoder", "vision_model": "vision_encoder.model"}
    trained = set()
    for key, value in published.items():
        first = key.split(".")[0]
        if first in towers:
            now = saved[f"observation_encoder.{towers[first]}.{key}"]
            trained |= {first} if (now != value).any() else set()
            np.testing.assert_allclose(now, value, atol=1e-2, err_msg=key)
    assert trained == {"vision_model"}
    assert load_policy(folder).config.drop_n_last_frames == 3
    path = tmp_path / "chunks.png"
    visualize.main([f"--policy.path={folder}", f"--output={path}"])
    assert path.stat().st_size > 5000


def seen_tokens(config: TrainConfig, batch_size: int = 32) -> tuple[dict[str, Any], dict[str, Any]]:
    """Give the tokens that the policy sees of training batches, and those of the samples' real tasks."""
    sources = training_data.open_sources(config)
    policies = training_data.build_policies(config, sources)
    mesh = sharding.make_mesh()
    whole, split = sharding.replicated(mesh), sharding.batch_sharding(mesh, batch_size)
    samples = training_data.training_samples(config, sources, policies, whole, split)
    batch = samples.read(np.arange(batch_size))
    preprocess = jax.jit(train_step.make_preprocess(policies, is_mixture=bool(config.dataset.mixture)))
    held_out = training_data.held_out_batches(
        config, sources, policies, samples, functools.partial(sharding.BatchPlacement.of, whole)
    )
    batches = [batch, *(next(iter(batches))[1] for batches in held_out.values())]
    seen = [preprocess(batch) for batch in batches]
    which = [np.asarray(b.get("dataset_index", np.zeros(len(b[ACTION]), int))) for b in batches]
    tasks = [
        sources[i].meta.tasks[t]
        for b, dataset in zip(batches, which, strict=True)
        for i, t in zip(dataset, np.asarray(b["task_index"]), strict=True)
    ]
    assert len(set(tasks)) >= 2
    keys = (OBS_LANGUAGE_TOKENS, OBS_LANGUAGE_ATTENTION_MASK)
    return {k: np.concatenate([s[k] for s in seen]) for k in keys}, policies[0].tokenize({TASK: tasks})


@pytest.mark.parametrize("mode", ["decode", "cache", "device", "streaming", "mixture"])
def test_each_sample_comes_with_its_own_task(root: Path, tmp_path: Path, mode: str):
    dataset: dict[str, Any] = {"repo_id": "test/recorded", "root": str(root)}
    dataset |= {"streaming": True, "buffer_size": 60} if mode == "streaming" else {"frame_mode": mode}
    if mode == "mixture":
        other = record(
            tmp_path / "other", LENGTHS[:3], tasks=("a much longer task than those", "task 1")
        ).root
        sources = (SourceConfig("test/one", root=str(root)), SourceConfig("test/two", root=str(other)))
        dataset = {"mixture": sources}
    policy = dataclasses.replace(TINY, input_features={}, output_features={}, tokenizer_padding="longest")
    config = TrainConfig(policy=policy, dataset=DatasetConfig(eval_split=0.3, **dataset))
    seen, expected = seen_tokens(config)
    for key, value in expected.items():
        np.testing.assert_array_equal(seen[key], value, err_msg=key)


def test_the_environment_says_what_to_do(tmp_path: Path, monkeypatch):
    config = dataclasses.replace(TINY, input_features=PUSHT, image_resize_shape=(32, 32))
    policy = new_policy(config)
    runner = policy.make_runner(2)
    tasks, select_action = [], runner.select_action

    def watched(observation, slots):
        tasks.append(observation[TASK])
        return select_action(observation, slots)

    monkeypatch.setattr(runner, "select_action", watched)
    env = EnvConfig("pusht", episode_length=3)
    settings = EvalConfig(n_episodes=2, batch_size=2, use_async_envs=True, max_episodes_rendered=0)
    assert evaluate(runner, env, settings, seed=0, output_dir=tmp_path) is not None
    assert tasks == [["Push the T-shaped block onto the T-shaped target."] * 2] * 3
    check_environment(config, env)
    for variant in latency.make_variants("tiny", policy, env, 0, [2]):
        assert variant.observation[TASK] == tasks[0][:1]
        assert variant.denoising_steps in (2, 3)
    monkeypatch.delattr(pusht.FastPushTEnv, "task_description")
    with pytest.raises(InputError, match="told what to do, but the environment has no task_description"):
        check_environment(config, env)


def test_the_task_changes_the_actions_and_dropout_the_loss():
    policy = new_policy(TINY)
    rng = np.random.default_rng(0)
    draw = functools.partial(jax.random.normal, jax.random.key(1))
    flat = jax.tree.map(lambda x: draw(x.shape) * 0.3, policy.params)  # also what starts as zeros
    observation = {
        OBS_STATE: rng.uniform(size=(1, 2, 3)).astype(np.float32),
        "observation.images.top": rng.integers(0, 256, (1, 2, 36, 40, 3)).astype(np.uint8),
        ACTION: rng.uniform(size=(1, 8, 2)).astype(np.float32),
    }
    sample, loss_fn = jax.jit(policy.sample_actions), jax.jit(policy.loss_fn, static_argnames="train")
    batches = [policy.preprocess(observation | {TASK: [task]}) for task in ("open the box", "a red cube")]
    chunks = [sample(flat, policy.buffers, batch, jax.random.key(0)) for batch in batches]
    assert np.abs(chunks[0] - chunks[1]).max() > 1e-3
    given = {"noise": draw((1, 8, 2)), "time": np.full(1, 0.5, np.float32), "crop": np.array([[2, 4]])}
    losses = [
        loss_fn(flat, policy.buffers, batches[0], jax.random.key(i), train=train, **given)[0]
        for train in (False, True)
        for i in range(2)
    ]
    assert losses[0] == losses[1]
    assert losses[2] != losses[3]


def test_times_are_drawn_as_the_strategy_says():
    for flow, mean in ((FlowMatching(strategy="uniform"), 0.5), (FlowMatching(s=0.9), 0.9 * 0.4)):
        time = np.asarray(flow.draw_time(jax.random.key(0), 20_000))
        assert abs(time.mean() - mean) < 0.01
        assert 0 <= time.min() < 0.01
        assert time.max() <= (1 if flow.strategy == "uniform" else 0.9)


def test_unnormalized_inputs_are_named(root: Path, caplog):
    config = dataclasses.replace(TINY, input_features={}, output_features={}, normalization_mapping={})
    train_config = TrainConfig(policy=config, dataset=DatasetConfig(repo_id="test/recorded", root=str(root)))
    training_data.build_policies(train_config, training_data.open_sources(train_config))
    (message,) = [r.getMessage() for r in caplog.records if "will not be normalized" in r.getMessage()]
    assert "observation.images.top (VISUAL), observation.state (STATE)" in message


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"n_action_steps": 8}, r"n_action_steps must be at most horizon - n_obs_steps \+ 1 = 7, not 8"),
        ({"objective": "score"}, "objective must be diffusion or flow_matching"),
        ({"num_heads": 3}, "num_heads=3 must divide hidden_dim=16"),
        ({"num_heads": 16}, "use_rope needs an even number of dimensions a head"),
        ({"timestep_embed_dim": 7}, "timestep_embed_dim must be even"),
        ({"dropout": 1.0}, r"dropout must be in \[0, 1\)"),
        ({"vision_encoder_name": "google/vit"}, "vision_encoder_name must be a CLIP model"),
        (
            {"image_resize_shape": (20, 40)},
            r"image_crop_shape \(32, 32\) does not fit into image_resize_shape",
        ),
        ({"tokenizer_padding": "none"}, "tokenizer_padding must be max_length or longest"),
        ({"integration_method": "heun"}, "integration_method must be euler or rk4"),
        ({"timestep_sampling_s": 0.0}, r"timestep_sampling_s must be in \(0, 1\]"),
        ({"timestep_sampling_alpha": 0.0}, "timestep_sampling_alpha must be positive"),
        ({"sigma_min": 2.0}, r"sigma_min must be in 0\.\.1"),
        ({"objective": "diffusion", "beta_start": 0.5}, "beta_start and beta_end must be in order"),
        ({"objective": "diffusion", "num_inference_steps": 101}, "num_inference_steps must be in"),
        ({"drop_n_last_frames": -1}, "drop_n_last_frames must not be negative"),
    ],
)
def test_impossible_settings_are_refused(changes: dict[str, Any], message: str):
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(TINY, **changes)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"input_features": {}}, "needs 'observation.state'"),
        ({"image_crop_shape": (32, 41)}, r"image_crop_shape \(32, 41\) does not fit into .* 36 x 40"),
        ({"image_crop_shape": None}, r"make images of \(36, 40\); tests/clip-tiny wants \(32, 32\)"),
        ({"tokenizer_max_length": 25}, "tokenizer_max_length is 25, tests/clip-tiny reads at most 24 tokens"),
        (
            {"text_encoder_name": "tests/clip-missing"},
            r"'tests/clip-missing' was not found .* or give a folder",
        ),
    ],
)
def test_what_does_not_suit_clip_is_refused(changes: dict[str, Any], message: str):
    with pytest.raises(InputError, match=message):
        new_policy(dataclasses.replace(TINY, **changes))


def test_frames_that_need_padding_are_dropped_by_default():
    config = dataclasses.replace(TINY, drop_n_last_frames=None)
    assert config.num_dropped_frames == 3
    assert dataclasses.replace(config, n_action_steps=2).num_dropped_frames == 5
    assert config.exported().drop_n_last_frames == 3


def test_towers_start_from_a_folder_that_is_a_clip_model(tmp_path: Path):
    folder = tmp_path / "my-clip"
    folder.symlink_to(find_tokenizer(CLIP, state_dict.MODEL_NAME))
    names = {"vision_encoder_name": str(folder), "text_encoder_name": str(folder)}
    wrist = {"observation.images.wrist": TINY.input_features["observation.images.top"]}
    changes = {
        "use_separate_rgb_encoder_per_camera": True,
        "input_features": {**TINY.input_features, **wrist},
    }
    policy = new_policy(dataclasses.replace(TINY, **names, **changes))
    saved = torch_state.to_torch(policy.module, policy.params, policy.buffers)
    published = state_dict.read(folder)
    for key, value in published.items():
        for place in ("text_encoder.text_encoder", "vision_encoders.0.model", "vision_encoders.1.model"):
            name = f"observation_encoder.{place}.{key}"
            if name in saved:
                np.testing.assert_array_equal(saved[name], value, err_msg=name)
    assert any(isinstance(step, TokenizeTask) for step in policy.preprocessor.steps)
