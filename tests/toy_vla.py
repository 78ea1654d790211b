"""A policy that is told its state, takes images of any size and does without cameras; small, for tests."""

import dataclasses
from collections.abc import Mapping
from typing import Any, ClassVar

import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, PRNGKeyArray

from lerobot_jax.features import (
    ACTION,
    EMPTY_CAMERA,
    OBS_STATE,
    FeatureType,
    NormalizationMode,
    PolicyFeature,
)
from lerobot_jax.nn.linear import Embedding, Linear
from lerobot_jax.policies.base import Batch, Metrics
from lerobot_jax.policies.base import Policy as BasePolicy
from lerobot_jax.policies.config import PolicyConfig
from lerobot_jax.processors import (
    OBS_LANGUAGE_ATTENTION_MASK,
    OBS_LANGUAGE_TOKENS,
    Pi05StatePrompt,
    RelativeActions,
    TokenizeTask,
)
from lerobot_jax.processors.text import TextStep

TOP, SIDE = "observation.images.top", "observation.images.side"
VOCABULARY = 400


def _quantiles() -> dict[str, NormalizationMode]:
    return dict.fromkeys(("STATE", "ACTION"), NormalizationMode.QUANTILES) | {
        "VISUAL": NormalizationMode.IDENTITY
    }


@dataclasses.dataclass(frozen=True)
class Config(PolicyConfig):
    """Settings."""

    type: ClassVar[str] = "tests.toy_vla"
    chunk_size: int = 4
    n_action_steps: int = 2
    empty_cameras: int = 0
    normalization_mapping: dict[str, NormalizationMode] = dataclasses.field(
        default_factory=_quantiles, hash=False
    )

    @property
    def observation_delta_indices(self) -> None:
        return None

    @property
    def action_delta_indices(self) -> list[int]:
        return list(range(self.chunk_size))

    @property
    def text_steps(self) -> tuple[TextStep, ...]:
        name = "google/paligemma-3b-pt-224"
        return Pi05StatePrompt(), TokenizeTask(tokenizer_name=name, max_length=40)

    @property
    def disabled_relative_step(self) -> RelativeActions:
        return RelativeActions()

    @property
    def resizes_images(self) -> bool:
        return True

    @property
    def optional_cameras(self) -> bool:
        return True

    @property
    def added_inputs(self) -> dict[str, PolicyFeature]:
        camera = PolicyFeature(FeatureType.VISUAL, (3, 16, 16))
        return {f"{EMPTY_CAMERA}{i}": camera for i in range(self.empty_cameras)}

    @property
    def optimizer_preset(self) -> Mapping[str, Any]:
        return {"type": "adamw", "lr": 1e-2}

    def check_features(self) -> None: ...

    @classmethod
    def tiny(cls) -> "Config":
        return cls(
            input_features={
                OBS_STATE: PolicyFeature(FeatureType.STATE, (3,)),
                TOP: PolicyFeature(FeatureType.VISUAL, (3, 16, 16)),
                SIDE: PolicyFeature(FeatureType.VISUAL, (3, 16, 16)),
            },
            output_features={ACTION: PolicyFeature(FeatureType.ACTION, (2,))},
        )


class Policy(BasePolicy):
    """Actions are linear in the mean of the tokens' embeddings and in what each camera shows on average."""

    config: Config

    def __init__(self, config: Config, *, rngs: nnx.Rngs):
        self.config = config
        self.embed = Embedding(VOCABULARY, 16, rngs=rngs)
        self.project = Linear(3, 16, rngs=rngs)
        self.head = Linear(16, config.chunk_size * config.action_feature.shape[0], rngs=rngs)

    def loss(
        self, batch: Batch, *, key: PRNGKeyArray, train: bool, reduction: str = "mean", **draws: Array
    ) -> tuple[Float[Array, "..."], Metrics]:
        error = (self.sample_actions(batch, key=key) - batch[ACTION]) ** 2
        losses = jnp.where(batch[f"{ACTION}_is_pad"][..., None], 0, error).mean((1, 2))
        return (losses.mean() if reduction == "mean" else losses), {}

    def sample_actions(
        self, batch: Batch, *, key: PRNGKeyArray, **draws: Array
    ) -> Float[Array, "b chunk act"]:
        mask = batch[OBS_LANGUAGE_ATTENTION_MASK][..., None]  # b l 1
        x = (self.embed(batch[OBS_LANGUAGE_TOKENS]) * mask).sum(1) / mask.sum(1)  # b d
        for name in self.config.image_features:
            if name in batch:
                is_shown = ~batch.get(f"{name}_is_pad", jnp.zeros(len(x), bool))[:, None]
                x += jnp.where(is_shown, self.project(batch[name].mean((1, 2))), 0)
        return self.head(x).reshape(len(x), self.config.chunk_size, -1)
