import numpy as np
import pytest

from lerobot_jax.comparison.motion import measure_motion, path_length, rms_acceleration
from lerobot_jax.eval import Episode


def test_path_length():
    assert path_length(np.array([[0, 0], [3, 4], [3, 10], [3, 10.0]])) == pytest.approx(11)
    assert path_length(np.zeros((1, 2))) == 0


def test_acceleration_of_known_motions():
    t = np.arange(40) / 10
    fall = np.stack([3 * t, -0.5 * 9.81 * t**2], 1)
    assert rms_acceleration(fall, fps=10) == pytest.approx(9.81)
    steady = np.stack([3 * t, 1 - 2 * t], 1)
    assert rms_acceleration(steady, fps=10) == pytest.approx(0, abs=1e-9)
    there_and_back = np.array([[0.0], [1.0], [0.0], [1.0]])
    assert rms_acceleration(there_and_back, fps=1) == 2
    assert rms_acceleration(there_and_back, fps=10) == 200
    assert rms_acceleration(there_and_back[:2], fps=10) is None


def test_the_motion_of_an_episode():
    episode = Episode(0, 100, fps=10)
    episode.positions = [np.array([0.0, 0.0]), np.array([3.0, 4.0]), np.array([6.0, 8.0])]
    episode.commands = [np.array([1.0, 1.0], np.float32), np.array([2.0, 2.0], np.float32)]
    assert measure_motion(episode) == {
        "path_length": 10.0,
        "agent_acceleration": 0.0,
        "command_acceleration": None,
    }
