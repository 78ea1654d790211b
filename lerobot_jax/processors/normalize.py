"""Normalization by a dataset's statistics. Mirrors `lerobot.processor.normalize_processor`.

One difference, on purpose: where LeRobot passes a feature through when its statistics are missing, this is an
error that names the feature.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any, ClassVar

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from lerobot_jax.errors import InputError
from lerobot_jax.features import ACTION, FeatureType, NormalizationMode, PolicyFeature
from lerobot_jax.processors.steps import Batch, State, Step

# Which statistics a mode needs: (subtracted, and what the scale is made of)
NEEDED = {
    NormalizationMode.MEAN_STD: ("mean", "std"),
    NormalizationMode.MIN_MAX: ("min", "max"),
    NormalizationMode.QUANTILES: ("q01", "q99"),
    NormalizationMode.QUANTILE10: ("q10", "q90"),
}


@dataclasses.dataclass(frozen=True, eq=False)
class _Normalization(Step):
    """Settings and statistics that normalizing and its inverse share."""

    features: Mapping[str, PolicyFeature]
    norm_map: Mapping[FeatureType, NormalizationMode]
    stats: Mapping[str, Mapping[str, np.ndarray]]
    eps: float = 1e-8
    normalize_observation_keys: tuple[str, ...] | None = None

    def __post_init__(self):
        for key in self.features:
            missing = [name for name in NEEDED.get(self.mode(key), ()) if name not in self.stats.get(key, {})]
            if missing:
                kind = self.features[key].type
                raise InputError(
                    f"'{key}' is to be normalized with {self.mode(key)}, but its statistics {missing} are missing; "
                    f"give them in the dataset's stats.json, or set normalization_mapping.{kind} to IDENTITY"
                )

    def mode(self, key: str) -> NormalizationMode:
        """Tell how a feature is normalized."""
        return self.norm_map.get(self.features[key].type, NormalizationMode.IDENTITY)

    def _scale_and_offset(self, key: str, ndim: int) -> tuple[np.ndarray, np.ndarray]:
        low, high = (np.asarray(self.stats[key][name], np.float32) for name in NEEDED[self.mode(key)])
        if self.features[key].type == FeatureType.VISUAL:  # stored (c, 1, 1), used channel-last
            low, high = low.reshape(-1), high.reshape(-1)
        low, high = (x.reshape((1,) * (ndim - x.ndim) + x.shape) for x in (low, high))
        if self.mode(key) == NormalizationMode.MEAN_STD:
            return high, low
        span = high - low
        return np.where(span == 0, np.float32(self.eps), span), low

    def _normalize(self, key: str, value: Float[Array, "..."]) -> Float[Array, "..."]:
        if self.mode(key) == NormalizationMode.IDENTITY:
            return value
        scale, offset = self._scale_and_offset(key, value.ndim)
        if self.mode(key) == NormalizationMode.MEAN_STD:
            return (value - offset) / (scale + np.float32(self.eps))
        return 2 * (value - offset) / scale - 1

    def _unnormalize(self, key: str, value: Float[Array, "..."]) -> Float[Array, "..."]:
        if self.mode(key) == NormalizationMode.IDENTITY:
            return value
        scale, offset = self._scale_and_offset(key, value.ndim)
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
        stats: dict[str, dict[str, np.ndarray]] = {}
        for flat_key, value in state.items():
            key, name = flat_key.rsplit(".", 1)
            stats.setdefault(key, {})[name] = value
        settings = dict(config)
        settings["features"] = {key: PolicyFeature.from_dict(f) for key, f in config["features"].items()}
        settings["norm_map"] = {FeatureType(k): NormalizationMode(m) for k, m in config["norm_map"].items()}
        keys = config.get("normalize_observation_keys")
        settings["normalize_observation_keys"] = None if keys is None else tuple(keys)
        return cls(stats=stats, **settings)

    @property
    def state(self) -> State:
        return {
            f"{key}.{name}": np.asarray(value, np.float32)
            for key, values in self.stats.items()
            for name, value in values.items()
        }

    def _applies_to(self, key: str) -> bool:
        kept = self.normalize_observation_keys
        return key in self.features and (kept is None or key == ACTION or key in kept)


@dataclasses.dataclass(frozen=True, eq=False)
class Normalizer(_Normalization):
    """Scales observations and actions for the policy."""

    registry_name: ClassVar[str] = "normalizer_processor"

    def __call__(self, batch: Batch) -> Batch:
        return {
            key: self._normalize(key, jnp.asarray(value)) if self._applies_to(key) else value
            for key, value in batch.items()
        }


@dataclasses.dataclass(frozen=True, eq=False)
class Unnormalizer(_Normalization):
    """Scales the policy's actions back."""

    registry_name: ClassVar[str] = "unnormalizer_processor"

    def __call__(self, batch: Batch) -> Batch:
        return {
            key: self._unnormalize(key, jnp.asarray(value)) if self._applies_to(key) else value
            for key, value in batch.items()
        }
