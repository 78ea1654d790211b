"""ACT on Push-T."""

from lerobot_jax.config import DatasetConfig, EnvConfig, EvalConfig, TrainConfig
from lerobot_jax.features import NormalizationMode
from lerobot_jax.policies.act import ACTConfig


def get_config(variant: str = "") -> TrainConfig:
    if variant == "state":
        return TrainConfig(
            job_name="act_pusht_state",
            dataset=DatasetConfig(repo_id="builtin/pusht_keypoints"),
            env=EnvConfig(type="pusht"),
            eval=EvalConfig(n_episodes=50),
            policy=ACTConfig(
                normalization_mapping=dict.fromkeys(("STATE", "ENV", "ACTION"), NormalizationMode.MEAN_STD),
                chunk_size=16,
                n_action_steps=8,
                dim_model=256,
                n_heads=4,
                dim_feedforward=1024,
                n_encoder_layers=3,
                use_vae=False,
                dropout=0.0,
                optimizer_lr=3e-4,
            ),
            steps=10000,
            batch_size=64,
            log_freq=200,
            save_freq=2500,
            env_eval_freq=5000,
        )
    return TrainConfig(job_name="act_pusht")
