"""Actions as tokens: FAST (Pertsch et al. 2025, arXiv:2501.09747), on the host.

A chunk of actions is transformed along time (DCT-II), rounded, written as a string with one character for each
coefficient, and compressed by byte-pair encoding. Mirrors `lerobot.processor.tokenizer_processor`'s
`ActionTokenizerProcessorStep` and the `UniversalActionProcessor` of physical-intelligence/fast. LeRobot runs the
latter from code in the tokenizer's repository; no such code is run here, whatever `trust_remote_code` says.
"""

import dataclasses
import functools
import logging
import sys
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import scipy.fft
from jaxtyping import Bool, Float, Int

from lerobot_jax.errors import InputError
from lerobot_jax.features import ACTION
from lerobot_jax.files import read_json
from lerobot_jax.processors.steps import Batch
from lerobot_jax.processors.text import TextStep, changed_settings
from lerobot_jax.processors.tokenizer import TextTokenizer, find_tokenizer, read_tokenizer

ACTION_TOKENS = "action.tokens"
ACTION_TOKEN_MASK = "action.token_mask"
SETTINGS_NAME = "processor_config.json"

log = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True, eq=False)
class FastTokenizer:
    """FAST's own tokens of an action chunk.

    Attributes:
        bpe: compresses the strings.
        scale: how finely coefficients are rounded: to 1 / scale.
        min_token: the smallest coefficient, character 0.
    """

    bpe: TextTokenizer
    scale: float
    min_token: float

    @classmethod
    def read(cls, folder: Path) -> "FastTokenizer":
        """Read processor_config.json and the byte-pair encoding beside it or in bpe_tokenizer/."""
        path = folder / SETTINGS_NAME
        config = read_json(path)
        settings = {}
        for name in ("scale", "min_token"):
            settings[name] = config.get(name) if isinstance(config, dict) else None
            if not isinstance(settings[name], int | float):
                raise InputError(f"{path}: a FAST tokenizer needs a number '{name}', not {settings[name]!r}")
        inner = folder / "bpe_tokenizer"  # where transformers 5 puts it
        return cls(read_tokenizer(inner if inner.is_dir() else folder), **settings)

    def encode(self, chunk: Float[np.ndarray, "chunk act"]) -> list[int]:
        """Give the tokens of normalized actions."""
        frequencies = np.asarray(scipy.fft.dct(chunk, axis=0, norm="ortho"))
        coefficients = np.around(frequencies * self.scale)
        characters = np.maximum(coefficients.reshape(-1) - self.min_token, 0).astype(int)
        if characters.max() > sys.maxunicode:
            raise InputError(
                f"actions up to {np.abs(chunk).max():g} are too large for FAST; are they normalized, and with the "
                "statistics of these actions?"
            )
        return self.bpe.encode("".join(map(chr, characters)))


@dataclasses.dataclass(frozen=True, eq=False)
class TokenizeActions(TextStep):
    """Turns normalized actions into the tokens that the language model is trained to write.

    They are the text tokenizer's: <bos>, "Action: ", FAST's tokens counted down from the end of the vocabulary,
    "|", <eos>; cut or filled up with zeros to `max_action_tokens`. Without actions in the batch nothing is done.

    Attributes:
        trust_remote_code: has no effect; LeRobot's tokenizer needs it.
        max_action_tokens: the length of a row.
        action_tokenizer_name: a local folder or a model on the Hub.
        fast_skip_tokens: how many tokens at the end of the vocabulary are not used.
        paligemma_tokenizer_name: the text tokenizer, a local folder or a model on the Hub.
    """

    registry_name: ClassVar[str] = "action_tokenizer_processor"
    trust_remote_code: bool = True
    max_action_tokens: int = 256
    action_tokenizer_name: str | None = None
    fast_skip_tokens: int = 128
    paligemma_tokenizer_name: str = "google/paligemma-3b-pt-224"

    @property
    def reads(self) -> tuple[str, ...]:
        return (ACTION,)

    @property
    def writes(self) -> tuple[str, ...]:
        return (ACTION_TOKENS, ACTION_TOKEN_MASK)

    def __call__(self, batch: Batch) -> Batch:
        if ACTION not in batch:
            return batch
        action = np.asarray(batch[ACTION])
        if action.ndim == 2:
            action = action[:, None]
        if action.ndim != 3 or not np.isfinite(action).all():
            raise InputError(
                f"'{self.registry_name}' needs finite actions of shape (batch, chunk, dimensions); "
                f"'{ACTION}' has the shape {np.shape(batch[ACTION])} and the values {action}"
            )
        tokens, mask = zip(*(self._row(chunk) for chunk in action), strict=True)
        return batch | {ACTION_TOKENS: np.stack(tokens), ACTION_TOKEN_MASK: np.stack(mask)}

    def missing_tokens(self, batch: Batch) -> list[str]:
        return [key for key in self.writes if key not in batch] if ACTION in batch else []

    def _row(
        self, chunk: Float[np.ndarray, "chunk act"]
    ) -> tuple[Int[np.ndarray, " tokens"], Bool[np.ndarray, " tokens"]]:
        text, fast = self._tokenizers
        last = text.vocab_size - 1 - self.fast_skip_tokens
        ids = [text.ids["bos_token"], *text.encode("Action: ", add_special_tokens=False)]
        ids += [last - token for token in fast.encode(chunk)] + text.encode("|")
        length = self.max_action_tokens
        if len(ids) > length:
            log.warning("actions of %d tokens are cut to max_action_tokens = %d", len(ids), length)
        row, mask = np.zeros(length, np.int32), np.arange(length) < len(ids)
        row[mask] = ids[:length]
        return row, mask

    @functools.cached_property
    def _tokenizers(self) -> tuple[TextTokenizer, FastTokenizer]:
        if self.action_tokenizer_name is None:
            raise InputError(f"'{self.registry_name}' has no action_tokenizer_name, so it cannot tokenize")
        name = self.paligemma_tokenizer_name
        text = read_tokenizer(find_tokenizer(name), add_bos_token=False, add_eos_token=True)
        if text.ids.get("bos_token") is None:
            raise InputError(f"tokenizer '{name}' has no bos_token")
        return text, FastTokenizer.read(find_tokenizer(self.action_tokenizer_name, SETTINGS_NAME))

    def to_config(self) -> dict[str, Any]:
        """Give LeRobot's three settings, and the others if they are not the usual ones: LeRobot would lose them."""
        saved = {"trust_remote_code": self.trust_remote_code, "max_action_tokens": self.max_action_tokens}
        if self.action_tokenizer_name is not None:
            saved["action_tokenizer_name"] = self.action_tokenizer_name
        return saved | changed_settings(self, ("fast_skip_tokens", "paligemma_tokenizer_name"))
