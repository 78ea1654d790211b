import json
from pathlib import Path

import jax
import numpy as np
import pytest

from lerobot_jax import eval as evaluation
from lerobot_jax.config import EnvConfig, EvalConfig
from lerobot_jax.envs.vector import make_vector_env, observation_type
from lerobot_jax.errors import InputError
from lerobot_jax.features import FeatureType, NormalizationMode, PolicyFeature
from lerobot_jax.policies.act import ACTConfig
from lerobot_jax.policies.base import FunctionalPolicy, make_policy
from lerobot_jax.policies.rtc import RTCConfig
from tests.policies import flow_policy

ENV = EnvConfig(type="pusht", episode_length=12)


def make_act(inputs: dict[str, PolicyFeature], action: int = 2) -> FunctionalPolicy:
    config = ACTConfig(
        input_features=inputs,
        output_features={"action": PolicyFeature(FeatureType.ACTION, (action,))},
        normalization_mapping=dict.fromkeys(("STATE", "ENV", "ACTION"), NormalizationMode.MEAN_STD),
        vision_backbone="resnet18w4",
        pretrained_backbone_weights=None,
        chunk_size=4,
        n_action_steps=2,
        dim_model=16,
        n_heads=2,
        dim_feedforward=16,
        n_encoder_layers=1,
        n_vae_encoder_layers=1,
    )
    features = {**inputs, **config.output_features}
    stats = {k: {"mean": np.full(f.shape, 256.0), "std": np.full(f.shape, 90.0)} for k, f in features.items()}
    policy = make_policy(config, stats)
    params, buffers = policy.init(jax.random.key(0))
    return policy.replace(params=params, buffers=buffers)


STATE = {"observation.state": PolicyFeature(FeatureType.STATE, (2,))}
KEYPOINTS = STATE | {"observation.environment_state": PolicyFeature(FeatureType.ENV, (16,))}
PIXELS = STATE | {"observation.image": PolicyFeature(FeatureType.VISUAL, (3, 96, 96))}


@pytest.fixture(scope="module")
def policy() -> FunctionalPolicy:
    return make_act(KEYPOINTS)


def run(
    policy: FunctionalPolicy,
    folder: Path,
    batch_size: int,
    *,
    is_async: bool = False,
    videos: int = 0,
    inference_delay: int = 0,
) -> dict:
    config = EvalConfig(5, batch_size, is_async, videos)
    runner = policy.make_runner(config.num_envs, 0, inference_delay)
    info = evaluation.evaluate(runner, ENV, config, seed=100, output_dir=folder)
    assert info is not None
    return info


def results(info: dict) -> dict:
    """Leave out what may differ: times and paths."""
    metrics = info["per_task"][0]["metrics"]
    return {k: v for k, v in metrics.items() if "paths" not in k}


def test_results_do_not_depend_on_the_batch_size(policy: FunctionalPolicy, tmp_path: Path):
    expected = results(run(policy, tmp_path, 1))
    assert expected["seeds"] == [100, 101, 102, 103, 104]
    assert expected["lengths"] == [12] * 5
    for batch_size, is_async in ((2, False), (5, False), (3, True)):
        found = results(run(policy, tmp_path, batch_size, is_async=is_async))
        assert found.keys() == expected.keys()
        for key, values in expected.items():  # the simulator's polygon areas vary by a rounding error
            np.testing.assert_allclose(found[key], values, rtol=1e-12, err_msg=key)


@pytest.mark.parametrize("rtc", [None, RTCConfig(execution_horizon=4)])
def test_delays_change_results_and_batch_sizes_do_not(rtc: RTCConfig | None, tmp_path: Path):
    policy = flow_policy.make(256.0, 90.0, 5, rtc_config=rtc)
    info = run(policy, tmp_path, 1, inference_delay=2)
    assert info["overall"]["inference_delay"] == 2
    expected = results(info)
    for key, values in results(run(policy, tmp_path, 3, inference_delay=2)).items():
        np.testing.assert_allclose(values, expected[key], rtol=1e-12, err_msg=key)
    waiting = run(policy, tmp_path, 3)
    assert waiting["overall"]["inference_delay"] == 0
    assert results(waiting)["sum_rewards"] != expected["sum_rewards"]


def test_policies_without_real_time_chunking_switch_late(policy: FunctionalPolicy, tmp_path: Path):
    """ACT: with a delay of 1, actions 1 and 2 of each chunk of 4; the first one from its beginning."""
    delayed = policy.make_runner(1, inference_delay=1)
    rows = [
        {key: np.full((1, *feature.shape), 100.0 + 10 * t, np.float32) for key, feature in KEYPOINTS.items()}
        for t in range(5)
    ]
    actions = [delayed.select_action(row)[0] for row in rows]
    chunks = [
        policy.postprocess(
            policy.sample_actions(
                policy.params, policy.buffers, policy.preprocess(rows[t]), jax.random.key(0)
            )
        )[0]
        for t in (0, 2)
    ]
    expected = [*chunks[0][:3], *chunks[1][1:3]]
    np.testing.assert_allclose(actions, expected, rtol=1e-4)


def test_eval_info_has_lerobots_fields(policy: FunctionalPolicy, tmp_path: Path):
    info = run(policy, tmp_path, 2, videos=2)
    assert set(info) == {"per_task", "per_group", "overall"}
    task = info["per_task"][0]
    assert (task["task_group"], task["task_id"]) == ("pusht", 0)
    assert {"sum_rewards", "max_rewards", "successes", "video_paths", "predicted_video_paths"} <= set(
        task["metrics"]
    )
    names = {
        "avg_sum_reward",
        "avg_max_reward",
        "pc_success",
        "n_episodes",
        "video_paths",
        "predicted_video_paths",
    }
    assert names <= set(info["per_group"]["pusht"])
    assert names | {"eval_s", "eval_ep_s"} <= set(info["overall"])
    assert 0 < info["overall"]["chunk_latency_p95_s"] < info["overall"]["eval_s"]
    json.dumps(info)
    rewards = task["metrics"]["sum_rewards"]
    np.testing.assert_allclose(info["overall"]["avg_sum_reward"], np.mean(rewards))
    assert [Path(path).name for path in info["overall"]["video_paths"]] == [
        "eval_episode_0.mp4",
        "eval_episode_1.mp4",
    ]
    import av

    with av.open(info["overall"]["video_paths"][0]) as container:
        assert sum(1 for _ in container.decode(video=0)) == 13  # the first view and one after every step
    assert "5 episodes: success 0.0 % (95 %: 0.0 to 43" in evaluation.describe(info)


def test_episodes_tell_their_motion(policy: FunctionalPolicy, tmp_path: Path):
    config = EvalConfig(3, 2, False, 0)
    runner = policy.make_runner(config.num_envs, seed=0)
    episodes = evaluation.run_episodes(runner, ENV, config, seed=100, output_dir=tmp_path)
    assert episodes is not None
    assert [(e.number, e.seed, e.fps, e.length) for e in episodes] == [(i, 100 + i, 10, 12) for i in range(3)]
    for episode in episodes:
        assert (len(episode.positions), len(episode.commands)) == (13, 12)
        envs = make_vector_env(ENV, "state", 1, use_async_envs=False)
        first, _ = envs.reset(seed=episode.seed)
        np.testing.assert_allclose(episode.positions[0], first["observation.state"][0, :2])
        for command, position in zip(episode.commands, episode.positions[1:], strict=True):
            observation, *_ = envs.step(command[None])
            np.testing.assert_allclose(position, observation["observation.state"][0, :2], rtol=1e-5)
        envs.close()
        assert episode.steps_to_success is None


def test_the_first_success_counts():
    episode = evaluation.Episode(0, 100, fps=10)
    for is_success in (False, True, False, True):
        shown = {"is_success": is_success, "pos_agent": np.zeros(2)}
        evaluation._add_step(episode, np.zeros(2, np.float32), 0.1, shown)
    assert (episode.success, episode.steps_to_success, episode.length) == (True, 2, 4)


def test_image_policies_see_the_camera(tmp_path: Path):
    policy = make_act(PIXELS)
    first, second = (results(run(policy, tmp_path, n)) for n in (1, 2))
    np.testing.assert_allclose(first["sum_rewards"], second["sum_rewards"], rtol=1e-12)


def test_an_evaluation_can_be_stopped(policy: FunctionalPolicy, tmp_path: Path):
    runner = policy.make_runner(1)
    arguments = (runner, ENV, EvalConfig(2, 1, False, 0))
    assert evaluation.evaluate(*arguments, seed=0, output_dir=tmp_path, should_stop=lambda: True) is None


def test_what_does_not_fit_is_reported(policy: FunctionalPolicy):
    evaluation.check_environment(policy.config, ENV)
    with pytest.raises(InputError, match=r"action has shape \(3,\), env.type=pusht takes \(2,\)"):
        evaluation.check_environment(make_act(KEYPOINTS, action=3).config, ENV)
    wide = {"observation.environment_state": KEYPOINTS["observation.environment_state"]}
    other = wide | {"observation.velocity": PolicyFeature(FeatureType.STATE, (2,))}
    with pytest.raises(InputError, match=r"needs \['observation.velocity'\], env.type=pusht shows only"):
        evaluation.check_environment(make_act(other).config, ENV)
    with pytest.raises(InputError, match="images or environment_state, not both"):
        observation_type(ENV, KEYPOINTS | PIXELS)


def test_the_command(policy: FunctionalPolicy, tmp_path: Path):
    policy.save_pretrained(tmp_path / "policy")
    path = f"--policy.path={tmp_path / 'policy'}"
    small = ["--eval.n_episodes=2", "--eval.max_episodes_rendered=1", "--env.episode_length=12"]
    evaluation.main([path, "--env.type=pusht", *small, f"--output_dir={tmp_path / 'a'}", "--seed=100"])
    info = json.loads((tmp_path / "a/eval_info.json").read_text())
    assert info["per_task"][0]["metrics"]["seeds"] == [100, 101]
    evaluation.main(
        [path, *small, f"--output_dir={tmp_path / 'b'}", "--policy.n_action_steps=4", "--seed=100"]
    )
    other = json.loads((tmp_path / "b/eval_info.json").read_text())
    assert other["overall"]["avg_sum_reward"] != info["overall"]["avg_sum_reward"]
    for arguments, message in (
        (["--env.type=pusht"], "--policy.path=FOLDER_OR_HUB_NAME is missing"),
        ([path, "--eval.n_episode=3"], "perhaps you meant --eval.n_episodes"),
        ([path, "--policy.chunk_size=6"], "decoder_pos_embed.weight has shape"),
        (["--policy.path=/nowhere"], "/nowhere: no such folder"),
    ):
        with pytest.raises(InputError, match=message):
            evaluation.main(arguments)


def test_real_time_chunking_is_turned_on_by_a_setting(tmp_path: Path):
    """Also where config.json has null."""
    policy = flow_policy.make(256.0, 90.0, 5)
    policy.save_pretrained(tmp_path / "policy")
    assert json.loads((tmp_path / "policy/config.json").read_text())["rtc_config"] is None
    path = f"--policy.path={tmp_path / 'policy'}"
    delayed = [path, "--eval.inference_delay=2", "--eval.n_episodes=5", "--eval.max_episodes_rendered=0"]
    sums = []
    for name, more in (
        ("naive", []),
        ("on", ["--policy.rtc_config.execution_horizon=4"]),
        ("vjp", ["--policy.rtc_config.execution_horizon=4", "--policy.rtc_config.guidance=vjp"]),
        ("off", ["--policy.rtc_config.enabled=False"]),
    ):
        output = tmp_path / name
        evaluation.main([*delayed, "--env.episode_length=12", "--seed=100", f"--output_dir={output}", *more])
        sums.append(json.loads((output / "eval_info.json").read_text())["overall"]["avg_sum_reward"])
    assert sums[0] == sums[3]
    assert len(set(sums)) == 3
    for wrong, message in (
        (["--policy.rtc_config.max_guidance_weight=0"], "rtc_config.max_guidance_weight must be positive"),
        (["--policy.rtc_config.prefix_attention_schedule=LINEAL"], "invalid choice 'LINEAL'"),
        (["--policy.rtc_config.horizon=4"], "Unrecognized options: --policy.rtc_config.horizon=4"),
        (["--eval.inference_delay=5"], "inference_delay=5 is more than half of the 8 actions"),
        (["--eval.inference_delay=-1"], "eval.inference_delay must not be negative"),
    ):
        with pytest.raises(InputError, match=message):
            evaluation.main([path, *wrong])


def test_wilson_interval():
    """Textbook values: 0 and 10 of 10, and 638 of 1000."""
    np.testing.assert_allclose(evaluation.wilson_interval(0, 10), (0, 0.2775), atol=1e-3)
    np.testing.assert_allclose(evaluation.wilson_interval(10, 10), (0.7225, 1), atol=1e-3)
    np.testing.assert_allclose(evaluation.wilson_interval(638, 1000), (0.6077, 0.6672), atol=1e-3)


@pytest.mark.parametrize("obs_type", ["state", "environment_state_agent_pos", "pixels", "pixels_agent_pos"])
def test_observations_have_lerobots_names(obs_type: str):
    envs = make_vector_env(ENV, obs_type, 2, use_async_envs=False)
    observation, _ = envs.reset(seed=0)
    shapes = {k: (v.shape[1:], v.dtype) for k, v in observation.items()}
    state = {"observation.state": ((5,) if obs_type == "state" else (2,), np.float32)}
    expected = {
        "state": state,
        "environment_state_agent_pos": state | {"observation.environment_state": ((16,), np.float32)},
        "pixels": {"observation.image": ((96, 96, 3), np.uint8)},
        "pixels_agent_pos": state | {"observation.image": ((96, 96, 3), np.uint8)},
    }
    assert shapes == expected[obs_type]
    envs.close()
