"""Diffusion Policy."""

from lerobot_jax.policies.diffusion.config import DiffusionConfig
from lerobot_jax.policies.diffusion.modeling import DiffusionPolicy

Config, Policy = DiffusionConfig, DiffusionPolicy
__all__ = ["Config", "DiffusionConfig", "DiffusionPolicy", "Policy"]
