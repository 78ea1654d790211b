"""Normalization by a dataset's statistics. Mirrors `lerobot.processor.normalize_processor`.

One difference, on purpose: where LeRobot passes a feature through when its statistics are missing, this is an
error that names the feature.
"""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Shaped

from lerobot_jax.errors import InputError
from lerobot_jax.features import ACTION, FeatureType, NormalizationMode, PolicyFeature
from lerobot_jax.processors.steps import Batch, State, Step
from lerobot_jax.settings import check_settings

Stats = Mapping[str, Mapping[str, np.ndarray]]
Numbers = Shaped[Array | np.ndarray, "..."]

# Which statistics a mode needs: (subtracted, and what the scale is made of)
NEEDED = {
    NormalizationMode.MEAN_STD: ("mean", "std"),
    NormalizationMode.MIN_MAX: ("min", "max"),
    NormalizationMode.QUANTILES: ("q01", "q99"),
    NormalizationMode.QUANTILE10: ("q10", "q90"),
}
# The types of the settings in a JSON file.
SETTINGS = {
    "eps": float,
    "features": Mapping[str, Mapping[str, Any]],
    "norm_map": Mapping[str, str],
    "normalize_observation_keys": Sequence[str] | None,
}


@dataclasses.dataclass(frozen=True, eq=False)
class _Normalization(Step):
    """Settings and statistics that normalizing and its inverse share."""

    features: Mapping[str, PolicyFeature]
    norm_map: Mapping[FeatureType, NormalizationMode]
    stats: Stats
    eps: float = 1e-8
    normalize_observation_keys: tuple[str, ...] | None = None

    def mode(self, key: str) -> NormalizationMode:
        """Tell how an entry of a batch is normalized; the action is, even when it is no declared feature."""
        if key == ACTION:
            return self.norm_map.get(FeatureType.ACTION, NormalizationMode.IDENTITY)
        feature, kept = self.features.get(key), self.normalize_observation_keys
        if feature is None or feature.type == FeatureType.ACTION or (kept is not None and key not in kept):
            return NormalizationMode.IDENTITY
        return self.norm_map.get(feature.type, NormalizationMode.IDENTITY)

    def _scaled_keys(self, batch: Batch) -> list[str]:
        return [key for key in batch if self.mode(key) != NormalizationMode.IDENTITY]

    def check_statistics(self) -> None:
        """Raise `InputError` naming a feature whose statistics are missing."""
        for key in self.features:
            self._needed_statistics(key)

    def _needed_statistics(self, key: str) -> list[np.ndarray]:
        needed = NEEDED.get(self.mode(key), ())
        missing = [name for name in needed if name not in self.stats.get(key, {})]
        if missing:
            kind = FeatureType.ACTION if key == ACTION else self.features[key].type
            raise InputError(
                f"'{key}' is to be normalized with {self.mode(key)}, but its statistics {missing} are missing; "
                f"give them in the dataset's stats.json, or set normalization_mapping.{kind} to IDENTITY"
            )
        return [np.asarray(self.stats[key][name], np.float32) for name in needed]

    def _scale_and_offset(self, key: str, value: Numbers) -> tuple[np.ndarray, np.ndarray]:
        low, high = (x.astype(_computed_dtype(value)) for x in self._needed_statistics(key))
        if key == ACTION and low.ndim == 2 and len(low) > 1 and value.shape[1:] != low.shape:
            raise InputError(
                f"'{key}' has statistics for each step of a chunk, so it must be of shape (b, {len(low)}, "
                f"{low.shape[1]}), not {value.shape}"
            )
        if key in self.features and self.features[key].type == FeatureType.VISUAL and low.ndim == 3:
            low, high = (
                np.moveaxis(low, 0, -1),
                np.moveaxis(high, 0, -1),
            )  # stored (c, 1, 1), used channel-last
        low, high = (x.reshape((1,) * (value.ndim - x.ndim) + x.shape) for x in (low, high))
        if self.mode(key) == NormalizationMode.MEAN_STD:
            return high, low
        span = high - low
        return np.where(span == 0, low.dtype.type(self.eps), span), low

    def _normalize(self, key: str, value: Numbers) -> Numbers:
        scale, offset = self._scale_and_offset(key, value)
        if self.mode(key) == NormalizationMode.MEAN_STD:
            return (value - offset) / (scale + scale.dtype.type(self.eps))
        return 2 * (value - offset) / scale - 1

    def _unnormalize(self, key: str, value: Numbers) -> Numbers:
        scale, offset = self._scale_and_offset(key, value)
        if self.mode(key) == NormalizationMode.MEAN_STD:
            return value * scale + offset
        return (value + 1) / 2 * scale + offset

    def to_config(self) -> dict[str, Any]:
        config: dict[str, Any] = {
            "eps": self.eps,
            "features": {key: feature.to_dict() for key, feature in self.features.items()},
            "norm_map": {kind.value: mode.value for kind, mode in self.norm_map.items()},
        }
        if self.normalize_observation_keys is not None:
            config["normalize_observation_keys"] = sorted(self.normalize_observation_keys)
        return config

    @classmethod
    def from_config(cls, config: Mapping[str, Any], state: State) -> "_Normalization":
        check_settings(config, SETTINGS)
        if not {"features", "norm_map"} <= set(config):
            raise InputError("'features' and 'norm_map' are needed")
        stats: dict[str, dict[str, np.ndarray]] = {}
        for flat_key, value in state.items():
            key, dot, name = flat_key.rpartition(".")
            if not dot:
                raise InputError(f"its state file has '{flat_key}', which is not FEATURE.STATISTIC")
            stats.setdefault(key, {})[name] = value
        settings = dict(config)
        settings["features"] = {key: _read_feature(key, f) for key, f in config["features"].items()}
        settings["norm_map"] = {FeatureType(k): NormalizationMode(m) for k, m in config["norm_map"].items()}
        keys = config.get("normalize_observation_keys")
        settings["normalize_observation_keys"] = None if keys is None else tuple(keys)
        return cls(stats=stats, **settings)

    @property
    def state(self) -> State:
        return {
            f"{key}.{name}": np.asarray(value)
            for key, values in self.stats.items()
            for name, value in values.items()
        }


@dataclasses.dataclass(frozen=True, eq=False)
class Normalizer(_Normalization):
    """Scales observations and actions for the policy."""

    registry_name: ClassVar[str] = "normalizer_processor"

    def __call__(self, batch: Batch) -> Batch:
        return batch | {key: self._normalize(key, batch[key]) for key in self._scaled_keys(batch)}


@dataclasses.dataclass(frozen=True, eq=False)
class Unnormalizer(_Normalization):
    """Scales the policy's actions back."""

    registry_name: ClassVar[str] = "unnormalizer_processor"

    def __call__(self, batch: Batch) -> Batch:
        return batch | {key: self._unnormalize(key, batch[key]) for key in self._scaled_keys(batch)}


@dataclasses.dataclass(frozen=True, eq=False)
class PerStepNormalizer(Normalizer):
    """A normalizer whose statistics of the action are (chunk, act). Its name keeps stock LeRobot from loading it:
    its `select_action` would scale each single action of a chunk with the statistics of all steps."""

    registry_name: ClassVar[str] = "lerobot_jax_per_step_normalizer"


@dataclasses.dataclass(frozen=True, eq=False)
class PerStepUnnormalizer(Unnormalizer):
    """Undoes `PerStepNormalizer`."""

    registry_name: ClassVar[str] = "lerobot_jax_per_step_unnormalizer"


def make_normalizers(
    inputs: Mapping[str, PolicyFeature],
    outputs: Mapping[str, PolicyFeature],
    normalization: Mapping[str, NormalizationMode],
    stats: Stats,
    per_step: bool = False,
) -> tuple[Normalizer, Unnormalizer]:
    """Build a new policy's normalizer and unnormalizer from a dataset's statistics.

    Args:
        inputs: what the policy sees.
        outputs: what it predicts.
        normalization: feature type -> how it is normalized.
        stats: feature -> its statistics.
        per_step: whether those of the action are (chunk, act) instead of (act).

    Raises:
        InputError: naming a feature whose statistics are missing.
    """
    features = {**inputs, **outputs}
    norm_map = {FeatureType(kind): NormalizationMode(mode) for kind, mode in normalization.items()}
    kinds = (PerStepNormalizer, PerStepUnnormalizer) if per_step else (Normalizer, Unnormalizer)
    normalizer = kinds[0](features, norm_map, _stored(features, stats))
    unnormalizer = kinds[1](outputs, norm_map, _stored(outputs, stats))
    normalizer.check_statistics()
    unnormalizer.check_statistics()
    return normalizer, unnormalizer


def _stored(features: Mapping[str, PolicyFeature], stats: Stats) -> Stats:
    """Give statistics as LeRobot stores them: float32; of an image among the features, c becomes (c, 1, 1)."""

    def store(key: str, statistic: np.ndarray) -> np.ndarray:
        array = np.asarray(statistic, np.float32)
        is_image = key in features and features[key].type == FeatureType.VISUAL
        return array.reshape(-1, 1, 1) if is_image and array.ndim == 1 else array

    return {key: {name: store(key, x) for name, x in values.items()} for key, values in stats.items()}


def _read_feature(key: str, described: Mapping[str, Any]) -> PolicyFeature:
    wanted = {"type": str, "shape": Sequence[int]}
    try:
        check_settings(described, wanted)
    except InputError as error:
        raise InputError(f"features: '{key}': {error}") from None
    if set(described) != set(wanted):
        raise InputError(f"features: '{key}' must have a type and a shape, it has {sorted(described)}")
    return PolicyFeature.from_dict(described)


def _computed_dtype(value: Any) -> Any:
    """Give the type in which a value is scaled: its own, as LeRobot does; float32 for integers."""
    return value.dtype if jnp.issubdtype(value.dtype, jnp.floating) else np.float32
