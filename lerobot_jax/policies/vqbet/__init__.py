"""VQ-BeT."""

from lerobot_jax.policies.vqbet.config import VQBeTConfig
from lerobot_jax.policies.vqbet.modeling import VQBeTPolicy

Config, Policy = VQBeTConfig, VQBeTPolicy
__all__ = ["Config", "Policy", "VQBeTConfig", "VQBeTPolicy"]
