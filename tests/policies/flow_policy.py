"""A small flow policy for tests of what such policies share: real-time chunking, training with delays."""

import dataclasses
from collections.abc import Mapping
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float, Int, PRNGKeyArray

from lerobot_jax.features import ACTION, OBS_STATE, FeatureType, NormalizationMode, PolicyFeature
from lerobot_jax.nn.linear import Linear
from lerobot_jax.policies import action_prefix, base
from lerobot_jax.policies.base import Batch, FunctionalPolicy, Metrics, make_policy
from lerobot_jax.policies.config import PolicyConfig
from lerobot_jax.policies.rtc import RTCConfig, euler


@dataclasses.dataclass(frozen=True)
class Config(PolicyConfig):
    type: ClassVar[str] = "tests.policies.flow_policy"

    chunk_size: int = 8
    n_action_steps: int = 4
    normalization_mapping: dict[str, NormalizationMode] = dataclasses.field(
        default_factory=lambda: dict.fromkeys(("STATE", "ACTION"), NormalizationMode.MEAN_STD), hash=False
    )
    rtc_config: RTCConfig | None = None
    """Real-time chunking; any of its settings turns it on."""
    rtc_training_delay: int = dataclasses.field(default=0, metadata={"in_lerobot": False})
    """In training, up to so many of a chunk's first actions are given."""
    num_inference_steps: int = 4

    @property
    def observation_delta_indices(self) -> None:
        return None

    @property
    def optimizer_preset(self) -> Mapping[str, Any]:
        return {"type": "adamw", "lr": 1e-3}

    @property
    def action_delta_indices(self) -> list[int]:
        return list(range(self.chunk_size))

    def check_features(self) -> None:
        pass

    @classmethod
    def tiny(cls) -> "Config":
        return cls(
            input_features={OBS_STATE: PolicyFeature(FeatureType.STATE, (2,))},
            output_features={ACTION: PolicyFeature(FeatureType.ACTION, (2,))},
        )


class FlowPolicy(base.Policy):
    config: Config

    def __init__(self, config: Config, *, rngs: nnx.Rngs):
        self.config = config
        steps, (act,) = config.chunk_size, config.action_feature.shape
        (state,) = config.input_features[OBS_STATE].shape
        self.seen = Linear(state, 16, rngs=rngs)
        self.steps = Linear(steps, steps, rngs=rngs)
        self.inside = Linear(act + 1, 16, rngs=rngs)
        self.out = Linear(16, act, rngs=rngs)

    def denoise(
        self, batch: Batch, x_t: Float[Array, "b chunk act"], time: Float[Array, "b *chunk"]
    ) -> Float[Array, "b chunk act"]:
        time = jnp.broadcast_to(time.reshape(len(time), -1, 1), (*x_t.shape[:2], 1))
        x = self.inside(jnp.concatenate([x_t, time], axis=-1))
        x = x + self.steps(x.swapaxes(1, 2)).swapaxes(1, 2) + self.seen(batch[OBS_STATE])[:, None]
        return self.out(jnp.tanh(x))

    def loss(
        self,
        batch: Batch,
        *,
        key: PRNGKeyArray,
        train: bool,
        reduction: str = "mean",
        noise: Float[Array, "b chunk act"] | None = None,
        time: Float[Array, " b"] | None = None,
        delays: Int[Array, " b"] | None = None,
    ) -> tuple[Float[Array, "..."], Metrics]:
        actions = batch[ACTION]
        keys, size = jax.random.split(key, 3), len(actions)
        noise = jax.random.normal(keys[0], actions.shape) if noise is None else noise
        time = jax.random.uniform(keys[1], (size,)) if time is None else time
        most = self.config.rtc_training_delay
        delays = action_prefix.draw_delays(keys[2], size, most) if delays is None else delays
        times = action_prefix.times_of_actions(time, delays, self.config.chunk_size)
        x_t = times[..., None] * noise + (1 - times[..., None]) * actions
        losses = (self.denoise(batch, x_t, times) - (noise - actions)) ** 2
        losses = losses * action_prefix.loss_weights(delays, self.config.chunk_size)[..., None]
        losses = losses.mean(axis=(1, 2))
        return (losses.mean() if reduction == "mean" else losses), {}

    def sample_actions(
        self,
        batch: Batch,
        *,
        key: PRNGKeyArray,
        noise: Float[Array, "b chunk act"] | None = None,
        prev_chunk_left_over: Float[Array, "b left act"] | None = None,
        inference_delay: int | Int[Array, ""] | None = None,
        execution_horizon: int | Int[Array, ""] | None = None,
    ) -> Float[Array, "b chunk act"]:
        shape = (len(batch[OBS_STATE]), self.config.chunk_size, *self.config.action_feature.shape)
        return euler(
            lambda x_t, time: self.denoise(batch, x_t, time),
            jax.random.normal(key, shape) if noise is None else noise,
            self.config.num_inference_steps,
            config=self.config.rtc_config,
            prev_chunk_left_over=prev_chunk_left_over,
            inference_delay=inference_delay,
            execution_horizon=execution_horizon,
        )


Policy = FlowPolicy


def make(mean: float = 0.0, std: float = 1.0, state: int = 2, **settings: Any) -> FunctionalPolicy:
    """Give one with fresh weights, for states (of so many dimensions) and actions of this mean and deviation."""
    inputs = {OBS_STATE: PolicyFeature(FeatureType.STATE, (state,))}
    config = dataclasses.replace(Config.tiny(), input_features=inputs, **settings)
    stats = {
        key: {"mean": np.full(size, mean, np.float32), "std": np.full(size, std, np.float32)}
        for key, size in ((OBS_STATE, state), (ACTION, 2))
    }
    target_stats = stats[ACTION] if config.action_target.is_transformed else None
    policy = make_policy(config, stats, target_stats=target_stats)
    params, buffers = policy.init(jax.random.key(0))
    return policy.replace(params=params, buffers=buffers)
