"""Transforms draw what torchvision's draw (tools/make_transforms_golden.py), and refuse what those refuse."""

from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.stats

from lerobot_jax import transforms
from lerobot_jax.errors import InputError
from lerobot_jax.transforms import ImageTransformConfig, make_transform
from lerobot_jax.transforms.transform import Transform

GOLDEN = dict(np.load(Path(__file__).parent / "golden" / "draws.npz"))
SIZE = (21, 30)
KEYS = jax.random.split(jax.random.key(3), 1500)
CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "jitter": ("ColorJitter", {"brightness": 0.4, "contrast": (0.2, 0.9), "hue": 0.1}),
    "sharpness": ("SharpnessJitter", {"sharpness": (0.5, 1.5)}),
    "affine": (
        "RandomAffine",
        {"degrees": 15, "translate": (0.1, 0.2), "scale": (0.7, 1.2), "shear": (-5.0, 5.0, 0.0, 8.0)},
    ),
    "crop": ("RandomCrop", {"size": (20, 32), "padding": (1, 2, 3, 0)}),
    "resized": ("RandomResizedCrop", {"size": SIZE, "scale": (0.3, 1.0), "ratio": (0.5, 1.9)}),
    "fallback": ("RandomResizedCrop", {"size": SIZE, "scale": (2.0, 3.0), "ratio": (1.6, 1.9)}),
}


def make(kind: str, **kwargs: Any) -> Transform:
    return make_transform(ImageTransformConfig(type=kind, kwargs=kwargs))


@pytest.mark.parametrize("name", CASES)
def test_draws_are_distributed_like_torchvisions(name: str):
    kind, kwargs = CASES[name]
    transform = make(kind, **kwargs)
    drawn = jax.jit(jax.vmap(lambda key: transform.draw(key, *SIZE)))(KEYS)
    for key, values in drawn.items():
        recorded = GOLDEN.get(f"{name}/{key}", GOLDEN.get(f"{name}/{key}_factor"))
        if key == "order":
            continue
        assert recorded is not None
        for ours, theirs in zip(np.atleast_2d(values.T), np.atleast_2d(recorded.T), strict=True):
            p = float(scipy.stats.ks_2samp(ours, theirs)[1])  # pyright: ignore[reportArgumentType]
            assert p > 1e-3, key
            assert abs(ours.min() - theirs.min()) <= 0.1 * np.ptp(theirs), key
            assert abs(ours.max() - theirs.max()) <= 0.1 * np.ptp(theirs), key


def test_colours_change_in_every_order():
    jitter = make("ColorJitter", brightness=0.4, contrast=0.2, hue=0.1)
    orders = jax.vmap(lambda key: jitter.draw(key, *SIZE)["order"])(KEYS)
    _, counts = np.unique(np.asarray(orders), axis=0, return_counts=True)
    assert len(counts) == 6
    assert scipy.stats.chisquare(counts).pvalue > 1e-3


def test_colours_change_in_the_order_drawn():
    jitter = make("ColorJitter", brightness=0.4, contrast=(0.3, 0.5), saturation=0.2, hue=0.1)
    image = jnp.asarray(np.random.default_rng(0).integers(0, 256, (8, 9, 3), np.uint8))
    factors = {"brightness": 1.3, "contrast": 0.4, "saturation": 0.9, "hue": -0.08}
    factors = {name: jnp.float32(factor) for name, factor in factors.items()}
    adjust = {name: jax.jit(getattr(transforms, f"adjust_{name}")) for name in factors}
    transform = jax.jit(jitter.transform)
    for order in ([2, 0, 3, 1], [3, 2, 1, 0]):
        expected = image
        for name in (list(factors)[i] for i in order):
            expected = adjust[name](expected, factors[name])
        result = transform(image, {"order": jnp.array(order), **factors})
        np.testing.assert_array_equal(result, expected)


def test_jitter_of_nothing_is_the_identity():
    jitter = make("ColorJitter", brightness=0.0, hue=(0.0, 0.0))
    image = jnp.asarray(np.random.default_rng(0).integers(0, 256, (8, 9, 3), np.uint8))
    np.testing.assert_array_equal(jitter.transform(image, jitter.draw(KEYS[0], 8, 9)), image)


def test_a_random_crop_is_a_part_of_the_padded_image():
    crop = make("RandomCrop", size=(8, 9), padding=(1, 2), fill=(7, 8, 9))
    image = jnp.asarray(np.random.default_rng(0).integers(10, 256, (2, 8, 9, 3), np.uint8))
    result = crop.transform(image, {"top": jnp.int32(4), "left": jnp.int32(0)})
    assert result.shape == image.shape
    np.testing.assert_array_equal(result[:, :6, 1:], image[:, 2:, :8])
    np.testing.assert_array_equal(result[:, 6:], np.broadcast_to([7, 8, 9], (2, 2, 9, 3)))
    np.testing.assert_array_equal(result[:, :, 0], np.broadcast_to([7, 8, 9], (2, 8, 3)))


def test_padding_if_needed():
    crop = make("RandomCrop", size=12, pad_if_needed=True)
    image = jnp.full((8, 14, 3), 200, jnp.uint8)
    tops = jax.jit(jax.vmap(lambda key: crop.draw(key, 8, 14)["top"]))(KEYS)
    assert set(tops.tolist()) == {0, 1, 2, 3, 4}  # padded by 4 on both sides
    result = crop.transform(image, {"top": jnp.int32(1), "left": jnp.int32(2)})
    np.testing.assert_array_equal((result == 200).all((1, 2)), np.isin(np.arange(12), range(3, 11)))


def test_a_number_names_an_interpolation_as_in_torchvision():
    image = jnp.asarray(np.random.default_rng(0).integers(10, 256, (8, 9, 3), np.uint8))
    results = {}
    for kind in ("nearest", 0, "bilinear", 2):
        affine = make("RandomAffine", degrees=(20, 20), interpolation=kind)
        results[kind] = jax.jit(affine.transform)(image, affine.draw(KEYS[0], 8, 9))
    np.testing.assert_array_equal(results["nearest"], results[0])
    np.testing.assert_array_equal(results["bilinear"], results[2])
    assert (results[0] != results[2]).any()


@pytest.mark.parametrize(
    ("kind", "kwargs", "message"),
    [
        ("GaussianNoise", {}, "'GaussianNoise' is not supported; supported are Identity, ColorJitter"),
        ("ColorJitter", {"brightness": -0.1}, "brightness must be finite and increasing"),
        ("ColorJitter", {"brightness": (-0.5, 1.0)}, "brightness must be finite and increasing, 0 or more"),
        ("ColorJitter", {"contrast": (1.2, 0.8)}, "contrast must be"),
        ("ColorJitter", {"saturation": float("nan")}, "saturation must be"),
        ("ColorJitter", {"hue": 0.6}, "hue must be within -0.5..0.5"),
        ("ColorJitter", {"hue": (-0.1, 0.51)}, "hue must be within -0.5..0.5"),
        ("ColorJitter", {"brightnes": 0.1}, "unknown setting 'brightnes'; the nearest known is 'brightness'"),
        ("ColorJitter", {"brightness": "a lot"}, "brightness must be of type"),
        ("SharpnessJitter", {}, "kwargs of SharpnessJitter: sharpness is missing"),
        ("SharpnessJitter", {"sharpness": (0.5, 0.1)}, "sharpness must be"),
        ("RandomAffine", {"degrees": -3}, "degrees must be"),
        ("RandomAffine", {"degrees": 3, "translate": (0.1, 1.1)}, "translate must be fractions"),
        ("RandomAffine", {"degrees": 3, "scale": (0.0, 1.0)}, "scale must be finite and increasing, above 0"),
        ("RandomAffine", {"degrees": 3, "shear": (1.0, 2.0, 3.0)}, "shear must be of type"),
        ("RandomAffine", {"degrees": 3, "fill": 256}, "fill must be"),
        ("RandomAffine", {"degrees": 3, "interpolation": "bicubic"}, "interpolation must be of type"),
        ("RandomAffine", {"degrees": 3, "center": (0, 0)}, "unknown setting 'center'"),
        ("RandomCrop", {"size": (3, 4, 5)}, "size must be"),
        ("RandomCrop", {"size": 0}, "size must be"),
        ("RandomCrop", {"size": 3, "padding": (1, 2, 3)}, "padding must be"),
        ("RandomCrop", {"size": 3, "padding": -1}, "padding must be"),
        ("RandomCrop", {"size": 3, "padding_mode": "wrap"}, "padding_mode must be of type"),
        ("RandomCrop", {"size": 3, "padding_mode": "edge", "fill": (1, 2, 3)}, "fill must be one number"),
        ("CenterCrop", {}, "size is missing"),
        ("RandomResizedCrop", {"size": 3, "scale": (0.5, 0.2)}, "scale must be"),
        ("RandomResizedCrop", {"size": 3, "ratio": (0.0, 0.2)}, "ratio must be"),
        ("RandomResizedCrop", {"size": 3, "interpolation": "nearest"}, "interpolation must be of type"),
        ("RandomResizedCrop", {"size": 3, "antialias": False}, "antialias must be of type"),
    ],
)
def test_settings_that_cannot_be(kind: str, kwargs: dict, message: str):
    with pytest.raises(InputError, match=message.replace("(", r"\(")):
        make(kind, **kwargs)
