"""pi0.5: pi0 whose prompt has the state, and whose expert is told the time by its norms.

Paper: "pi0.5: a Vision-Language-Action Model with Open-World Generalization" (https://arxiv.org/abs/2504.16054).
Mirrors `lerobot.policies.pi05.modeling_pi05.PI05Policy`, with the differences of `lerobot_jax.policies.pi0`.
"""

import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from lerobot_jax.nn.activations import silu
from lerobot_jax.nn.linear import Linear
from lerobot_jax.policies.pi0.modeling import PI0Model, PI0Policy, Suffix
from lerobot_jax.policies.pi05.config import PI05Config


class PI05Policy(PI0Policy):
    """A vision-language model and an action expert under LeRobot's names."""

    config: PI05Config

    def __init__(self, config: PI05Config, *, rngs: nnx.Rngs):
        self.config = config
        self.model = PI05Model(config, rngs=rngs)


class PI05Model(PI0Model):
    """The networks, from tokens, images and noisy actions to the velocity."""

    is_adaptive = True
    num_state_tokens = 0

    def make_projections(self, width: int, dtype: jnp.dtype, rngs: nnx.Rngs) -> None:
        self.time_mlp_in, self.time_mlp_out = (Linear(width, width, dtype=dtype, rngs=rngs) for _ in range(2))

    def embed_suffix(
        self,
        state: Float[Array, "b state"],
        noisy: Float[Array, "b chunk act"],
        time: Float[Array, "b *chunk"],
    ) -> Suffix:
        """Embed the noisy actions; what the norms are told is the time, of each sample or of each action."""
        del state  # it is in the prompt
        actions = self.action_in_proj(noisy)
        hidden = self.time_mlp_in(self.embed_time(time).astype(actions.dtype))
        return actions, silu(self.time_mlp_out(silu(hidden)))
