"""What is recorded of ACT: `lerobot.policies.act`."""

from . import Variant

CASES = ("loss", "loss_train", "train_steps", "chunk", "select")

SMALL = {
    "vision_backbone": "resnet18w4",
    "pretrained_backbone_weights": None,
    "dim_model": 32,
    "n_heads": 4,
    "dim_feedforward": 48,
    "n_encoder_layers": 2,
    "n_vae_encoder_layers": 2,
    "latent_dim": 6,
    "chunk_size": 6,
    "n_action_steps": 6,
    "optimizer_lr": 1e-3,
    "optimizer_lr_backbone": 3e-4,
}

VARIANTS = {
    "vae_2cam": Variant(
        about="two cameras, LeRobot's default layers, chunks cut short",
        inputs={
            "observation.state": (5,),
            "observation.images.top": (3, 48, 64),
            "observation.images.wrist": (3, 48, 64),
        },
        action=4,
        settings=SMALL | {"n_action_steps": 4},
    ),
    "env_prenorm": Variant(
        about="no camera, no VAE, pre-norm, gelu, two decoder layers, quantiles",
        inputs={"observation.state": (5,), "observation.environment_state": (7,)},
        action=4,
        settings=SMALL
        | {
            "use_vae": False,
            "pre_norm": True,
            "n_decoder_layers": 2,
            "feedforward_activation": "gelu",
            "chunk_size": 5,
            "n_action_steps": 5,
            "normalization_mapping": {"STATE": "QUANTILE10", "ENV": "MEAN_STD", "ACTION": "QUANTILES"},
        },
        store_weights=True,
    ),
    "dilated_te": Variant(
        about="bottleneck ResNet with dilation, temporal ensembling, camera and environment state",
        inputs={
            "observation.state": (5,),
            "observation.environment_state": (3,),
            "observation.images.top": (3, 64, 64),
        },
        action=4,
        settings=SMALL
        | {
            "vision_backbone": "resnet50w4",
            "replace_final_stride_with_dilation": True,
            "temporal_ensemble_coeff": 0.01,
            "n_action_steps": 1,
            "pre_norm": True,
        },
    ),
    "full_resnet18": Variant(
        about="ResNet-18 of the real width",
        inputs={"observation.state": (5,), "observation.images.top": (3, 96, 96)},
        action=4,
        settings=SMALL | {"vision_backbone": "resnet18"},
    ),
    "vae_minmax": Variant(
        about="odd image size, image left as it is, MIN_MAX with an action dimension that never moves",
        inputs={"observation.state": (3,), "observation.images.top": (3, 33, 47)},
        action=3,
        settings=SMALL
        | {
            "kl_weight": 1.0,
            "chunk_size": 4,
            "n_action_steps": 2,
            "n_vae_encoder_layers": 1,
            "normalization_mapping": {"VISUAL": "IDENTITY", "STATE": "QUANTILES", "ACTION": "MIN_MAX"},
        },
        constant=("action", 1),
        store_weights=True,
    ),
    "three_cameras": Variant(
        about="three cameras of different sizes, MIN_MAX images, raw state, QUANTILE10 actions",
        inputs={
            "observation.images.top": (3, 32, 40),
            "observation.images.wrist": (3, 33, 48),
            "observation.state": (4,),
            "observation.images.side": (3, 40, 24),
        },
        action=3,
        settings=SMALL
        | {
            "n_decoder_layers": 2,
            "feedforward_activation": "gelu",
            "kl_weight": 0.5,
            "latent_dim": 8,
            "chunk_size": 5,
            "n_action_steps": 3,
            "normalization_mapping": {"VISUAL": "MIN_MAX", "STATE": "IDENTITY", "ACTION": "QUANTILE10"},
        },
    ),
    "deep_raw": Variant(
        about="three encoder and decoder layers, quantile images, raw actions",
        inputs={"observation.images.top": (3, 48, 40), "observation.state": (6,)},
        action=2,
        settings=SMALL
        | {
            "dim_model": 24,
            "n_heads": 3,
            "n_encoder_layers": 3,
            "n_decoder_layers": 3,
            "kl_weight": 0.0,
            "chunk_size": 7,
            "n_action_steps": 5,
            "optimizer_weight_decay": 0.05,
            "normalization_mapping": {"VISUAL": "QUANTILES", "STATE": "MIN_MAX", "ACTION": "IDENTITY"},
        },
    ),
    "resnet34_te": Variant(
        about="ResNet-34, no VAE, temporal ensembling that favours new actions, chunk shorter than the episode",
        inputs={"observation.images.top": (3, 40, 56), "observation.state": (2,)},
        action=5,
        settings=SMALL
        | {
            "vision_backbone": "resnet34w2",
            "use_vae": False,
            "temporal_ensemble_coeff": -0.3,
            "chunk_size": 4,
            "n_action_steps": 1,
            "normalization_mapping": {"VISUAL": "QUANTILE10", "STATE": "MEAN_STD", "ACTION": "MIN_MAX"},
        },
        constant=("observation.state", 0),
    ),
    "env_vae": Variant(
        about="no camera with a VAE, one encoder layer, environment quantiles of which one never moves",
        inputs={"observation.environment_state": (5,), "observation.state": (3,)},
        action=3,
        settings=SMALL
        | {
            "dim_model": 16,
            "n_heads": 2,
            "n_encoder_layers": 1,
            "n_vae_encoder_layers": 3,
            "latent_dim": 3,
            "n_action_steps": 1,
            "normalization_mapping": {"STATE": "MIN_MAX", "ENV": "QUANTILES", "ACTION": "MEAN_STD"},
        },
        constant=("observation.environment_state", 2),
        store_weights=True,
    ),
}
