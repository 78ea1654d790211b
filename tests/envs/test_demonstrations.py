"""The built-in datasets: what the environment itself would have recorded."""

import numpy as np
import pytest

from lerobot_jax import hub
from lerobot_jax.data.dataset import LeRobotDataset
from lerobot_jax.envs import demonstrations
from lerobot_jax.envs.demonstrations import load_demonstrations, make_builtin_dataset
from lerobot_jax.envs.pusht import FastPushTEnv
from lerobot_jax.errors import InputError


@pytest.fixture
def episodes(tmp_path, monkeypatch):
    monkeypatch.setenv("HF_LEROBOT_HOME", str(tmp_path))
    shortest = sorted(load_demonstrations(), key=lambda episode: len(episode[1]))[:2]
    monkeypatch.setattr(demonstrations, "load_demonstrations", lambda: shortest)
    return shortest


@pytest.mark.parametrize("repo_id", demonstrations.BUILTIN)
def test_a_builtin_dataset_is_what_the_environment_shows(episodes, repo_id: str):
    make_builtin_dataset(repo_id)
    dataset = LeRobotDataset(repo_id)
    env = FastPushTEnv(obs_type="environment_state_agent_pos", render_mode="rgb_array")
    assert (dataset.num_episodes, dataset.fps) == (2, 10)
    frames = iter(dataset[i] for i in range(len(dataset)))
    for seed, actions in episodes:
        observation, _ = env.reset(seed=seed)
        for step, action in enumerate(actions):
            frame = next(frames)
            np.testing.assert_array_equal(frame["action"], action)
            np.testing.assert_array_equal(frame["observation.state"], np.float32(observation["agent_pos"]))
            if "observation.image" in frame:
                difference = env.picture.astype(int) - frame["observation.image"]
                assert np.abs(difference).mean() < 3  # lossy compression
            else:
                keypoints = np.float32(observation["environment_state"])
                np.testing.assert_array_equal(frame["observation.environment_state"], keypoints)
            observation, reward, terminated, _, _ = env.step(action)
            np.testing.assert_allclose(frame["next.reward"], reward, rtol=1e-6)
            assert frame["next.success"] == terminated == (step == len(actions) - 1)
    assert next(frames, None) is None


def test_a_builtin_dataset_is_made_once_and_whole_or_not_at_all(episodes, monkeypatch):
    root = hub.lerobot_home() / "builtin/pusht_keypoints"
    with monkeypatch.context() as patch:
        patch.setattr(demonstrations.DatasetWriter, "finalize", lambda self: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            make_builtin_dataset("builtin/pusht_keypoints")
    assert not list(root.parent.iterdir())
    make_builtin_dataset("builtin/pusht_keypoints")
    before = {path: path.stat().st_mtime_ns for path in root.rglob("*")}
    make_builtin_dataset("builtin/pusht_keypoints")
    assert {path: path.stat().st_mtime_ns for path in root.rglob("*")} == before
    (root / demonstrations.SOURCE_NAME).write_text("others")  # as after an update of the package
    make_builtin_dataset("builtin/pusht_keypoints")
    assert {path: path.stat().st_mtime_ns for path in root.rglob("*")} != before
    (root / demonstrations.SOURCE_NAME).unlink()  # somebody's own dataset
    with pytest.raises(InputError, match="is not the built-in dataset builtin/pusht_keypoints; move it away"):
        make_builtin_dataset("builtin/pusht_keypoints")
    assert (root / "meta/info.json").exists()


def test_an_unknown_builtin_dataset_is_refused():
    with pytest.raises(
        InputError, match=r"'builtin/pushed': no such built-in .* builtin/pusht, builtin/pusht_k"
    ):
        make_builtin_dataset("builtin/pushed")
