"""Settings of pi0.5. Mirrors `lerobot.policies.pi05.configuration_pi05.PI05Config`."""

import dataclasses
from typing import ClassVar

from lerobot_jax.features import NormalizationMode
from lerobot_jax.policies.pi0.config import PI0Config
from lerobot_jax.processors.text import Pi05StatePrompt, TextStep


def _normalization() -> dict[str, NormalizationMode]:
    return {
        "VISUAL": NormalizationMode.IDENTITY,
        "STATE": NormalizationMode.QUANTILES,
        "ACTION": NormalizationMode.QUANTILES,
    }


@dataclasses.dataclass(frozen=True)
class PI05Config(PI0Config):
    """pi0 with the state in the prompt and the time in the expert's norms; the defaults are LeRobot's."""

    type: ClassVar[str] = "pi05"

    normalization_mapping: dict[str, NormalizationMode] = dataclasses.field(
        default_factory=_normalization, hash=False
    )
    """Feature type -> how it is normalized; a type that is not listed is left as it is."""
    tokenizer_max_length: int = 200
    """Tokens of the prompt, which has the state as numbers; longer ones are cut."""

    @property
    def text_steps(self) -> tuple[TextStep, ...]:
        return (Pi05StatePrompt(), self._tokenize)

    @classmethod
    def tiny(cls) -> "PI05Config":
        return cls(
            **vars(PI0Config.tiny()) | {"normalization_mapping": _normalization(), "tokenizer_max_length": 60}
        )
