"""A random subset of the transforms for each sample and camera, inside jit. Mirrors LeRobot's `ImageTransforms`."""

import functools
import zlib
from collections.abc import Callable, Mapping

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int, Key, PRNGKeyArray, UInt8

from lerobot_jax.errors import InputError
from lerobot_jax.transforms.color import Image
from lerobot_jax.transforms.config import ImageTransformsConfig, make_transform
from lerobot_jax.transforms.geometry import NewImage
from lerobot_jax.transforms.transform import Transform

Images = UInt8[Array, "b ..."] | Float[Array, "b ..."]


def random_transforms(
    config: ImageTransformsConfig,
) -> Callable[[PRNGKeyArray, dict[str, Images]], dict[str, Images]]:
    """Give `apply(key, images)`, which changes each camera's images, of shape `b *t h w c`, at random.

    What happens to a sample is a function of the key, its place in the batch and the camera's name, and the same
    for all its observation steps. As in LeRobot, `max_num_transforms` different transforms are drawn by their
    weights, and applied in the order of `tfs`, or in that in which they were drawn if `random_order`. Types are
    kept: LeRobot transforms the frames of videos as uint8, and images in tables as float32 in 0..1.
    """

    def apply(key: PRNGKeyArray, images: dict[str, Images]) -> dict[str, Images]:
        if not config.enable:
            return images
        changed = {}
        for camera, batch in images.items():
            final_size(config, camera, *batch.shape[-3:-1])
            changed[camera] = _transform_batch(
                config, jax.random.fold_in(key, zlib.crc32(camera.encode())), batch
            )
        return changed

    return apply


def _transform_batch(config: ImageTransformsConfig, key: PRNGKeyArray, images: Images) -> Images:
    transforms = list(_active(config).values())
    keys = jax.vmap(jax.random.fold_in, (None, 0))(key, jnp.arange(len(images)))
    subset_keys, *keys = jax.vmap(lambda k: jax.random.split(k, 1 + len(transforms)), out_axes=1)(keys)
    drawn = jax.vmap(functools.partial(draw_subset, config))(subset_keys)  # b n
    for turn in jnp.split(drawn, drawn.shape[1], 1) if config.random_order else [drawn]:
        for i, transform in enumerate(transforms):
            images = _transform_chosen(transform, keys[i], images, (turn == i).any(1))
    return images


def _transform_chosen(
    transform: Transform, keys: Key[Array, " b"], images: Images, chosen: Bool[Array, " b"]
) -> Images:
    size = images.shape[-3:-1]

    def change(key: PRNGKeyArray, image: Image) -> NewImage:
        return transform.transform(image, transform.draw(key, *size))

    def change_chosen(images: Images) -> Images:
        return jax.vmap(lambda c, k, image: jnp.where(c, change(k, image), image))(chosen, keys, images)

    if transform.new_size(*size) != size:  # then every sample is chosen: `final_size`
        return jax.vmap(change)(keys, images)
    # The branch has a second use: without it, XLA computes the result anew for each pixel that the next transform
    # looks up.
    return jax.lax.cond(chosen.any(), change_chosen, lambda images: images, images)


def draw_subset(config: ImageTransformsConfig, key: PRNGKeyArray) -> Int[Array, " n"]:
    """Draw which transforms are applied, as indices among those with a weight, in the order of being drawn."""
    weights = np.array([tf.weight for tf in config.tfs.values() if tf.weight], np.float32)
    # The largest of log weights with Gumbel noise are a sample without replacement.
    scores = jnp.log(weights) + jax.random.gumbel(key, weights.shape)
    return jax.lax.top_k(scores, min(config.max_num_transforms, len(weights)))[1]


def check_sizes(
    config: ImageTransformsConfig, given: Mapping[str, tuple[int, ...]], wanted: Mapping[str, tuple[int, ...]]
) -> None:
    """Raise `InputError` if the transforms do not give the height and width that the policy wants of a camera."""
    for camera, (height, width) in wanted.items():
        result = final_size(config, camera, *given[camera]) if config.enable else given[camera]
        if result != (height, width):
            raise InputError(
                f"image_transforms make {result[0]} x {result[1]} of {camera}, the policy wants {height} x {width}"
            )


def final_size(config: ImageTransformsConfig, camera: str, height: int, width: int) -> tuple[int, int]:
    """Give the height and width that a camera's images have after the transforms.

    Raises:
        InputError: when a crop does not fit them, or would change the size of some images only.
    """
    transforms, size = _active(config), (height, width)
    for name, transform in transforms.items():
        try:
            new = transform.new_size(*size)
        except InputError as error:
            raise InputError(f"image_transforms.tfs.{name}: {camera}: {error}") from None
        if new != size and (config.random_order or config.max_num_transforms < len(transforms)):
            raise InputError(
                f"image_transforms.tfs.{name} makes {new[0]} x {new[1]} of {camera}, which is "
                f"{size[0]} x {size[1]}; only if all transforms are applied, in a fixed order, may one change it"
            )
        size = new
    return size


def _active(config: ImageTransformsConfig) -> dict[str, Transform]:
    """Give the transforms with a weight; as in LeRobot, one without is never applied."""
    return {name: make_transform(tf) for name, tf in config.tfs.items() if tf.weight}
