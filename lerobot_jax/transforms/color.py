"""Brightness, contrast, saturation, hue and sharpness with PyTorch's arithmetic: bit for bit on uint8.

Images are channel-last, of 1 or 3 channels, uint8 in 0..255 or float32 in 0..1. The images of leading axes share
the factor; with `jax.vmap`, each has its own.

Two differences are left, of one level at most: the gray of 3 of the 16.7 million colours is 1 brighter than
PyTorch's; and the sum of the gray of an image of more than 65,793 pixels is exact here, and can be rounded there,
which changes about one pixel in a million.

Mirrors `torchvision.transforms.v2.functional._color`.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, UInt8

from lerobot_jax.transforms.arithmetic import add_product, divide, multiply, rounded

Image = UInt8[Array, "*b h w c"] | Float[Array, "*b h w c"]
Factor = Float[Array, ""]


def adjust_brightness(image: Image, factor: Factor) -> Image:
    """Multiply by the factor: 0 is black, 1 the image itself."""
    return _finish(image.astype(jnp.float32) * factor, image)


def adjust_contrast(image: Image, factor: Factor) -> Image:
    """Blend with the mean of the gray image: 0 is that gray everywhere, 1 the image itself."""
    gray = _gray(image)
    if image.dtype == jnp.uint8:
        total = gray.astype(jnp.int32).sum((-3, -2, -1), keepdims=True)  # exact, unlike a sum of floats
        mean = divide(total.astype(jnp.float32), image.shape[-3] * image.shape[-2])
    else:
        mean = gray.mean((-3, -2, -1), keepdims=True)
    return _blend(image, mean, factor)


def adjust_saturation(image: Image, factor: Factor) -> Image:
    """Blend with the gray image: 0 is gray, 1 the image itself. An image of one channel stays as it is."""
    return image if image.shape[-1] == 1 else _blend(image, _gray(image), factor)


def adjust_hue(image: Image, shift: Factor) -> Image:
    """Turn the hue by so many turns (-0.5..0.5). An image of one channel stays as it is."""
    if image.shape[-1] == 1:
        return image
    is_uint8 = image.dtype == jnp.uint8
    hue, saturation, value = _rgb_to_hsv(
        rounded(image.astype(jnp.float32) * (1 / 255)) if is_uint8 else image
    )
    rgb = _hsv_to_rgb(_fraction(hue + shift), saturation, value)
    return _finish(rgb * 255.999 if is_uint8 else rgb, image)


def adjust_sharpness(image: Image, factor: Factor) -> Image:
    """Blend with the blurred image: 0 is blurred, 1 the image itself, 2 sharper. The outermost pixels stay."""
    height, width = image.shape[-3:-1]
    if height <= 2 or width <= 2:
        return image
    margins = [(0, 0)] * (image.ndim - 3) + [(1, 1), (1, 1), (0, 0)]
    padded, pixels = jnp.pad(image, margins).astype(jnp.float32), image.astype(jnp.float32)
    total = 4 * pixels
    for top in range(3):
        for left in range(3):
            total = total + padded[..., top : top + height, left : left + width, :]
    blurred = total * (1 / 13)
    if image.dtype == jnp.uint8:
        blurred = jnp.round(
            blurred
        )  # whole numbers over 13 are never halfway: a rounding error has no effect
    blended = add_product(pixels, blurred - pixels, 1 - factor)
    is_inner = jnp.pad(jnp.ones((height - 2, width - 2, 1), bool), margins[-3:])
    return _finish(jnp.where(jax.lax.broadcast(is_inner, image.shape[:-3]), blended, pixels), image)


HSV = tuple[Float[Array, "*b h w"], Float[Array, "*b h w"], Float[Array, "*b h w"]]


def _rgb_to_hsv(image: Float[Array, "*b h w 3"]) -> HSV:
    """Give hue, saturation and value, all in 0..1."""
    red, green, blue = _channels(image)
    value = jnp.maximum(jnp.maximum(red, green), blue)
    spread = value - jnp.minimum(jnp.minimum(red, green), blue)
    is_gray, is_red, is_green = spread == 0, value == red, value == green
    saturation = spread / jnp.where(is_gray, 1, value)
    base = jnp.where(is_red, 0, jnp.where(is_green, 2, 4))
    before = jnp.where(is_red, blue, jnp.where(is_green, red, green))  # the channel before the largest one
    after = jnp.where(is_red, green, jnp.where(is_green, blue, red))
    spread = jnp.where(is_gray, 1, spread)
    sixths = (value - before) / spread + base - (value - after) / spread
    return _fraction(rounded(sixths * (1 / 6)) + 1), saturation, value


def _hsv_to_rgb(
    hue: Float[Array, "*b h w"], saturation: Float[Array, "*b h w"], value: Float[Array, "*b h w"]
) -> Float[Array, "*b h w 3"]:
    sixths = rounded(hue * 6)
    sector = jnp.floor(sixths)
    rest = rounded(saturation * (sixths - sector))
    low = (1 - saturation) * value
    falling = (1 - rest) * value
    rising = (rest + (1 - saturation)) * value
    value, low, falling, rising = (jnp.clip(x, 0, 1)[..., None] for x in (value, low, falling, rising))
    # Green does two sectors later, and blue four, what red does. A hue that was rounded up to 1 is in sector 6.
    sector = sector[..., None] - jax.lax.broadcast(jnp.array([0.0, 2, 4]), hue.shape)
    sector = jnp.where(sector < 0, sector + 6, sector)
    between = jnp.where(sector == 1, falling, jnp.where(sector == 4, rising, low))
    return jnp.where((sector == 0) | (sector >= 5), value, between)


def _gray(image: Image) -> Float[Array, "*b h w 1"]:
    """Give the luma, rounded down if the image is uint8."""
    pixels = image.astype(jnp.float32)
    if image.shape[-1] == 1:
        return pixels
    red, green, blue = _channels(pixels)
    if image.dtype == jnp.uint8:
        # The sum is a whole number below 2^24, and a half keeps the quotient away from the next one.
        gray = jnp.floor((2989 * red + 5870 * green + 1140 * blue + 0.5) * 1e-4)
    else:
        gray = 0.2989 * red + 0.587 * green + 0.114 * blue
    return gray[..., None]


def _blend(image: Image, other: Float[Array, "*#b #h #w #c"], factor: Factor) -> Image:
    pixels = image.astype(jnp.float32)
    return _finish(add_product(multiply(pixels, factor), other, 1 - factor), image)


def _fraction(x: Float[Array, "*a"]) -> Float[Array, "*a"]:
    return x - jnp.floor(x)


def _channels(pixels: Float[Array, "*b h w 3"]) -> tuple[Float[Array, "*b h w"], ...]:
    return pixels[..., 0], pixels[..., 1], pixels[..., 2]


def _finish(pixels: Float[Array, "*b h w c"], image: Image) -> Image:
    """Limit pixels to what the image's type allows; truncate to whole levels if it is uint8."""
    return jnp.clip(pixels, 0, 255 if image.dtype == jnp.uint8 else 1).astype(image.dtype)
