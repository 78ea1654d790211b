"""LeRobot's names: batch keys, feature types, normalization modes, policy features.

A batch is a plain dict with these keys (leading axes `b`, and `t` where a policy asks for several steps):

| key                             | value                                                                 |
|---------------------------------|-----------------------------------------------------------------------|
| `observation.state`             | float32 `b [t] state`, the robot's own joints or position              |
| `observation.environment_state` | float32 `b [t] env`, what a simulator tells about the scene            |
| `observation.image[s.<camera>]` | uint8 `b [t] h w c` until it is on the device, then float32 in 0..1    |
| `action`                        | float32 `b chunk act`                                                  |
| `<key>_is_pad`                  | bool `b t`, True where the step lies outside the episode               |
| `task`                          | list of str, what the robot should do                                  |
| `timestamp`, `frame_index`, `episode_index`, `index`, `task_index` | scalars `b` that say where a sample is from |

Mirrors `lerobot.configs.types`, `lerobot.utils.constants` and `lerobot.utils.feature_utils`.
"""

import dataclasses
import enum
from collections.abc import Mapping
from typing import Any

ACTION = "action"
ACTION_IS_PAD = "action_is_pad"
OBS_PREFIX = "observation."
OBS_STATE = "observation.state"
OBS_ENV_STATE = "observation.environment_state"
OBS_IMAGE = "observation.image"
OBS_IMAGES = "observation.images"
EMPTY_CAMERA = "observation.images.empty_camera_"  # and a number: a camera that is never there
REWARD = "next.reward"
DONE = "next.done"
SUCCESS = "next.success"
TASK = "task"
TASK_INDEX = "task_index"


class FeatureType(enum.StrEnum):
    STATE = "STATE"
    VISUAL = "VISUAL"
    ENV = "ENV"
    ACTION = "ACTION"
    REWARD = "REWARD"
    LANGUAGE = "LANGUAGE"


class NormalizationMode(enum.StrEnum):
    MIN_MAX = "MIN_MAX"
    MEAN_STD = "MEAN_STD"
    IDENTITY = "IDENTITY"
    QUANTILES = "QUANTILES"
    QUANTILE10 = "QUANTILE10"


@dataclasses.dataclass(frozen=True)
class PolicyFeature:
    """One input or output of a policy: its type and shape; images are `(channels, height, width)`."""

    type: FeatureType
    shape: tuple[int, ...]

    def to_dict(self) -> dict[str, Any]:
        return {"type": self.type.value, "shape": list(self.shape)}

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> "PolicyFeature":
        return cls(FeatureType(data["type"]), tuple(data["shape"]))


def dataset_to_policy_features(features: Mapping[str, Mapping[str, Any]]) -> dict[str, PolicyFeature]:
    """Tell a policy's inputs and outputs from a dataset's features; the rest (rewards, indices) is left out.

    Images are channel-last in a dataset and channel-first here, as in LeRobot's config.json.
    """
    policy_features = {}
    for key, feature in features.items():
        shape = tuple(feature["shape"])
        if feature["dtype"] in ("image", "video"):
            if len(shape) != 3:
                raise ValueError(f"{key}: an image has 3 dimensions, its declared shape is {shape}")
            if feature["names"][2] in ("channel", "channels"):
                shape = (shape[2], shape[0], shape[1])
            policy_features[key] = PolicyFeature(FeatureType.VISUAL, shape)
        elif key == OBS_ENV_STATE:
            policy_features[key] = PolicyFeature(FeatureType.ENV, shape)
        elif key.startswith("observation"):
            policy_features[key] = PolicyFeature(FeatureType.STATE, shape)
        elif key.startswith(ACTION):
            policy_features[key] = PolicyFeature(FeatureType.ACTION, shape)
    return policy_features
