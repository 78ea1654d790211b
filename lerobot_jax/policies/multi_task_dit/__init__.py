"""Multi-task Diffusion Transformer."""

from lerobot_jax.policies.multi_task_dit.config import MultiTaskDiTConfig
from lerobot_jax.policies.multi_task_dit.modeling import MultiTaskDiTPolicy

Config, Policy = MultiTaskDiTConfig, MultiTaskDiTPolicy
__all__ = ["Config", "MultiTaskDiTConfig", "MultiTaskDiTPolicy", "Policy"]
