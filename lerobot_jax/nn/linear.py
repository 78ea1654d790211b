"""Linear, Embedding and LayerNorm as PyTorch initializes and computes them."""

import jax.numpy as jnp
from flax import nnx

from lerobot_jax.nn import initializers


class Linear(nnx.Linear):
    """`torch.nn.Linear(in_features, out_features)`."""

    def __init__(
        self,
        in_features: int,
        out_features: int,
        *,
        kernel_init: nnx.Initializer = initializers.torch_uniform,
        bias_init: nnx.Initializer | None = None,
        dtype: jnp.dtype = jnp.float32,
        rngs: nnx.Rngs,
    ):
        bias_init = bias_init or initializers.torch_bias(in_features)
        super().__init__(
            in_features, out_features, kernel_init=kernel_init, bias_init=bias_init, dtype=dtype, rngs=rngs
        )


class Embedding(nnx.Embed):
    """`torch.nn.Embedding(num_embeddings, features)`."""

    def __init__(self, num_embeddings: int, features: int, *, rngs: nnx.Rngs):
        super().__init__(num_embeddings, features, embedding_init=nnx.initializers.normal(1.0), rngs=rngs)


class WholeEmbedding(Embedding):
    """An embedding whose table is used as it is: PyTorch's code reads its `weight` instead of calling it."""


class LayerNorm(nnx.LayerNorm):
    """`torch.nn.LayerNorm(features, eps)`; its statistics are float32 whatever the dtype."""

    def __init__(
        self, features: int, *, epsilon: float = 1e-5, dtype: jnp.dtype = jnp.float32, rngs: nnx.Rngs
    ):
        super().__init__(features, epsilon=epsilon, use_fast_variance=False, dtype=dtype, rngs=rngs)
