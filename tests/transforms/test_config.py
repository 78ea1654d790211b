import dataclasses
import json

import pytest

from lerobot_jax.config import parse
from lerobot_jax.errors import InputError
from lerobot_jax.transforms import ImageTransformConfig, ImageTransformsConfig

# What stock LeRobot 0.6.1 writes into train_config.json
STOCK = {
    "enable": False,
    "max_num_transforms": 3,
    "random_order": False,
    "tfs": {
        "brightness": {"weight": 1.0, "type": "ColorJitter", "kwargs": {"brightness": [0.8, 1.2]}},
        "contrast": {"weight": 1.0, "type": "ColorJitter", "kwargs": {"contrast": [0.8, 1.2]}},
        "saturation": {"weight": 1.0, "type": "ColorJitter", "kwargs": {"saturation": [0.5, 1.5]}},
        "hue": {"weight": 1.0, "type": "ColorJitter", "kwargs": {"hue": [-0.05, 0.05]}},
        "sharpness": {"weight": 1.0, "type": "SharpnessJitter", "kwargs": {"sharpness": [0.5, 1.5]}},
        "affine": {
            "weight": 1.0,
            "type": "RandomAffine",
            "kwargs": {"degrees": [-5.0, 5.0], "translate": [0.05, 0.05]},
        },
    },
}


@dataclasses.dataclass(frozen=True)
class Flags:
    image_transforms: ImageTransformsConfig = dataclasses.field(default_factory=ImageTransformsConfig)


def read(*args: str) -> ImageTransformsConfig:
    return parse(Flags, Flags(), args, "test", "").image_transforms


def test_defaults_are_lerobots():
    config = ImageTransformsConfig()
    assert json.loads(json.dumps(dataclasses.asdict(config))) == STOCK


def test_command_line():
    assert read() == ImageTransformsConfig()
    config = read(
        "--image_transforms.enable=True",
        "--image_transforms.max_num_transforms=2",
        "--image_transforms.tfs.hue.weight=0",
        "--image_transforms.tfs.affine.kwargs.degrees",
        "-9",
        "9",
    )
    tfs = ImageTransformsConfig().tfs
    tfs["hue"] = dataclasses.replace(tfs["hue"], weight=0.0)
    tfs["affine"] = ImageTransformConfig(
        type="RandomAffine", kwargs={"degrees": (-9.0, 9.0), "translate": (0.05, 0.05)}
    )
    assert config == ImageTransformsConfig(True, 2, False, tfs)


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["--image_transforms.max_num_transforms=0"], "max_num_transforms must be at least 1"),
        (["--image_transforms.tfs.hue.weight=-1"], r"tfs\.hue.*weight must be finite and not negative"),
        (["--image_transforms.tfs.hue.type=Hue"], r"tfs\.hue.*type 'Hue' is not supported; supported are"),
        (
            ["--image_transforms.tfs.hue.kwargs.hue", "0.1", "0.9"],
            r"tfs\.hue.*hue must be within -0\.5\.\.0\.5",
        ),
        (["--image_transforms.tfs.hues.weight=1"], "image_transforms.tfs.hues.weight"),
    ],
)
def test_command_line_errors_name_the_field(args: list[str], message: str):
    with pytest.raises(InputError, match=message):
        read(*args)


def test_enabled_without_any_transform():
    with pytest.raises(InputError, match="must have a transform"):
        ImageTransformsConfig(enable=True, tfs={})
    with pytest.raises(InputError, match="must have a transform"):
        ImageTransformsConfig(enable=True, tfs={"a": ImageTransformConfig(weight=0.0)})
