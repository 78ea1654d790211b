"""pi0.5 on your own SO-101: fine-tune lerobot/pi05_base on demonstrations that you recorded with `lerobot-record`.

    python -m lerobot_jax.train --config=configs/pi05_so101.py --config.dataset.repo_id=USER/NAME
    python -m lerobot_jax.train --config=configs/pi05_so101.py:expert --config.dataset.repo_id=USER/NAME
    python -m lerobot_jax.train --config=configs/pi05_so101.py:lora --config.dataset.repo_id=USER/NAME

Cameras are named as in the dataset, here `front` and `wrist`; one of the two may be missing, and
`--config.rename_map observation.images.top observation.images.front` renames. To start from a folder, change
pretrained_path in a copy of this file. The result runs on the arm with
`lerobot-rollout --policy.path=outputs/pi05_so101/checkpoints/last/pretrained_model`, see docs/robot.md.
"""

from lerobot_jax.config import DatasetConfig, TrainConfig
from lerobot_jax.features import ACTION, OBS_STATE, FeatureType, PolicyFeature
from lerobot_jax.peft_targets import PeftConfig
from lerobot_jax.policies.pi05 import PI05Config
from lerobot_jax.sharding import MeshConfig


def get_config(variant: str = "") -> TrainConfig:
    if variant not in ("", "expert", "lora"):
        raise ValueError(f"no variant '{variant}'; there are 'expert' and 'lora'")
    layers = r".*(language_model|gemma_expert\.model)\.layers\.\d+\.(self_attn\.[qkvo]_proj|mlp\.\w+_proj)"
    adapters = PeftConfig(
        target_modules=layers,
        full_training_modules=("action_in_proj", "action_out_proj", "time_mlp_in", "time_mlp_out"),
        r=16,
        lora_alpha=16,
    )
    return TrainConfig(
        job_name="_".join(["pi05_so101", *([variant] if variant else [])]),
        dataset=DatasetConfig(repo_id="USER/NAME"),
        policy=PI05Config(
            pretrained_path="lerobot/pi05_base",
            input_features={
                OBS_STATE: PolicyFeature(FeatureType.STATE, (6,)),
                "observation.images.front": PolicyFeature(FeatureType.VISUAL, (3, 480, 640)),
                "observation.images.wrist": PolicyFeature(FeatureType.VISUAL, (3, 480, 640)),
            },
            output_features={ACTION: PolicyFeature(FeatureType.ACTION, (6,))},
            dtype="bfloat16",
            use_amp=True,
            n_action_steps=25,
            train_expert_only=variant == "expert",
            optimizer_weight_decay=1e-10,
        ),
        peft=adapters if variant == "lora" else None,
        ema_decay=None if variant == "lora" else 0.99,
        mesh=MeshConfig(data=1, fsdp=-1),  # all devices hold a part of the state each
        steps=20_000,
        batch_size=32,
        log_freq=100,
        save_freq=5_000,
        env_eval_freq=0,
    )
