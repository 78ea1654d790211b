import importlib
from pathlib import Path

import PIL.Image
import pytest

from tests.data.recordings import record

RECIPE = """
from lerobot_jax.config import DatasetConfig, TrainConfig
from lerobot_jax.transforms import ImageTransformConfig, ImageTransformsConfig

def get_config():
    tfs = {
        "colour": ImageTransformConfig(type="ColorJitter", kwargs={"brightness": (0.5, 1.5), "hue": 0.1}),
        "affine": ImageTransformConfig(type="RandomAffine", kwargs={"degrees": (-9.0, 9.0), "scale": (0.5, 1.0)}),
        "crop": ImageTransformConfig(type="RandomCrop", kwargs={"size": (32, 48), "padding": 8}),
    }
    transforms = ImageTransformsConfig(max_num_transforms=2, tfs=tfs)
    return TrainConfig(dataset=DatasetConfig("test/recorded", root="dataset", image_transforms=transforms))
"""


def test_a_sheet_shows_each_transform_and_subsets(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    record(tmp_path / "dataset", (4,))
    (tmp_path / "recipe.py").write_text(RECIPE)
    monkeypatch.chdir(tmp_path)
    importlib.import_module("lerobot_jax.transforms.__main__").main(["--config=recipe.py"])
    with PIL.Image.open("image_transforms.png") as sheet:
        assert sheet.width == 1320
        assert sheet.height == 968  # 9 pictures of transforms, the frame, 11 subsets: 4 rows of 6
