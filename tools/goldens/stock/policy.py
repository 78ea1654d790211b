"""Policies of stock LeRobot with their processors: written new into a folder, loaded from one."""

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torchvision
from lerobot.configs import FeatureType, NormalizationMode, PolicyFeature, PreTrainedConfig
from lerobot.policies.factory import get_policy_class, make_policy_config, make_pre_post_processors
from torch import Tensor, nn
from torchvision.models.resnet import BasicBlock, Bottleneck, ResNet

from .. import Variant, of_policy
from .drawing import Arrays, draw_statistics, set_weights, to_tensors

FEATURE_TYPES = {"action": "ACTION", "observation.state": "STATE", "observation.environment_state": "ENV"}
RESNETS = {
    10: (BasicBlock, [1, 1, 1, 1]),
    18: (BasicBlock, [2, 2, 2, 2]),
    34: (BasicBlock, [3, 4, 6, 3]),
    50: (Bottleneck, [3, 4, 6, 3]),
}


@dataclass
class Stock:
    """A policy in evaluation mode, its processors, and what they are given."""

    policy: Any
    preprocess: Callable[[dict[str, Any]], dict[str, Any]]
    postprocess: Callable[[Tensor], Tensor]
    batch: dict[str, Any]  # preprocessed
    observations: list[dict[str, Any]]  # raw, one a step


def write_model(
    policy: str, variant: Variant, seed: int, folder: Path
) -> tuple[Any, dict[str, Arrays], dict]:
    """Write a policy as LeRobot does; give its config, the dataset's statistics, shapes and kinds of weights."""
    shapes = {**variant.inputs, "action": (variant.action,)}
    config = _new_config(policy, shapes, dict(variant.settings))
    module = _construct(config)
    kinds = of_policy(policy, set_weights)(module, policy, seed)
    module.save_pretrained(folder)
    if not variant.store_weights:
        (folder / "model.safetensors").unlink()
    constant_key, dimension = variant.constant or (None, None)
    stats = {
        key: draw_statistics(key, shape, seed, dimension if key == constant_key else None)
        for key, shape in shapes.items()
    }
    stats_tensors = {key: to_tensors(values) for key, values in stats.items()}
    for processor in make_pre_post_processors(config, dataset_stats=stats_tensors):
        processor.save_pretrained(folder)
    param_shapes = {key: list(value.shape) for key, value in module.state_dict().items()}
    return config, stats, {"init_kinds": kinds, "param_shapes": param_shapes}


def _new_config(policy: str, shapes: Mapping[str, tuple[int, ...]], settings: dict[str, Any]) -> Any:
    features = {
        key: PolicyFeature(FeatureType(FEATURE_TYPES.get(key, "VISUAL")), shape)
        for key, shape in shapes.items()
    }
    settings = {key: tuple(value) if isinstance(value, list) else value for key, value in settings.items()}
    if "normalization_mapping" in settings:
        modes = settings["normalization_mapping"]
        settings["normalization_mapping"] = {key: NormalizationMode(mode) for key, mode in modes.items()}
    return make_policy_config(
        policy,
        device="cpu",
        push_to_hub=False,
        output_features={"action": features.pop("action")},
        input_features=features,
        **settings,
    )


def load_stock(folder: Path, seed: int, inputs: Mapping[str, Any]) -> Stock:
    """Load a policy, dropout switched off, and preprocess its batch; inputs are `raw/KEY` and `obs/STEP/KEY`."""
    config = PreTrainedConfig.from_pretrained(folder)
    for name in vars(config):
        if "dropout" in name:
            setattr(config, name, 0.0)
    if (folder / "model.safetensors").exists():
        _register_narrow_resnet(config)
        policy = get_policy_class(config.type).from_pretrained(folder, config=config, strict=True)
    else:
        policy = _construct(config)
        of_policy(config.type, set_weights)(policy, config.type, seed)
    preprocess, postprocess = make_pre_post_processors(config, pretrained_path=str(folder))
    steps = sorted({int(key.split("/")[1]) for key in inputs if key.startswith("obs/")})
    observations = [to_tensors(below(f"obs/{t}/", inputs)) for t in steps]
    return Stock(
        policy.eval(), preprocess, postprocess, preprocess(to_tensors(below("raw/", inputs))), observations
    )


def below(prefix: str, inputs: Mapping[str, Any]) -> dict[str, Any]:
    """Give the entries whose keys begin with a prefix, without it."""
    return {key.removeprefix(prefix): value for key, value in inputs.items() if key.startswith(prefix)}


def _construct(config: Any) -> Any:
    _register_narrow_resnet(config)
    return get_policy_class(config.type)(config)


def _register_narrow_resnet(config: Any) -> None:
    """Make `resnet18w4` a model of torchvision: ResNet-18 with 4 channels in its first stage instead of 64."""
    backbone = getattr(config, "vision_backbone", "")
    match = re.fullmatch(r"resnet(\d+)w(\d+)", backbone)
    if not match:
        return
    block, layers = RESNETS[int(match[1])]
    width = int(match[2])

    class NarrowResNet(ResNet):
        def __init__(self, weights: None, **options: Any):
            super().__init__(block, layers, **options)
            self.conv1 = nn.Conv2d(3, width, kernel_size=7, stride=2, padding=3, bias=False)
            self.bn1 = self._norm_layer(width)
            self.fc = nn.Linear(8 * width * block.expansion, 1)

        def _make_layer(self, block: Any, planes: int, *args: Any, **options: Any) -> nn.Sequential:
            if planes == 64:  # the first stage, after a stem of 64 channels
                self.inplanes = width
            return super()._make_layer(block, planes * width // 64, *args, **options)

    setattr(torchvision.models, backbone, NarrowResNet)
