"""Policies of lerobot_jax in stock LeRobot: importing this registers the policy type `jax`."""

from lerobot_policy_jax.configuration_jax import JaxConfig

__all__ = ["JaxConfig"]
