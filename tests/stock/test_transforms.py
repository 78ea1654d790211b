"""Stock LeRobot, live: its image transforms with the parameters that it draws, and its step that resizes."""

import json
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lerobot_jax import transforms
from lerobot_jax.processors import AddBatchDimension, CropResizeImages, Device, Pipeline, RenameObservations
from lerobot_jax.transforms import ImageTransformsConfig, make_transform
from tests.data.recordings import FEATURES, record
from tests.stock.conftest import lerobot_python, run_command

pytestmark = pytest.mark.lerobot

PEER = Path(__file__).with_name("transforms_peer.py")
CAMERA = "observation.images.top"
SIZE = (120, 160)
COUNT = 24
RANGES = {
    "brightness": (0, 2),
    "contrast": (0, 2),
    "saturation": (0, 2),
    "hue": (-0.5, 0.5),
    "sharpness": (0, 2),
}
STEPS = {
    "smaller": CropResizeImages(resize_size=[48, 64]),
    "larger": CropResizeImages(resize_size=[131, 300]),
    "cropped": CropResizeImages({CAMERA: [7, 20, 96, 101]}, [37, 53]),
}


def make_arrays() -> dict[str, np.ndarray]:
    """Make images (noise, or noise enlarged by 8) and parameters for each."""
    rng = np.random.default_rng(8)
    images = rng.integers(0, 256, (COUNT, *SIZE, 3), np.uint8)
    coarse = rng.integers(0, 256, (COUNT, 15, 20, 3), np.uint8).repeat(8, 1).repeat(8, 2)
    images[::2] = coarse[::2]
    sizes = np.stack([rng.integers(20, side + 1, COUNT) for side in SIZE], 1)
    corners = rng.integers(0, np.array(SIZE) - sizes + 1)
    factors = {name: rng.uniform(low, high, COUNT).astype(np.float32) for name, (low, high) in RANGES.items()}
    return {"images": images, "boxes": np.concatenate([corners, sizes], 1).astype(np.int32)} | factors


@pytest.fixture(scope="module")
def arrays() -> dict[str, np.ndarray]:
    return make_arrays()


@pytest.fixture(scope="module")
def pipelines(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Write a preprocessor with each of the steps."""
    folders = {}
    for name, step in STEPS.items():
        folders[name] = tmp_path_factory.mktemp(name)
        steps = (RenameObservations(), AddBatchDimension(), Device("cpu"), step)
        Pipeline("policy_preprocessor", steps).save(folders[name])
    return folders


@pytest.fixture(scope="module")
def stock(arrays, pipelines, tmp_path_factory: pytest.TempPathFactory) -> dict[str, np.ndarray]:
    folder = tmp_path_factory.mktemp("stock")
    side = {CAMERA.replace("top", "side"): {**FEATURES[CAMERA], "dtype": "image"}}
    record(folder / "dataset", (6,), FEATURES | side)
    np.savez(folder / "images.npz", allow_pickle=False, **arrays)
    request: dict[str, Any] = {"images": str(folder / "images.npz"), "dataset": str(folder / "dataset")}
    request["pipelines"] = [str(path) for path in pipelines.values()]
    (folder / "request.json").write_text(json.dumps(request))
    run_command(lerobot_python(), PEER, folder / "request.json", folder / "out.npz", folder=folder)
    return dict(np.load(folder / "out.npz"))


@pytest.mark.parametrize("name", RANGES)
def test_colours_and_sharpness(stock, arrays, name: str):
    function = jax.jit(jax.vmap(getattr(transforms, f"adjust_{name}")))
    np.testing.assert_array_equal(function(arrays["images"], arrays[name]), stock[f"adjust/{name}"])
    result = function(arrays["images"].astype(np.float32) / np.float32(255), arrays[name])
    np.testing.assert_allclose(result, stock[f"adjust/{name}/float32"], rtol=0, atol=1e-6)


def test_resized_crops(stock, arrays):
    def cut(image: jax.Array, box: jax.Array) -> jax.Array:
        return transforms.resized_crop(image, *box, size=SIZE)

    function = jax.jit(jax.vmap(cut))
    result = np.asarray(function(arrays["images"], arrays["boxes"]), int)
    difference = np.abs(result - stock["resized_crop"])
    assert difference.max() <= 1
    assert (difference > 0).mean() < 1e-4
    result = function(arrays["images"].astype(np.float32) / np.float32(255), arrays["boxes"])
    np.testing.assert_allclose(result, stock["resized_crop/float32"], rtol=0, atol=1e-6)


@pytest.mark.parametrize("random_order", [False, True])
def test_the_default_transforms(stock, arrays, random_order: bool):
    """With the transforms and parameters that stock drew, the images are stock's."""
    config = ImageTransformsConfig(enable=True, random_order=random_order)
    apply = {name: jax.jit(make_transform(tf).transform) for name, tf in config.tfs.items()}
    affine = 0
    for image, expected, drawn in zip(
        arrays["images"], stock[f"{random_order}/images"], stock[f"{random_order}/drawn"], strict=True
    ):
        names, parameters = json.loads(str(drawn))
        for name in names:
            image = apply[name](image, our_parameters(name, parameters[name]))
        wrong = np.asarray(image) != expected
        if "affine" in names:  # the matrix differs by 1e-7: some pixels come from a neighbour
            affine += 1
            assert wrong.mean() < 1e-3, names
        else:
            assert not wrong.any(), names
    assert 0 < affine < COUNT


def our_parameters(name: str, theirs: dict[str, Any]) -> dict[str, Any]:
    values = {
        key.removesuffix("_factor"): jnp.array(value, jnp.float32)
        for key, value in theirs.items()
        if value is not None
    }
    return values if name in ("affine", "sharpness") else values | {"order": jnp.array([0])}


def test_transforms_see_uint8_of_videos_and_float32_of_images(stock):
    """All observation steps of a camera at once, which thus share the parameters."""
    assert sorted(stock["seen"]) == ["torch.float32 (2, 3, 32, 48)", "torch.uint8 (2, 3, 32, 48)"]


@pytest.mark.parametrize("name", STEPS)
def test_stock_runs_a_preprocessor_that_resizes(stock, arrays, pipelines, name: str):
    assert stock["registered"], "importing lerobot.policies does not register the step"
    batch = {CAMERA: arrays["images"].astype(np.float32) / np.float32(255)}
    result = jax.jit(Pipeline.load(pipelines[name], "policy_preprocessor"))(batch)[CAMERA]
    np.testing.assert_allclose(result, stock[str(pipelines[name])], rtol=0, atol=1e-5)
