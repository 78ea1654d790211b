"""Diffusion Policy on Push-T: push a T-shaped block onto its target.

    python -m lerobot_jax.train --config=configs/diffusion_pusht.py          # 96x96 camera, position: for a GPU
    python -m lerobot_jax.train --config=configs/diffusion_pusht.py:state    # the block's keypoints: for a laptop

Both train on built-in demonstrations. For the human ones, add `--config.dataset.repo_id=lerobot/pusht` (state:
`lerobot/pusht_keypoints`), or make them with tools/import_pusht.py and add `--config.dataset.root=FOLDER`.

The first has the settings of LeRobot's published `lerobot/diffusion_pusht`. To act sooner after the same training,
evaluate with `--policy.noise_scheduler_type=DDIM --policy.num_inference_steps=10`.
"""

from lerobot_jax.config import DatasetConfig, EnvConfig, EvalConfig, TrainConfig
from lerobot_jax.features import NormalizationMode
from lerobot_jax.policies.diffusion import DiffusionConfig


def get_config(variant: str = "") -> TrainConfig:
    if variant == "state":
        return TrainConfig(
            job_name="diffusion_pusht_state",
            dataset=DatasetConfig(repo_id="builtin/pusht_keypoints"),
            env=EnvConfig(type="pusht"),
            eval=EvalConfig(n_episodes=100),
            policy=DiffusionConfig(
                normalization_mapping=dict.fromkeys(("STATE", "ENV", "ACTION"), NormalizationMode.MIN_MAX),
                horizon=16,
                n_action_steps=8,
                down_dims=(64, 128, 256),
                num_inference_steps=10,
                noise_scheduler_type="DDIM",
                optimizer_lr=5e-4,
            ),
            ema_decay=0.998,
            steps=20_000,
            batch_size=64,
            log_freq=500,
            save_freq=10_000,
            env_eval_freq=10_000,
        )
    if variant:
        raise ValueError(f"no variant '{variant}'; there is 'state'")
    return TrainConfig(
        job_name="diffusion_pusht",
        dataset=DatasetConfig(repo_id="builtin/pusht"),
        env=EnvConfig(type="pusht"),
        eval=EvalConfig(n_episodes=50),
        policy=DiffusionConfig(
            horizon=16,
            n_action_steps=8,
            crop_shape=(84, 84),
            pretrained_backbone_weights=None,
            use_group_norm=True,
        ),
        steps=200_000,
        batch_size=64,
        log_freq=200,
        save_freq=25_000,
        env_eval_freq=25_000,
    )
