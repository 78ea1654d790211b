"""The policies that the benchmarks time, of both sides, and data of Push-T's shapes.

ACT has LeRobot's default sizes, Diffusion Policy those of the published `lerobot/diffusion_pusht`, VQ-BeT those of
`lerobot/vqbet_pusht`, after it has learned its codes (before: `--options='{"n_vqvae_training_steps": 1000}'`); one
96x96 camera.
"""

from typing import Any

import numpy as np

OPTIONS: dict[str, dict[str, Any]] = {
    "act": {},
    "diffusion": {"horizon": 16, "n_action_steps": 8, "crop_shape": (84, 84), "use_group_norm": True},
    "vqbet": {"n_vqvae_training_steps": 1, "n_action_pred_token": 7, "use_group_norm": True},
}
IMAGE, STATE, ACTION = "observation.image", "observation.state", "action"
SHAPES = {IMAGE: (3, 96, 96), STATE: (2,), ACTION: (2,)}


def draw_observations(seed: int, batch_size: int, *past: int) -> dict[str, np.ndarray]:
    """Draw observations: images are uint8 `b h w c`, behind the axes `past`."""
    rng = np.random.default_rng(seed)
    return {
        IMAGE: rng.integers(0, 256, (batch_size, *past, 96, 96, 3), np.uint8),
        STATE: rng.normal(size=(batch_size, *past, 2)).astype(np.float32),
    }


def statistics() -> dict[str, dict[str, np.ndarray]]:
    numbers = {"mean": 0.0, "std": 1.0, "min": -3.0, "max": 3.0}
    return {
        key: {
            name: np.full((3, 1, 1) if key == IMAGE else shape, value, np.float32)
            for name, value in numbers.items()
        }
        for key, shape in SHAPES.items()
    }


def make_lerobot_jax_policy(name: str, **options: Any) -> Any:
    """Give a policy of ours without arrays."""
    from lerobot_jax.features import FeatureType, PolicyFeature
    from lerobot_jax.policies.base import config_class, make_policy

    new_config: Any = config_class(name)
    config = new_config(
        input_features={
            IMAGE: PolicyFeature(FeatureType.VISUAL, SHAPES[IMAGE]),
            STATE: PolicyFeature(FeatureType.STATE, SHAPES[STATE]),
        },
        output_features={ACTION: PolicyFeature(FeatureType.ACTION, SHAPES[ACTION])},
        pretrained_backbone_weights=None,
        **options,
    )
    return make_policy(config, statistics())


def make_lerobot_policy(name: str, **options: Any) -> tuple[Any, Any, Any]:
    """Give (policy, preprocessor, postprocessor) of stock LeRobot, on the GPU if there is one."""
    import torch  # pyright: ignore[reportMissingImports]
    from lerobot.configs import FeatureType, PolicyFeature  # pyright: ignore[reportMissingImports]
    from lerobot.policies.factory import (  # pyright: ignore[reportMissingImports]
        get_policy_class,
        make_policy_config,
        make_pre_post_processors,
    )

    device = "cuda" if torch.cuda.is_available() else "cpu"
    config = make_policy_config(
        name,
        input_features={
            IMAGE: PolicyFeature(type=FeatureType.VISUAL, shape=SHAPES[IMAGE]),
            STATE: PolicyFeature(type=FeatureType.STATE, shape=SHAPES[STATE]),
        },
        output_features={ACTION: PolicyFeature(type=FeatureType.ACTION, shape=SHAPES[ACTION])},
        pretrained_backbone_weights=None,
        device=device,
        **options,
    )
    stats = {k: {n: torch.from_numpy(v) for n, v in s.items()} for k, s in statistics().items()}
    return get_policy_class(name)(config).to(device), *make_pre_post_processors(config, dataset_stats=stats)


def to_torch(batch: dict[str, np.ndarray]) -> dict[str, Any]:
    """Give a batch as stock LeRobot's datasets and environments do: float images, channel-first."""
    import torch  # pyright: ignore[reportMissingImports]

    tensors = {key: torch.from_numpy(value) for key, value in batch.items()}
    tensors[IMAGE] = tensors[IMAGE].movedim(-1, -3).contiguous() / 255
    return tensors
