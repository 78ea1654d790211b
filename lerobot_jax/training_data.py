"""What a run trains on: its datasets, the policy's features and statistics in them, samples in training order."""

import dataclasses
import functools
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import numpy as np
from absl import logging

from lerobot_jax import certificate, distributed, hub
from lerobot_jax.config import SourceConfig, TrainConfig
from lerobot_jax.data import loader, mixture
from lerobot_jax.data.dataset import LeRobotDataset, resized_features, split_episodes
from lerobot_jax.data.metadata import LeRobotDatasetMetadata
from lerobot_jax.data.sample_weights import SAMPLE_WEIGHT, sample_weights
from lerobot_jax.data.samples import Batch, DeviceRows, Samples, SeedSamples, ShuffledRows, device_bytes
from lerobot_jax.data.streaming import Stream, StreamedSamples, open_stream
from lerobot_jax.data.target_statistics import complete_statistics, name_joints, target_statistics
from lerobot_jax.data.windows import policy_delta_timestamps
from lerobot_jax.errors import InputError
from lerobot_jax.features import (
    ACTION,
    FeatureType,
    PolicyFeature,
    dataset_to_policy_features,
)
from lerobot_jax.policies import base
from lerobot_jax.policies.base import FunctionalPolicy
from lerobot_jax.policies.config import PolicyConfig
from lerobot_jax.policy_weights import PolicyWeights
from lerobot_jax.sharding import BatchPlacement
from lerobot_jax.training_features import check_cameras, feature_map, policy_features
from lerobot_jax.training_text import make_tokenize, text_keys, with_task_tokens

IMAGENET_STATS = {"mean": (0.485, 0.456, 0.406), "std": (0.229, 0.224, 0.225)}
DEVICE_SHARE = 0.25  # of a device's memory, for a dataset: the rest is for the policy


@dataclasses.dataclass(frozen=True)
class Source:
    """A dataset, and which of its episodes are trained on.

    Attributes:
        config: which dataset it is.
        meta: what it says of itself.
        settings: how it is read: `delta_timestamps`, `tolerance_s`, `cameras`, `image_size` and `added_columns` of
            `LeRobotDataset`.
        data: the dataset, or the stream that gives it; None if only its metadata was read.
        train_episodes: those to train on.
        held_out_episodes: those for the validation loss.
    """

    config: SourceConfig
    meta: LeRobotDatasetMetadata
    settings: dict[str, Any]
    data: LeRobotDataset | Stream | None
    train_episodes: list[int]
    held_out_episodes: list[int]

    @property
    def name(self) -> str:
        return self.config.repo_id

    @property
    def dataset(self) -> LeRobotDataset:
        """The dataset, if it is not streamed."""
        assert isinstance(self.data, LeRobotDataset)
        return self.data

    @property
    def features(self) -> dict[str, PolicyFeature]:
        """What the dataset offers, under the policy's names."""
        rename = self.config.rename_map
        found = dataset_to_policy_features(resized_features(self.meta, self.settings["image_size"]))
        return {rename.get(key, key): feature for key, feature in found.items()}

    def num_train_frames(self, drop_n_last_frames: int) -> int:
        """Count the frames to train on."""
        lengths = np.asarray(self.meta.episodes["length"])[self.train_episodes] - drop_n_last_frames
        return int(lengths.clip(min=0).sum())


def open_sources(config: TrainConfig) -> list[Source]:
    """Open the datasets with the windows and cameras that the policy wants; make built-in ones first.

    Raises:
        InputError: naming what is missing or damaged.
    """
    return [_open_source(config, chosen) for chosen in _chosen_sources(config)]


def describe_sources(
    config: TrainConfig, find: Callable[[SourceConfig], LeRobotDatasetMetadata]
) -> list[Source]:
    """Give the datasets without their data, to plan: of each only the metadata that `find` gives."""
    return [_source(config, chosen, find(chosen), None) for chosen in _chosen_sources(config)]


def _chosen_sources(config: TrainConfig) -> Sequence[SourceConfig]:
    if config.dataset.mixture:
        return config.dataset.sources
    (only,) = config.dataset.sources
    return [dataclasses.replace(only, rename_map=config.rename_map)]


def _open_source(config: TrainConfig, source: SourceConfig) -> Source:
    repo_id, root, revision = source.repo_id, source.root, source.revision
    if root is None and repo_id.startswith("builtin/"):
        from lerobot_jax.envs.demonstrations import make_builtin_dataset

        make_builtin_dataset(repo_id)
        root = str(hub.lerobot_home() / repo_id) if config.dataset.streaming else None
    stream = open_stream(repo_id, root, revision) if config.dataset.streaming else None
    meta = stream.meta if stream else LeRobotDatasetMetadata.find(repo_id, root, revision)
    opened = _source(config, source, meta, stream)
    if stream is None:
        data = LeRobotDataset(
            repo_id, root=root, episodes=source.episodes, revision=revision, **opened.settings
        )
        opened = dataclasses.replace(opened, data=data)
    return opened


def _source(
    config: TrainConfig, source: SourceConfig, meta: LeRobotDatasetMetadata, data: Stream | None
) -> Source:
    _check_rename_map(source, meta)
    original = {new: old for old, new in source.rename_map.items()}
    cameras = [original.get(key, key) for key in config.policy.image_features]
    if config.dataset.mixture or config.policy.optional_cameras:
        cameras = [key for key in cameras if key in meta.camera_keys]
    settings = {
        "delta_timestamps": policy_delta_timestamps(config.policy, meta.features, meta.fps),
        "tolerance_s": config.tolerance_s,
        "cameras": cameras if config.policy.input_features else None,
        "image_size": config.dataset.image_size,
        "added_columns": _added_columns(config, source, meta),
    }
    train, held_out = split_episodes(meta, source.episodes, config.dataset.eval_split)
    opened = Source(source, meta, settings, data, train, held_out)
    dropped = config.policy.num_dropped_frames
    if opened.num_train_frames(dropped) == 0:
        raise InputError(f"{source.repo_id}: no episode is longer than drop_n_last_frames={dropped}")
    return opened


def _added_columns(
    config: TrainConfig, source: SourceConfig, meta: LeRobotDatasetMetadata
) -> dict[str, np.ndarray]:
    """Compute what samples have besides what is in the dataset: their weights, if they depend on the sample."""
    weighting = config.sample_weighting
    if weighting is None or weighting.type == "uniform":
        return {}
    chunk_size = getattr(config.policy, "chunk_size", None)
    if chunk_size is None:
        raise InputError(
            f"sample_weighting.type={weighting.type} needs a policy with a chunk_size, as in LeRobot; "
            f"{config.policy.type} has none"
        )
    if config.dataset.mixture and weighting.progress_path is not None:
        raise InputError(
            "sample_weighting.progress_path is for one dataset; in a mixture, each has a sarm_progress.parquet"
        )
    train, _ = split_episodes(meta, source.episodes, config.dataset.eval_split)
    weights = sample_weights(weighting, meta, chunk_size, root=source.root, episodes=train)
    return {SAMPLE_WEIGHT: weights}


def _check_rename_map(source: SourceConfig, meta: LeRobotDatasetMetadata) -> None:
    renamed = source.rename_map
    unknown = sorted(set(renamed) - set(meta.features))
    if unknown:
        raise InputError(f"rename_map: {source.repo_id} has no {unknown}; it has {sorted(meta.features)}")
    names = [renamed.get(key, key) for key in meta.features]
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice:
        raise InputError(f"rename_map: two features of {source.repo_id} would be called {twice}")


def build_policies(config: TrainConfig, sources: Sequence[Source]) -> list[FunctionalPolicy]:
    """Fit the policy's features to the datasets, and its statistics to each.

    Returns:
        One for each source: the same policy with that dataset's processors and tasks, without arrays. Where only
        the metadata was read, its statistics change nothing.

    Raises:
        InputError: naming a feature that a dataset lacks or has in another shape, or missing statistics.
    """
    inputs, outputs = policy_features(config, sources)
    policy_config = dataclasses.replace(
        config.policy, input_features=inputs, output_features=outputs, use_peft=False
    )
    for source in sources:
        check_cameras(config, source, policy_config)
    if unnormalized := base.unnormalized_inputs(policy_config):
        logging.warning(
            "%s will not be normalized: policy.normalization_mapping does not list the type",
            ", ".join(f"{key} ({inputs[key].type})" for key in unnormalized),
        )
    policies = []
    for source in sources:
        stats = _statistics(config, source, {**inputs, **outputs})
        target = name_joints(
            config.policy.action_target,
            source.meta.features,
            also_absolute=config.policy.disabled_relative_step is not None,
        )
        adapted = dataclasses.replace(policy_config, action_target=target)
        target_stats = _target_statistics(adapted, source) if target.is_transformed else None
        rename, size = source.config.rename_map, config.dataset.image_size
        policies.append(base.make_policy(adapted, stats, rename, target_stats, size))
    return with_task_tokens(policies, sources)


def open_weights(policy: FunctionalPolicy) -> PolicyWeights | None:
    """Open and check the weights that training starts from, if the policy names some.

    Raises:
        InputError: naming what is missing, does not fit, or is not what its certificate says.
    """
    config = policy.config
    if config.pretrained_path is None:
        return None
    folder = base.find_policy(config.pretrained_path, config.pretrained_revision)
    certificate.check_files(folder)
    return base.open_policy(folder, config)[1]


def _statistics(config: TrainConfig, source: Source, features: dict[str, PolicyFeature]) -> Any:
    """Give a dataset's statistics under the policy's names."""
    if source.data is None:
        return {key: mixture.neutral_statistics(_row(feature)) for key, feature in features.items()}
    rename = source.config.rename_map
    known = source.meta.stats
    if isinstance(source.data, LeRobotDataset):
        known = complete_statistics(known, source.data.columns)
    stats = {rename.get(k, k): dict(values) for k, values in known.items()}
    if config.dataset.use_imagenet_stats:
        for key, feature in features.items():
            is_never_seen = key not in source.features and config.policy.optional_cameras
            if feature.type == FeatureType.VISUAL and not is_never_seen:
                images = {name: np.array(v).reshape(3, 1, 1) for name, v in IMAGENET_STATS.items()}
                stats[key] = stats.get(key, {}) | images
    return mixture.pad_statistics(stats, features) if config.dataset.mixture else stats


def _target_statistics(policy: PolicyConfig, source: Source) -> dict[str, np.ndarray]:
    """Give the statistics of what the policy predicts of a dataset's actions."""
    if source.data is None:
        steps = policy.action_delta_indices if policy.action_target.statistics_per_step else None
        lead = () if steps is None else (len(steps),)
        return mixture.neutral_statistics((*lead, *policy.action_feature.shape))
    if not isinstance(source.data, LeRobotDataset):
        raise InputError(
            "action_target: its statistics need all actions of the dataset, so dataset.streaming must be off"
        )
    if source.features[ACTION] != policy.action_feature:
        raise InputError(
            f"action_target: the actions of {source.name} have {source.features[ACTION].shape[0]} dimensions, the "
            f"policy {policy.action_feature.shape[0]}; only absolute actions can be padded"
        )
    rename = source.config.rename_map
    columns = {rename.get(k, k): column for k, column in source.dataset.columns.items()}
    return target_statistics(columns, policy.action_target, policy.action_delta_indices)


def _row(feature: PolicyFeature) -> tuple[int, ...]:
    """Give the shape of a feature's statistics."""
    return (feature.shape[0], 1, 1) if feature.type == FeatureType.VISUAL else feature.shape


def batch_keys(policy: FunctionalPolicy, source: Source) -> list[str]:
    """List what a batch needs of a dataset, by its names: inputs and outputs of the policy, padding, the task."""
    original = {new: old for old, new in source.config.rename_map.items()}
    keys = [original.get(key, key) for key in (*policy.config.input_features, *policy.config.output_features)]
    return keys + [f"{key}_is_pad" for key in keys] + text_keys(policy)


def training_keys(policy: FunctionalPolicy, source: Source) -> list[str]:
    """List what a batch needs in training: with what is computed beside the dataset."""
    return [*batch_keys(policy, source), *source.settings["added_columns"]]


def training_samples(
    config: TrainConfig,
    sources: Sequence[Source],
    policies: Sequence[FunctionalPolicy],
    whole: jax.sharding.Sharding,
    split: jax.sharding.NamedSharding,
) -> Samples:
    """Give the samples in training order; decode frames into the cache or copy them to the devices before.

    With several seeds, a batch has a leading axis: the batch of each.

    Args:
        config: the run's.
        sources: its datasets.
        policies: tell what a sample of each dataset has.
        whole: keeps a copy of an array on every device.
        split: how a batch lies on the devices.
    """
    dropped, policy = config.policy.num_dropped_frames, policies[0]
    if isinstance(stream := sources[0].data, Stream):
        (source,) = sources
        return StreamedSamples(
            stream,
            source.train_episodes,
            training_keys(policy, source),
            config.seed,
            buffer_size=config.dataset.buffer_size,
            drop_n_last_frames=dropped,
            finish=sample_finishes(config, sources, policies)[0],
            **source.settings,
        )
    seeds = [run.seed for run in config.runs]
    if _prepare_frames(config, sources):
        (source,) = sources
        keys, rows = training_keys(policy, source), source.dataset.rows_of(source.train_episodes, dropped)
        seed = seeds if len(seeds) > 1 else seeds[0]
        tokenize = make_tokenize(policy, is_mixture=False)
        return DeviceRows(source.dataset, rows, keys, seed, whole, split, tokenize)
    orders = [_host_samples(config, sources, policies, seed) for seed in seeds]
    return SeedSamples(orders) if len(seeds) > 1 else orders[0]


def _host_samples(
    config: TrainConfig, sources: Sequence[Source], policies: Sequence[FunctionalPolicy], seed: int
) -> Samples:
    """Give the samples in the order of a seed, read on the host."""
    parts: list[Samples] = []
    finishes = sample_finishes(config, sources, policies)
    for i, (source, policy, finish) in enumerate(zip(sources, policies, finishes, strict=True)):
        rows = source.dataset.rows_of(source.train_episodes, config.policy.num_dropped_frames)
        keys = training_keys(policy, source)
        parts.append(ShuffledRows(source.dataset, rows, keys, seed, stream=i, finish=finish))
    if not config.dataset.mixture:
        return parts[0]
    return mixture.MixedSamples(parts, [source.config.weight for source in sources], seed)


def sample_finishes(
    config: TrainConfig, sources: Sequence[Source], policies: Sequence[FunctionalPolicy]
) -> list[Callable[[Batch], Batch]]:
    """Tell what becomes of each dataset's samples as they are read.

    In a mixture they get the policy's names and widths; tokens, if its text tells numbers of the sample.
    """
    is_mixture = bool(config.dataset.mixture)
    finishes: list[Callable[[Batch], Batch]] = []
    for source, policy in zip(sources, policies, strict=True):
        steps = [feature_map(policy.config, source, sources)] if is_mixture else []
        tokenize = make_tokenize(policy, is_mixture=is_mixture, is_plan=source.data is None)
        finishes.append(functools.partial(_apply, [*steps, *([tokenize] if tokenize else [])]))
    return finishes


def _apply(functions: Sequence[Callable[[Batch], Batch]], batch: Batch) -> Batch:
    for function in functions:
        batch = function(batch)
    return batch


def _prepare_frames(config: TrainConfig, sources: Sequence[Source]) -> bool:
    """Bring frames to where `dataset.frame_mode` wants them, and say where; tell whether that is the devices."""
    settings, mode = config.dataset, config.dataset.frame_mode
    needed = sum(device_bytes(source.dataset) for source in sources)
    memory = (jax.local_devices()[0].memory_stats() or {}).get("bytes_limit", 0)
    fits = distributed.from_first(0 < needed <= DEVICE_SHARE * memory)
    on_device = mode == "device" or (mode == "auto" and fits and not settings.mixture)
    if mode == "device" and settings.mixture:
        raise InputError("dataset.frame_mode=device works with one dataset, not with a mixture; use cache")
    if mode == "decode" or not any(source.dataset.cameras for source in sources):
        return on_device
    cached = [source.dataset.cache_frames(settings.frame_cache_gb) for source in sources]
    if mode == "cache" and not all(cached):
        raise InputError("dataset.frame_mode=cache: the frames do not fit; raise dataset.frame_cache_gb")
    place = (
        "the devices"
        if on_device
        else "the cache on disk"
        if all(cached)
        else "the videos, decoded on demand"
    )
    why = f"dataset.frame_mode={mode}"
    if mode == "auto":
        room = f"{memory / 1e9:.0f} GB of device memory" if memory else "no device memory of its own"
        why = f"{needed / 1e9:.2f} GB decoded, {room}, frame_cache_gb={settings.frame_cache_gb:g}"
    logging.info("frames come from %s (%s)", place, why)
    return on_device


def held_out_batches(
    config: TrainConfig,
    sources: Sequence[Source],
    policies: Sequence[FunctionalPolicy],
    samples: Samples,
    place: Callable[[int], BatchPlacement],
) -> dict[str, Iterator[tuple[BatchPlacement, Batch]]]:
    """Give each dataset's held-out samples, once and in order, as they come in training.

    Args:
        config: the run's.
        sources: its datasets.
        policies: tell what a sample of each dataset has.
        samples: those of training.
        place: tells where a batch of so many samples lies; this process gets what it needs of it.
    """
    found = {}
    finishes = sample_finishes(config, sources, policies)
    for i, (source, policy) in enumerate(zip(sources, policies, strict=True)):
        if isinstance(samples, StreamedSamples):
            whole = samples.validation_batches(
                source.held_out_episodes, config.batch_size, config.max_eval_samples
            )
            batches = _parts(whole, place)
        else:
            rows = source.dataset.first_rows(source.held_out_episodes, config.max_eval_samples)
            keys = batch_keys(policy, source)
            batches = loader.validation_batches(source.dataset, rows, keys, config.batch_size, place)
        found[source.name] = _finished(batches, finishes[i], i if config.dataset.mixture else None)
    return found


def _parts(
    batches: Iterator[Batch], place: Callable[[int], BatchPlacement]
) -> Iterator[tuple[BatchPlacement, Batch]]:
    """Give of whole batches what this process needs."""
    for batch in batches:
        placement = place(len(batch[ACTION]))
        rows = placement.rows
        yield (
            placement,
            {k: v[rows] if isinstance(v, np.ndarray) else [v[i] for i in rows] for k, v in batch.items()},
        )


def _finished(
    batches: Iterator[tuple[BatchPlacement, Batch]], finish: Callable[[Batch], Batch], number: int | None
) -> Iterator[tuple[BatchPlacement, Batch]]:
    for placement, batch in batches:
        marked = {} if number is None else {mixture.DATASET_INDEX: np.full(len(placement.rows), number)}
        yield placement, finish(batch) | marked
