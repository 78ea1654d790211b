"""Cropping and resizing the observed images.

A policy trained on images of another size than the camera's carries this step, so that it takes the camera's.
Mirrors `ImageCropResizeProcessorStep` of `lerobot.processor.hil_processor`.

Three differences, on purpose. Padding flags (`observation.images.<camera>_is_pad`) pass; LeRobot's step takes them
for images. It fills a crop that reaches beyond the image with black, and limits uint8 images to 0 and 1; both are
errors here.
"""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import jax.numpy as jnp

from lerobot_jax.errors import InputError
from lerobot_jax.processors.steps import Batch, Step
from lerobot_jax.transforms.geometry import resize


@dataclasses.dataclass(frozen=True, eq=False)
class CropResizeImages(Step):
    """Crops images to (top, left, height, width), by key, and resizes all of them to (height, width).

    Images are float in 0..1, channel-last; resizing is bilinear, with antialiasing where they shrink.
    """

    registry_name: ClassVar[str] = "image_crop_resize_processor"
    crop_params_dict: Mapping[str, Sequence[int]] | None = None
    resize_size: Sequence[int] | None = None

    def __post_init__(self):
        for key, crop in (self.crop_params_dict or {}).items():
            if len(crop) != 4 or min(crop[:2]) < 0 or min(crop[2:]) < 1:
                raise InputError(
                    f"crop_params_dict must have (top, left, height, width) of {key}, not {tuple(crop)}"
                )
        if self.resize_size is not None and (len(self.resize_size) != 2 or min(self.resize_size) < 1):
            raise InputError(f"resize_size must be (height, width), not {tuple(self.resize_size)}")

    def __call__(self, batch: Batch) -> Batch:
        return batch | {key: self._change(key, batch[key]) for key in batch if _is_image(key)}

    def _change(self, key: str, image: Any) -> Any:
        crop = (self.crop_params_dict or {}).get(key)
        if crop is not None:
            top, left, height, width = crop
            if top + height > image.shape[-3] or left + width > image.shape[-2]:
                raise InputError(
                    f"'{key}' is to be cropped to {height} x {width} pixels at ({top}, {left}), but has only "
                    f"{image.shape[-3]} x {image.shape[-2]}"
                )
            image = image[..., top : top + height, left : left + width, :]
        if self.resize_size is not None:
            if not jnp.issubdtype(image.dtype, jnp.floating):
                raise InputError(f"'{key}' must be float in 0..1 to be resized, it is {image.dtype}")
            height, width = self.resize_size
            image = jnp.clip(resize(jnp.asarray(image, jnp.float32), (height, width)), 0, 1)
        return image


def _is_image(key: str) -> bool:
    return key.startswith("observation.") and "image" in key and not key.endswith("_is_pad")
