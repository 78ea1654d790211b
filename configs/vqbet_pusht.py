"""VQ-BeT on Push-T: push a T-shaped block onto its target.

    python -m lerobot_jax.train --config=configs/vqbet_pusht.py          # 96x96 camera, position: for a GPU

It trains on built-in demonstrations. For the human ones, add `--config.dataset.repo_id=lerobot/pusht`, or make them
with tools/import_pusht.py and add `--config.dataset.root=FOLDER`.

The settings are those with which LeRobot's published `lerobot/vqbet_pusht` was trained, by its recipe of that time
(lerobot/configs/policy/vqbet.yaml): group norm and no pretrained weights, 7 predicted chunks of 5 actions from 5
observation steps, 16 codes in each codebook, learned in the first 20,000 of 250,000 steps of batch 64; random crops
to 84 x 84. They differ from LeRobot's defaults of today in `use_group_norm`, `pretrained_backbone_weights` and
`n_action_pred_token`. Two things differ from that recipe: images were normalized with a mean and a deviation of
0.5, while here, as in LeRobot today, they are not; and the ranges of state and action are those of the dataset.
"""

from lerobot_jax.config import DatasetConfig, EnvConfig, EvalConfig, TrainConfig
from lerobot_jax.policies.vqbet import VQBeTConfig


def get_config(variant: str = "") -> TrainConfig:
    if variant:
        raise ValueError(f"no variant '{variant}'")
    return TrainConfig(
        job_name="vqbet_pusht",
        dataset=DatasetConfig(repo_id="builtin/pusht"),
        env=EnvConfig(type="pusht"),
        eval=EvalConfig(n_episodes=50),
        policy=VQBeTConfig(
            n_action_pred_token=7,
            pretrained_backbone_weights=None,
            use_group_norm=True,
        ),
        steps=250_000,
        batch_size=64,
        log_freq=200,
        save_freq=25_000,
        env_eval_freq=25_000,
    )
