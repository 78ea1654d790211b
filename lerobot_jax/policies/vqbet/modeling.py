"""VQ-BeT: a transformer chooses codes for chunks of actions, and adds what the codes leave out.

Paper: "Behavior Generation with Latent Actions" (https://arxiv.org/abs/2403.03181).
Mirrors `lerobot.policies.vqbet.modeling_vqbet`; module names are LeRobot's, so that torch_state.py needs no table.

Training has two phases: first, the codes are learned from the actions alone; then, they are fixed, and the rest is
trained. The buffer `discretized` says which it is, so both are in one compiled train step.

Differences, on purpose: images are channel-last; the history of observations and the action queue live in
rollout.py; codes are drawn by the Gumbel-max trick, from noise that comes from the key; when acting, codes are
drawn for the current step only; the metrics of the other phase are NaN; `optimized_steps`, which LeRobot loses, is
kept in checkpoints (not in model.safetensors); batch norms begin with PyTorch's running statistics (see
nn/rgb_encoder.py).
"""

from collections.abc import Callable
from typing import Any

import einops
import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int, PRNGKeyArray

from lerobot_jax.features import ACTION, OBS_STATE
from lerobot_jax.nn.conditional import conditional_loss
from lerobot_jax.nn.resnet import NAMES, NUMBERS, TORCHVISION_WEIGHTS
from lerobot_jax.nn.rgb_encoder import RgbEncoder
from lerobot_jax.nn.variables import Buffer
from lerobot_jax.policies.base import Batch, Metrics, Policy, PretrainedPart
from lerobot_jax.policies.vqbet.config import VQBeTConfig
from lerobot_jax.policies.vqbet.gpt import GPT
from lerobot_jax.policies.vqbet.vqvae import MLP, NUM_CODEBOOKS, VqVae
from lerobot_jax.transforms import geometry

COMMITMENT_WEIGHT = 5
FOCAL_GAMMA = 2
PHASE_1_METRICS = ("n_different_codes", "n_different_combinations", "recon_l1_error")
PHASE_2_METRICS = (
    "classification_loss",
    "offset_loss",
    "equal_primary_code_rate",
    "equal_secondary_code_rate",
    "vq_action_error",
    "offset_action_error",
    "action_error_max",
    "action_mse_error",
)


class VQBeTPolicy(Policy):
    """Learns codes for chunks of actions, then to choose among them."""

    config: VQBeTConfig

    def __init__(self, config: VQBeTConfig, *, rngs: nnx.Rngs):
        self.config = config
        self.vqbet = VQBeTModel(config, rngs=rngs)

    def loss(
        self,
        batch: Batch,
        *,
        key: PRNGKeyArray,
        train: bool,
        reduction: str = "mean",
        codes: Int[Array, "b chunks codebooks"] | None = None,
        gumbel: Float[Array, "b chunks codebooks codes"] | None = None,
        crop: Int[Array, "2"] | None = None,
    ) -> tuple[Float[Array, "..."], Metrics]:
        """Give the loss of the phase that training is in, and count the step, as LeRobot does.

        Args:
            batch: normalized observations (b t ...) and `action` (b steps act).
            key: for the draws that are not given, and for dropout.
            train: let the codebooks learn and drop out; without, as when acting.
            reduction: "mean": LeRobot's loss. "none": one loss a sample, whose mean is LeRobot's loss.
            codes: which are chosen, in the second phase.
            gumbel: standard Gumbel noise that chooses them.
            crop: top and left of what the image encoder sees, when it crops at random.

        Returns:
            (loss, metrics); those of the other phase are NaN.
        """
        drawn = {"codes": codes, "gumbel": gumbel, "crop": crop}

        def in_phase(compute: Callable[..., tuple[Array, Metrics]]):
            def loss(params: Any, buffers: Any, batch: Batch, key: PRNGKeyArray, drawn: dict[str, Any]):
                module = nnx.merge(graphdef, nnx.State(params), nnx.State(buffers))
                losses, found = compute(module, batch, key, train, **drawn)
                unknown = dict.fromkeys((*PHASE_1_METRICS, *PHASE_2_METRICS), jnp.full((), jnp.nan))
                loss = losses.mean() if reduction == "mean" else losses
                return loss, (unknown | found, nnx.to_pure_dict(nnx.state(module, Buffer)))

            return loss

        graphdef, *states = nnx.split(self.vqbet, nnx.Param, Buffer)
        params, buffers = map(nnx.to_pure_dict, states)
        phases = in_phase(VQBeTModel.prediction_losses), in_phase(VQBeTModel.discretization_losses)
        is_second = self.vqbet.action_head.vqvae_model.discretized[...]
        seen = {name: batch[name] for name in (ACTION, OBS_STATE, self.vqbet.camera)}
        loss, (metrics, buffers) = conditional_loss(is_second, *phases, params, buffers, seen, key, drawn)
        nnx.update(self.vqbet, nnx.State(buffers))
        return loss, metrics

    def sample_actions(
        self,
        batch: Batch,
        *,
        key: PRNGKeyArray,
        codes: Int[Array, "b 1 codebooks"] | None = None,
        gumbel: Float[Array, "b 1 codebooks codes"] | None = None,
    ) -> Float[Array, "b chunk act"]:
        """Choose the normalized actions from the current observation on.

        Args:
            batch: normalized observations (b t ...).
            key: for the draws that are not given.
            codes: which are chosen.
            gumbel: standard Gumbel noise that chooses them.
        """
        if gumbel is None:
            gumbel = self.sampling_draws(len(batch[OBS_STATE]), key)["gumbel"]
        now = self.config.n_obs_steps - 1
        features = self.vqbet.features(batch)[:, now : now + 1]
        return self.vqbet.action_head(features, gumbel, codes)["predicted_action"][:, 0]

    def sampling_draws(self, batch_size: int, key: PRNGKeyArray) -> dict[str, Array]:
        return {"gumbel": jax.random.gumbel(key, (batch_size, 1, NUM_CODEBOOKS, self.config.vqvae_n_embed))}

    @classmethod
    def pretrained_parts(cls, config: VQBeTConfig) -> list[PretrainedPart]:
        """Start the image encoder from ImageNet weights."""
        weights = config.pretrained_backbone_weights
        if weights is None:
            return []
        source = TORCHVISION_WEIGHTS.get(weights, weights)
        advice = (
            "give a safetensors file with torchvision's keys as policy.pretrained_backbone_weights, or None"
        )
        names: dict[str, str] = dict(zip(NAMES, NUMBERS, strict=True))
        return [PretrainedPart(("vqbet", "rgb_encoder", "backbone"), source, r"fc\..*", advice, names)]


class VQBeTModel(nnx.Module):
    """The image encoder, the transformer and the head."""

    def __init__(self, config: VQBeTConfig, *, rngs: nnx.Rngs):
        state, images = config.robot_state_feature, config.image_features
        assert state is not None  # by config.check_features
        ((self.camera, image),) = images.items()
        _, height, width = image.shape
        self.rgb_encoder = RgbEncoder(
            config.vision_backbone,
            (height, width),
            resize=None,
            crop=config.crop_shape,
            num_keypoints=config.spatial_softmax_num_keypoints,
            use_group_norm=config.use_group_norm,
            dtype=config.compute_dtype,
            rngs=rngs,
        )
        self.action_token = nnx.Param(jax.random.normal(rngs.params(), (1, 1, config.gpt_input_dim)))
        self.state_projector = MLP(state.shape[0], config.gpt_input_dim, rngs=rngs)
        self.rgb_feature_projector = MLP(
            2 * config.spatial_softmax_num_keypoints, config.gpt_input_dim, rngs=rngs
        )
        self.policy = GPT(config, rngs=rngs)
        self.action_head = VQBeTHead(config, rngs=rngs)
        first, step = jnp.arange(config.num_chunks)[:, None], jnp.arange(config.action_chunk_size)[None]
        self.select_target_actions_indices = Buffer(first + step)  # chunks chunk
        self.config = config

    def features(
        self,
        batch: Batch,
        train: bool = False,
        crop: Int[Array, "2"] | None = None,
        dropout_key: PRNGKeyArray | None = None,
    ) -> Float[Array, "b chunks d"]:
        """Give what the transformer answers to each query for a chunk of actions."""
        b = len(batch[OBS_STATE])
        images = einops.rearrange(batch[self.camera], "b t h w c -> (b t) h w c")
        seen = self.rgb_encoder(images, train, crop).astype(jnp.float32)
        seen = einops.rearrange(self.rgb_feature_projector(seen), "(b t) d -> b t d", b=b)
        state = self.state_projector(batch[OBS_STATE].astype(jnp.float32))  # b t d
        query = self.action_token[...]
        tokens = jnp.stack([seen, state, jnp.broadcast_to(query, state.shape)], axis=2)
        tokens = einops.rearrange(tokens, "b t token d -> b (t token) d")
        num_further = self.config.n_action_pred_token - 1
        further = jnp.broadcast_to(query, (b, num_further, query.shape[-1]))
        answers = self.policy(jnp.concatenate([tokens, further], axis=1), dropout_key)
        positions = [*self.config.query_positions, *range(answers.shape[1] - num_further, answers.shape[1])]
        return answers[:, jnp.asarray(positions)]

    def target_chunks(self, batch: Batch) -> Float[Array, "b chunks size"]:
        """Give the chunk of recorded actions from each step on."""
        chunks = batch[ACTION][:, self.select_target_actions_indices[...]]  # b chunks chunk act
        return chunks.reshape(*chunks.shape[:2], -1)

    def discretization_losses(
        self, batch: Batch, key: PRNGKeyArray, train: bool, **_: Any
    ) -> tuple[Float[Array, " b"], Metrics]:
        """Learn codes: the error of the chunks that they stand for, and how far the chunks are from them."""
        vqvae = self.action_head.vqvae_model
        target = self.target_chunks(batch)
        decoded, quantized = vqvae.reconstruct(target.reshape(-1, target.shape[-1]), train, key)
        error = jnp.abs(target - decoded.reshape(target.shape)).mean((1, 2))  # b
        commitment = quantized.commitment.reshape(target.shape[:2]).mean(1)  # b
        num = self.config.vqvae_n_embed
        is_used = jnp.zeros((NUM_CODEBOOKS, num), bool)
        is_used = is_used.at[jnp.arange(NUM_CODEBOOKS)[None], quantized.codes].set(True)
        is_pair_used = jnp.zeros((num, num), bool).at[tuple(quantized.codes.T)].set(True)
        vqvae.count_step(self.config.n_vqvae_training_steps)
        return error + COMMITMENT_WEIGHT * commitment, {
            "n_different_codes": is_used.sum(dtype=jnp.float32),
            "n_different_combinations": is_pair_used.sum(dtype=jnp.float32),
            "recon_l1_error": error.mean(),
        }

    def prediction_losses(
        self,
        batch: Batch,
        key: PRNGKeyArray,
        train: bool,
        *,
        codes: Int[Array, "b chunks codebooks"] | None,
        gumbel: Float[Array, "b chunks codebooks codes"] | None,
        crop: Int[Array, "2"] | None,
    ) -> tuple[Float[Array, " b"], Metrics]:
        """Choose codes: whether they are those of the recorded actions, and the error of the actions."""
        config, head = self.config, self.action_head
        gumbel_key, crop_key, dropout_key = jax.random.split(key, 3)
        if gumbel is None:
            shape = (len(batch[ACTION]), config.num_chunks, NUM_CODEBOOKS, config.vqvae_n_embed)
            gumbel = jax.random.gumbel(gumbel_key, shape)
        if crop is None and train:
            crop = self.draw_crop(crop_key)
        features = self.features(batch, train, crop if train else None, dropout_key if train else None)
        predicted = head(features, gumbel, codes)
        target = self.target_chunks(batch)  # b chunks size
        wanted = head.find_codes(target)  # b chunks codebooks
        chosen, logits = predicted["codes"], predicted["logits"]
        focal = focal_losses(logits, wanted).mean(1)  # b codebooks
        weights = jnp.asarray([config.primary_code_loss_weight, config.secondary_code_loss_weight])
        classification = focal @ weights
        error = target - predicted["predicted_action"].reshape(target.shape)
        offset = jnp.abs(error).mean((1, 2))
        return classification + config.offset_loss_weight * offset, {
            "classification_loss": classification.mean(),
            "offset_loss": offset.mean(),
            "equal_primary_code_rate": (wanted == chosen)[..., 0].mean(),
            "equal_secondary_code_rate": (wanted == chosen)[..., 1].mean(),
            "vq_action_error": jnp.abs(target - predicted["decoded_action"]).mean(),
            "offset_action_error": offset.mean(),
            "action_error_max": jnp.abs(error).max(),
            "action_mse_error": jnp.square(error).mean(),
        }

    def draw_crop(self, key: PRNGKeyArray) -> Int[Array, "2"] | None:
        """Draw what the image encoder sees of a batch's images; None if that is not random."""
        crop = self.config.crop_shape
        if crop is None or not self.config.crop_is_random:
            return None
        _, height, width = self.config.image_features[self.camera].shape
        return geometry.draw_corners(key, 1, (height, width), crop)[0]


class VQBeTHead(nnx.Module):
    """Chooses codes, and adds to the actions that they stand for an offset which depends on the codes."""

    def __init__(self, config: VQBeTConfig, *, rngs: nnx.Rngs):
        num, width = config.vqvae_n_embed, config.gpt_output_dim
        self.vqvae_model = VqVae(config, rngs=rngs)
        if config.sequentially_select:
            self.map_to_cbet_preds_primary_bin = MLP(width, num, rngs=rngs)
            self.map_to_cbet_preds_secondary_bin = MLP(width + num, num, rngs=rngs)
        else:
            self.map_to_cbet_preds_bin = MLP(width, NUM_CODEBOOKS * num, rngs=rngs)
        size = config.action_chunk_size * config.action_feature.shape[0]
        self.map_to_cbet_preds_offset = MLP(width, NUM_CODEBOOKS * num * size, rngs=rngs)
        self.config = config

    def __call__(
        self,
        features: Float[Array, "b chunks d"],
        gumbel: Float[Array, "b chunks codebooks codes"],
        codes: Int[Array, "b chunks codebooks"] | None = None,
    ) -> dict[str, Array]:
        """Predict chunks of actions.

        Args:
            features: the transformer's answers.
            gumbel: noise by which codes are drawn.
            codes: these instead of drawn ones.

        Returns:
            `codes` (b chunks codebooks), their `logits` (b chunks codebooks codes), `predicted_action` (b chunks
            chunk act) and the part of it that the codes stand for, `decoded_action` (b chunks size).
        """
        config, num = self.config, self.config.vqvae_n_embed
        logits, codes = self._choose(features, gumbel, codes)
        offsets = einops.rearrange(
            self.map_to_cbet_preds_offset(features), "b t (g c d) -> b t g c d", g=NUM_CODEBOOKS, c=num
        )
        offset = jnp.take_along_axis(offsets, codes[..., None, None], axis=3)[..., 0, :].sum(2)  # b t size
        decoded = self.vqvae_model.decode(codes.reshape(-1, NUM_CODEBOOKS)).reshape(offset.shape)
        decoded = jax.lax.stop_gradient(decoded)
        predicted = (decoded + offset).reshape(*offset.shape[:2], config.action_chunk_size, -1)
        return {"codes": codes, "logits": logits, "predicted_action": predicted, "decoded_action": decoded}

    def find_codes(self, chunks: Float[Array, "b chunks size"]) -> Int[Array, "b chunks codebooks"]:
        """Give the codes that stand for recorded actions."""
        codes = self.vqvae_model.find_codes(chunks.reshape(-1, chunks.shape[-1]))
        return codes.reshape(*chunks.shape[:2], NUM_CODEBOOKS)

    def _choose(
        self, features: Float[Array, "b t d"], gumbel: Float[Array, "b t g c"], codes: Array | None
    ) -> tuple[Float[Array, "b t g c"], Int[Array, "b t g"]]:
        """Give the logits of the codes, and draw codes unless they are given."""
        temperature, num = self.config.bet_softmax_temperature, self.config.vqvae_n_embed
        if not self.config.sequentially_select:
            logits = self.map_to_cbet_preds_bin(features)
            logits = einops.rearrange(logits, "b t (g c) -> b t g c", g=NUM_CODEBOOKS)
            return logits, jnp.argmax(logits / temperature + gumbel, axis=-1) if codes is None else codes
        primary = self.map_to_cbet_preds_primary_bin(features)  # b t c
        drawn = jnp.argmax(primary / temperature + gumbel[:, :, 0], axis=-1)  # b t
        first = drawn if codes is None else codes[..., 0]
        known = jnp.concatenate([features, jax.nn.one_hot(first, num)], axis=-1)
        secondary = self.map_to_cbet_preds_secondary_bin(known)
        logits = jnp.stack([primary, secondary], axis=2)
        if codes is None:
            codes = jnp.stack(
                [first, jnp.argmax(secondary / temperature + gumbel[:, :, 1], axis=-1)], axis=-1
            )
        return logits, codes


def focal_losses(logits: Float[Array, "*lead codes"], wanted: Int[Array, "*lead"]) -> Float[Array, "*lead"]:
    """Weigh the cross entropy by how wrong a choice is (https://arxiv.org/abs/1708.02002)."""
    log_p = jax.nn.log_softmax(logits, axis=-1)
    log_p = jnp.take_along_axis(log_p, wanted[..., None], axis=-1)[..., 0]
    return -((1 - jnp.exp(log_p)) ** FOCAL_GAMMA) * log_p
