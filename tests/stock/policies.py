"""Policies of ours with random weights and statistics, for tests with stock LeRobot."""

import dataclasses
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np

from lerobot_jax import torch_state
from lerobot_jax.features import FeatureType, PolicyFeature
from lerobot_jax.policies.base import FunctionalPolicy, load_pretrained_parts, make_policy
from lerobot_jax.policies.config import PolicyConfig
from tests.stock.conftest import Peer


def new_policy(
    config: PolicyConfig, action: int, stats: Mapping[str, Mapping[str, np.ndarray]] | None = None
) -> FunctionalPolicy:
    """Initialize a policy whose action has so many dimensions; statistics that are not given are random."""
    changes: dict[str, Any] = {"device": "cpu"}
    if hasattr(config, "pretrained_backbone_weights"):
        changes["pretrained_backbone_weights"] = None
    changes["output_features"] = {"action": PolicyFeature(FeatureType.ACTION, (action,))}
    config = dataclasses.replace(config, **changes)
    rng = np.random.default_rng(1)
    drawn = {}
    for key, feature in {**config.input_features, **config.output_features}.items():
        shape = (3, 1, 1) if feature.type == FeatureType.VISUAL else feature.shape
        low = rng.normal(0, 1, shape).astype(np.float32)
        drawn[key] = {"mean": low, "std": np.abs(low) + 0.5, "min": low - 1, "max": low + 2}
        drawn[key] |= {"q01": low - 0.8, "q99": low + 1.7}
    given = drawn | dict(stats or {})
    target_stats = given["action"] if config.action_target.is_transformed else None
    policy = make_policy(config, given, target_stats=target_stats)
    params, buffers = load_pretrained_parts(policy, *policy.init(jax.random.key(0)))
    return policy.replace(params=params, buffers=buffers)


def assert_starts_like_stock(stock: Peer, policy: FunctionalPolicy, folder: Path) -> None:
    """Every parameter that is used is drawn from the same distribution: equal spread, up to sampling error."""
    ours = torch_state.to_torch(policy.module, policy.params, policy.buffers)
    theirs = stock("initialize", config=policy.config.to_dict(), folder=folder)
    assert set(ours) == set(theirs)
    for key, (mean, std, largest) in theirs.items():
        if re.fullmatch(r"model\.paligemma_with_expert\..*lm_head\.weight", key):  # pi0 does not use it
            continue
        value = ours[key]
        error = 6 / np.sqrt(value.size)
        scale = max(std, largest / 3)
        assert abs(value.mean() - mean) <= error * scale + 1e-6, key
        assert abs(value.std() - std) <= error * scale + 1e-6, key
        if value.size > 20:  # of a few draws, the largest says nothing
            assert np.abs(value).max() <= 1.5 * largest + 1e-6, key
