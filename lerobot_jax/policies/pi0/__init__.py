"""pi0: a vision-language model with an action expert, trained by flow matching."""

from lerobot_jax.policies.pi0.config import PI0Config
from lerobot_jax.policies.pi0.modeling import PI0Policy

Config, Policy = PI0Config, PI0Policy
__all__ = ["Config", "PI0Config", "PI0Policy", "Policy"]
