"""The steps that turn a task into tokens. They run on the host, see `Pipeline.tokenize`.

Mirrors `lerobot.processor.{newline_task_processor,tokenizer_processor}` and the steps in
`lerobot.policies.{pi0,pi05,pi0_fast}.processor_*`. A tokenizer is loaded when it is used first, so that a pipeline
can be read and written without it.
"""

import dataclasses
import functools
from typing import Any, ClassVar

import numpy as np
from jaxtyping import Bool, Int

from lerobot_jax.errors import InputError
from lerobot_jax.features import ACTION, OBS_STATE, TASK
from lerobot_jax.processors.steps import Batch, Step
from lerobot_jax.processors.tokenizer import TextTokenizer, find_tokenizer, read_tokenizer

OBS_LANGUAGE_TOKENS = "observation.language.tokens"
OBS_LANGUAGE_ATTENTION_MASK = "observation.language.attention_mask"


class TextStep(Step):
    """A step that runs on the host: it reads strings, or gives tokens."""

    @property
    def reads(self) -> tuple[str, ...]:
        """The entries of a batch that the step needs."""
        raise NotImplementedError

    @property
    def writes(self) -> tuple[str, ...]:
        """The entries that it adds or changes."""
        raise NotImplementedError

    @property
    def reads_numbers(self) -> bool:
        """Whether it needs more than texts: the normalized state, or actions."""
        return bool({OBS_STATE, ACTION}.intersection(self.reads))

    def missing_tokens(self, batch: Batch) -> list[str]:
        """List the tokens that a batch should have had from this step."""
        return []


@dataclasses.dataclass(frozen=True, eq=False)
class _NewLine(TextStep):
    """Lets every task end with a newline, as the tokenizers of PaliGemma and SmolVLM want it."""

    @property
    def reads(self) -> tuple[str, ...]:
        return (TASK,)

    @property
    def writes(self) -> tuple[str, ...]:
        return (TASK,)

    def __call__(self, batch: Batch) -> Batch:
        return batch | {TASK: [task.removesuffix("\n") + "\n" for task in tasks_of(batch, TASK)]}


@dataclasses.dataclass(frozen=True, eq=False)
class Pi0NewLine(_NewLine):
    registry_name: ClassVar[str] = "pi0_new_line_processor"


@dataclasses.dataclass(frozen=True, eq=False)
class SmolVLANewLine(_NewLine):
    registry_name: ClassVar[str] = "smolvla_new_line_processor"


@dataclasses.dataclass(frozen=True, eq=False)
class _StatePrompt(TextStep):
    """Writes the normalized state into the prompt, as numbers of 256 bins between -1 and 1 (-1: below).

    Attributes:
        max_state_dim: has no effect, as in LeRobot.
        task_key: the entry of the batch with the tasks.
    """

    ending: ClassVar[str]
    max_state_dim: int = 32
    task_key: str = TASK

    @property
    def reads(self) -> tuple[str, ...]:
        return (self.task_key, OBS_STATE)

    @property
    def writes(self) -> tuple[str, ...]:
        return (self.task_key,)

    def __call__(self, batch: Batch) -> Batch:
        tasks, state = tasks_of(batch, self.task_key), batch.get(OBS_STATE)
        if state is None or np.ndim(state) != 2:
            has = "none" if state is None else f"one of shape {np.shape(state)}"
            raise InputError(
                f"'{self.registry_name}' needs an '{OBS_STATE}' of shape (batch, dimensions), the batch has {has}"
            )
        bins = np.digitize(np.asarray(state), np.linspace(-1, 1, 257)[:-1]) - 1
        prompts = [
            f"Task: {_on_one_line(task)}, State: {' '.join(map(str, row))};\n{self.ending}"
            for task, row in zip(tasks, bins, strict=True)
        ]
        return batch | {self.task_key: prompts}

    def to_config(self) -> dict[str, Any]:
        """Give the settings that are not the usual ones; LeRobot writes none."""
        return changed_settings(self, ("max_state_dim", "task_key"))


@dataclasses.dataclass(frozen=True, eq=False)
class Pi05StatePrompt(_StatePrompt):
    registry_name: ClassVar[str] = "pi05_prepare_state_tokenizer_processor_step"
    ending: ClassVar[str] = "Action: "


@dataclasses.dataclass(frozen=True, eq=False)
class Pi0FastStatePrompt(_StatePrompt):
    registry_name: ClassVar[str] = "pi0_fast_prepare_state_tokenizer_processor_step"
    ending: ClassVar[str] = ""


@dataclasses.dataclass(frozen=True, eq=False)
class TokenizeTask(TextStep):
    """Turns the tasks into token ids and a mask that is True for tokens and False for padding.

    Attributes:
        tokenizer_name: a local folder or a model on the Hub.
        max_length: longer texts are cut to it, if `truncation` says so.
        task_key: the entry of the batch with the tasks.
        padding_side: "right" or "left".
        padding: "max_length", or "longest" (or True) in the batch, or "do_not_pad" (or False).
        truncation: whether long texts are cut; LeRobot also takes transformers' names of strategies.
    """

    registry_name: ClassVar[str] = "tokenizer_processor"
    max_length: int = 512
    task_key: str = TASK
    padding_side: str = "right"
    padding: str | bool = "max_length"
    truncation: str | bool = True
    tokenizer_name: str | None = None

    def __post_init__(self):
        choices = {
            "padding_side": ("right", "left"),
            "padding": ("max_length", "longest", "do_not_pad", True, False),
            "truncation": ("longest_first", "only_first", "do_not_truncate", True, False),
        }
        for name, values in choices.items():
            if getattr(self, name) not in values:
                known = ", ".join(map(str, values))
                raise InputError(f"{name} must be one of {known}, not '{getattr(self, name)}'")
        if self.max_length < 1:
            raise InputError(f"max_length must be at least 1, not {self.max_length}")

    @property
    def reads(self) -> tuple[str, ...]:
        return (self.task_key,)

    @property
    def writes(self) -> tuple[str, ...]:
        return (OBS_LANGUAGE_TOKENS, OBS_LANGUAGE_ATTENTION_MASK)

    def __call__(self, batch: Batch) -> Batch:
        rows = self._tokenizer.encode_batch(tasks_of(batch, self.task_key))
        tokens, mask = self._padded(rows)
        return batch | {OBS_LANGUAGE_TOKENS: tokens, OBS_LANGUAGE_ATTENTION_MASK: mask}

    def missing_tokens(self, batch: Batch) -> list[str]:
        return [key for key in self.writes if key not in batch]

    @property
    def fixed_length(self) -> int | None:
        """The number of tokens of every text; None where it depends on the texts."""
        return self.max_length if self.padding == "max_length" else None

    @functools.cached_property
    def _tokenizer(self) -> TextTokenizer:
        if self.tokenizer_name is None:
            raise InputError(f"'{self.registry_name}' has no tokenizer_name, so it cannot tokenize")
        tokenizer = read_tokenizer(find_tokenizer(self.tokenizer_name))
        if self.truncation not in (False, "do_not_truncate"):
            tokenizer.truncate_to(self.max_length)
        return tokenizer

    def _padded(
        self, rows: list[list[int]]
    ) -> tuple[Int[np.ndarray, "b tokens"], Bool[np.ndarray, "b tokens"]]:
        lengths = {len(row) for row in rows}
        pads = self.padding not in (False, "do_not_pad")
        if len(lengths) > 1 and not pads:
            raise InputError("the tasks have different numbers of tokens; set the tokenizer's padding")
        length = self.max_length if self.padding == "max_length" else max(lengths)
        if max(lengths) > length:
            raise InputError(f"a task has {max(lengths)} tokens, max_length is {length}; set truncation")
        pad = self._tokenizer.ids.get("pad_token") if pads else 0
        if pad is None:
            raise InputError(f"tokenizer '{self.tokenizer_name}' has no pad_token, but padding is on")
        tokens, mask = np.full((len(rows), length), pad, np.int32), np.zeros((len(rows), length), bool)
        for i, row in enumerate(rows):
            place = slice(length - len(row), None) if self.padding_side == "left" else slice(len(row))
            tokens[i, place], mask[i, place] = row, True
        return tokens, mask

    def to_config(self) -> dict[str, Any]:
        config = super().to_config()
        return {name: value for name, value in config.items() if (name, value) != ("tokenizer_name", None)}


def tasks_of(batch: Batch, key: str) -> list[str]:
    """Give the tasks of a batch, one for each sample.

    Raises:
        InputError: when there are none, or another number than samples, or what is there are no strings.
    """
    tasks = batch.get(key)
    tasks = [tasks] if isinstance(tasks, str) else tasks.tolist() if isinstance(tasks, np.ndarray) else tasks
    if not isinstance(tasks, list | tuple) or not tasks or not all(isinstance(task, str) for task in tasks):
        has = f"only {sorted(batch)}" if tasks is None else repr(tasks)
        raise InputError(
            f"the policy wants to be told what to do: '{key}' must be a text or a list of texts, one for each "
            f"sample; the batch has {has}"
        )
    state = batch.get(OBS_STATE, ())
    if np.ndim(state) > 1 and len(state) != len(tasks):
        raise InputError(f"the batch has {len(state)} samples but {len(tasks)} texts in '{key}'")
    return list(tasks)


def changed_settings(step: Step, names: tuple[str, ...]) -> dict[str, Any]:
    """Give those of some settings of a step that differ from their defaults."""
    defaults = {field.name: field.default for field in dataclasses.fields(step)}
    return {name: getattr(step, name) for name in names if getattr(step, name) != defaults[name]}


def _on_one_line(task: str) -> str:
    return task.strip().replace("_", " ").replace("\n", " ")
