"""Draw what the image transforms of a recipe do to a frame, as LeRobot's `lerobot-imgtransform-viz`.

    python -m lerobot_jax.transforms --config=RECIPE [--config.FIELD=VALUE ...]

Writes image_transforms.png: the frame, each transform at the low end, the middle and the high end of its ranges (what
else is random in it is drawn), and below what training sees: random subsets.
"""

import dataclasses
import sys
from collections.abc import Sequence

import jax
import numpy as np
from absl import logging
from matplotlib.figure import Figure

from lerobot_jax.config import load_config
from lerobot_jax.errors import InputError, reported_on_one_line
from lerobot_jax.logs import setup_logging
from lerobot_jax.training_data import open_sources
from lerobot_jax.transforms import ImageTransformConfig, make_transform, random_transforms

RANGES = ("brightness", "contrast", "saturation", "hue", "sharpness", "degrees", "scale", "shear")


def main(argv: Sequence[str]) -> None:
    config = load_config(argv)
    dataset = open_sources(config)[0].dataset
    if not dataset.cameras:
        raise InputError(f"{config.dataset.repo_id}: no camera")
    camera = next(iter(dataset.cameras))
    frames = dataset.read(np.array([len(dataset) // 2]), [camera])[camera]
    frame, key = jax.numpy.asarray(frames.reshape(-1, *frames.shape[-3:])[-1]), jax.random.key(config.seed)
    pictures = {"original": frame}
    for name, tf in config.dataset.image_transforms.tfs.items():
        for place, fraction in (("low", 0), ("middle", 0.5), ("high", 1)):
            transform = make_transform(_narrow(tf, fraction))
            parameters = transform.draw(key, *frame.shape[:2])
            pictures[f"{name}, {place}"] = transform.transform(frame, parameters)
    enabled = dataclasses.replace(config.dataset.image_transforms, enable=True)
    subsets = jax.jit(random_transforms(enabled))(key, {camera: frame[None].repeat(11, 0)})[camera]
    pictures |= {f"subset {i}": image for i, image in enumerate(subsets, 1)}
    figure = Figure(figsize=(12, 2.2 * -(-len(pictures) // 6)), layout="constrained")
    for ax in (axes := figure.subplots(-(-len(pictures) // 6), 6).flat):
        ax.set_axis_off()
    for ax, (title, image) in zip(axes, pictures.items(), strict=False):
        ax.imshow(np.asarray(image))
        ax.set_title(title, fontsize=9)
    figure.savefig("image_transforms.png", dpi=110)
    logging.info("drawn: image_transforms.png, from %s of %s", camera, config.dataset.repo_id)


def _narrow(tf: ImageTransformConfig, fraction: float) -> ImageTransformConfig:
    """Give the transform with each of its ranges narrowed to a point."""
    kwargs = dict(tf.kwargs)
    for name in set(RANGES) & set(kwargs):
        if tf.type != "RandomResizedCrop" and isinstance(kwargs[name], tuple):
            low, high = kwargs[name]
            kwargs[name] = (low + fraction * (high - low),) * 2
    return dataclasses.replace(tf, kwargs=kwargs)


if __name__ == "__main__":
    setup_logging()
    with reported_on_one_line():
        main(sys.argv[1:])
