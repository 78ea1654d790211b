"""torchvision's ResNets up to the last feature map; channel-last.

Mirrors `torchvision.models.resnet`, either cut by `IntermediateLayerGetter` at `layer4` (ACT), or as
`nn.Sequential(*children[:-2])` (Diffusion Policy, VQ-BeT), whose layers have numbers for names. Besides
torchvision's names, `resnet18w4` means a ResNet-18 whose first stage is 4 channels wide instead of 64.
"""

import re
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from lerobot_jax.nn import initializers
from lerobot_jax.nn.conv import Conv2d
from lerobot_jax.nn.execution import run_block
from lerobot_jax.nn.max_pool import max_pool
from lerobot_jax.nn.norms import FrozenBatchNorm2d

# Channels -> a norm, called with the feature map and whether the policy is in training.
MakeNorm = Callable[[int], Any]


class ResNetSpec(NamedTuple):
    bottleneck: bool
    num_blocks: tuple[int, int, int, int]
    width: int


_DEPTHS = {
    "10": (False, (1, 1, 1, 1)),
    "18": (False, (2, 2, 2, 2)),
    "34": (False, (3, 4, 6, 3)),
    "50": (True, (3, 4, 6, 3)),
    "101": (True, (3, 4, 23, 3)),
    "152": (True, (3, 8, 36, 3)),
}

# torchvision's weights are published as .pth files; the same arrays as safetensors are on the Hub.
TORCHVISION_WEIGHTS = {
    "ResNet18_Weights.IMAGENET1K_V1": "timm/resnet18.tv_in1k",
    "ResNet34_Weights.IMAGENET1K_V1": "timm/resnet34.tv_in1k",
    "ResNet50_Weights.IMAGENET1K_V1": "timm/resnet50.tv_in1k",
    "ResNet50_Weights.IMAGENET1K_V2": "timm/resnet50.tv2_in1k",
    "ResNet101_Weights.IMAGENET1K_V1": "timm/resnet101.tv_in1k",
    "ResNet101_Weights.IMAGENET1K_V2": "timm/resnet101.tv2_in1k",
    "ResNet152_Weights.IMAGENET1K_V1": "timm/resnet152.tv_in1k",
    "ResNet152_Weights.IMAGENET1K_V2": "timm/resnet152.tv2_in1k",
}


def parse_resnet(name: str) -> ResNetSpec:
    """Read a name such as `resnet18`, `resnet50` or `resnet18w4`; raise ValueError for any other."""
    match = re.fullmatch(r"resnet(\d+)(?:w(\d+))?", name)
    if match is None or match[1] not in _DEPTHS:
        known = ", ".join(f"resnet{depth}" for depth in _DEPTHS)
        raise ValueError(f"vision_backbone must be one of {known}, not '{name}'")
    bottleneck, num_blocks = _DEPTHS[match[1]]
    return ResNetSpec(bottleneck, num_blocks, int(match[2] or 64))


def _conv(
    in_channels: int,
    out_channels: int,
    size: int,
    *,
    stride: int = 1,
    dilation: int = 1,
    dtype: jnp.dtype,
    rngs: nnx.Rngs,
) -> Conv2d:
    return Conv2d(
        in_channels,
        out_channels,
        size,
        stride=stride,
        padding=(size // 2) * dilation,
        dilation=dilation,
        use_bias=False,
        kernel_init=initializers.kaiming_normal_fan_out,
        dtype=dtype,
        rngs=rngs,
    )


class BasicBlock(nnx.Module):
    expansion = 1

    def __init__(
        self,
        in_channels: int,
        width: int,
        stride: int,
        dilation: int,
        *,
        norm: MakeNorm,
        dtype: jnp.dtype,
        rngs: nnx.Rngs,
    ):
        self.conv1 = _conv(in_channels, width, 3, stride=stride, dtype=dtype, rngs=rngs)
        self.bn1 = norm(width)
        self.conv2 = _conv(width, width, 3, dtype=dtype, rngs=rngs)
        self.bn2 = norm(width)
        self.downsample = _downsample(in_channels, width, stride, norm=norm, dtype=dtype, rngs=rngs)

    def __call__(self, x: Float[Array, "b h w c"], train: bool) -> Float[Array, "b h2 w2 c2"]:
        y = jax.nn.relu(self.bn1(self.conv1(x), train))
        y = self.bn2(self.conv2(y), train)
        return jax.nn.relu(y + _shortcut(self.downsample, x, train))


class Bottleneck(nnx.Module):
    expansion = 4

    def __init__(
        self,
        in_channels: int,
        width: int,
        stride: int,
        dilation: int,
        *,
        norm: MakeNorm,
        dtype: jnp.dtype,
        rngs: nnx.Rngs,
    ):
        self.conv1 = _conv(in_channels, width, 1, dtype=dtype, rngs=rngs)
        self.bn1 = norm(width)
        self.conv2 = _conv(width, width, 3, stride=stride, dilation=dilation, dtype=dtype, rngs=rngs)
        self.bn2 = norm(width)
        self.conv3 = _conv(width, 4 * width, 1, dtype=dtype, rngs=rngs)
        self.bn3 = norm(4 * width)
        self.downsample = _downsample(in_channels, 4 * width, stride, norm=norm, dtype=dtype, rngs=rngs)

    def __call__(self, x: Float[Array, "b h w c"], train: bool) -> Float[Array, "b h2 w2 c2"]:
        y = jax.nn.relu(self.bn1(self.conv1(x), train))
        y = jax.nn.relu(self.bn2(self.conv2(y), train))
        y = self.bn3(self.conv3(y), train)
        return jax.nn.relu(y + _shortcut(self.downsample, x, train))


def _downsample(
    in_channels: int, out_channels: int, stride: int, *, norm: MakeNorm, dtype: jnp.dtype, rngs: nnx.Rngs
) -> nnx.List | None:
    if stride == 1 and in_channels == out_channels:
        return None
    conv = _conv(in_channels, out_channels, 1, stride=stride, dtype=dtype, rngs=rngs)
    return nnx.List([conv, norm(out_channels)])


def _shortcut(
    downsample: nnx.List | None, x: Float[Array, "b h w c"], train: bool
) -> Float[Array, "b h2 w2 c2"]:
    if downsample is None:
        return x
    conv, norm = downsample
    return norm(conv(x), train)


NAMES = ("conv1", "bn1", "layer1", "layer2", "layer3", "layer4")
NUMBERS = ("0", "1", "4", "5", "6", "7")  # 2 and 3 are the ReLU and the pooling, which have no weights


class ResNet(nnx.Module):
    """The convolutional part of a ResNet: images in, feature map of stride 32 (16 when dilated) out."""

    def __init__(
        self,
        name: str,
        *,
        norm: MakeNorm = FrozenBatchNorm2d,
        names: tuple[str, ...] = NAMES,
        dilate_last_stage: bool = False,
        dtype: jnp.dtype = jnp.float32,
        rngs: nnx.Rngs,
    ):
        """Draw the weights.

        Args:
            name: such as `resnet18`.
            norm: makes the norm of so many channels.
            names: of its parts, `NAMES` or `NUMBERS`.
            dilate_last_stage: keep the resolution in the last stage.
            dtype: of the activations.
            rngs: `params`.
        """
        spec = parse_resnet(name)
        if dilate_last_stage and not spec.bottleneck:
            raise ValueError(f"{name} cannot be dilated: its blocks have no dilation; use resnet50 or larger")
        block = Bottleneck if spec.bottleneck else BasicBlock
        conv1 = _conv(3, spec.width, 7, stride=2, dtype=dtype, rngs=rngs)
        parts: list[Any] = [conv1, norm(spec.width)]
        channels = spec.width
        for stage, num_blocks in enumerate(spec.num_blocks):
            width = spec.width * 2**stage
            stride, dilation = (1 if stage == 0 else 2), 1
            if dilate_last_stage and stage == 3:
                stride, dilation = 1, 2  # from the second block on, as in torchvision
            blocks = []
            for i in range(num_blocks):
                first = i == 0
                strides = (stride, 1) if first else (1, dilation)
                blocks.append(block(channels, width, *strides, norm=norm, dtype=dtype, rngs=rngs))
                channels = width * block.expansion
            parts.append(nnx.List(blocks))
        for part_name, part in zip(names, parts, strict=True):
            setattr(self, part_name, part)
        self.names = names
        self.out_channels = channels

    def __call__(self, image: Float[Array, "b h w 3"], train: bool = False) -> Float[Array, "b h2 w2 c"]:
        conv1, bn1, *stages = (getattr(self, name) for name in self.names)
        x: Any = max_pool(jax.nn.relu(bn1(conv1(image), train)))
        for stage in stages:
            for block in stage:
                x = run_block(block, x, train)
        return x


def feature_map_size(height: int, width: int) -> tuple[int, int]:
    """Give the height and width of the feature map of an image."""
    for _ in range(5):  # each halving rounds up
        height, width = (height + 1) // 2, (width + 1) // 2
    return height, width
