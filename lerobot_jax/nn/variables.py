"""The kinds of state that a policy's modules hold: `nnx.Param` is trained, `Buffer` is not."""

from flax import nnx


class Buffer(nnx.Variable):
    """State that is not trained but belongs to the model: torch's buffers (frozen norms, position tables)."""


class Progress(Buffer):
    """A buffer that tells how far training is: all forward passes of one optimizer step see the same value."""


class Counter(Progress):
    """A count that PyTorch's policy does not save: it begins at 0 when weights come from a PyTorch checkpoint."""


def freeze(module: nnx.Module) -> None:
    """Turn a module's parameters into buffers: it is exported, but neither trained nor decayed."""
    for _, part in nnx.iter_modules(module):
        for name, value in list(vars(part).items()):
            if isinstance(value, nnx.Param):
                setattr(part, name, Buffer(value.get_value()))
