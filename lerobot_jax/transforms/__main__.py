"""Draw what a recipe's image transforms do to a frame, as `lerobot-imgtransform-viz` does.

    python -m lerobot_jax.transforms --config=RECIPE [--config.FIELD=VALUE ...]

Writes image_transforms.png: each transform at both ends and in the middle of its ranges, and random subsets.
"""

import dataclasses
import sys
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from absl import logging
from matplotlib.figure import Figure

from lerobot_jax.config import load_config
from lerobot_jax.errors import InputError, reported_on_one_line
from lerobot_jax.logs import setup_logging
from lerobot_jax.training_data import open_sources
from lerobot_jax.transforms import ImageTransformConfig, make_transform, random_transforms


def main(argv: Sequence[str]) -> None:
    config = load_config(argv)
    config = dataclasses.replace(config, dataset=dataclasses.replace(config.dataset, streaming=False))
    dataset = open_sources(config)[0].dataset
    if not dataset.cameras:
        raise InputError(f"{dataset.repo_id}: no camera that the policy sees")
    camera, key = next(iter(dataset.cameras)), jax.random.key(config.seed)
    frames = dataset.read(np.array([len(dataset) // 2]), [camera])[camera]
    frame = jnp.asarray(frames.reshape(-1, *frames.shape[-3:])[-1])
    pictures = {}
    for name, tf in config.dataset.image_transforms.tfs.items():
        for place, fraction in (("low", 0.0), ("middle", 0.5), ("high", 1.0)):
            narrow = make_transform(_narrow(tf, fraction))
            pictures[f"{name}, {place}"] = jax.jit(narrow.transform)(
                frame, narrow.draw(key, *frame.shape[:2])
            )
    enabled = dataclasses.replace(config.dataset.image_transforms, enable=True)
    subsets = jax.jit(random_transforms(enabled))(key, {camera: frame[None].repeat(11, 0)})[camera]
    pictures |= {"the frame": frame} | {f"subset {i}": image for i, image in enumerate(subsets, 1)}
    num_rows = -(-len(pictures) // 6)
    figure = Figure(figsize=(12, 2.2 * num_rows), layout="constrained")
    for i, (title, image) in enumerate(pictures.items(), 1):
        ax = figure.add_subplot(num_rows, 6, i, title=title)
        ax.imshow(np.asarray(image))
        ax.set_axis_off()
    figure.savefig("image_transforms.png", dpi=110)
    logging.info("drawn: image_transforms.png")


def _narrow(tf: ImageTransformConfig, fraction: float) -> ImageTransformConfig:
    """Give the transform with its ranges narrowed to points."""
    names = ("brightness", "contrast", "saturation", "hue", "sharpness", "degrees", "shear")
    ranges = {k: v for k, v in tf.kwargs.items() if k in names and np.size(v) == 2}
    points = {name: (low + fraction * (high - low),) * 2 for name, (low, high) in ranges.items()}
    return dataclasses.replace(tf, kwargs={**tf.kwargs, **points})


if __name__ == "__main__":
    setup_logging()
    with reported_on_one_line():
        main(sys.argv[1:])
