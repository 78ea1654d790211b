"""Affine maps, padding, crops and resizing of images with PyTorch's arithmetic.

Images are channel-last, uint8 in 0..255 or float32 in 0..1. The images of leading axes share the parameters; with
`jax.vmap`, each has its own.

Given the matrix, a nearest affine map is PyTorch's bit for bit. PyTorch computes the matrix in float64;
`inverse_affine` differs by 1e-7, so that about one pixel in 100,000 comes from the neighbour of where it should.
Resizing uint8 is PyTorch's arithmetic on CPUs, in fixed point with weights of 16 bits; a weight that differs in the
last bit changes about one pixel in 100,000 by one level.

Mirrors `torchvision.transforms.v2.functional._geometry`.
"""

from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int, PRNGKeyArray, UInt8

from lerobot_jax.transforms.arithmetic import add_product, divide, rounded
from lerobot_jax.transforms.color import Image

PaddingMode = Literal["constant", "edge", "reflect", "symmetric"]
Fill = tuple[float, ...]
NewImage = UInt8[Array, "*b new_h new_w c"] | Float[Array, "*b new_h new_w c"]


def inverse_affine(
    angle: Float[Array, ""], translate: Float[Array, "2"], scale: Float[Array, ""], shear: Float[Array, "2"]
) -> Float[Array, "2 3"]:
    """Give the matrix that maps a pixel of the result to where it comes from, about the image's centre.

    Args:
        angle: of a clockwise rotation, in degrees.
        translate: right and down, in pixels.
        scale: of the image.
        shear: along x and y, in degrees.
    """
    rotation, (shear_x, shear_y) = jnp.deg2rad(angle), jnp.deg2rad(shear)
    a = jnp.cos(rotation - shear_y) / jnp.cos(shear_y)
    b = -(a * jnp.tan(shear_x) + jnp.sin(rotation))
    c = jnp.sin(rotation - shear_y) / jnp.cos(shear_y)
    d = jnp.cos(rotation) - c * jnp.tan(shear_x)
    linear = jnp.array([[d, -b], [-c, a]]) / scale
    return jnp.concatenate([linear, -(linear * translate[None]).sum(1, keepdims=True)], 1)


def affine(
    image: Image,
    matrix: Float[Array, "2 3"],
    interpolation: Literal["nearest", "bilinear"] = "nearest",
    fill: Fill = (0,),
) -> Image:
    """Move pixels to where `inverse_affine` says; outside there is `fill`, one number or one a channel."""
    height, width = image.shape[-3:-1]
    x, y = _sources(matrix, height, width)
    if interpolation == "nearest":
        pixels, is_inside = _look_up(image, jnp.round(x), jnp.round(y))
        return jnp.where(is_inside, pixels, _filling(fill, image).astype(image.dtype))
    left, top = jnp.floor(x), jnp.floor(y)
    total, weight = jnp.zeros(image.shape, jnp.float32), jnp.zeros((*image.shape[:-1], 1), jnp.float32)
    for down, right in ((0, 0), (0, 1), (1, 0), (1, 1)):
        pixels, is_inside = _look_up(image, left + right, top + down)
        part = (1 - jnp.abs(x - left - right)) * (1 - jnp.abs(y - top - down))
        part = jnp.where(is_inside, _align(part[..., None], image), 0)
        total, weight = total + part * pixels, weight + part
    filling = _filling(fill, image)
    blended = weight * (total - filling) + filling
    return (jnp.round(blended) if image.dtype == jnp.uint8 else blended).astype(image.dtype)


def _sources(
    matrix: Float[Array, "2 3"], height: int, width: int
) -> tuple[Float[Array, "h w"], Float[Array, "h w"]]:
    """Give the column and the row that each pixel comes from, rounded in the places where PyTorch rounds."""
    columns = jnp.arange(width)[None] - (width - 1) / 2
    rows = jnp.arange(height)[:, None] - (height - 1) / 2
    sources = []
    for (a, b, c), size in zip(matrix, (width, height), strict=True):
        a, b, c = divide(a, size / 2), divide(b, size / 2), divide(c, size / 2)
        position = rounded(columns * a) + rounded(rows * b) + c  # -1..1
        sources.append(add_product(jnp.float32(-0.5), position + 1, jnp.float32(size / 2)))
    return sources[0], sources[1]


def _look_up(
    image: Image, x: Float[Array, "h w"], y: Float[Array, "h w"]
) -> tuple[Image, Bool[Array, "..."]]:
    """Give the pixels at whole coordinates, and whether those are inside the image."""
    height, width, channels = image.shape[-3:]
    is_inside = (x >= 0) & (x < width) & (y >= 0) & (y < height)
    index = jnp.where(is_inside, y.astype(jnp.int32) * width + x.astype(jnp.int32), 0)
    flat = image.reshape(-1, height * width, channels)
    pixels = flat.at[:, index.reshape(-1)].get(mode="promise_in_bounds")
    return pixels.reshape(image.shape), _align(is_inside[..., None], image)


def pad(
    image: Image, padding: tuple[int, int, int, int], mode: PaddingMode = "constant", fill: Fill = (0,)
) -> NewImage:
    """Add pixels on the left, top, right and bottom; `fill` is one number or one a channel."""
    left, top, right, bottom = padding
    widths = [(0, 0)] * (image.ndim - 3) + [(top, bottom), (left, right), (0, 0)]
    if mode != "constant":
        return jnp.pad(image, widths, mode)
    is_image = jnp.pad(jnp.ones(image.shape[-3:-1], bool), widths[-3:-1])
    padded = jnp.pad(image, widths)
    return jnp.where(_align(is_image[..., None], padded), padded, _filling(fill, padded).astype(image.dtype))


def crop(image: Image, top: Int[Array, ""], left: Int[Array, ""], size: tuple[int, int]) -> NewImage:
    """Cut out a part that lies inside the image."""
    rows = jax.lax.dynamic_slice_in_dim(image, top, size[0], image.ndim - 3)
    return jax.lax.dynamic_slice_in_dim(rows, left, size[1], image.ndim - 2)


def draw_corners(
    key: PRNGKeyArray, num: int, size: tuple[int, int], crop_size: tuple[int, int]
) -> Int[Array, "num 2"]:
    """Draw where crops of images of a size begin: top and left of `num` of them."""
    room = [have - want + 1 for have, want in zip(size, crop_size, strict=True)]
    return jax.random.randint(key, (num, 2), 0, jnp.asarray(room)[None])


def center_crop(image: Image, size: tuple[int, int]) -> NewImage:
    """Cut out the middle; an image that is smaller is padded with 0 first."""
    (height, width), (new_height, new_width) = image.shape[-3:-1], size
    missing = max(new_height - height, 0), max(new_width - width, 0)
    image = pad(image, (missing[1] // 2, missing[0] // 2, (missing[1] + 1) // 2, (missing[0] + 1) // 2))
    # Half a pixel goes to the even side: Python's rounding.
    top, left = round((image.shape[-3] - new_height) / 2), round((image.shape[-2] - new_width) / 2)
    return image[..., top : top + new_height, left : left + new_width, :]


def resize(image: Image, size: tuple[int, int]) -> NewImage:
    """Resize, bilinearly, and with antialiasing where the image shrinks."""
    start, (height, width) = jnp.int32(0), image.shape[-3:-1]
    if (height, width) == tuple(size):
        return image
    return resized_crop(image, start, start, jnp.int32(height), jnp.int32(width), size)


def resized_crop(
    image: Image,
    top: Int[Array, ""],
    left: Int[Array, ""],
    height: Int[Array, ""],
    width: Int[Array, ""],
    size: tuple[int, int],
) -> NewImage:
    """Cut out a part and resize that, bilinearly, and with antialiasing where it shrinks."""
    is_uint8 = image.dtype == jnp.uint8
    columns = _resizing(left, width, image.shape[-2], size[1], is_uint8)
    rows = _resizing(top, height, image.shape[-3], size[0], is_uint8)
    pixels = _weigh("oi,...hic->...hoc", columns, image.astype(jnp.float32), is_uint8)
    return _weigh("oi,...iwc->...owc", rows, pixels, is_uint8).astype(image.dtype)


def _resizing(
    start: Int[Array, ""], length: Int[Array, ""], old_size: int, new_size: int, is_uint8: bool
) -> Float[Array, "new old"]:
    """Give the weights of each old pixel in each new one, for a part of the old ones."""
    new, old = jnp.arange(new_size)[:, None], jnp.arange(old_size)[None] - start
    scale = divide(length.astype(jnp.float32), new_size)
    if is_uint8:  # whole numbers are as good as PyTorch's float64 here
        twice = 2 * new_size * old - (2 * new + 1) * length + new_size
        distance = twice.astype(jnp.float32) / (2 * new_size)
    else:
        distance = old - rounded((new + 0.5) * scale) + 0.5
    weights = jnp.maximum(1 - jnp.abs(distance) / jnp.maximum(scale, 1), 0)
    weights = jnp.where((old >= 0) & (old < length), weights, 0)
    return weights / weights.sum(1, keepdims=True)


def _weigh(
    equation: str, weights: Float[Array, "new old"], pixels: Float[Array, "*b h w c"], is_uint8: bool
) -> Float[Array, "*b new_h new_w c"]:
    """Give the sums of pixels with their weights; of uint8, in PyTorch's fixed-point arithmetic."""
    if not is_uint8:
        return jnp.einsum(equation, weights, pixels, precision="highest")
    doubled = weights.max() * 2.0 ** np.arange(1, 23)
    unit = jnp.left_shift(1, (doubled + 0.5 < 2**15).sum()).astype(jnp.float32)  # the weights have 16 bits
    total = jnp.einsum(equation, jnp.floor(weights * unit + 0.5), pixels, precision="highest")
    return jnp.clip(jnp.floor(total / unit + 0.5), 0, 255)


def _align(x: Array, image: Image) -> Array:
    """Give x the image's number of axes."""
    return x.reshape((1,) * (image.ndim - x.ndim) + x.shape)


def _filling(fill: Fill, image: Image) -> Array:
    return _align(jnp.array(fill, jnp.float32), image)
