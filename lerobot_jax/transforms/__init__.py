"""Random changes of training images (data augmentation) on the device: LeRobot's, with PyTorch's arithmetic."""

from lerobot_jax.transforms.color import (
    adjust_brightness,
    adjust_contrast,
    adjust_hue,
    adjust_saturation,
    adjust_sharpness,
)
from lerobot_jax.transforms.config import ImageTransformConfig, ImageTransformsConfig, make_transform
from lerobot_jax.transforms.geometry import (
    affine,
    center_crop,
    crop,
    inverse_affine,
    pad,
    resize,
    resized_crop,
)
from lerobot_jax.transforms.subset import check_sizes, draw_subset, final_size, random_transforms

__all__ = [
    "ImageTransformConfig",
    "ImageTransformsConfig",
    "adjust_brightness",
    "adjust_contrast",
    "adjust_hue",
    "adjust_saturation",
    "adjust_sharpness",
    "affine",
    "center_crop",
    "check_sizes",
    "crop",
    "draw_subset",
    "final_size",
    "inverse_affine",
    "make_transform",
    "pad",
    "random_transforms",
    "resize",
    "resized_crop",
]
