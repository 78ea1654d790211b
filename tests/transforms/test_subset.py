import functools
import zlib
from collections.abc import Sequence
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.stats
from jax.sharding import NamedSharding, PartitionSpec

from lerobot_jax.errors import InputError
from lerobot_jax.transforms import (
    ImageTransformConfig,
    ImageTransformsConfig,
    check_sizes,
    draw_subset,
    final_size,
    make_transform,
    random_transforms,
)
from lerobot_jax.transforms.transform import Transform

GOLDEN = dict(np.load(Path(__file__).parent / "golden" / "draws.npz"))
KEYS = jax.random.split(jax.random.key(3), 6000)
DEFAULT = ImageTransformsConfig(enable=True)
IMAGES = np.random.default_rng(0).integers(0, 256, (8, 2, 10, 12, 3), np.uint8)


def weighted(weights: Sequence[float], count: int, random_order: bool) -> ImageTransformsConfig:
    tfs = {str(i): ImageTransformConfig(weight=w) for i, w in enumerate(weights)}
    return ImageTransformsConfig(True, count, random_order, tfs)


def count_rows(rows: np.ndarray, sort: bool) -> dict[tuple[int, ...], int]:
    rows = np.sort(rows, axis=1) if sort else rows
    found, counts = np.unique(rows, axis=0, return_counts=True)
    return {tuple(map(int, row)): int(n) for row, n in zip(found, counts, strict=True)}


@pytest.mark.parametrize(
    ("name", "weights", "count"),
    [("default", [1, 1, 1, 1, 1, 1], 3), ("weighted", [1, 5, 0, 2, 0.5], 2), ("all", [3, 1, 1], 7)],
)
def test_subsets_are_distributed_like_lerobots(name: str, weights: list[float], count: int):
    config = weighted(weights, count, False)
    drawn = np.asarray(jax.jit(jax.vmap(lambda key: draw_subset(config, key)))(KEYS))
    in_order = name == "weighted"  # recorded with random_order
    ours, theirs = count_rows(drawn, not in_order), count_rows(GOLDEN[f"subset_{name}"], not in_order)
    assert ours.keys() == theirs.keys()
    if len(ours) > 1:
        table = [[counts[subset] for subset in ours] for counts in (ours, theirs)]
        assert float(scipy.stats.chi2_contingency(table)[1]) > 1e-3  # pyright: ignore[reportArgumentType]


def test_subsets_are_drawn_by_weight_without_replacement():
    weights = np.array([1, 5, 2, 0.5])
    config = weighted([1, 5, 0, 2, 0.5], 2, True)
    ours = count_rows(np.asarray(jax.jit(jax.vmap(lambda key: draw_subset(config, key)))(KEYS)), False)
    total = weights.sum()
    chances = {
        (i, j): weights[i] / total * weights[j] / (total - weights[i])
        for i in range(4)
        for j in range(4)
        if i != j
    }
    expected = [len(KEYS) * chances[pair] for pair in chances]
    assert scipy.stats.chisquare([ours[pair] for pair in chances], expected).pvalue > 1e-3


def apply_one(transform: Transform, key: jax.Array, image: jax.Array) -> jax.Array:
    return transform.transform(image, transform.draw(key, *image.shape[:2]))


@pytest.mark.parametrize("random_order", [False, True])
def test_each_sample_gets_its_subset_in_order(random_order: bool):
    """The batch is what the drawn transforms give when they are applied to one image after the other."""
    config = ImageTransformsConfig(True, 3, random_order)
    result = jax.jit(random_transforms(config))(jax.random.key(1), {"top": jnp.asarray(IMAGES)})["top"]
    transforms = [jax.jit(functools.partial(apply_one, make_transform(tf))) for tf in config.tfs.values()]
    key = jax.random.fold_in(jax.random.key(1), zlib.crc32(b"top"))
    changed = 0
    for i, image in enumerate(IMAGES[:4]):
        subset_key, *keys = jax.random.split(jax.random.fold_in(key, i), 1 + len(transforms))
        drawn = [int(j) for j in draw_subset(config, subset_key)]
        frames = []
        for frame in image:  # each observation step on its own, with the same parameters
            frame = jnp.asarray(frame)
            for j in drawn if random_order else sorted(drawn):
                frame = transforms[j](keys[j], frame)
            frames.append(frame)
        np.testing.assert_array_equal(result[i], frames)
        changed += drawn != sorted(drawn)
    assert changed


def test_augmentation_is_a_function_of_key_place_and_camera():
    apply = jax.jit(random_transforms(DEFAULT))
    images = jnp.asarray(np.broadcast_to(IMAGES[:1], IMAGES.shape))
    key = jax.random.key(5)
    alone = apply(key, {"top": images})["top"]
    both = apply(key, {"side": images[:3], "top": images})
    np.testing.assert_array_equal(both["top"], alone)
    np.testing.assert_array_equal(apply(key, {"top": images[:3]})["top"], alone[:3])
    assert (both["side"] != alone[:3]).any((1, 2, 3, 4)).sum() >= 2  # another camera
    assert len({image.tobytes() for image in np.asarray(alone)}) >= 6  # another place
    assert (apply(jax.random.key(6), {"top": images})["top"] != alone).any()


def test_batches_that_are_split_over_devices_get_the_same():
    mesh = jax.make_mesh((8,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
    images = jax.device_put(IMAGES, NamedSharding(mesh, PartitionSpec("data")))
    apply = jax.jit(random_transforms(DEFAULT))
    result = apply(jax.random.key(5), {"top": images})["top"]
    assert result.sharding.spec[0] == "data"
    np.testing.assert_array_equal(result, apply(jax.random.key(5), {"top": jnp.asarray(IMAGES)})["top"])


def test_float_images_stay_float():
    images = jnp.asarray(IMAGES[:, 0] / np.float32(255))
    result = jax.jit(random_transforms(DEFAULT))(jax.random.key(0), {"top": images})["top"]
    assert result.dtype == jnp.float32
    assert (result != images).any()
    assert result.min() >= 0
    assert result.max() <= 1


def test_disabled_transforms_change_nothing():
    images = {"top": jnp.asarray(IMAGES)}
    assert random_transforms(ImageTransformsConfig())(jax.random.key(0), images)["top"] is images["top"]


def crops(**crop: ImageTransformConfig) -> ImageTransformsConfig:
    return ImageTransformsConfig(True, len(crop), False, dict(crop))


def test_crops_keep_the_size_or_change_it_for_all():
    crop = ImageTransformConfig(type="RandomCrop", kwargs={"size": (10, 12), "padding": 2})
    resized = ImageTransformConfig(type="RandomResizedCrop", kwargs={"size": (10, 12)})
    config = ImageTransformsConfig(True, 1, True, {"crop": crop, "resized": resized})
    result = jax.jit(random_transforms(config))(jax.random.key(0), {"top": jnp.asarray(IMAGES)})["top"]
    assert result.shape == IMAGES.shape
    center = ImageTransformConfig(type="CenterCrop", kwargs={"size": 6})
    config = crops(crop=crop, center=center)
    result = jax.jit(random_transforms(config))(jax.random.key(0), {"top": jnp.asarray(IMAGES)})["top"]
    assert result.shape == (8, 2, 6, 6, 3)
    check_sizes(config, {"top": (10, 12)}, {"top": (6, 6)})


def test_wrong_sizes_are_named():
    small = ImageTransformConfig(type="RandomCrop", kwargs={"size": 8})
    with pytest.raises(InputError, match="make 8 x 8 of top, the policy wants 10 x 12"):
        check_sizes(crops(crop=small), {"top": (10, 12)}, {"top": (10, 12)})
    with pytest.raises(InputError, match=r"tfs\.crop: top: size 8 x 8 does not fit into an image of 10 x 7"):
        final_size(crops(crop=small), "top", 10, 7)
    some = ImageTransformsConfig(True, 1, False, {"crop": small, "none": ImageTransformConfig()})
    with pytest.raises(InputError, match=r"tfs\.crop makes 8 x 8 of top, which is 10 x 12; only if all"):
        random_transforms(some)(jax.random.key(0), {"top": jnp.asarray(IMAGES)})
    reflected = {"size": 8, "padding": 9, "padding_mode": "reflect"}
    config = crops(crop=ImageTransformConfig(type="RandomCrop", kwargs=reflected))
    with pytest.raises(InputError, match="10 x 9 is too small for reflect padding"):
        final_size(config, "top", 10, 9)
