"""ACT on Push-T."""

from lerobot_jax.config import DatasetConfig, EnvConfig, EvalConfig, SchedulerConfig, TrainConfig
from lerobot_jax.features import NormalizationMode
from lerobot_jax.policies.act import ACTConfig


def get_config(variant: str = "") -> TrainConfig:
    if variant == "state":
        return TrainConfig(
            job_name="act_pusht_state",
            dataset=DatasetConfig(repo_id="builtin/pusht_keypoints"),
            env=EnvConfig(type="pusht"),
            eval=EvalConfig(n_episodes=100),
            policy=ACTConfig(
                normalization_mapping={k: NormalizationMode.MEAN_STD for k in ("STATE", "ENV", "ACTION")},
                chunk_size=16,
                n_action_steps=8,
                dim_model=128,
                n_heads=4,
                dim_feedforward=512,
                n_encoder_layers=2,
                pre_norm=True,
                use_vae=False,
                dropout=0.0,
                optimizer_lr=1e-3,
            ),
            scheduler=SchedulerConfig(type="cosine", num_warmup_steps=500),
            ema_decay=0.998,
            steps=22_000,
            batch_size=64,
            log_freq=500,
            save_freq=11_000,
            env_eval_freq=22_000,
        )
    return TrainConfig(job_name="act_pusht")
