"""pi0 on LIBERO: fine-tune lerobot/pi0_base on the four suites' demonstrations, as openpi does.

    python -m lerobot_jax.train --config=configs/pi0_libero.py           # everything: eight H200, a pod
    python -m lerobot_jax.train --config=configs/pi0_libero.py:expert                  # the action expert: one GPU
    python -m lerobot_jax.train --config=configs/pi0_libero.py:lora                    # adapters: one GPU

Ask `python -m lerobot_jax.plan --config=configs/pi0_libero.py --topology=v5e:8x8` first what
your devices hold. All three compute in bfloat16; what is trained is kept in float32. Steps, batch,
schedule and the average of the weights (not of adapters) are openpi's for LIBERO. To start from a folder, change
pretrained_path in a copy of this file. The tokenizer
is that of google/paligemma-3b-pt-224, whose terms one accepts on the Hub.
"""

from lerobot_jax.config import DatasetConfig, TrainConfig
from lerobot_jax.features import ACTION, OBS_STATE, FeatureType, PolicyFeature
from lerobot_jax.peft_targets import PeftConfig
from lerobot_jax.policies.pi0 import PI0Config
from lerobot_jax.sharding import MeshConfig


def get_config(variant: str = "") -> TrainConfig:
    if variant not in ("", "expert", "lora"):
        raise ValueError(f"no variant '{variant}'; there are 'expert' and 'lora'")
    # The attention and the MLPs of both transformers; state, actions and time come in and go out by small layers.
    layers = r".*(language_model|gemma_expert\.model)\.layers\.\d+\.(self_attn\.[qkvo]_proj|mlp\.\w+_proj)"
    adapters = PeftConfig(
        target_modules=layers,
        full_training_modules=(
            "state_proj",
            "action_in_proj",
            "action_out_proj",
            "action_time_mlp_in",
            "action_time_mlp_out",
        ),
        r=16,
        lora_alpha=16,
    )
    return TrainConfig(
        job_name="_".join(["pi0_libero", *([variant] if variant else [])]),
        dataset=DatasetConfig(repo_id="HuggingFaceVLA/libero"),
        policy=PI0Config(
            pretrained_path="lerobot/pi0_base",
            input_features={
                OBS_STATE: PolicyFeature(FeatureType.STATE, (8,)),
                "observation.images.image": PolicyFeature(FeatureType.VISUAL, (3, 256, 256)),
                "observation.images.image2": PolicyFeature(FeatureType.VISUAL, (3, 256, 256)),
            },
            output_features={ACTION: PolicyFeature(FeatureType.ACTION, (7,))},
            dtype="bfloat16",
            use_amp=True,
            n_action_steps=10,
            train_expert_only=variant == "expert",
            optimizer_weight_decay=1e-10,
        ),
        peft=adapters if variant == "lora" else None,
        ema_decay=None if variant == "lora" else 0.99,
        mesh=MeshConfig(data=1, fsdp=-1),  # all devices hold a part of the state each
        steps=30_000,
        batch_size=32,
        log_freq=100,
        save_freq=5_000,
        env_eval_freq=0,
    )
