"""Flow matching with an MLP on Push-T: push a T-shaped block onto its target, seen through its keypoints.

    python -m lerobot_jax.train --config=examples/lerobot_policy_flow_mlp/configs/flow_mlp_pusht.py

Trains on built-in demonstrations, as configs/act_pusht.py does.
"""

from lerobot_jax.config import DatasetConfig, EnvConfig, EvalConfig, SchedulerConfig, TrainConfig
from lerobot_policy_flow_mlp import FlowMLPConfig


def get_config() -> TrainConfig:
    return TrainConfig(
        job_name="flow_mlp_pusht",
        dataset=DatasetConfig(repo_id="builtin/pusht_keypoints"),
        env=EnvConfig(type="pusht"),
        eval=EvalConfig(n_episodes=100),
        policy=FlowMLPConfig(),
        scheduler=SchedulerConfig(type="cosine", num_warmup_steps=500),
        ema_decay=0.999,
        steps=20_000,
        batch_size=256,
        log_freq=500,
        save_freq=10_000,
        env_eval_freq=10_000,
    )
