"""How a policy moves: the length of the agent's path and the smoothness of its motion and of its commands.

Positions are in the environment's units (Push-T: pixels of its 512 x 512 world), commands in those of the action
(Push-T: the same, where the agent shall go), times in seconds.
"""

import numpy as np
from jaxtyping import Float

from lerobot_jax.eval import Episode


def measure_motion(episode: Episode) -> dict[str, float | None]:
    """Give an episode's path length and accelerations; None where it has too few steps."""
    positions, commands = np.stack(episode.positions), np.stack(episode.commands)
    return {
        "path_length": path_length(positions),
        "agent_acceleration": rms_acceleration(positions, episode.fps),
        "command_acceleration": rms_acceleration(commands, episode.fps),
    }


def path_length(positions: Float[np.ndarray, "steps dim"]) -> float:
    """Add up the distances between successive positions."""
    return float(np.linalg.norm(np.diff(positions, axis=0), axis=1).sum())


def rms_acceleration(positions: Float[np.ndarray, "steps dim"], fps: int) -> float | None:
    """Give the root of the mean squared acceleration, from second differences; units a second squared.

    A smooth motion has a small one. None: fewer than three positions.
    """
    if len(positions) < 3:
        return None
    accelerations = np.diff(positions.astype(np.float64), n=2, axis=0) * fps**2
    return float(np.sqrt((accelerations**2).sum(1).mean()))
