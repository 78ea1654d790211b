"""The two kinds of state that a policy's modules hold: `nnx.Param` is trained, `Buffer` is not."""

from flax import nnx


class Buffer(nnx.Variable):
    """State that is not trained but belongs to the model: torch's buffers (frozen norms, position tables)."""
