"""Record what torchvision's and LeRobot's image transforms give, for tests/transforms/golden/.

    $LEROBOT_PYTHON tools/make_transforms_golden.py

Runs in the environment of `lerobot==0.6.1`, on a CPU (torchvision resizes uint8 differently on GPUs).

functions.npz: `images` (n, h, w, 3) uint8; for each function its parameters, and what it gives of the images
(uint8) and of the first FLOATS of them divided by 255 (float32). draws.npz: parameters that transforms draw, and
subsets. steps.npz: what LeRobot's processor step makes of those float images, by its configuration.
"""

import json
from pathlib import Path

import numpy as np
import torch  # pyright: ignore[reportMissingImports]
from lerobot.processor import ImageCropResizeProcessorStep  # pyright: ignore[reportMissingImports]
from lerobot.transforms import (  # pyright: ignore[reportMissingImports]
    ImageTransformConfig,
    ImageTransforms,
    ImageTransformsConfig,
    make_transform_from_config,
)
from torchvision.transforms import InterpolationMode  # pyright: ignore[reportMissingImports]
from torchvision.transforms.v2 import functional as F  # pyright: ignore[reportMissingImports]
from torchvision.transforms.v2.functional._geometry import (  # pyright: ignore[reportMissingImports]
    _get_inverse_affine_matrix,
)

OUT = Path(__file__).resolve().parent.parent / "tests" / "transforms" / "golden"
SIZE = (21, 30)
FLOATS = 2
NUM_DRAWS = 1500
FACTORS = {
    "adjust_brightness": (0.0, 0.3, 0.8, 1.0, 1.37, 2.0),
    "adjust_contrast": (0.0, 0.3, 0.8, 1.0, 1.37, 2.0),
    "adjust_saturation": (0.0, 0.3, 0.8, 1.0, 1.37, 2.0),
    "adjust_hue": (-0.5, -0.05, 0.0, 0.05, 0.31, 0.5),
    "adjust_sharpness": (0.0, 0.3, 0.8, 1.0, 1.37, 2.0),
}
# angle, translate, scale, shear
AFFINES = [
    (33.0, (-4, 2), float(np.float32(0.8)), (10.0, 0.0)),
    (float(np.float32(4.3)), (2, 1), 1.0, (0.0, 0.0)),
    (0.0, (0, 0), 1.0, (0.0, 0.0)),
    (0.0, (3, -2), 0.5, (0.0, 0.0)),
    (-5.0, (0, 0), float(np.float32(1.2)), (0.0, 0.0)),
    (180.0, (1, 0), float(np.float32(1.1)), (-7.0, 12.0)),
]
# top, left, height, width
BOXES = [(3, 5, 10, 12), (0, 0, 21, 30), (0, 29, 21, 1), (7, 0, 14, 30), (1, 2, 19, 21), (10, 10, 5, 9)]
RESIZED = [(21, 30), (9, 40), (33, 7)]
PADDINGS = {
    "constant": (3, 1, 0, 4),
    "edge": (2, 2, 2, 2),
    "reflect": (5, 0, 3, 2),
    "symmetric": (1, 6, 2, 0),
}
CENTERED = [(21, 30), (10, 13), (25, 12), (24, 35)]
DRAWS = {
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
CAMERA = "observation.images.top"
# crop (top, left, height, width), resize_size
STEPS = [
    (None, (9, 40)),
    (None, (33, 7)),
    (None, (50, 64)),
    (None, (10, 15)),
    ((3, 5, 10, 12), (21, 30)),
    ((0, 1, 21, 28), (7, 11)),
    ((2, 0, 9, 30), None),
]
SUBSETS = {
    "default": ([1, 1, 1, 1, 1, 1], 3, False),
    "weighted": ([1, 5, 0, 2, 0.5], 2, True),
    "all": ([3, 1, 1], 7, False),
}


def make_images() -> np.ndarray:
    """Make noise, flat areas, gray and saturated ones."""
    rng = np.random.default_rng(5)
    images = rng.integers(0, 256, (6, *SIZE, 3), np.uint8)
    images[1] = rng.integers(0, 256, (3, 5, 3), np.uint8).repeat(7, 0).repeat(6, 1)
    images[2, :10] = images[2, :10, :, :1]
    images[3, :8], images[3, 8:12, :9] = 0, 255
    images[4] = images[4] // 3 + 20
    return images


def record_functions() -> dict[str, np.ndarray]:
    images = make_images()
    result = {"images": images}
    pixels = [torch.from_numpy(image).movedim(-1, 0) for image in images]

    def record(name: str, parameters: list, function) -> None:
        """Apply function(image, parameters[i]) to image i."""
        arguments = list(zip(pixels, parameters, strict=True))
        outputs = [function(x, p).movedim(0, -1).numpy() for x, p in arguments]
        floats = [function(x.float() / 255, p).movedim(0, -1).numpy() for x, p in arguments[:FLOATS]]
        result.update({f"{name}/uint8": np.stack(outputs), f"{name}/float32": np.stack(floats)})
        if isinstance(parameters[0], float | tuple):
            flat = [np.hstack(p if isinstance(p, tuple) else [p]).astype(np.float32) for p in parameters]
            result[f"{name}/parameters"] = np.stack(flat).squeeze()

    for name, factors in FACTORS.items():
        record(name, [float(np.float32(f)) for f in factors], getattr(F, name))
    for mode in InterpolationMode.NEAREST, InterpolationMode.BILINEAR:
        fill = [10.0, 200.0, 90.0]

        def affine(x, p, mode=mode, fill=fill):
            level = fill if x.dtype == torch.uint8 else [f / 255 for f in fill]
            return F.affine(x, *p, mode, level)

        record(f"affine_{mode.value}", AFFINES, affine)
    matrices = [_get_inverse_affine_matrix([0.0, 0.0], a, map(float, t), s, sh) for a, t, s, sh in AFFINES]
    result["inverse_affine"] = np.array(matrices, np.float32).reshape(-1, 2, 3)
    for size in RESIZED:
        name = "resized_crop_{}_{}".format(*size)
        record(name, BOXES, lambda x, p, size=size: F.resized_crop(x, *p, list(size)))
    for mode, padding in PADDINGS.items():
        fill = [10.0, 200.0, 90.0] if mode == "constant" else 0
        record(f"pad_{mode}", [None] * 6, lambda x, _, p=padding, m=mode, f=fill: F.pad(x, list(p), f, m))
    for size in CENTERED:
        name = "center_crop_{}_{}".format(*size)
        record(name, [None] * 6, lambda x, _, size=size: F.center_crop(x, list(size)))
    return result


def record_draws() -> dict[str, np.ndarray]:
    result = {}
    for name, (kind, kwargs) in DRAWS.items():
        transform = make_transform_from_config(ImageTransformConfig(type=kind, kwargs=kwargs))
        draws = [transform.make_params([torch.zeros(3, *SIZE)]) for _ in range(NUM_DRAWS)]
        for key in sorted(draws[0]):
            values = [draw[key] for draw in draws]
            if not isinstance(values[0], bool | type(None)):
                result[f"{name}/{key}"] = np.array([np.asarray(x) for x in values], np.float32)
    for name, (weights, count, random_order) in SUBSETS.items():
        tfs = {str(i): ImageTransformConfig(weight=w) for i, w in enumerate(weights)}
        transforms = ImageTransforms(ImageTransformsConfig(True, count, random_order, tfs))
        indices = {id(x): i for i, x in enumerate(transforms.tf.transforms)}
        chosen = []
        for _ in range(4 * NUM_DRAWS):
            transforms(torch.zeros(3, 1, 1))
            chosen.append([indices[id(x)] for x in transforms.tf.selected_transforms])
        result[f"subset_{name}"] = np.array(chosen, np.int8)
    return result


def record_steps() -> dict[str, np.ndarray]:
    """Run LeRobot's processor step on the images as float; what a step is configured with is its name."""
    pixels = torch.from_numpy(make_images()[:FLOATS]).movedim(-1, 1).float() / 255
    result = {}
    for crop, size in STEPS:
        crops = None if crop is None else {CAMERA: crop}
        step = ImageCropResizeProcessorStep(crop_params_dict=crops, resize_size=size)
        name = json.dumps({"crop_params_dict": crops, "resize_size": size})
        result[name] = step.observation({CAMERA: pixels})[CAMERA].movedim(1, -1).numpy()
    return result


if __name__ == "__main__":
    torch.manual_seed(0)
    OUT.mkdir(parents=True, exist_ok=True)
    for name, record in (("functions", record_functions), ("draws", record_draws), ("steps", record_steps)):
        np.savez_compressed(OUT / f"{name}.npz", allow_pickle=False, **record())
