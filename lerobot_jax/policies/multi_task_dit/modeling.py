"""Multi-task Diffusion Transformer (DiT): denoises a chunk of actions, given images, state and a task in words.

Paper: "A Careful Examination of Large Behavior Models for Multitask Dexterous Manipulation"
(https://arxiv.org/abs/2507.05331). Mirrors `lerobot.policies.multi_task_dit.modeling_multi_task_dit`; module names
are LeRobot's, so that torch_state.py needs no table.

Differences, on purpose: images and sequences are channel-last; the history of observations and the action queue
live in rollout.py; sampling is one `lax.scan`, whose noise comes from the key; the frozen text tower is held as
buffers; a crop that does not fit is an error, where LeRobot warns and crops nothing.
"""

from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int, Num, PRNGKeyArray

from lerobot_jax.features import ACTION, ACTION_IS_PAD, OBS_STATE
from lerobot_jax.nn.clip_settings import ADVICE
from lerobot_jax.policies.base import Batch, Metrics, Policy, PretrainedPart
from lerobot_jax.policies.multi_task_dit.config import MultiTaskDiTConfig
from lerobot_jax.policies.multi_task_dit.observation_encoder import ObservationEncoder
from lerobot_jax.policies.multi_task_dit.transformer import DiffusionTransformer

NOT_OF_VISION = r"text_model\..*|.*_projection\..*|logit_scale|.*position_ids"
NOT_OF_TEXT = r"vision_model\..*|.*_projection\..*|logit_scale|.*position_ids"


class MultiTaskDiTPolicy(Policy):
    """Trained by diffusion or flow matching, it starts from noise when it acts."""

    config: MultiTaskDiTConfig

    def __init__(self, config: MultiTaskDiTConfig, *, rngs: nnx.Rngs):
        self.config = config
        self.observation_encoder = ObservationEncoder(config, rngs=rngs)
        self.noise_predictor = DiffusionTransformer(config, self.observation_encoder.cond_dim, rngs=rngs)

    def loss(
        self,
        batch: Batch,
        *,
        key: PRNGKeyArray,
        train: bool,
        reduction: str = "mean",
        noise: Float[Array, "b horizon act"] | None = None,
        timestep: Int[Array, " b"] | None = None,
        time: Float[Array, " b"] | None = None,
        crop: Int[Array, "encoders 2"] | None = None,
    ) -> tuple[Float[Array, "..."], Metrics]:
        """Compare what is predicted with the noise, the recorded actions or the velocity between them.

        Args:
            batch: normalized observations (b t ...), tokens of the task (b l), `action` (b horizon act) and
                `action_is_pad` (b horizon).
            key: for the draws that are not given.
            train: crop at random and use dropout; without, as when acting.
            reduction: "mean": LeRobot's loss. "none": one loss a sample, whose mean is LeRobot's loss.
            noise: mixed with the actions, standard normal.
            timestep: with diffusion: how many steps of noise are added.
            time: with flow matching: how far from noise (0) to actions (1).
            crop: top and left of what each image tower sees, when it crops at random.

        Returns:
            (loss, {})
        """
        config, actions = self.config, batch[ACTION]
        noise_key, time_key, crop_key, dropout_key = jax.random.split(key, 4)
        if noise is None:
            noise = jax.random.normal(noise_key, actions.shape)
        if crop is None and train:
            crop = self.observation_encoder.draw_crops(crop_key)
        if config.objective == "flow_matching":
            flow = config.flow_matching
            moment = flow.draw_time(time_key, len(actions)) if time is None else time
            noisy, target = flow.mix(actions, noise, moment)
        else:
            moment = timestep
            if moment is None:
                moment = jax.random.randint(time_key, (len(actions),), 0, config.num_train_timesteps)
            noisy = config.noise_schedule.add_noise(actions, noise, moment)
            target = noise if config.prediction_type == "epsilon" else actions
        cond = self.observation_encoder(batch, crop if train else None)
        predicted = self.noise_predictor(noisy, moment, cond, dropout_key if train else None)
        error = jnp.square(predicted - target)  # b horizon act
        if config.do_mask_loss_for_padding:
            valid = ~batch[ACTION_IS_PAD][..., None]  # b horizon 1
            num_valid = jnp.maximum(valid.sum() * error.shape[-1], 1)
            losses = (error * valid).sum((1, 2)) * (len(error) / num_valid)  # b
        else:
            losses = error.mean((1, 2))
        return (losses.mean() if reduction == "mean" else losses), {}

    def sample_actions(
        self,
        batch: Batch,
        *,
        key: PRNGKeyArray,
        noise: Float[Array, "b horizon act"] | None = None,
        step_noise: Float[Array, "noises b horizon act"] | None = None,
    ) -> Float[Array, "b chunk act"]:
        """Generate normalized actions from the current observation on, `n_action_steps` of them.

        Args:
            batch: normalized observations (b t ...) and tokens of the task (b l).
            key: for the draws that are not given.
            noise: where to begin.
            step_noise: what DDPM's steps add.
        """
        config = self.config
        draws = self.sampling_draws(len(batch[OBS_STATE]), key)
        noise = draws["noise"] if noise is None else noise
        cond = self.observation_encoder(batch)

        def predict(x: Float[Array, "b horizon act"], moment: Num[Array, ""]) -> Array:
            return self.noise_predictor(x, jnp.broadcast_to(moment, len(x)), cond)

        if config.objective == "flow_matching":
            actions = config.flow_matching.sample(predict, noise)
        else:
            step_noise = draws["step_noise"] if step_noise is None else step_noise
            actions = config.noise_schedule.sample(predict, noise, step_noise, config.num_sampling_steps)
        start = config.n_obs_steps - 1
        return actions[:, start : start + config.n_action_steps]

    def sampling_draws(self, batch_size: int, key: PRNGKeyArray) -> dict[str, Array]:
        config = self.config
        shape = (batch_size, config.horizon, *config.action_feature.shape)
        noise_key, step_key = jax.random.split(key)
        draws = {"noise": jax.random.normal(noise_key, shape)}
        if config.objective == "diffusion":
            num = config.noise_schedule.num_step_noises(config.num_sampling_steps)
            draws["step_noise"] = jax.random.normal(step_key, (num, *shape))
        return draws

    @classmethod
    def pretrained_parts(cls, config: MultiTaskDiTConfig) -> list[PretrainedPart]:
        """Start both towers from CLIP's weights."""
        towers: list[tuple[Any, ...]] = []
        if config.image_features and config.use_separate_rgb_encoder_per_camera:
            towers = [("vision_encoders", i, "model") for i in range(len(config.image_features))]
        elif config.image_features:
            towers = [("vision_encoder", "model")]
        text = ("observation_encoder", "text_encoder", "text_encoder")
        return [
            *(
                PretrainedPart(
                    ("observation_encoder", *tower), config.vision_encoder_name, NOT_OF_VISION, ADVICE
                )
                for tower in towers
            ),
            PretrainedPart(text, config.text_encoder_name, NOT_OF_TEXT, ADVICE),
        ]
