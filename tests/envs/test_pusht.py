import importlib
import sys

import numpy as np
import pytest

from lerobot_jax.envs.pusht import FastPushTEnv, PushTEnv
from lerobot_jax.errors import InputError


@pytest.fixture
def env() -> FastPushTEnv:
    env = FastPushTEnv(obs_type="pixels_agent_pos")
    env.reset(seed=3)
    return env


def test_pictures_are_gym_pushts(env: FastPushTEnv):
    slow = PushTEnv(obs_type="pixels_agent_pos")
    slow.reset(seed=3)
    rng = np.random.default_rng(0)
    for _ in range(30):
        action = rng.uniform(100, 400, 2).astype(np.float32)
        (fast_view, *fast_rest), (slow_view, *slow_rest) = env.step(action), slow.step(action)
        np.testing.assert_array_equal(fast_view["pixels"], slow_view["pixels"])
        assert fast_rest[:3] == slow_rest[:3]
    np.testing.assert_array_equal(env.render(), slow.render())


def test_a_state_is_shown_exactly(env: FastPushTEnv):
    state = np.array([111.5, 222.25, 300.125, 280.75, 2.5])
    env.show(state)
    np.testing.assert_allclose(env.state, state, atol=1e-9)
    before = env.picture
    env.show(state[[0, 1, 2, 3, 4]] + [0, 0, 30, 0, 0])
    assert not np.array_equal(env.picture, before)
    env.show(state)
    np.testing.assert_array_equal(env.picture, before)


def test_the_goal_is_covered_at_the_goal(env: FastPushTEnv):
    env.show(np.array([50.0, 50.0, 256.0, 256.0, np.pi / 4]))
    assert env.coverage == pytest.approx(1)
    assert env.keypoints.shape == (16,)


def test_without_the_simulator_it_is_said_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "gym_pusht", None)
    monkeypatch.delitem(sys.modules, "lerobot_jax.envs")
    with pytest.raises(InputError, match=r"pip install 'lerobot_jax\[sim\]'"):
        importlib.import_module("lerobot_jax.envs")
