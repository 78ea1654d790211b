"""What a policy sees and does, and how it fits to the datasets that it is trained on."""

from collections.abc import Sequence
from typing import TYPE_CHECKING

from absl import logging

from lerobot_jax.config import TrainConfig
from lerobot_jax.data import mixture
from lerobot_jax.errors import InputError
from lerobot_jax.features import FeatureType, PolicyFeature
from lerobot_jax.policies.config import PolicyConfig
from lerobot_jax.transforms import check_sizes, final_size

if TYPE_CHECKING:
    from lerobot_jax.training_data import Source

Features = dict[str, PolicyFeature]


def policy_features(config: TrainConfig, sources: Sequence["Source"]) -> tuple[Features, Features]:
    """Give the policy's inputs and outputs: its own, or what the datasets have; vectors as wide as the widest.

    Of a policy that pads vectors, they are as wide as the datasets', whatever robots it has seen before.
    """
    offered: Features = {}
    chosen = {**config.policy.input_features, **config.policy.output_features}
    for source in sources:
        for key, feature in source.features.items():
            if config.policy.input_features and config.policy.output_features and key not in chosen:
                continue
            other = offered.setdefault(key, feature)
            if len(feature.shape) == 1 and other.type == feature.type:
                offered[key] = max(feature, other, key=lambda f: f.shape)
            elif other != feature:
                raise InputError(
                    f"dataset.mixture: '{key}' is {feature.shape} in {source.name}, {other.shape} in another "
                    "dataset; dataset.image_size can make images equal"
                )
    found_outputs = {k: f for k, f in offered.items() if f.type == FeatureType.ACTION}
    outputs = config.policy.output_features or found_outputs
    inputs = config.policy.input_features or {k: f for k, f in offered.items() if k not in found_outputs}
    inputs = {**inputs, **config.policy.added_inputs}
    if config.policy.pads_vectors:
        inputs, outputs = (_as_wide_as(offered, features) for features in (inputs, outputs))
    for name, features in (("input", inputs), ("output", outputs)):
        for key, feature in features.items():
            for source in sources:
                where = f"policy.{name}_features"
                _check_offered(where, key, feature, source, config.policy, padded=len(sources) > 1)
    return inputs, outputs


def _as_wide_as(offered: Features, features: Features) -> Features:
    return {
        key: offered[key] if len(feature.shape) == 1 and key in offered else feature
        for key, feature in features.items()
    }


def check_cameras(config: TrainConfig, source: "Source", policy: PolicyConfig) -> None:
    """Check a dataset's cameras, and the sizes that image transforms make of their frames.

    Args:
        config: the run's.
        source: the dataset.
        policy: the settings, with features.
    """
    wanted = {key: feature.shape[1:] for key, feature in policy.image_features.items()}
    given = {key: source.features[key].shape[1:] for key in wanted if key in source.features}
    if wanted and not given:
        raise InputError(
            f"{source.name}: has none of the cameras {sorted(wanted)}, only {source.meta.camera_keys}; "
            "rename_map can rename"
        )
    if policy.optional_cameras:
        policy.log_missing_cameras(source.name, given)
    elif len(given) < len(wanted):
        logging.warning("%s: lacks %s, which will be black", source.name, sorted(set(wanted) - set(given)))
    transforms = config.dataset.image_transforms
    if transforms.enable and config.dataset.image_size is None and not policy.resizes_images:
        check_sizes(transforms, given, {key: wanted[key] for key in given})
    elif transforms.enable:  # the policy resizes
        for key, size in given.items():
            final_size(transforms, key, *size)


def _check_offered(
    where: str, key: str, wanted: PolicyFeature, source: "Source", policy: PolicyConfig, *, padded: bool
) -> None:
    has = source.features.get(key)
    if has == wanted:
        return
    if has is None and wanted.type == FeatureType.VISUAL and (padded or policy.optional_cameras):
        return
    if (
        policy.resizes_images
        and has is not None
        and has.type == wanted.type == FeatureType.VISUAL
        and has.shape[0] == wanted.shape[0]
    ):
        return
    if (
        padded
        and has is not None
        and has.type == wanted.type
        and len(has.shape) == 1
        and has.shape <= wanted.shape
    ):
        return
    found = f"in shape {has.shape}" if has else f"only {sorted(source.features)}"
    raise InputError(
        f"{where}: '{key}' of shape {wanted.shape} is needed, dataset {source.name} has it {found}; "
        "rename_map can rename"
    )


def feature_map(policy: PolicyConfig, source: "Source", sources: Sequence["Source"]) -> mixture.FeatureMap:
    """Tell how a dataset's samples become the policy's, in a mixture with others.

    Images are as large as the datasets have them; optional cameras that no dataset has are left out.
    """
    rename = source.config.rename_map
    shown = {key: f for each in sources for key, f in each.features.items() if f.type == FeatureType.VISUAL}
    features = {
        key: shown.get(key, feature)
        for key, feature in {**policy.input_features, **policy.output_features}.items()
        if feature.type != FeatureType.VISUAL or key in shown or not policy.optional_cameras
    }
    deltas: dict[str, list[float]] = source.settings["delta_timestamps"]
    steps = {rename.get(key, key): len(delta) for key, delta in deltas.items()}
    if (indices := policy.observation_delta_indices) is not None:
        steps |= dict.fromkeys(policy.image_features, len(indices))
    return mixture.FeatureMap(features, steps, rename)
