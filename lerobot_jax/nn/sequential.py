"""`torch.nn.Sequential`."""

from typing import Any

from flax import nnx


class Sequential(nnx.List):
    """Layers called one after the other. Functions without parameters count too, as they do in PyTorch's names."""

    def __call__(self, x: Any) -> Any:
        for layer in self:
            x = layer(x)
        return x
