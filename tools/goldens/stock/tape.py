"""Every random tensor that torch draws, recorded or played back."""

import inspect
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from lerobot_jax.errors import InputError


class Tape(TorchDispatchMode):
    """Record what torch draws, in order, below autograd; given a recording, put its tensors in their place."""

    def __init__(self, recording: Sequence[np.ndarray] | None = None):
        super().__init__()
        self.recording = recording
        self.draws: list[np.ndarray] = []
        self.descriptions: list[dict[str, Any]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        # Attention counts as random because of its dropout, which is off here.
        if torch.Tag.nondeterministic_seeded not in func.tags or "attention" in func.name():
            return out
        place = _calling_line()
        if self.recording is not None:
            if len(self.draws) >= len(self.recording):
                raise InputError(
                    f"{place} draws more tensors than the {len(self.recording)} that are recorded"
                )
            out.copy_(torch.from_numpy(self.recording[len(self.draws)]))
        self.draws.append(out.detach().numpy().copy())
        self.descriptions.append({"draw": func.name(), "shape": list(out.shape), "place": place})
        return out


def _calling_line() -> str:
    """Name the innermost running line of LeRobot."""
    for frame in inspect.stack(context=0):
        _, package, path = frame.filename.rpartition("site-packages/lerobot/")
        if package:
            return f"{path}:{frame.lineno} {frame.function}"
    return "outside of LeRobot"
