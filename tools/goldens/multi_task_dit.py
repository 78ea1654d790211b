"""What is recorded of the multi-task Diffusion Transformer: `lerobot.policies.multi_task_dit`."""

from typing import Any

from . import Variant

CASES = ("loss", "loss_train", "train_steps", "chunk", "select")
TASKS = ["pick up the red cube", "Open the drawer – then push the block!", ""]

CLIP = "tests/clip-tiny"  # tools/make_clip_golden.py
SMALL = {
    "horizon": 8,
    "n_action_steps": 4,
    "hidden_dim": 16,
    "num_layers": 2,
    "num_heads": 2,
    "timestep_embed_dim": 12,
    "vision_encoder_name": CLIP,
    "text_encoder_name": CLIP,
    "tokenizer_max_length": 24,
    "image_crop_shape": [32, 32],
    "optimizer_lr": 1e-3,
}
FLOW = SMALL | {"objective": "flow_matching", "num_integration_steps": 3}
TOP, WRIST = "observation.images.top", "observation.images.wrist"

VARIANTS = {
    "flow_euler": Variant(
        about="flow matching by Euler, times from a beta distribution, learnt positions, random crops",
        inputs={"observation.state": (3,), TOP: (3, 36, 40)},
        action=2,
        settings=FLOW
        | {
            "num_integration_steps": 5,
            "sigma_min": 0.05,
            "timestep_sampling_s": 0.9,
            "timestep_sampling_alpha": 2.0,
            "timestep_sampling_beta": 1.5,
            "use_rope": False,
            "use_positional_encoding": True,
        },
    ),
    "flow_rk4_two_encoders": Variant(
        about="flow matching by Runge-Kutta, uniform times, a tower a camera, tasks padded left, weight decay",
        inputs={"observation.state": (3,), TOP: (3, 30, 44), WRIST: (3, 30, 44)},
        action=3,
        settings=FLOW
        | {
            "n_obs_steps": 1,
            "n_action_steps": 8,
            "num_heads": 4,
            "integration_method": "rk4",
            "timestep_sampling_strategy": "uniform",
            "rope_base": 100.0,
            "use_separate_rgb_encoder_per_camera": True,
            "vision_encoder_lr_multiplier": 0.5,
            "image_resize_shape": [36, 38],
            "tokenizer_padding_side": "left",
            "do_mask_loss_for_padding": True,
            "optimizer_weight_decay": 0.1,
            "scheduler_warmup_steps": 2,
        },
    ),
    "ddim_shared": Variant(
        about="DDIM that predicts actions, rotated and learnt positions, one tower for two cameras, resized only",
        inputs={
            "observation.state": (3,),
            "observation.environment_state": (4,),
            TOP: (3, 48, 50),
            WRIST: (3, 48, 50),
        },
        action=2,
        settings=SMALL
        | {
            "noise_scheduler_type": "DDIM",
            "num_train_timesteps": 20,
            "num_inference_steps": 4,
            "prediction_type": "sample",
            "clip_sample": False,
            "use_positional_encoding": True,
            "image_resize_shape": [32, 32],
            "image_crop_shape": None,
            "tokenizer_padding": "longest",
            "scheduler_name": "constant_with_warmup",
            "scheduler_warmup_steps": 5,
            "normalization_mapping": {"VISUAL": "IDENTITY", "STATE": "MEAN_STD", "ACTION": "MEAN_STD"},
        },
    ),
    "ddpm_blind": Variant(
        about="DDPM without cameras or positions, three observation steps, tasks cut, a state that never moves",
        inputs={"observation.state": (5,)},
        action=2,
        settings=SMALL
        | {
            "n_obs_steps": 3,
            "n_action_steps": 3,
            "num_layers": 1,
            "num_train_timesteps": 9,
            "num_inference_steps": 5,
            "beta_schedule": "linear",
            "clip_sample_range": 2.0,
            "use_rope": False,
            "tokenizer_max_length": 7,
            "normalization_mapping": {"STATE": "QUANTILES", "ACTION": "MIN_MAX"},
        },
        constant=("observation.state", 1),
    ),
}


def initial_kind(module: Any, key: str, tensor: Any) -> str:
    """Treat the class token and learnt positions, which are no layers, as embeddings."""
    from .stock import drawing

    is_vector = key in ("class_embedding", "pos_embedding")
    return "embed" if is_vector else drawing.initial_kind(module, key, tensor)


def draw_batch(config: Any, stats: Any, seed: int) -> dict[str, Any]:
    """Give each sample a task."""
    from .stock import drawing

    return {**drawing.draw_batch(config, stats, seed), "task": TASKS}


def draw_observation(config: Any, stats: Any, step: int, seed: int) -> dict[str, Any]:
    """Give each environment a task."""
    from .stock import drawing

    return {**drawing.draw_observation(config, stats, step, seed), "task": TASKS}


def chunk(stock: Any) -> dict[str, Any]:
    """One chunk for the batch's windows; LeRobot's own function takes them from its queues only."""
    policy = stock.policy
    actions = policy._generate_actions(policy._prepare_batch(stock.batch))
    return {"action": actions, "post/action": stock.postprocess(actions.clone())}
