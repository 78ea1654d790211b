"""pi0.5: pi0 whose expert is told the time by its norms, and whose prompt has the state."""

from lerobot_jax.policies.pi05.config import PI05Config
from lerobot_jax.policies.pi05.modeling import PI05Policy

Config, Policy = PI05Config, PI05Policy
__all__ = ["Config", "PI05Config", "PI05Policy", "Policy"]
