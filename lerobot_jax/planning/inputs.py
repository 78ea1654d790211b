"""The policy and the batches of a run, from what its datasets say of themselves; no frame is read."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
from absl import logging

from lerobot_jax import hub, training_data
from lerobot_jax.config import SourceConfig, TrainConfig
from lerobot_jax.data import mixture, tables
from lerobot_jax.data.dataset import resized_features
from lerobot_jax.data.info import DEFAULT_FEATURES, image_shape
from lerobot_jax.data.metadata import LeRobotDatasetMetadata
from lerobot_jax.data.samples import Batch
from lerobot_jax.data.streaming import open_stream
from lerobot_jax.errors import InputError
from lerobot_jax.features import TASK, FeatureType, PolicyFeature
from lerobot_jax.policies import base
from lerobot_jax.policies.base import FunctionalPolicy
from lerobot_jax.policy_weights import PolicyWeights
from lerobot_jax.training_data import Source

FPS = 10  # of datasets that cannot be reached: it changes no shape
FRAMES = 10_000


def describe_run(config: TrainConfig) -> tuple[list[Source], list[FunctionalPolicy]]:
    """Give a run's datasets and policies, without data and weights.

    Raises:
        InputError: when a dataset cannot be reached and the policy does not say either what it takes.
    """
    sources = training_data.describe_sources(config, lambda source: _find(config, source))
    return sources, training_data.build_policies(config, sources)


def weights_at_hand(policy: FunctionalPolicy) -> PolicyWeights | None:
    """Open the weights that training would start from, if `pretrained_path` is a folder here."""
    path = policy.config.pretrained_path
    return base.open_policy(Path(path), policy.config)[1] if path and Path(path).is_dir() else None


def batch_shapes(
    config: TrainConfig,
    sources: Sequence[Source],
    policies: Sequence[FunctionalPolicy],
    sharding: jax.sharding.Sharding | None = None,
) -> dict[str, jax.ShapeDtypeStruct]:
    """Tell what the train step gets as a batch, from metadata alone, and where it lies.

    The shapes have the leading axes of seeds, if there are several, and of micro-batches, if gradients are
    accumulated; the types are those on the devices.
    """
    finishes = training_data.sample_finishes(config, sources, policies)
    samples = [
        finish(_blank_sample(source, training_data.training_keys(policy, source)))
        for source, policy, finish in zip(sources, policies, finishes, strict=True)
    ]
    if config.dataset.mixture:
        samples[0] |= {mixture.DATASET_INDEX: np.zeros(1, np.int64)}
    accumulation = config.gradient_accumulation_steps
    lead = (*(n for n in (config.num_seeds, accumulation) if n > 1), config.batch_size)
    return {
        key: jax.ShapeDtypeStruct(
            (*lead, *x.shape[1:]), jax.dtypes.canonicalize_dtype(x.dtype), sharding=sharding
        )
        for sample in samples
        for key, x in sample.items()
    }


def _blank_sample(source: Source, keys: Sequence[str]) -> Batch:
    """Give a batch of one sample as the dataset would, of zeros."""
    deltas, chosen = source.settings["delta_timestamps"], source.settings["cameras"]
    cameras = source.meta.camera_keys if chosen is None else chosen
    sample = {}
    for key, feature in resized_features(source.meta, source.settings["image_size"]).items():
        steps = (len(deltas[key]),) if key in deltas else ()
        if steps:
            sample[f"{key}_is_pad"] = np.zeros((1, *steps), np.bool_)
        if key in cameras:
            sample[key] = np.zeros((1, *steps, *image_shape(feature)), np.uint8)
        elif key not in source.meta.camera_keys:
            sample[key] = np.zeros((1, *steps, *tables.row_shape(feature)), tables.row_dtype(feature))
    added = source.settings["added_columns"].items()
    sample |= {name: np.zeros((1, *values.shape[1:]), values.dtype) for name, values in added}
    sample[TASK] = [source.meta.tasks[0]]
    return {key: value for key, value in sample.items() if key in keys}


def _find(config: TrainConfig, source: SourceConfig) -> LeRobotDatasetMetadata:
    """Find a dataset's metadata; make it up from the policy's features if there is none."""
    is_builtin = source.root is None and source.repo_id.startswith("builtin/")
    if is_builtin and not (hub.lerobot_home() / source.repo_id).exists():
        from lerobot_jax.envs.demonstrations import builtin_features

        return _made_up(source.repo_id, builtin_features(source.repo_id))
    try:
        if "://" in (source.root or ""):
            return open_stream(source.repo_id, source.root, source.revision).meta
        return LeRobotDatasetMetadata.find(source.repo_id, source.root, source.revision)
    except InputError as error:
        policy = config.policy
        if not policy.input_features or not policy.output_features:
            raise InputError(
                f"{error}; or, to plan without it, name what the policy takes and gives: policy.input_features and "
                "policy.output_features"
            ) from None
        logging.warning("planning from the policy's own features, since %s", error)
        original = {new: old for old, new in source.rename_map.items()}
        features = {**policy.input_features, **policy.output_features}
        return _made_up(
            source.repo_id, {original.get(key, key): _of_dataset(f) for key, f in features.items()}
        )


def _of_dataset(feature: PolicyFeature) -> dict[str, Any]:
    """Write a policy's feature as a dataset has it."""
    if feature.type != FeatureType.VISUAL:
        return {"dtype": "float32", "shape": feature.shape, "names": None}
    channels, height, width = feature.shape
    names = ["height", "width", "channels"]
    return {"dtype": "video", "shape": (height, width, channels), "names": names}


def _made_up(repo_id: str, features: dict[str, dict[str, Any]]) -> LeRobotDatasetMetadata:
    """Give the metadata of a dataset of one long episode."""
    features = {**features, **DEFAULT_FEATURES}
    info = {"fps": FPS, "features": features, "total_episodes": 1, "total_frames": FRAMES}
    episodes = {"length": np.array([FRAMES]), "tasks": [["do it"]]}
    return LeRobotDatasetMetadata(repo_id, Path(repo_id), None, info, {}, ["do it"], episodes)
