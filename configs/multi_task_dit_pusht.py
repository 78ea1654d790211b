"""Multi-task Diffusion Transformer on Push-T: a camera, the position, and the task in words. For a GPU.

    python -m lerobot_jax.train --config=configs/multi_task_dit_pusht.py

Trains on built-in demonstrations, which have one task; name a dataset of several with
`--config.dataset.repo_id=USER/NAME --config.env_eval_freq=0`. The image tower starts from CLIP's weights and is
fine-tuned, the text tower stays as it is: both come from the Hub, as does the tokenizer. Without a network, give a
folder that has them: `--config.policy.vision_encoder_name=FOLDER --config.policy.text_encoder_name=FOLDER`, where
'clip' must be in FOLDER.
"""

from lerobot_jax.config import DatasetConfig, EnvConfig, EvalConfig, TrainConfig
from lerobot_jax.policies.multi_task_dit import MultiTaskDiTConfig


def get_config(variant: str = "") -> TrainConfig:
    if variant:
        raise ValueError(f"no variant '{variant}'; give none")
    return TrainConfig(
        job_name="multi_task_dit_pusht",
        dataset=DatasetConfig(repo_id="builtin/pusht"),
        env=EnvConfig(type="pusht"),
        eval=EvalConfig(n_episodes=50),
        policy=MultiTaskDiTConfig(
            horizon=16,
            n_action_steps=8,
            objective="flow_matching",
            num_integration_steps=20,
            image_resize_shape=(224, 224),
            image_crop_shape=None,
        ),
        steps=30_000,
        batch_size=64,
        log_freq=200,
        save_freq=10_000,
        env_eval_freq=10_000,
    )
