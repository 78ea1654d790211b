"""What is recorded of VQ-BeT: `lerobot.policies.vqbet`."""

from typing import Any

from tests.goldens import initial_value

from . import Variant

CASES = ("loss", "loss_train", "train_steps", "select")

SMALL = {
    "vision_backbone": "resnet10w4",
    "pretrained_backbone_weights": None,
    "spatial_softmax_num_keypoints": 4,
    "vqvae_n_embed": 5,
    "vqvae_embedding_dim": 6,
    "vqvae_enc_hidden_dim": 12,
    "gpt_block_size": 16,
    "gpt_input_dim": 12,
    "gpt_output_dim": 10,
    "gpt_n_layer": 2,
    "gpt_n_head": 2,
    "gpt_hidden_dim": 16,
    "optimizer_lr": 1e-3,
    "scheduler_warmup_steps": 1,
}

VARIANTS = {
    "both_phases": Variant(
        about="codes are learned for two steps, then the rest; batch norm, random crops",
        inputs={"observation.state": (3,), "observation.images.top": (3, 36, 40)},
        action=2,
        settings=SMALL
        | {
            "n_vqvae_training_steps": 2,
            "n_obs_steps": 2,
            "n_action_pred_token": 2,
            "action_chunk_size": 3,
            "crop_shape": [33, 35],
            "optimizer_vqvae_lr": 3e-3,
            "optimizer_vqvae_weight_decay": 0.1,
            "optimizer_weight_decay": 0.01,
        },
        store_weights=True,  # LeRobot moves batch norms' statistics when it makes a policy
    ),
    "sequential_unused_input": Variant(
        about="codes one after the other, an input that the policy does not see, centre crops",
        inputs={
            "observation.state": (3,),
            "observation.environment_state": (4,),
            "observation.images.top": (3, 33, 38),
        },
        action=3,
        settings=SMALL
        | {
            "n_vqvae_training_steps": 0,
            "n_obs_steps": 2,
            "n_action_pred_token": 3,
            "action_chunk_size": 2,
            "crop_shape": [32, 35],
            "crop_is_random": False,
            "sequentially_select": True,
            "bet_softmax_temperature": 0.5,
            "offset_loss_weight": 10.0,
            "secondary_code_loss_weight": 2.0,
        },
        store_weights=True,
    ),
    "one_step": Variant(
        about="one observation step, one query, chunks of one action, no crop, other normalization",
        inputs={"observation.images.top": (3, 33, 34), "observation.state": (2,)},
        action=2,
        settings=SMALL
        | {
            "n_vqvae_training_steps": 0,
            "n_obs_steps": 1,
            "n_action_pred_token": 1,
            "action_chunk_size": 1,
            "crop_shape": None,
            "gpt_n_layer": 1,
            "gpt_n_head": 4,
            "normalization_mapping": {"VISUAL": "MEAN_STD", "STATE": "QUANTILES", "ACTION": "MEAN_STD"},
        },
        constant=("observation.state", 1),
        store_weights=True,
    ),
}


def set_weights(policy: Any, name: str, seed: int) -> dict[str, str]:
    """Give the codebooks values too; a policy that is to learn codes for 0 steps has learned them."""
    import torch

    from .stock import drawing

    kinds = drawing.set_weights(policy, name, seed)
    vqvae = policy.vqbet.action_head.vqvae_model
    for i, layer in enumerate(vqvae.vq_layer.layers):
        for key, kind in (("embed", "embed"), ("embed_avg", "embed"), ("cluster_size", "running_var")):
            buffer = getattr(layer._codebook, key)
            full = f"vqbet.action_head.vqvae_model.vq_layer.layers.{i}._codebook.{key}"
            kinds[full] = kind
            buffer.copy_(torch.from_numpy(initial_value(kind, full, list(buffer.shape), seed, 1.0)))
    if policy.config.n_vqvae_training_steps == 0:
        vqvae.discretized.fill_(True)
        vqvae.vq_layer.freeze_codebook.fill_(True)
    return kinds
