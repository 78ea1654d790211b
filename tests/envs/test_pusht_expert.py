"""The Push-T expert, and the demonstrations that it recorded."""

import numpy as np
import pytest

from lerobot_jax.envs import pusht_expert
from lerobot_jax.envs.demonstrations import DEMONSTRATIONS
from lerobot_jax.envs.pusht import FastPushTEnv
from lerobot_jax.envs.pusht_expert import PushTExpert, push, rotate, run_episode


@pytest.fixture(scope="module")
def expert():
    return PushTExpert()


@pytest.fixture(scope="module")
def env():
    return FastPushTEnv(obs_type="state", render_mode="rgb_array")


@pytest.fixture(scope="module")
def demonstrations():
    with np.load(DEMONSTRATIONS) as file:
        return dict(file)


@pytest.mark.parametrize("contact", range(len(pusht_expert.CONTACT)))
def test_push_is_the_physics_of_the_environment(env, contact):
    """Follow the predicted contact point for 20 px; the block must follow the prediction."""
    point, normal = pusht_expert.CONTACT[contact], pusht_expert.CONTACT_NORMAL[contact]
    centre, angle = np.array([256.0, 256.0]), 0.7
    start = point + pusht_expert.AGENT_RADIUS * normal
    position = centre - rotate(pusht_expert.CENTRE, angle)
    env.reset(seed=0)
    env.agent.velocity = (0, 0)
    env.show(np.array([*(centre + rotate(start, angle)), *position, angle]))
    for depth in [*np.linspace(1, 20, 20), *[20.0] * 8]:
        shift, turn = push(point, normal, depth)
        env.step(centre + rotate(rotate(start, turn) + shift, angle))
    state = env.state
    np.testing.assert_allclose(state[4], angle + turn, atol=0.02)
    np.testing.assert_allclose(
        state[2:4] + rotate(pusht_expert.CENTRE, state[4]), centre + rotate(shift, angle), atol=1.0
    )


def test_expert_solves_fresh_episodes(env, expert):
    for seed in range(700_000, 700_006):
        success, actions = run_episode(env, expert, seed)
        assert success
        assert actions.dtype == np.float32
        assert actions.shape == (len(actions), 2)
        assert (actions >= 0).all()
        assert (actions <= 512).all()


def test_action_depends_on_the_state_only(expert):
    rng = np.random.default_rng(0)
    low, high = [50, 50, -90, -90, 150, 150, -3], [450, 450, 90, 90, 350, 350, 3]
    states = rng.uniform(low, high, (20, 7))
    forward = np.array([expert.act(state) for state in states])
    backward = np.array([PushTExpert().act(state) for state in states[::-1]])
    np.testing.assert_array_equal(forward, backward[::-1])


def test_demonstrations_are_consistent(demonstrations):
    assert {name: array.dtype for name, array in demonstrations.items()} == {
        "seeds": np.uint32,
        "lengths": np.int16,
        "actions": np.float32,
    }
    assert (np.diff(demonstrations["seeds"].astype(int)) > 0).all()
    assert demonstrations["actions"].shape == (demonstrations["lengths"].sum(dtype=int), 2)
    assert demonstrations["lengths"].max() <= 300
    assert DEMONSTRATIONS.stat().st_size <= 2_000_000


def test_demonstrations_replay_to_success_on_their_last_step(env, demonstrations):
    ends = demonstrations["lengths"].cumsum(dtype=int)
    for episode in np.linspace(0, len(ends) - 1, 6).astype(int):
        actions = demonstrations["actions"][
            ends[episode] - demonstrations["lengths"][episode] : ends[episode]
        ]
        seed = int(demonstrations["seeds"][episode])
        env.reset(seed=seed)
        terminated = [env.step(action)[2] for action in actions]
        assert terminated.index(True) == len(actions) - 1
