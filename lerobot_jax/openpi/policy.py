"""A policy of LeRobot's from a checkpoint of openpi's.

A checkpoint is a folder with `params/` (Orbax) and `assets/<robot>/norm_stats.json`. The rest is in openpi's
training config, which is code, so that it must be said again: see `Settings`. What that config does to a robot's
observations and actions beyond it, such as turning joints around, is not part of the policy. openpi tidies prompts
up (spaces at the ends, underscores, line breaks); LeRobot's pi0.5 does, too, but its pi0 takes them as they are.
"""

import dataclasses
import functools
import itertools
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import ml_dtypes
import numpy as np
import tqdm

from lerobot_jax import torch_state
from lerobot_jax.certificate import make_observations
from lerobot_jax.errors import InputError
from lerobot_jax.features import ACTION, OBS_IMAGES, OBS_STATE, FeatureType, PolicyFeature
from lerobot_jax.nn.gemma import GEMMA_SIZES, GemmaSettings
from lerobot_jax.nn.paligemma import PALIGEMMA_SIZES, PaliGemmaSettings
from lerobot_jax.nn.siglip import SiglipSettings
from lerobot_jax.openpi.arrays import is_rounded_by_lerobot
from lerobot_jax.openpi.statistics import find_statistics, read_statistics
from lerobot_jax.openpi.weights import PARAMS, Weights, read_weights
from lerobot_jax.policies.base import FunctionalPolicy, make_policy
from lerobot_jax.policies.pi0 import PI0Config
from lerobot_jax.policies.pi05 import PI05Config
from lerobot_jax.processors import Pi05StatePrompt, Pipeline, SmolVLANewLine
from lerobot_jax.progress import progress_bar
from lerobot_jax.state_dict import StateDict, Tensor

ABSOLUTE = "absolute"  # the name of a joint whose actions are not relative


@dataclasses.dataclass(frozen=True)
class Settings:
    """What openpi's training config says and its checkpoints do not."""

    chunk_size: int
    """openpi's action_horizon: 50 by default, 10 in pi0_droid and pi05_libero, 15 in pi05_droid."""
    cameras: tuple[str, ...] = ("base_0_rgb", "left_wrist_0_rgb", "right_wrist_0_rgb")
    """The cameras that there are, under the names they shall have, in openpi's order."""
    norm_stats: str | None = None
    """The norm_stats.json to use; None: the only one in the checkpoint's assets."""
    state_dim: int | None = None
    """How many dimensions the robot's state has, if the statistics have more of them; None: as many."""
    action_dim: int | None = None
    """How many its action has."""
    delta_actions: tuple[int, ...] = ()
    """openpi's make_bool_mask(...) for DeltaActions: 6 -1 means six joints relative to the state, one absolute."""
    discrete_state_input: bool = True
    """Whether pi0.5 reads the state in its prompt; it does not in openpi's pi05_libero."""
    lora_scale: float | None = None
    """alpha / rank of adapters in the attention; None: 1, as in openpi's variants."""


def read_policy(
    folder: Path, settings: Settings, dtype: Literal["float32", "bfloat16"] | None = None
) -> FunctionalPolicy:
    """Read a checkpoint.

    Args:
        folder: its folder, or its `params`.
        settings: what it was trained with.
        dtype: the type of the transformers' weights; None: as stored.

    Raises:
        InputError: when the checkpoint is not what it should be, or does not suit the settings.
    """
    weights = read_weights(folder, settings.lora_scale, dtype)
    stats = _read_statistics(
        folder.parent if folder.name == PARAMS else folder, settings, weights.policy_type
    )
    widths = {feature: len(next(iter(values.values()))) for feature, values in stats.items()}
    side = math.isqrt(weights.sizes["patches"]) * weights.sizes["patch_height"]
    image = PolicyFeature(FeatureType.VISUAL, (3, side, side))
    inputs = {f"{OBS_IMAGES}.{camera}": image for camera in settings.cameras}
    named = _variants(weights) | _relative(settings.delta_actions, widths[ACTION])
    kind = PI05Config if weights.policy_type == "pi05" else PI0Config
    try:
        config = kind(
            input_features={**inputs, OBS_STATE: PolicyFeature(FeatureType.STATE, (widths[OBS_STATE],))},
            output_features={ACTION: PolicyFeature(FeatureType.ACTION, (widths[ACTION],))},
            image_resolution=(side, side),
            chunk_size=settings.chunk_size,
            n_action_steps=settings.chunk_size,
            max_state_dim=weights.sizes["action_dim"],
            max_action_dim=weights.sizes["action_dim"],
            dtype="bfloat16" if _is_rounded(weights.state) else "float32",
            **named,
        )
    except ValueError as error:
        raise InputError(f"{folder}: {error}") from None
    policy = make_policy(
        config, stats, target_stats=stats[ACTION] if config.action_target.is_transformed else None
    )
    if not settings.discrete_state_input:
        policy = policy.replace(preprocessor=_without_state_in_prompt(policy.preprocessor))
    # Before the weights are read, which takes minutes, the tokenizer must be there.
    policy.tokenize(make_observations(policy))
    with progress_bar("reading", len(weights.state), "array") as bar:
        params, buffers = torch_state.from_torch(policy.module, _counted(weights.state, bar))
    return policy.replace(params=params, buffers=buffers)


def _is_rounded(state: StateDict) -> bool:
    """Tell whether all weights are bfloat16 that are in LeRobot's policies of that type."""
    return all(
        t.dtype == ml_dtypes.bfloat16 for key, t in state.tensors.items() if is_rounded_by_lerobot(key)
    )


def _counted(state: StateDict, bar: tqdm.tqdm) -> StateDict:
    """Give the same arrays, each of which moves a progress bar when it is read."""

    def read(tensor: Tensor) -> np.ndarray:
        array = tensor.read()
        bar.update()
        return array

    tensors = {key: t._replace(read=functools.partial(read, t)) for key, t in state.tensors.items()}
    return StateDict(tensors, state.metadata, state.source)


def _read_statistics(folder: Path, settings: Settings, policy_type: str) -> dict[str, dict[str, np.ndarray]]:
    path = find_statistics(folder) if settings.norm_stats is None else Path(settings.norm_stats)
    stats = read_statistics(path, policy_type)
    for feature, name in ((OBS_STATE, "state_dim"), (ACTION, "action_dim")):
        wanted, there = getattr(settings, name), len(next(iter(stats[feature].values())))
        if wanted is not None and not 1 <= wanted <= there:
            raise InputError(
                f"{name} must be from 1 to {there}, as there are statistics in {path}; not {wanted}"
            )
        stats[feature] = {statistic: values[:wanted] for statistic, values in stats[feature].items()}
    return stats


def _variants(weights: Weights) -> dict[str, Any]:
    """Give LeRobot's names for the sizes of the transformers."""
    sizes = weights.sizes
    shared = {"depth": sizes["depth"], "num_heads": sizes["heads"], "head_dim": sizes["head_dim"]}
    text = GemmaSettings(width=sizes["width"], mlp_dim=sizes["mlp_dim"], **shared)
    expert = GemmaSettings(width=sizes["expert_width"], mlp_dim=sizes["expert_mlp_dim"], **shared)
    vision = SiglipSettings(
        hidden_size=sizes["vision_width"],
        intermediate_size=sizes["vision_mlp_dim"],
        num_hidden_layers=sizes["vision_depth"],
        num_attention_heads=sizes["vision_heads"],
        patch_size=sizes["patch_height"],
    )
    whole = PaliGemmaSettings(text, vision, sizes["vocab"])
    return {
        "paligemma_variant": _name(whole, PALIGEMMA_SIZES, weights),
        "action_expert_variant": _name(expert, GEMMA_SIZES, weights),
    }


def _name(sizes: Any, known: Mapping[str, Any], weights: Weights) -> str:
    for name, others in known.items():
        if others == sizes:
            return name
    raise InputError(f"{weights.state.source} has {sizes}, which is none of LeRobot's {', '.join(known)}")


def _relative(delta_actions: Sequence[int], width: int) -> dict[str, Any]:
    """Give the settings that make the joints of openpi's mask relative: LeRobot excludes joints by their names."""
    moving = list(itertools.chain(*([n > 0] * abs(n) for n in delta_actions)))
    if len(moving) > width:
        raise InputError(f"delta_actions tell of {len(moving)} joints, but the action has {width}")
    if not any(moving):
        return {}
    moving += [False] * (width - len(moving))
    return {
        "use_relative_actions": True,
        "relative_exclude_joints": (ABSOLUTE,),
        "action_feature_names": tuple(f"{'joint' if m else ABSOLUTE}_{i}" for i, m in enumerate(moving)),
    }


def _without_state_in_prompt(preprocessor: Pipeline) -> Pipeline:
    """Let the prompt be the task and a new line, as pi0's is.

    The step is that of SmolVLA, which does the same as pi0's: stock LeRobot knows it whatever policy it loads.
    """
    steps = tuple(SmolVLANewLine() if isinstance(s, Pi05StatePrompt) else s for s in preprocessor.steps)
    return dataclasses.replace(preprocessor, steps=steps)
