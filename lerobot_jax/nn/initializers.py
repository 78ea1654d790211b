"""PyTorch's default initializations, so that a policy trained from scratch starts like stock LeRobot's."""

import math

import jax
import jax.numpy as jnp
from flax import nnx

# kaiming_uniform_(a=sqrt(5)), torch's default for Linear and Conv weights: U(-1/sqrt(fan_in), 1/sqrt(fan_in))
torch_uniform = nnx.initializers.variance_scaling(1 / 3, "fan_in", "uniform")
# kaiming_normal_(mode="fan_out", nonlinearity="relu"), torchvision's ResNets
kaiming_normal_fan_out = nnx.initializers.variance_scaling(2.0, "fan_out", "normal")


def torch_bias(fan_in: int) -> nnx.Initializer:
    """Draw from U(-1/sqrt(fan_in), 1/sqrt(fan_in)), torch's default for Linear and Conv biases."""

    def init(key, shape, dtype=jnp.float32):
        bound = 1 / math.sqrt(fan_in)
        return jax.random.uniform(key, shape, dtype, -bound, bound)

    return init
