"""What stock LeRobot makes of images; run by its own Python for test_transforms.py.

    PYTHON transforms_peer.py REQUEST OUT

REQUEST is a JSON file: `images`, an npz file with images (n, h, w, 3) uint8 and their parameters; `dataset`, the
folder of one; `pipelines`, folders with a preprocessor. Writes the npz file OUT.
"""

import json
import sys

import lerobot.policies  # noqa: F401  (does this register the steps of a pipeline?)
import numpy as np
import torch
from lerobot.datasets import LeRobotDataset
from lerobot.processor import PolicyProcessorPipeline, ProcessorStepRegistry
from lerobot.transforms import ImageTransforms, ImageTransformsConfig
from torchvision.transforms.v2 import functional as F

REGISTERED = "image_crop_resize_processor" in ProcessorStepRegistry.list()
FACTORS = ("brightness", "contrast", "saturation", "hue", "sharpness")


def adjust(images: list[torch.Tensor], arrays: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    result = {}
    for name in FACTORS:
        function = getattr(F, f"adjust_{name}")
        pairs = zip(images, arrays[name].tolist(), strict=True)
        result[f"adjust/{name}"] = np.stack([function(x, f).movedim(0, -1).numpy() for x, f in pairs])
    pairs = zip(images, arrays["boxes"].tolist(), strict=True)
    resized = [F.resized_crop(x, *box, list(x.shape[-2:])).movedim(0, -1).numpy() for x, box in pairs]
    return result | {"resized_crop": np.stack(resized)}


def augment(images: list[torch.Tensor], random_order: bool) -> dict[str, np.ndarray]:
    """Apply LeRobot's default transforms; give the images, and which transforms with what parameters."""
    config = ImageTransformsConfig(enable=True, random_order=random_order)
    apply = ImageTransforms(config)
    drawn = {}
    for name, transform in apply.transforms.items():

        def make_params(inputs, name=name, original=transform.make_params):
            drawn[name] = original(inputs)
            return drawn[name]

        transform.make_params = make_params
    names = {id(transform): name for name, transform in apply.transforms.items()}
    changed, log = [], []
    for image in images:
        changed.append(apply(image).movedim(0, -1).numpy())
        chosen = [names[id(transform)] for transform in apply.tf.selected_transforms]
        values = {name: {k: v for k, v in drawn[name].items() if k != "fn_idx"} for name in chosen}
        log.append(json.dumps([chosen, values]))
    return {"images": np.stack(changed), "drawn": np.array(log)}


def look_at_dataset(root: str) -> dict[str, np.ndarray]:
    """Tell what image transforms are called with."""
    seen = []

    def note(image: torch.Tensor) -> torch.Tensor:
        seen.append(f"{image.dtype} {tuple(image.shape)}")
        return image

    dataset = LeRobotDataset(
        "test/ours",
        root=root,
        delta_timestamps={key: [-0.1, 0.0] for key in ("observation.images.top", "observation.images.side")},
        image_transforms=note,
        return_uint8=True,
        video_backend="pyav",
    )
    _ = dataset[3]
    return {"seen": np.array(seen)}


def preprocess(folder: str, images: list[torch.Tensor]) -> np.ndarray:
    pipeline = PolicyProcessorPipeline.from_pretrained(folder, config_filename="policy_preprocessor.json")
    batch = {"observation.images.top": torch.stack(images).float() / 255}
    result = pipeline(batch)["observation.images.top"]
    return np.moveaxis(result.numpy(), -3, -1)


def main(request_file: str, out: str) -> None:
    with open(request_file) as file:
        request = json.load(file)
    arrays = dict(np.load(request["images"]))
    images = [torch.from_numpy(image).movedim(-1, 0).contiguous() for image in arrays["images"]]
    torch.manual_seed(4)
    result = {"registered": np.array(REGISTERED)} | adjust(images, arrays)
    floats = {f"{k}/float32": v for k, v in adjust([x.float() / 255 for x in images], arrays).items()}
    result |= floats | look_at_dataset(request["dataset"])
    for random_order in (False, True):
        result |= {f"{random_order}/{k}": v for k, v in augment(images, random_order).items()}
    result |= {folder: preprocess(folder, images) for folder in request["pipelines"]}
    np.savez(out, allow_pickle=False, **result)


if __name__ == "__main__":
    main(*sys.argv[1:])
