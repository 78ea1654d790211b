"""Flow matching with an MLP. lerobot_jax finds the policy by the names `Config` and `Policy`."""

from lerobot_policy_flow_mlp.config import FlowMLPConfig
from lerobot_policy_flow_mlp.modeling import FlowMLPPolicy

Config, Policy = FlowMLPConfig, FlowMLPPolicy
__all__ = ["Config", "FlowMLPConfig", "FlowMLPPolicy", "Policy"]
