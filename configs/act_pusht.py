"""ACT on Push-T: push a T-shaped block onto its target.

    python -m lerobot_jax.train --config=configs/act_pusht.py          # 96x96 camera and agent position: for a GPU
    python -m lerobot_jax.train --config=configs/act_pusht.py:state    # the block's keypoints: for a laptop

Both train on built-in demonstrations. For the human ones, add `--config.dataset.repo_id=lerobot/pusht` (state:
`lerobot/pusht_keypoints`), or make them with tools/import_pusht.py and add `--config.dataset.root=FOLDER`.

Short chunks, of which half is executed, close the loop often enough for this task. The VAE is off: the built-in
demonstrations have no styles to tell apart, and it makes a step of the state variant several times as long.
"""

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
                normalization_mapping=dict.fromkeys(("STATE", "ENV", "ACTION"), NormalizationMode.MEAN_STD),
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
            env_eval_freq=11_000,
        )
    if variant:
        raise ValueError(f"no variant '{variant}'; there is 'state'")
    return TrainConfig(
        job_name="act_pusht",
        dataset=DatasetConfig(repo_id="builtin/pusht"),
        env=EnvConfig(type="pusht"),
        eval=EvalConfig(n_episodes=100),
        policy=ACTConfig(
            pretrained_backbone_weights=None,  # needs no download; the whole network learns at one rate
            chunk_size=16,
            n_action_steps=8,
            use_vae=False,
            optimizer_lr=1e-4,
            optimizer_lr_backbone=1e-4,
        ),
        scheduler=SchedulerConfig(type="cosine", num_warmup_steps=1_000),
        ema_decay=0.999,
        steps=60_000,
        batch_size=64,
        env_eval_freq=20_000,
        save_freq=20_000,
    )
