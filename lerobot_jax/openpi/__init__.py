"""Checkpoints of openpi (https://github.com/Physical-Intelligence/openpi), in JAX, become policies of LeRobot's."""

from lerobot_jax.openpi.policy import Settings, read_policy
from lerobot_jax.openpi.statistics import find_statistics, read_statistics
from lerobot_jax.openpi.weights import Weights, read_weights

__all__ = ["Settings", "Weights", "find_statistics", "read_policy", "read_statistics", "read_weights"]
