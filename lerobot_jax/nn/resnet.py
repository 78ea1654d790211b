"""torchvision's ResNets with frozen batch norms, up to the last feature map; channel-last.

Mirrors `torchvision.models.resnet` with `norm_layer=FrozenBatchNorm2d`, cut by `IntermediateLayerGetter` at
`layer4`. Besides torchvision's names, `resnet18w4` means a ResNet-18 whose first stage is 4 channels wide
instead of 64.
"""

import re
from typing import NamedTuple

import einops
import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from lerobot_jax.nn import initializers
from lerobot_jax.nn.variables import Buffer


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


class FrozenBatchNorm2d(nnx.Module):
    """Batch norm with fixed statistics and fixed affine parameters (torchvision.ops.FrozenBatchNorm2d)."""

    def __init__(self, features: int):
        self.weight = Buffer(jnp.ones(features))
        self.bias = Buffer(jnp.zeros(features))
        self.running_mean = Buffer(jnp.zeros(features))
        self.running_var = Buffer(jnp.ones(features))

    def __call__(self, x: Float[Array, "b h w c"]) -> Float[Array, "b h w c"]:
        scale = self.weight[...] * jax.lax.rsqrt(self.running_var[...] + 1e-5)
        bias = self.bias[...] - self.running_mean[...] * scale
        scale, bias = (einops.rearrange(v.astype(x.dtype), "c -> 1 1 1 c") for v in (scale, bias))
        return x * scale + bias


def _conv(
    in_channels: int,
    out_channels: int,
    size: int,
    *,
    stride: int = 1,
    dilation: int = 1,
    dtype: jnp.dtype,
    rngs: nnx.Rngs,
) -> nnx.Conv:
    return nnx.Conv(
        in_channels,
        out_channels,
        (size, size),
        strides=stride,
        padding=(size // 2) * dilation,
        kernel_dilation=dilation,
        use_bias=False,
        kernel_init=initializers.kaiming_normal_fan_out,
        dtype=dtype,
        rngs=rngs,
    )


class BasicBlock(nnx.Module):
    expansion = 1

    def __init__(
        self, in_channels: int, width: int, stride: int, dilation: int, *, dtype: jnp.dtype, rngs: nnx.Rngs
    ):
        self.conv1 = _conv(in_channels, width, 3, stride=stride, dtype=dtype, rngs=rngs)
        self.bn1 = FrozenBatchNorm2d(width)
        self.conv2 = _conv(width, width, 3, dtype=dtype, rngs=rngs)
        self.bn2 = FrozenBatchNorm2d(width)
        self.downsample = _downsample(in_channels, width, stride, dtype=dtype, rngs=rngs)

    def __call__(self, x: Float[Array, "b h w c"]) -> Float[Array, "b h2 w2 c2"]:
        y = jax.nn.relu(self.bn1(self.conv1(x)))
        y = self.bn2(self.conv2(y))
        return jax.nn.relu(y + _shortcut(self.downsample, x))


class Bottleneck(nnx.Module):
    expansion = 4

    def __init__(
        self, in_channels: int, width: int, stride: int, dilation: int, *, dtype: jnp.dtype, rngs: nnx.Rngs
    ):
        self.conv1 = _conv(in_channels, width, 1, dtype=dtype, rngs=rngs)
        self.bn1 = FrozenBatchNorm2d(width)
        self.conv2 = _conv(width, width, 3, stride=stride, dilation=dilation, dtype=dtype, rngs=rngs)
        self.bn2 = FrozenBatchNorm2d(width)
        self.conv3 = _conv(width, 4 * width, 1, dtype=dtype, rngs=rngs)
        self.bn3 = FrozenBatchNorm2d(4 * width)
        self.downsample = _downsample(in_channels, 4 * width, stride, dtype=dtype, rngs=rngs)

    def __call__(self, x: Float[Array, "b h w c"]) -> Float[Array, "b h2 w2 c2"]:
        y = jax.nn.relu(self.bn1(self.conv1(x)))
        y = jax.nn.relu(self.bn2(self.conv2(y)))
        y = self.bn3(self.conv3(y))
        return jax.nn.relu(y + _shortcut(self.downsample, x))


def _downsample(
    in_channels: int, out_channels: int, stride: int, *, dtype: jnp.dtype, rngs: nnx.Rngs
) -> nnx.List | None:
    if stride == 1 and in_channels == out_channels:
        return None
    conv = _conv(in_channels, out_channels, 1, stride=stride, dtype=dtype, rngs=rngs)
    return nnx.List([conv, FrozenBatchNorm2d(out_channels)])


def _shortcut(downsample: nnx.List | None, x: Float[Array, "b h w c"]) -> Float[Array, "b h2 w2 c2"]:
    for layer in downsample or []:
        x = layer(x)
    return x


class ResNet(nnx.Module):
    """The convolutional part of a ResNet: images in, feature map of stride 32 (16 when dilated) out."""

    layer1: nnx.List
    layer2: nnx.List
    layer3: nnx.List
    layer4: nnx.List

    def __init__(
        self, name: str, *, dilate_last_stage: bool = False, dtype: jnp.dtype = jnp.float32, rngs: nnx.Rngs
    ):
        spec = parse_resnet(name)
        if dilate_last_stage and not spec.bottleneck:
            raise ValueError(f"{name} cannot be dilated: its blocks have no dilation; use resnet50 or larger")
        block = Bottleneck if spec.bottleneck else BasicBlock
        self.conv1 = nnx.Conv(
            3,
            spec.width,
            (7, 7),
            strides=2,
            padding=3,
            use_bias=False,
            kernel_init=initializers.kaiming_normal_fan_out,
            dtype=dtype,
            rngs=rngs,
        )
        self.bn1 = FrozenBatchNorm2d(spec.width)
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
                blocks.append(block(channels, width, *strides, dtype=dtype, rngs=rngs))
                channels = width * block.expansion
            setattr(self, f"layer{stage + 1}", nnx.List(blocks))
        self.out_channels = channels

    def __call__(self, image: Float[Array, "b h w 3"]) -> Float[Array, "b h2 w2 c"]:
        x = jax.nn.relu(self.bn1(self.conv1(image)))
        x = max_pool(x)
        for stage in (self.layer1, self.layer2, self.layer3, self.layer4):
            for block in stage:
                x = block(x)
        return x


def max_pool(x: Float[Array, "b h w c"]) -> Float[Array, "b h2 w2 c"]:
    """Take maxima of 3 x 3 windows at stride 2, with a border of one pixel."""
    border = ((0, 0), (1, 1), (1, 1), (0, 0))
    return jax.lax.reduce_window(x, -jnp.inf, jax.lax.max, (1, 3, 3, 1), (1, 2, 2, 1), border)
