"""From an image to a vector of keypoints: the image encoder of Diffusion Policy and VQ-BeT.

Mirrors `DiffusionRgbEncoder` and `SpatialSoftmax` of `lerobot.policies.diffusion.modeling_diffusion` (VQ-BeT's are
the same). One difference, on purpose: constructing LeRobot's runs the backbone once in train mode on a black image,
which moves the running statistics of a new policy's batch norms; here they begin where PyTorch begins them.

Paper of the spatial softmax: "Deep Spatial Autoencoders for Visuomotor Learning" (https://arxiv.org/abs/1509.06113).
"""

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float, Int

from lerobot_jax.nn.conv import Conv2d
from lerobot_jax.nn.linear import Linear
from lerobot_jax.nn.norms import BatchNorm2d, GroupNorm
from lerobot_jax.nn.resnet import NUMBERS, ResNet, feature_map_size
from lerobot_jax.nn.variables import Buffer
from lerobot_jax.transforms import geometry


class RgbEncoder(nnx.Module):
    """Resize, crop, ResNet, spatial softmax, linear layer."""

    def __init__(
        self,
        backbone: str,
        image_size: tuple[int, int],
        *,
        resize: tuple[int, int] | None,
        crop: tuple[int, int] | None,
        num_keypoints: int,
        use_group_norm: bool,
        dtype: jnp.dtype = jnp.float32,
        rngs: nnx.Rngs,
    ):
        """Draw the weights.

        Args:
            backbone: the ResNet's name.
            image_size: (height, width) of the images that come.
            resize: to which (height, width) they are resized first, if at all.
            crop: to which (height, width) they are cropped then, if at all.
            num_keypoints: how many it finds.
            use_group_norm: instead of batch norm.
            dtype: of the activations.
            rngs: `params`.
        """
        norm = (lambda features: GroupNorm(features // 16, features)) if use_group_norm else BatchNorm2d
        self.backbone = ResNet(backbone, norm=norm, names=NUMBERS, dtype=dtype, rngs=rngs)
        seen = feature_map_size(*(crop or resize or image_size))
        self.pool = SpatialSoftmax(self.backbone.out_channels, seen, num_keypoints, dtype=dtype, rngs=rngs)
        self.out = Linear(2 * num_keypoints, 2 * num_keypoints, dtype=dtype, rngs=rngs)
        self.resize, self.crop, self.dtype = resize, crop, dtype

    def __call__(
        self, images: Float[Array, "b h w 3"], train: bool = False, corner: Int[Array, "2"] | None = None
    ) -> Float[Array, "b features"]:
        """Encode images.

        Args:
            images: normalized.
            train: whether batch norms take the batch's statistics.
            corner: top and left of the crop; it is the middle unless given.
        """
        if self.resize is not None:
            images = geometry.resize(images, self.resize)
        if self.crop is not None and corner is not None:
            images = geometry.crop(images, corner[0], corner[1], self.crop)
        elif self.crop is not None:
            images = geometry.center_crop(images, self.crop)
        keypoints = self.pool(self.backbone(images.astype(self.dtype), train))
        return jax.nn.relu(self.out(keypoints.reshape(len(images), -1)))


class SpatialSoftmax(nnx.Module):
    """Where in a feature map each keypoint is: the mean position under a softmax over the pixels, in -1..1."""

    def __init__(
        self,
        channels: int,
        size: tuple[int, int],
        num_keypoints: int,
        *,
        dtype: jnp.dtype = jnp.float32,
        rngs: nnx.Rngs,
    ):
        self.nets = Conv2d(channels, num_keypoints, 1, dtype=dtype, rngs=rngs)
        height, width = size
        x, y = np.meshgrid(np.linspace(-1.0, 1.0, width), np.linspace(-1.0, 1.0, height))
        self.pos_grid = Buffer(jnp.asarray(np.stack([x.ravel(), y.ravel()], axis=1), jnp.float32))  # pixels 2

    def __call__(self, features: Float[Array, "b h w c"]) -> Float[Array, "b k 2"]:
        logits = self.nets(features).astype(jnp.float32)
        attention = jax.nn.softmax(logits.reshape(len(logits), -1, logits.shape[-1]), axis=1)  # b pixels k
        return jnp.einsum("bpk,pd->bkd", attention, self.pos_grid[...])
