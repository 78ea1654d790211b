"""Policies from before LeRobot's processors, whose normalization sits in model.safetensors.

Such a folder has no `policy_preprocessor.json`; the statistics are buffers of the model, named after the features
(`normalize_inputs.buffer_observation_state.mean`). Mirrors `lerobot.processor.migrate_policy_normalization`, with
differences where LeRobot's script would lose a normalization in silence: features are found by the names in
config.json, so that underscores in camera names and `observation.environment_state` are understood; and what cannot
be told is an error.
"""

import dataclasses
import re
from pathlib import Path

import numpy as np

from lerobot_jax import processors, state_dict
from lerobot_jax.errors import InputError
from lerobot_jax.features import NormalizationMode
from lerobot_jax.policies.config import PolicyConfig, read_config
from lerobot_jax.state_dict import StateDict

_NORMALIZATION = re.compile(
    r"(?:(?:un)?normalize(?:_inputs|_targets|_outputs)?|(?:input|output)_normalizer)"
    r"\.(?:buffer_)?(?P<feature>[\w.]+)\.(?P<name>\w+)"
)
Stats = dict[str, dict[str, np.ndarray]]


def is_old(folder: Path) -> bool:
    """Tell whether a policy's folder is from before LeRobot's processors."""
    if (folder / f"{processors.PREPROCESSOR_NAME}.json").exists():
        return False
    return any(_NORMALIZATION.fullmatch(key) for key in state_dict.read(folder))


def migrate(
    folder: Path, config: PolicyConfig
) -> tuple[PolicyConfig, processors.Pipeline, processors.Pipeline, StateDict]:
    """Split an old policy into what LeRobot keeps today: config, processors, weights without normalization.

    Args:
        folder: the policy's folder.
        config: its config.json.

    Raises:
        InputError: when statistics are missing, belong to no feature, were never set, or contradict each other.
    """
    state = state_dict.read(folder)
    stats = _read_stats(state, config)
    modes = dict(config.normalization_mapping) if "normalization_mapping" in read_config(folder) else {}
    modes = _infer_modes(config, stats) | modes
    config = dataclasses.replace(config, normalization_mapping=modes)
    pre, post = processors.default_pipelines(
        config.input_features, config.output_features, modes, stats, config.device or "cpu"
    )
    # torch.compile puts `_orig_mod` into names.
    names = {key: key.replace("._orig_mod", "") for key in state if not _NORMALIZATION.fullmatch(key)}
    return config, pre, post, state.renamed(names)


def _read_stats(state: StateDict, config: PolicyConfig) -> Stats:
    features = {key.replace(".", "_"): key for key in {**config.input_features, **config.output_features}}
    stats: Stats = {}
    for key in sorted(state):
        match = _NORMALIZATION.fullmatch(key)
        if match is None:
            continue
        feature = features.get(match["feature"].replace(".", "_"))
        if feature is None:
            raise InputError(
                f"{state.source}: {key} is a statistic of none of {', '.join(features.values())}"
            )
        value, known = state[key], stats.setdefault(feature, {})
        if not np.isfinite(value).all():
            raise InputError(
                f"{state.source}: {key} is not finite: the statistics of this policy were never set"
            )
        if not np.array_equal(known.setdefault(match["name"], value), value):
            raise InputError(f"{state.source}: {key} contradicts the same statistic under another name")
    return stats


def _infer_modes(config: PolicyConfig, stats: Stats) -> dict[str, NormalizationMode]:
    """Tell how each type of feature was normalized from which statistics there are, as LeRobot does."""
    modes = {}
    for key, feature in {**config.input_features, **config.output_features}.items():
        if key in stats:
            has_mean = {"mean", "std"} <= set(stats[key])
            modes[feature.type.value] = NormalizationMode.MEAN_STD if has_mean else NormalizationMode.MIN_MAX
    return modes
