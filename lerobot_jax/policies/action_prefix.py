"""Chunks that begin with known actions: how a flow policy learns to go on from what is being executed.

Paper: "Training-Time Action Conditioning for Efficient Real-Time Chunking" (https://arxiv.org/abs/2512.05964). In
training, a delay is drawn for each sample; so many actions at the beginning of its chunk are given as they are, at
flow time 0, and the loss is about the others. LeRobot 0.6.1 has nothing like it.

    delays = draw_delays(key, b, config.rtc_training_delay)
    times = times_of_actions(time, delays, chunk)                              # b chunk
    x_t = times[..., None] * noise + (1 - times[..., None]) * actions
    losses = losses * loss_weights(delays, chunk)[..., None]                   # b chunk act; then as without delays

Acting, `policies.rtc.euler` with `guidance="trained"` gives the old chunk's actions in their place.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, PRNGKeyArray


def draw_delays(key: PRNGKeyArray, batch_size: int, max_delay: int) -> Int[Array, " b"]:
    """Draw how many actions of each chunk are known: from 0 to `max_delay`, all alike."""
    return jax.random.randint(key, (batch_size,), 0, max_delay + 1)


def is_known(delays: Int[Array, " b"], chunk: int) -> Bool[Array, "b chunk"]:
    """Tell which actions come within the delay."""
    return jnp.arange(chunk)[None] < delays[:, None]


def times_of_actions(
    time: Float[Array, " b"], delays: Int[Array, " b"], chunk: int
) -> Float[Array, "b chunk"]:
    """Give the flow time of each action: 0 (no noise) of the known ones, the sample's of the others."""
    return jnp.where(is_known(delays, chunk), 0.0, time[:, None])


def with_prefix(
    known: Float[Array, "b chunk act"], others: Float[Array, "b chunk act"], delays: Int[Array, " b"]
) -> Float[Array, "b chunk act"]:
    """Put the known actions in front of the others."""
    return jnp.where(is_known(delays, known.shape[1])[..., None], known, others)


def loss_weights(delays: Int[Array, " b"], chunk: int) -> Float[Array, "b chunk"]:
    """Weigh the losses of the actions: known ones not at all, the others so that the mean over a chunk is theirs.

    So a sample counts the same whatever its delay, and its loss does not depend on the others'; in the paper's code
    every action of a batch counts the same.
    """
    others = ~is_known(delays, chunk)
    return others * (chunk / jnp.maximum(chunk - delays, 1))[:, None]
