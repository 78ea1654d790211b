"""The sizes of recorded policies whose config.json has only names for them."""

from collections.abc import Mapping
from typing import Any

import pytest

from lerobot_jax.nn.gemma import GEMMA_SIZES, GemmaSettings
from lerobot_jax.nn.paligemma import PALIGEMMA_SIZES, PaliGemmaSettings
from lerobot_jax.nn.siglip import SiglipSettings
from lerobot_jax.policies import base


def use_sizes(arch: Mapping[str, Any], patch: pytest.MonkeyPatch) -> None:
    """Let the sizes that config.json has only names for be those of a recorded policy."""
    if "pi_tiny" not in arch:
        return
    sizes = arch["pi_tiny"]
    gemmas = {}
    for name in ("gemma_2b", "gemma_300m"):
        kept = ("width", "depth", "mlp_dim", "num_heads", "head_dim")
        gemmas[name] = GemmaSettings(*(sizes[name][key] for key in kept))
        patch.setitem(GEMMA_SIZES, name, gemmas[name])
    vision = SiglipSettings(**sizes["vision"])
    whole = PaliGemmaSettings(gemmas["gemma_2b"], vision, sizes["vocab_size"])
    patch.setitem(PALIGEMMA_SIZES, "gemma_2b", whole)
    base._module.cache_clear()
