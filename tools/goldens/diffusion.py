"""What is recorded of Diffusion Policy: `lerobot.policies.diffusion`."""

from . import Variant

CASES = ("loss", "loss_train", "train_steps", "chunk", "select")

SMALL = {
    "vision_backbone": "resnet18w4",
    "pretrained_backbone_weights": None,
    "spatial_softmax_num_keypoints": 5,
    "n_obs_steps": 2,
    "horizon": 8,
    "n_action_steps": 4,
    "down_dims": [16, 32],
    "kernel_size": 3,
    "n_groups": 4,
    "diffusion_step_embed_dim": 16,
    "num_train_timesteps": 12,
    "optimizer_lr": 1e-3,
}
STATE = {"observation.state": (3,), "observation.environment_state": (4,)}

VARIANTS = {
    "ddpm_gn": Variant(
        about="group norm, random crops, fewer steps than trained with",
        inputs={"observation.state": (3,), "observation.images.top": (3, 48, 56)},
        action=2,
        settings=SMALL
        | {
            "vision_backbone": "resnet10w16",
            "use_group_norm": True,
            "crop_shape": [40, 44],
            "num_inference_steps": 6,
        },
    ),
    "ddim_two_encoders": Variant(
        about="batch norm, an encoder for each of two cameras, resized and cropped, DDIM that predicts actions",
        inputs={
            "observation.state": (3,),
            "observation.images.top": (3, 36, 44),
            "observation.images.wrist": (3, 36, 44),
        },
        action=3,
        settings=SMALL
        | {
            "n_obs_steps": 3,
            "n_action_steps": 3,
            "resize_shape": [41, 37],
            "crop_ratio": 0.9,
            "noise_scheduler_type": "DDIM",
            "prediction_type": "sample",
            "num_inference_steps": 5,
            "use_film_scale_modulation": False,
            "do_mask_loss_for_padding": True,
            "clip_sample": False,
        },
        store_weights=True,  # LeRobot moves batch norms' statistics when it makes a policy
    ),
    "ddim_shared": Variant(
        about="batch norm, one encoder for two cameras and the environment's state, DDIM, centre crops",
        inputs=STATE | {"observation.images.top": (3, 40, 45), "observation.images.wrist": (3, 40, 45)},
        action=2,
        settings=SMALL
        | {
            "use_separate_rgb_encoder_per_camera": False,
            "crop_shape": [33, 40],
            "crop_is_random": False,
            "noise_scheduler_type": "DDIM",
            "beta_schedule": "scaled_linear",
            "num_inference_steps": 4,
            "n_action_steps": 7,
        },
        store_weights=True,
    ),
    "ddpm_one_step": Variant(
        about="one observation step, three levels, linear schedule, wide clipping, a state that never moves",
        inputs=STATE,
        action=2,
        settings=SMALL
        | {
            "n_obs_steps": 1,
            "horizon": 16,
            "n_action_steps": 8,
            "down_dims": [16, 24, 32],
            "n_groups": 8,
            "kernel_size": 5,
            "beta_schedule": "linear",
            "clip_sample_range": 2.0,
            "num_train_timesteps": 10,
        },
        constant=("observation.state", 0),
        store_weights=True,
    ),
    "ddpm_sample": Variant(
        about="one level, DDPM that predicts actions, sigmoid schedule, masked padding, quantiles",
        inputs=STATE,
        action=3,
        settings=SMALL
        | {
            "down_dims": [24],
            "horizon": 6,
            "n_action_steps": 5,
            "prediction_type": "sample",
            "beta_schedule": "sigmoid",
            "num_train_timesteps": 15,
            "num_inference_steps": 5,
            "do_mask_loss_for_padding": True,
            "normalization_mapping": {"STATE": "QUANTILES", "ENV": "MEAN_STD", "ACTION": "MIN_MAX"},
        },
    ),
    "full_resnet18": Variant(
        about="the published image encoder at its real width",
        inputs={"observation.state": (2,), "observation.images.top": (3, 96, 96)},
        action=2,
        settings=SMALL
        | {
            "vision_backbone": "resnet18",
            "use_group_norm": True,
            "crop_shape": [84, 84],
            "spatial_softmax_num_keypoints": 32,
            "horizon": 16,
            "n_action_steps": 8,
            "noise_scheduler_type": "DDIM",
            "num_train_timesteps": 100,
            "num_inference_steps": 3,
        },
    ),
}
