"""The step that crops and resizes gives what LeRobot's gave (tools/make_transforms_golden.py)."""

import json
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import PIL.Image
import pytest

from lerobot_jax.errors import InputError
from lerobot_jax.files import write_json
from lerobot_jax.processors import CropResizeImages, Pipeline

GOLDEN = Path(__file__).parents[1] / "transforms" / "golden"
STEPS = dict(np.load(GOLDEN / "steps.npz"))
PIXELS = np.load(GOLDEN / "functions.npz")["images"][:2]
IMAGES = PIXELS.astype(np.float32) / np.float32(255)
CAMERA = "observation.images.top"


@pytest.mark.parametrize("config", STEPS)
def test_result_is_lerobots(config: str):
    step = CropResizeImages.from_config(json.loads(config), {})
    np.testing.assert_allclose(jax.jit(step)({CAMERA: IMAGES})[CAMERA], STEPS[config], rtol=0, atol=1e-5)


def test_observation_steps_and_other_entries():
    step = CropResizeImages(resize_size=(10, 15))
    batch = {
        CAMERA: np.stack([IMAGES, IMAGES[::-1]]),
        "observation.image": IMAGES,
        f"{CAMERA}_is_pad": np.zeros((2, 2), bool),
        "observation.state": np.ones((2, 30)),
        "action": np.ones((2, 3)),
    }
    result = jax.jit(step)(batch)
    expected = STEPS[json.dumps({"crop_params_dict": None, "resize_size": [10, 15]})]
    np.testing.assert_allclose(result[CAMERA], np.stack([expected, expected[::-1]]), rtol=0, atol=1e-5)
    np.testing.assert_allclose(result["observation.image"], expected, rtol=0, atol=1e-5)
    for key in (f"{CAMERA}_is_pad", "observation.state", "action"):
        np.testing.assert_array_equal(result[key], batch[key])


def test_values_stay_in_range():
    images = np.broadcast_to(np.array([-0.5, 0.5, 1.5], np.float32), (8, 8, 3))
    result = CropResizeImages(resize_size=(5, 6))({CAMERA: images})[CAMERA]
    np.testing.assert_allclose(result[0, 0], [0, 0.5, 1], atol=1e-6)


def test_json_is_lerobots(tmp_path: Path):
    config = {"crop_params_dict": {CAMERA: [3, 5, 10, 12]}, "resize_size": [21, 30]}
    described = {
        "name": "policy_preprocessor",
        "steps": [{"registry_name": "image_crop_resize_processor", "config": config}],
    }
    write_json(described, tmp_path / "policy_preprocessor.json", indent=2)
    pipeline = Pipeline.load(tmp_path, "policy_preprocessor")
    np.testing.assert_allclose(pipeline({CAMERA: IMAGES})[CAMERA], STEPS[json.dumps(config)], atol=1e-5)
    (tmp_path / "again").mkdir()
    pipeline.save(tmp_path / "again")
    assert json.loads((tmp_path / "again" / "policy_preprocessor.json").read_text()) == described


@pytest.mark.parametrize("size", [(10, 15), (21, 60), (33, 11)])
def test_pillow_resizes_uint8_the_same_up_to_rounding(size: tuple[int, int]):
    """What a cache of resized frames holds is what the step gives of the frames, to within rounding."""
    height, width = size
    resized = [
        np.asarray(PIL.Image.fromarray(x).resize((width, height), PIL.Image.Resampling.BILINEAR))
        for x in PIXELS
    ]
    result = jax.jit(CropResizeImages(resize_size=size))({CAMERA: IMAGES})[CAMERA]
    assert (
        np.abs(255 * np.asarray(result) - np.stack(resized)).max() < 1.02
    )  # rounded after each of two passes


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"resize_size": [3]}, "resize_size must be"),
        ({"resize_size": [0, 3]}, "resize_size must be"),
        ({"resize_size": 3}, "resize_size must be of type"),
        ({"crop_params_dict": {CAMERA: [1, 2, 3]}}, f"crop_params_dict must have .* of {CAMERA}"),
        ({"crop_params_dict": {CAMERA: [-1, 2, 3, 4]}}, f"crop_params_dict must have .* of {CAMERA}"),
        ({"size": [3, 4]}, "unknown setting 'size'"),
    ],
)
def test_settings_that_cannot_be(config: dict[str, Any], message: str):
    with pytest.raises(InputError, match=message):
        CropResizeImages.from_config(config, {})


def test_images_that_do_not_fit():
    with pytest.raises(InputError, match=r"cropped to 20 x 12 pixels at \(3, 5\), but has only 21 x 30"):
        CropResizeImages({CAMERA: (3, 5, 20, 12)})({CAMERA: IMAGES})
    with pytest.raises(InputError, match=r"must be float in 0\.\.1 to be resized, it is uint8"):
        CropResizeImages(resize_size=(4, 5))({CAMERA: jnp.asarray(PIXELS)})
