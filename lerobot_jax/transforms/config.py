"""Which transforms are applied to training images: LeRobot's settings. Mirrors `lerobot.transforms.transforms`."""

import dataclasses
import math
import typing
from typing import Any

from lerobot_jax.errors import InputError
from lerobot_jax.settings import check_settings
from lerobot_jax.transforms.transform import TRANSFORMS, Transform


@dataclasses.dataclass(frozen=True)
class ImageTransformConfig:
    """One transform."""

    weight: float = 1.0
    """How likely it is chosen, relative to the others; 0: never."""
    type: str = "Identity"
    """ColorJitter, SharpnessJitter, RandomAffine, RandomCrop, CenterCrop, RandomResizedCrop or Identity."""
    kwargs: dict[str, Any] = dataclasses.field(default_factory=dict, hash=False)
    """Its settings, under torchvision's names."""

    def __post_init__(self):
        if not 0 <= self.weight < math.inf:
            raise InputError(f"weight must be finite and not negative, it is {self.weight}")
        make_transform(self)


def _default_transforms() -> dict[str, ImageTransformConfig]:
    return {
        "brightness": ImageTransformConfig(type="ColorJitter", kwargs={"brightness": (0.8, 1.2)}),
        "contrast": ImageTransformConfig(type="ColorJitter", kwargs={"contrast": (0.8, 1.2)}),
        "saturation": ImageTransformConfig(type="ColorJitter", kwargs={"saturation": (0.5, 1.5)}),
        "hue": ImageTransformConfig(type="ColorJitter", kwargs={"hue": (-0.05, 0.05)}),
        "sharpness": ImageTransformConfig(type="SharpnessJitter", kwargs={"sharpness": (0.5, 1.5)}),
        "affine": ImageTransformConfig(
            type="RandomAffine", kwargs={"degrees": (-5.0, 5.0), "translate": (0.05, 0.05)}
        ),
    }


@dataclasses.dataclass(frozen=True)
class ImageTransformsConfig:
    """Random changes of training images, on the device: a random subset of `tfs` for each sample and camera."""

    enable: bool = False
    """Apply transforms."""
    max_num_transforms: int = 3
    """How many of them are applied to each image."""
    random_order: bool = False
    """Apply them in random order instead of that of `tfs`."""
    tfs: dict[str, ImageTransformConfig] = dataclasses.field(default_factory=_default_transforms, hash=False)
    """The transforms that subsets are drawn from."""

    def __post_init__(self):
        if self.max_num_transforms < 1:
            raise InputError(
                f"image_transforms.max_num_transforms must be at least 1, not {self.max_num_transforms}"
            )
        if self.enable and not any(tf.weight for tf in self.tfs.values()):
            raise InputError(
                "image_transforms.tfs must have a transform with a weight above 0, or set enable=False"
            )


def make_transform(config: ImageTransformConfig) -> Transform:
    """Build a transform from its settings.

    Raises:
        InputError: when there is no such transform, or a setting is unknown or wrong.
    """
    if config.type not in TRANSFORMS:
        raise InputError(f"type '{config.type}' is not supported; supported are {', '.join(TRANSFORMS)}")
    kind = TRANSFORMS[config.type]
    try:
        check_settings(config.kwargs, typing.get_type_hints(kind))
        for field in dataclasses.fields(kind):
            if field.default is dataclasses.MISSING and field.name not in config.kwargs:
                raise InputError(f"{field.name} is missing")
        return kind(**config.kwargs)
    except InputError as error:
        raise InputError(f"kwargs of {config.type}: {error}") from None
