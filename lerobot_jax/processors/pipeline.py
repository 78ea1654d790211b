"""A pipeline of steps and its files. Mirrors `lerobot.processor.pipeline` and `lerobot.processor.factory`."""

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import safetensors
import safetensors.numpy

from lerobot_jax.errors import InputError
from lerobot_jax.features import FeatureType, NormalizationMode, PolicyFeature
from lerobot_jax.files import read_json, write_json
from lerobot_jax.processors.normalize import Normalizer, Unnormalizer
from lerobot_jax.processors.steps import AddBatchDimension, Batch, Device, RenameObservations, Step

PREPROCESSOR_NAME = "policy_preprocessor"
POSTPROCESSOR_NAME = "policy_postprocessor"
STEPS: dict[str, type[Step]] = {
    step.registry_name: step
    for step in (RenameObservations, AddBatchDimension, Device, Normalizer, Unnormalizer)
}


@dataclasses.dataclass(frozen=True, eq=False)
class Pipeline:
    """Steps that are applied one after the other."""

    name: str
    steps: tuple[Step, ...]

    def __call__(self, batch: Batch) -> Batch:
        for step in self.steps:
            batch = step(batch)
        return batch

    @property
    def rename_map(self) -> dict[str, str]:
        """Observation key outside -> in the policy."""
        return {
            old: new
            for step in self.steps
            if isinstance(step, RenameObservations)
            for old, new in step.rename_map.items()
        }

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
                entry["state_file"] = f"{self.name}_step_{i}_{step.registry_name}.safetensors"
                state = {key: np.ascontiguousarray(value) for key, value in step.state.items()}
                safetensors.numpy.save_file(state, folder / entry["state_file"])
            described["steps"].append(entry)
        write_json(described, folder / f"{self.name}.json", indent=2)

    @classmethod
    def load(cls, folder: Path, name: str) -> "Pipeline":
        """Read `<name>.json` and its state files from a folder.

        Raises:
            InputError: naming the file and what is wrong with it: missing, damaged, an unknown step or setting,
                statistics that are missing.
        """
        path = folder / f"{name}.json"
        described = read_json(path)
        steps = tuple(_load_step(path, entry) for entry in described["steps"])
        return cls(described["name"], steps)


def _load_step(path: Path, entry: Mapping[str, Any]) -> Step:
    name = entry.get("registry_name", entry.get("class"))
    if name not in STEPS:
        raise InputError(f"{path}: unknown step '{name}'; known are {', '.join(STEPS)}")
    state = {}
    if "state_file" in entry:
        state_path = path.parent / entry["state_file"]
        try:
            state = safetensors.numpy.load_file(state_path)
        except FileNotFoundError:
            raise InputError(f"{state_path}: no such file") from None
        except safetensors.SafetensorError as error:
            raise InputError(f"{state_path}: damaged or incomplete safetensors file ({error})") from None
    try:
        return STEPS[name].from_config(entry["config"], state)
    except InputError as error:
        raise InputError(f"{path}: {error}") from None
    except (TypeError, KeyError, ValueError) as error:
        raise InputError(f"{path}: step '{name}' has settings that do not fit: {error}") from None


def load_pipelines(folder: Path) -> tuple[Pipeline, Pipeline]:
    """Read a policy folder's pre- and post-processor."""
    return Pipeline.load(folder, PREPROCESSOR_NAME), Pipeline.load(folder, POSTPROCESSOR_NAME)


def default_pipelines(
    inputs: Mapping[str, PolicyFeature],
    outputs: Mapping[str, PolicyFeature],
    normalization: Mapping[str, NormalizationMode],
    stats: Mapping[str, Mapping[str, np.ndarray]],
    device: str,
    rename_map: Mapping[str, str] | None = None,
) -> tuple[Pipeline, Pipeline]:
    """Build what most policies use: rename, batch, device, normalize; and unnormalize, device.

    Mirrors `lerobot.processor.factory.make_default_pre_post_processors`.
    """
    norm_map = {FeatureType(kind): NormalizationMode(mode) for kind, mode in normalization.items()}
    pre: Sequence[Step] = (
        RenameObservations(dict(rename_map or {})),
        AddBatchDimension(),
        Device(device),
        Normalizer({**inputs, **outputs}, norm_map, stats),
    )
    post: Sequence[Step] = (Unnormalizer(outputs, norm_map, stats), Device("cpu"))
    return Pipeline(PREPROCESSOR_NAME, tuple(pre)), Pipeline(POSTPROCESSOR_NAME, tuple(post))
