"""Dimensions of the two towers of a CLIP model, as its config.json has them.

Mirrors `transformers.models.clip.configuration_clip`: the same fields, the same defaults for what is not written.
"""

import dataclasses
import typing
from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar, TypeVar

import huggingface_hub
import huggingface_hub.constants

from lerobot_jax import hub
from lerobot_jax.errors import InputError
from lerobot_jax.files import read_json
from lerobot_jax.settings import check_settings

CONFIG_NAME = "config.json"
ACTIVATIONS = ("quick_gelu", "gelu")
ADVICE = (
    "check the name, go online once, or give a folder that has CLIP's config.json, model.safetensors and "
    "tokenizer.json (its name must contain 'clip'): transformers' `CLIPModel.from_pretrained(NAME)` and "
    "`CLIPTokenizer.from_pretrained(NAME)` write them with `.save_pretrained(FOLDER)`"
)


@dataclasses.dataclass(frozen=True)
class CLIPSettings:
    """What both towers have."""

    part: ClassVar[str]  # its name in the config.json of a whole CLIP model

    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int = 12
    num_attention_heads: int = 8
    hidden_act: str = "quick_gelu"
    layer_norm_eps: float = 1e-5
    attention_dropout: float = 0.0

    def __post_init__(self):
        if self.hidden_act not in ACTIVATIONS:
            raise ValueError(f"hidden_act must be one of {', '.join(ACTIVATIONS)}, not '{self.hidden_act}'")
        if self.hidden_size % self.num_attention_heads:
            raise ValueError(
                f"hidden_size {self.hidden_size} must be a multiple of num_attention_heads "
                f"{self.num_attention_heads}"
            )
        if self.attention_dropout:
            raise ValueError(
                f"attention_dropout must be 0, as in all of OpenAI's, not {self.attention_dropout}"
            )


@dataclasses.dataclass(frozen=True)
class CLIPVisionSettings(CLIPSettings):
    """The image tower; images are `image_size` x `image_size`."""

    part: ClassVar[str] = "vision_config"

    hidden_size: int = 768
    intermediate_size: int = 3072
    num_attention_heads: int = 12
    num_channels: int = 3
    image_size: int = 224
    patch_size: int = 32

    @property
    def grid_size(self) -> int:
        """How many patches stand side by side."""
        return self.image_size // self.patch_size


@dataclasses.dataclass(frozen=True)
class CLIPTextSettings(CLIPSettings):
    """The text tower."""

    part: ClassVar[str] = "text_config"

    hidden_size: int = 512
    intermediate_size: int = 2048
    vocab_size: int = 49408
    max_position_embeddings: int = 77
    eos_token_id: int = 49407


Settings = TypeVar("Settings", bound=CLIPSettings)


def read_clip_settings(kind: type[Settings], name: str) -> Settings:
    """Read the dimensions of a tower of a CLIP model.

    Args:
        kind: which tower.
        name: a local folder, or a model in the Hub's cache or on the Hub.

    Raises:
        InputError: when there is no such model, or it is not one that can be computed here.
    """
    path = _find_config(name)
    content = read_json(path)
    described = content.get(kind.part, content) if isinstance(content, dict) else None
    if not isinstance(described, Mapping):
        raise InputError(f"{path}: must describe a CLIP model")
    hints = typing.get_type_hints(kind)
    wanted = {field.name: hints[field.name] for field in dataclasses.fields(kind)}
    known: dict[str, Any] = {key: value for key, value in described.items() if key in wanted}
    try:
        check_settings(known, wanted)
        return kind(**known)
    except ValueError as error:
        raise InputError(f"{path}: {kind.part}: {error}") from None


def _find_config(name: str) -> Path:
    if Path(name).is_dir():
        return Path(name) / CONFIG_NAME
    # Asked for often, so the cache is looked at first, without a question to the Hub.
    cache = huggingface_hub.constants.HF_HUB_CACHE
    found = huggingface_hub.try_to_load_from_cache(name, CONFIG_NAME, cache_dir=cache)
    if isinstance(found, str):
        return Path(found)
    return hub.fetch(name, "model", [CONFIG_NAME], advice=ADVICE) / CONFIG_NAME
