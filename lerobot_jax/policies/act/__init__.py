"""Action Chunking Transformer."""

from lerobot_jax.policies.act.config import ACTConfig
from lerobot_jax.policies.act.modeling import ACTPolicy

Config, Policy = ACTConfig, ACTPolicy
__all__ = ["ACTConfig", "ACTPolicy", "Config", "Policy"]
