"""A pipeline of steps and its files. Mirrors `lerobot.processor.pipeline` and `lerobot.processor.factory`."""

import dataclasses
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
import safetensors.numpy

from lerobot_jax import state_dict
from lerobot_jax.errors import InputError
from lerobot_jax.features import OBS_STATE, NormalizationMode, PolicyFeature
from lerobot_jax.files import read_json, write_json
from lerobot_jax.processors.actions import (
    ABSOLUTE,
    AbsoluteActions,
    ActionTarget,
    DeltaActions,
    RelativeActions,
    SummedActions,
    make_action_steps,
)
from lerobot_jax.processors.fast import TokenizeActions
from lerobot_jax.processors.normalize import (
    Normalizer,
    PerStepNormalizer,
    PerStepUnnormalizer,
    Stats,
    Unnormalizer,
    make_normalizers,
)
from lerobot_jax.processors.resize import CropResizeImages
from lerobot_jax.processors.steps import AddBatchDimension, Batch, Device, RenameObservations, State, Step
from lerobot_jax.processors.text import (
    OBS_LANGUAGE_ATTENTION_MASK,
    OBS_LANGUAGE_TOKENS,
    Pi0FastStatePrompt,
    Pi0NewLine,
    Pi05StatePrompt,
    SmolVLANewLine,
    TextStep,
    TokenizeTask,
)

PREPROCESSOR_NAME = "policy_preprocessor"
POSTPROCESSOR_NAME = "policy_postprocessor"
STEPS: dict[str, type[Step]] = {
    step.registry_name: step
    for step in (
        RenameObservations,
        AddBatchDimension,
        Device,
        CropResizeImages,
        Normalizer,
        Unnormalizer,
        PerStepNormalizer,
        PerStepUnnormalizer,
        RelativeActions,
        AbsoluteActions,
        DeltaActions,
        SummedActions,
        Pi0NewLine,
        SmolVLANewLine,
        Pi05StatePrompt,
        Pi0FastStatePrompt,
        TokenizeTask,
        TokenizeActions,
    )
}


@dataclasses.dataclass(frozen=True, eq=False)
class Pipeline:
    """Steps that are applied one after the other.

    Those that handle text run on the host: `tokenize`. The others are a pure function of arrays: calling the
    pipeline, which also works inside jit. `pipeline(pipeline.tokenize(batch))` is what LeRobot's pipeline does.
    """

    name: str
    steps: tuple[Step, ...]

    def __call__(self, batch: Batch) -> Batch:
        """Apply the steps on numbers.

        Raises:
            InputError: when a step misses something in the batch, tokens for example.
        """
        for step in self._text_steps:
            if missing := step.missing_tokens(batch):
                raise InputError(
                    f"the batch has no {', '.join(missing)}: call tokenize of '{self.name}' on it first"
                )
        batch = {key: _as_jax(value) for key, value in batch.items()}
        for step in self.steps:
            batch = batch if isinstance(step, TextStep) else step(batch)
        return batch

    def tokenize(self, batch: Batch) -> Batch:
        """Replace the texts of a raw batch by tokens, on the host; the rest of the batch stays raw.

        Steps on numbers that come before are applied on the way, because the state can be part of a text, and
        actions can become tokens.

        Raises:
            InputError: when the batch has no text, or a tokenizer cannot be found.
        """
        if not self.has_text:
            return batch
        needed = {OBS_STATE, *(key for step in self._text_steps for key in step.reads)}
        small = {
            key: value if isinstance(value, str | list | tuple) else np.asarray(value)
            for key, value in batch.items()
            if self.rename_map.get(key, key) in needed
        }
        for step in self.steps[: self.steps.index(self._text_steps[-1]) + 1]:
            small = step(small)
        written = {key for step in self._text_steps for key in step.writes}
        used_up = {step.task_key for step in self._text_steps if isinstance(step, TokenizeTask)}
        tokens = {key: small[key] for key in written if key in small}
        return {key: value for key, value in {**batch, **tokens}.items() if key not in used_up}

    def blank_tokens(self, batch_size: int) -> Batch | None:
        """Give tokens of nothing in the shapes that `tokenize` gives, without the tokenizer.

        None if these depend on the texts.
        """
        blank: Batch = {}
        for step in self._text_steps:
            if isinstance(step, TokenizeTask):
                if step.fixed_length is None:
                    return None
                shape = (batch_size, step.fixed_length)
                blank |= {OBS_LANGUAGE_TOKENS: np.zeros(shape, np.int32)}
                blank |= {OBS_LANGUAGE_ATTENTION_MASK: np.zeros(shape, np.bool_)}
            elif isinstance(step, TokenizeActions):
                return None
        return blank

    @property
    def has_text(self) -> bool:
        """Whether batches must go through `tokenize` first."""
        return bool(self._text_steps)

    @property
    def text_tells_numbers(self) -> bool:
        """Whether tokens depend on the numbers of a sample, and not on its task alone."""
        return any(step.reads_numbers for step in self._text_steps)

    @property
    def _text_steps(self) -> list[TextStep]:
        return [step for step in self.steps if isinstance(step, TextStep)]

    @property
    def rename_map(self) -> dict[str, str]:
        """Observation key outside -> in the policy."""
        return {
            old: new
            for step in self.steps
            if isinstance(step, RenameObservations)
            for old, new in step.rename_map.items()
        }

    @property
    def action_target(self) -> ActionTarget:
        """What the policy behind this preprocessor predicts."""
        target = ABSOLUTE
        for step in self.steps:
            if isinstance(step, RelativeActions):
                kind = step.representation if step.enabled else "absolute"
                target = dataclasses.replace(step.target, representation=kind)
        per_step = any(isinstance(step, PerStepNormalizer) for step in self.steps)
        return dataclasses.replace(target, statistics_per_step=per_step)

    @property
    def resizes_images(self) -> bool:
        """Whether images may have any size."""
        return any(isinstance(step, CropResizeImages) and step.resize_size for step in self.steps)

    def replace(self, *replacements: Step) -> "Pipeline":
        """Give the same pipeline with each step of a replacement's type replaced."""
        by_type = {type(step): step for step in replacements}
        return dataclasses.replace(self, steps=tuple(by_type.get(type(step), step) for step in self.steps))

    def save(self, folder: Path) -> None:
        """Write `<name>.json` and one safetensors file for each step that has state, as LeRobot does."""
        described: dict[str, Any] = {"name": self.name, "steps": []}
        for i, step in enumerate(self.steps):
            entry: dict[str, Any] = {"registry_name": step.registry_name, "config": step.to_config()}
            if step.state:
                entry["state_file"] = f"{_file_stem(self.name)}_step_{i}_{step.registry_name}.safetensors"
                state = {key: np.asarray(value, order="C") for key, value in step.state.items()}
                safetensors.numpy.save_file(state, folder / entry["state_file"])
            described["steps"].append(entry)
        write_json(described, folder / f"{_file_stem(self.name)}.json", indent=2)

    @classmethod
    def load(cls, folder: Path, name: str) -> "Pipeline":
        """Read `<name>.json` and its state files from a folder. Tokenizers are not needed for that.

        Raises:
            InputError: naming the file and what is wrong with it: missing, damaged, an unknown step or setting.
        """
        path = folder / f"{name}.json"
        described = read_json(path)
        if not isinstance(described, dict) or set(described) != {"name", "steps"}:
            has = sorted(described) if isinstance(described, dict) else type(described).__name__
            raise InputError(f"{path}: must be an object with a 'name' and 'steps', it has {has}")
        if not isinstance(described["name"], str) or _file_stem(described["name"]) != name:
            raise InputError(f"{path}: 'name' must be '{name}', it is {described['name']!r}")
        if not isinstance(described["steps"], list):
            raise InputError(f"{path}: 'steps' must be a list, it is {described['steps']!r}")
        entries = [_check_entry(path, i, entry) for i, entry in enumerate(described["steps"])]
        files = [entry["state_file"] for entry in entries if "state_file" in entry]
        if len(files) != len(set(files)):
            raise InputError(f"{path}: two steps have the same state_file")
        return cls(described["name"], tuple(_load_step(path, entry) for entry in entries))


def _as_jax(value: Any) -> Any:
    return jnp.asarray(value) if isinstance(value, np.ndarray) and value.dtype.kind not in "OSU" else value


def _file_stem(name: str) -> str:
    """Turn a pipeline's name into that of its files, as LeRobot does."""
    return re.sub(r"[^a-zA-Z0-9_]", "_", name.lower())


def _check_entry(path: Path, i: int, entry: Any) -> dict[str, Any]:
    """Give a step's entry in a pipeline's JSON if it has the right shape and names a known step."""
    if not isinstance(entry, dict):
        raise InputError(f"{path}: step {i} must be an object, it is {entry!r}")
    name = entry.get("registry_name", entry.get("class"))
    if not isinstance(name, str) or name not in STEPS:
        raise InputError(f"{path}: unknown step {name!r}; known are {', '.join(STEPS)}")
    unknown = set(entry) - {"registry_name", "config", "state_file"}
    if unknown or not isinstance(entry.get("config"), dict):
        raise InputError(
            f"{path}: step '{name}' must have a 'config' (an object) and may have a 'state_file'; "
            f"it has {sorted(entry)}"
        )
    file = entry.get("state_file", "x.safetensors")
    if not isinstance(file, str) or Path(file).name != file or not file.endswith(".safetensors"):
        raise InputError(
            f"{path}: the state_file of step '{name}' must be the name of a safetensors file beside it, "
            f"not {file!r}"
        )
    return entry


def _load_step(path: Path, entry: Mapping[str, Any]) -> Step:
    name, state = entry["registry_name"], State()
    if "state_file" in entry:
        state = dict(state_dict.read(path.parent / entry["state_file"]))
    try:
        return STEPS[name].from_config(entry["config"], state)
    except ValueError as error:
        raise InputError(f"{path}: step '{name}' has settings that do not fit: {error}") from None


def load_pipelines(folder: Path) -> tuple[Pipeline, Pipeline]:
    """Read a policy folder's pre- and post-processor."""
    pre, post = Pipeline.load(folder, PREPROCESSOR_NAME), Pipeline.load(folder, POSTPROCESSOR_NAME)
    relative = next((step for step in pre.steps if isinstance(step, RelativeActions)), None)
    absolute = next((step for step in post.steps if isinstance(step, AbsoluteActions)), None)
    if absolute is not None:
        post = post.replace(dataclasses.replace(absolute, relative=relative))
    return pre, post


def default_pipelines(
    inputs: Mapping[str, PolicyFeature],
    outputs: Mapping[str, PolicyFeature],
    normalization: Mapping[str, NormalizationMode],
    stats: Stats,
    device: str,
    rename_map: Mapping[str, str] | None = None,
    target: ActionTarget = ABSOLUTE,
    image_size: tuple[int, int] | None = None,
    text_steps: Sequence[TextStep] = (),
    disabled_relative_step: RelativeActions | None = None,
) -> tuple[Pipeline, Pipeline]:
    """Build what most policies use: rename, batch, tokenize, device, normalize; and unnormalize, device.

    Mirrors `lerobot.processor.factory.make_default_pre_post_processors`. Text that tells numbers comes after these
    are normalized, and before the device, as in LeRobot's pi05. The statistics of `action` must be those of the
    target, whose steps stand where LeRobot's pi0 has them: beside the normalizer, on the raw side.

    Raises:
        InputError: naming a feature whose statistics are missing.
    """
    to_target, from_target = make_action_steps(target, inputs, outputs, disabled_relative_step)
    per_step = target.statistics_per_step
    normalizer, unnormalizer = make_normalizers(inputs, outputs, normalization, stats, per_step=per_step)
    text: tuple[Step, ...] = (*text_steps, Device(device))
    numbers: tuple[Step, ...] = (
        *([CropResizeImages(resize_size=image_size)] if image_size else []),
        *to_target,
        normalizer,
    )
    reads_numbers = any(step.reads_numbers for step in text_steps)
    pre: Sequence[Step] = (
        RenameObservations(dict(rename_map or {})),
        AddBatchDimension(),
        *(numbers + text if reads_numbers else text + numbers),
    )
    post: Sequence[Step] = (unnormalizer, *from_target, Device("cpu"))
    return Pipeline(PREPROCESSOR_NAME, tuple(pre)), Pipeline(POSTPROCESSOR_NAME, tuple(post))
