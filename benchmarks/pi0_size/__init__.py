"""A policy of pi0's size and shape, to plan for: `Config` and `Policy` as every policy has them."""

from benchmarks.pi0_size.policy import Pi0SizeConfig, Pi0SizePolicy

Config, Policy = Pi0SizeConfig, Pi0SizePolicy
__all__ = ["Config", "Pi0SizeConfig", "Pi0SizePolicy", "Policy"]
