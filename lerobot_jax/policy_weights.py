"""The weights of a policy's folder: opened and checked first, then read array by array to where they belong."""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from flax.traverse_util import flatten_dict, unflatten_dict

from lerobot_jax import lora, torch_state
from lerobot_jax.adapter_folder import Adapters
from lerobot_jax.state_dict import StateDict

Tree = dict[str, Any]


@dataclasses.dataclass(frozen=True)
class PolicyWeights:
    """What a folder has for a policy, not read yet.

    Attributes:
        module: the policy (shapes are enough).
        state: its weights, or with adapters those that they change.
        adapters: PEFT's, if the folder has some.
    """

    module: nnx.Module
    state: StateDict
    adapters: Adapters | None = None

    def __post_init__(self):
        torch_state.check(self.module, self.state)

    @property
    def types(self) -> dict[torch_state.Path, np.dtype]:
        """The type in which each array is stored, by its path."""
        return torch_state.stored_types(self.module, self.state)

    def read(
        self,
        put: Callable[[torch_state.Path, np.ndarray], jax.Array] = lambda path, array: jnp.asarray(array),
        *,
        merge_adapters: bool = True,
    ) -> tuple[Tree, Tree]:
        """Give (params, buffers); in the memory of the host are no more than a few arrays at a time.

        Args:
            put: brings an array to the devices, given its path too.
            merge_adapters: False: leave them as `LoraWeight`s.
        """
        if self.adapters is None:
            return torch_state.from_torch(self.module, self.state, put=put)
        factors = self.adapters.factors
        if not merge_adapters:
            params, buffers = torch_state.from_torch(self.module, self.state, put=put)
            return lora.with_factors(factors, params), buffers

        def put_merged(path: torch_state.Path, array: np.ndarray) -> jax.Array:
            of_it = {target: factors[target] for target in factors if target.path == path}
            adapted: dict[Any, Any] = flatten_dict(lora.with_factors(of_it, unflatten_dict({path: array})))
            return put(path, np.asarray(adapted[path]))

        return torch_state.from_torch(self.module, self.state, put=put_merged)
