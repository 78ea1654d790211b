"""Fine-tune a policy of pi0's size, in bfloat16 with an average of the weights; there is no data to run it on.

python -m lerobot_jax.plan --config=benchmarks/pi0_size/recipe.py --topology=v5e:4x4 --config.mesh.fsdp=16
"""

from benchmarks.pi0_size import Pi0SizeConfig
from lerobot_jax.config import DatasetConfig, TrainConfig


def get_config(variant: str = "") -> TrainConfig:
    policy = {"": Pi0SizeConfig, "tiny": Pi0SizeConfig.tiny}[variant]()
    return TrainConfig(
        job_name="pi0_size",
        dataset=DatasetConfig(repo_id="none/none"),
        policy=policy,
        ema_decay=0.99,
        batch_size=64,
        env_eval_freq=0,
    )
