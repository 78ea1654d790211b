"""The functions give what torchvision gave (tools/make_transforms_golden.py)."""

import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lerobot_jax import transforms
from lerobot_jax.transforms import geometry

GOLDEN = dict(np.load(Path(__file__).parent / "golden" / "functions.npz"))
IMAGES = GOLDEN["images"]
FLOATS = IMAGES[:2].astype(np.float32) / np.float32(255)
FACTORS = ["brightness", "contrast", "saturation", "hue", "sharpness"]
FILL = (10.0, 200.0, 90.0)
PADDINGS = {
    "constant": (3, 1, 0, 4),
    "edge": (2, 2, 2, 2),
    "reflect": (5, 0, 3, 2),
    "symmetric": (1, 6, 2, 0),
}


def run(name: str, function: Callable, parameters: np.ndarray | None = None) -> None:
    """Check function(image, parameters[i]) for each image: uint8 exactly, float32 to 1e-6."""
    for images, kind in ((IMAGES, "uint8"), (FLOATS, "float32")):
        arguments = (images,) if parameters is None else (images, parameters[: len(images)])
        result = np.asarray(jax.jit(jax.vmap(function))(*arguments))
        expected = GOLDEN[f"{name}/{kind}"]
        assert result.dtype == expected.dtype
        if kind == "uint8":
            np.testing.assert_array_equal(result, expected)
        else:
            np.testing.assert_allclose(result, expected, rtol=0, atol=1e-6)


def fill_of(image: jax.Array) -> tuple[float, ...]:
    return FILL if image.dtype == jnp.uint8 else tuple(x / 255 for x in FILL)


@pytest.mark.parametrize("name", FACTORS)
def test_colours(name: str):
    function = getattr(transforms, f"adjust_{name}")
    run(f"adjust_{name}", function, GOLDEN[f"adjust_{name}/parameters"])


def test_affine_with_the_recorded_matrix():
    def nearest(image, matrix):
        return transforms.affine(image, matrix, "nearest", fill_of(image))

    run("affine_nearest", nearest, GOLDEN["inverse_affine"])

    def bilinear(image, matrix):
        return transforms.affine(image, matrix, "bilinear", fill_of(image))

    matrices, expected = GOLDEN["inverse_affine"], GOLDEN["affine_bilinear/uint8"].astype(int)
    result = np.asarray(jax.jit(jax.vmap(bilinear))(IMAGES, matrices), int)
    assert np.abs(result - expected).max() <= 1  # halves are rounded up or down
    assert (result != expected).sum() <= 4
    result = jax.jit(jax.vmap(bilinear))(FLOATS, matrices[:2])
    np.testing.assert_allclose(result, GOLDEN["affine_bilinear/float32"], rtol=0, atol=1e-6)


def test_affine_with_its_own_matrix():
    def move(image, p):
        matrix = transforms.inverse_affine(p[0], p[1:3], p[3], p[4:6])
        return matrix, transforms.affine(image, matrix, "nearest", FILL)

    parameters = GOLDEN["affine_nearest/parameters"]
    matrices, result = jax.jit(jax.vmap(move))(IMAGES, parameters)
    np.testing.assert_allclose(matrices, GOLDEN["inverse_affine"], rtol=0, atol=1e-6)
    wrong = (np.asarray(result) != GOLDEN["affine_nearest/uint8"]).any(-1)
    exact_scale = np.arange(6) != 3  # scale 0.5 looks up halfway between pixels, where the last bit decides
    assert wrong[exact_scale].mean() < 1e-3


@pytest.mark.parametrize(
    "name", [n[: -len("/uint8")] for n in GOLDEN if re.match(r"resized_crop_.*/uint8", n)]
)
def test_resized_crop(name: str):
    height, width = map(int, name.split("_")[2:])

    def cut(image, box):
        return transforms.resized_crop(image, *box, size=(height, width))

    run(name, cut, GOLDEN[f"{name}/parameters"].astype(np.int32))


@pytest.mark.parametrize("mode", PADDINGS)
def test_pad(mode: geometry.PaddingMode):
    run(f"pad_{mode}", lambda image: transforms.pad(image, PADDINGS[mode], mode, FILL))


@pytest.mark.parametrize("size", [(21, 30), (10, 13), (25, 12), (24, 35)])
def test_center_crop(size: tuple[int, int]):
    run("center_crop_{}_{}".format(*size), lambda image: transforms.center_crop(image, size))


def test_crop():
    result = jax.jit(lambda image, top, left: transforms.crop(image, top, left, (9, 11)))(IMAGES, 3, 19)
    np.testing.assert_array_equal(result, IMAGES[:, 3:12, 19:30])


@pytest.mark.parametrize("images", [IMAGES, FLOATS], ids=["uint8", "float32"])
def test_parameters_that_change_nothing(images: np.ndarray):
    one = jnp.float32(1)
    for name in ("brightness", "contrast", "saturation", "sharpness"):
        result = jax.jit(getattr(transforms, f"adjust_{name}"))(images, one)
        np.testing.assert_array_equal(result, images, err_msg=name)
    identity = transforms.inverse_affine(jnp.float32(0), jnp.zeros(2), one, jnp.zeros(2))
    np.testing.assert_array_equal(jax.jit(transforms.affine)(images, identity), images)
    np.testing.assert_array_equal(jax.jit(lambda x: transforms.resize(x, (21, 30)))(images), images)


@pytest.mark.parametrize("name", FACTORS)
def test_images_of_leading_axes_share_the_factor(name: str):
    function = jax.jit(getattr(transforms, f"adjust_{name}"))
    together = function(IMAGES.reshape(2, 3, *IMAGES.shape[1:]), jnp.float32(0.4))
    one_by_one = [function(image, jnp.float32(0.4)) for image in IMAGES]
    np.testing.assert_array_equal(together.reshape(IMAGES.shape), one_by_one)


def test_gray_of_colours_whose_gray_is_a_whole_number():
    red, green, blue = np.ogrid[:256, :256, :256]
    total = 2989 * red + 5870 * green + 1140 * blue
    colours = np.argwhere(total % 10_000 == 0)
    gray = jax.jit(transforms.adjust_saturation)(colours.astype(np.uint8)[None], jnp.float32(0))
    np.testing.assert_array_equal(gray[0, :, 0], total[tuple(colours.T)] // 10_000)


def test_optimized_programs_give_the_same():
    """Other tests compile without optimization, which does not fuse multiplications and additions."""
    code = "from tests.transforms import test_functions as t; [t.test_colours(name) for name in t.FACTORS]; "
    code += "t.test_affine_with_the_recorded_matrix()"
    environment = os.environ | {"XLA_FLAGS": "", "JAX_PLATFORMS": "cpu"}
    root = Path(__file__).parents[2]
    subprocess.run([sys.executable, "-c", code], cwd=root, env=environment, check=True)


def test_images_of_one_channel():
    gray, factor = jnp.asarray(IMAGES[..., :1]), jnp.float32(0.25)
    for name in ("saturation", "hue"):
        np.testing.assert_array_equal(getattr(transforms, f"adjust_{name}")(gray, factor), gray)
    mean = IMAGES[..., :1].mean((1, 2, 3), keepdims=True)
    expected = np.floor(0.25 * IMAGES[..., :1] + 0.75 * mean)
    np.testing.assert_array_equal(transforms.adjust_contrast(gray, factor), expected)
    np.testing.assert_array_equal(transforms.adjust_brightness(gray, factor), gray // 4)


def test_tiny_images_are_not_sharpened():
    tiny = jnp.asarray(IMAGES[:, :2])
    np.testing.assert_array_equal(transforms.adjust_sharpness(tiny, jnp.float32(0)), tiny)
