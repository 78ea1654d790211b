"""Push-T from gym-pusht, drawn faster, with observations under LeRobot's names.

Imported by the processes of asynchronous environments, so nothing here imports JAX.
"""

import os
import warnings
from typing import Any

import gymnasium
import numpy as np

os.environ.setdefault("PYGAME_HIDE_SUPPORT_PROMPT", "1")
with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # pygame and pymunk import deprecated modules
    import cv2
    import pygame
    from gym_pusht.envs import PushTEnv

OBS_KEYS = {
    "pixels": "observation.image",
    "agent_pos": "observation.state",
    "environment_state": "observation.environment_state",
}
INFO_METRICS = ("coverage",)  # reported by evaluations: the largest value of an episode
INFO_POSITION = "pos_agent"  # where the agent is, in pixels of the 512 x 512 world


class FastPushTEnv(PushTEnv):
    """gym-pusht's environment with the same pictures, made without copying the whole drawing.

    It says what its task is, in the words of the dataset `lerobot/pusht`; gym-pusht's does not.
    """

    task_description = "Push the T-shaped block onto the T-shaped target."

    def show(self, state: np.ndarray) -> None:
        """Put agent and block at a state: agent x, y, block x, y (pixels), block angle (radians); no physics."""
        self.agent.position = (float(state[0]), float(state[1]))
        self.block.angle = float(state[4])  # first, because turning moves a body whose center is elsewhere
        self.block.position = (float(state[2]), float(state[3]))
        for body in (self.agent, self.block):
            self.space.reindex_shapes_for_body(body)

    @property
    def state(self) -> np.ndarray:
        """Agent x, y, block x, y (pixels), block angle (radians)."""
        return np.array([*self.agent.position, *self.block.position, self.block.angle])

    @property
    def keypoints(self) -> np.ndarray:
        """The T's 8 corners, (16,): x, y, x, y, ... in pixels."""
        return self.get_keypoints(self._block_shapes).flatten()

    @property
    def coverage(self) -> float:
        """How much of the goal the block covers, 0..1."""
        return float(self._get_coverage())

    @property
    def picture(self) -> np.ndarray:
        """What a camera sees: (96, 96, 3) uint8."""
        return self._get_img(self._draw(), self.observation_width, self.observation_height)

    def _get_img(
        self, screen: pygame.Surface, width: int, height: int, render_action: bool = False
    ) -> np.ndarray:
        if render_action:
            return super()._get_img(screen, width, height, render_action)
        pixels: Any = screen.get_buffer()
        drawing = np.frombuffer(pixels, np.uint8).reshape(*screen.get_size()[::-1], 4)
        return np.ascontiguousarray(cv2.resize(drawing, (width, height))[..., 2::-1])  # stored as BGRX


class LeRobotObservations(gymnasium.ObservationWrapper):
    """Gives observations as a dict with LeRobot's keys: uint8 images, float32 vectors."""

    def __init__(self, env: gymnasium.Env):
        super().__init__(env)
        self.observation_space = gymnasium.spaces.Dict(
            {key: self._space(space) for key, space in self._renamed(env.observation_space).items()}
        )

    def observation(self, observation: Any) -> dict[str, np.ndarray]:
        return {
            key: value if value.dtype == np.uint8 else value.astype(np.float32)
            for key, value in self._renamed(observation).items()
        }

    def _renamed(self, observation: Any) -> dict[str, Any]:
        if isinstance(observation, dict | gymnasium.spaces.Dict):
            return {OBS_KEYS[name]: value for name, value in observation.items()}
        shape = observation.shape or ()
        return {OBS_KEYS["pixels" if len(shape) == 3 else "agent_pos"]: observation}

    @staticmethod
    def _space(space: gymnasium.spaces.Box) -> gymnasium.spaces.Box:
        dtype = np.uint8 if space.dtype == np.uint8 else np.float32
        return gymnasium.spaces.Box(space.low.min(), space.high.max(), space.shape, dtype)


def make_pusht(obs_type: str, episode_length: int = 300, **settings: Any) -> gymnasium.Env:
    """Make one environment.

    Args:
        obs_type: state, environment_state_agent_pos (the T's keypoints), pixels or pixels_agent_pos.
        episode_length: steps after which an episode is cut.
        settings: gym-pusht's own, such as visualization_width.
    """
    env = FastPushTEnv(obs_type=obs_type, render_mode="rgb_array", **settings)
    return LeRobotObservations(gymnasium.wrappers.TimeLimit(env, episode_length))
