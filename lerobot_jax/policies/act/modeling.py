"""ACT, the Action Chunking Transformer.

Zhao et al., "Learning Fine-Grained Bimanual Manipulation with Low-Cost Hardware", arXiv:2304.13705.
Mirrors `lerobot.policies.act.modeling_act`; attribute names are its parameter names. Differences, on purpose:
- `observation.state` may be left out (LeRobot declares so, but crashes).
- Batches are batch-first and images channel-last.
"""

import math
from functools import partial
from typing import NamedTuple

import einops
import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Bool, Float, PRNGKeyArray

from lerobot_jax.features import ACTION, ACTION_IS_PAD, OBS_ENV_STATE, OBS_STATE
from lerobot_jax.nn.attention import MultiheadAttention
from lerobot_jax.nn.conv import Conv2d
from lerobot_jax.nn.dropout import dropout, split_key
from lerobot_jax.nn.execution import run_block
from lerobot_jax.nn.initializers import torch_uniform
from lerobot_jax.nn.linear import LayerNorm, Linear, WholeEmbedding
from lerobot_jax.nn.resnet import TORCHVISION_WEIGHTS, ResNet
from lerobot_jax.nn.variables import Buffer
from lerobot_jax.policies.act.config import ACTConfig
from lerobot_jax.policies.base import Batch, Metrics, Policy, PretrainedPart


class Latent(NamedTuple):
    """The VAE encoder's distribution of the latent z: mean, and log of the variance."""

    mu: Float[Array, "b z"]
    log_sigma_x2: Float[Array, "b z"]


class ACTPolicy(Policy):
    """ACT with its loss: L1 of the actions, plus the KL divergence of the latent when trained as a VAE."""

    config: ACTConfig

    def __init__(self, config: ACTConfig, *, rngs: nnx.Rngs):
        self.config = config
        self.model = ACT(config, rngs=rngs)

    def loss(
        self,
        batch: Batch,
        *,
        key: PRNGKeyArray,
        train: bool,
        reduction: str = "mean",
        noise: Float[Array, "b z"] | None = None,
    ) -> tuple[Float[Array, "..."], Metrics]:
        """Compare predicted with recorded actions, padded steps left out.

        Args:
            batch: normalized observations, `action` (b chunk act) and `action_is_pad` (b chunk).
            key: for the latent's noise and dropout.
            train: encode the actions into the latent and drop out; without, the latent is zero.
            reduction: "mean": LeRobot's loss. "none": one loss a sample, whose mean is LeRobot's loss.
            noise: the latent's standard normal noise, drawn from `key` unless given.

        Returns:
            (loss, {"l1_loss", and "kld_loss" when training a VAE})
        """
        noise_key, dropout_key = jax.random.split(key)
        if noise is None:
            noise = jax.random.normal(noise_key, (len(batch[ACTION]), self.config.latent_dim))
        encode = train and self.config.use_vae
        actions, latent = self.model(batch, noise if encode else None, dropout_key if train else None)

        valid = ~batch[ACTION_IS_PAD][..., None]  # b chunk 1
        error = jnp.abs(batch[ACTION] - actions.astype(jnp.float32)) * valid
        num_valid = jnp.maximum(valid.sum() * error.shape[-1], 1)
        losses = error.sum((1, 2)) * (len(error) / num_valid)  # b
        metrics = {"l1_loss": losses.mean()}
        if latent is not None:
            mu, log_sigma_x2 = latent
            kld = -0.5 * (1 + log_sigma_x2 - mu**2 - jnp.exp(log_sigma_x2)).sum(-1)  # b
            metrics["kld_loss"] = kld.mean()
            losses = losses + self.config.kl_weight * kld
        return (losses.mean() if reduction == "mean" else losses), metrics

    @classmethod
    def pretrained_parts(cls, config: ACTConfig) -> list[PretrainedPart]:
        """Start the image encoder from ImageNet weights."""
        weights = config.pretrained_backbone_weights
        if weights is None or not config.image_features:
            return []
        source = TORCHVISION_WEIGHTS.get(weights, weights)
        advice = (
            "give a safetensors file with torchvision's keys as policy.pretrained_backbone_weights, or None"
        )
        return [PretrainedPart(("model", "backbone"), source, r"fc\..*|.*\.num_batches_tracked", advice)]

    def sample_actions(self, batch: Batch, *, key: PRNGKeyArray) -> Float[Array, "b chunk act"]:
        """Predict a chunk of normalized actions; ACT draws nothing, the latent is zero."""
        actions, _ = self.model(batch, None, None)
        return actions.astype(jnp.float32)


class ACT(nnx.Module):
    """The network: images, states and a latent go through an encoder; a decoder asks it for the actions."""

    def __init__(self, config: ACTConfig, *, rngs: nnx.Rngs):
        d, dtype = config.dim_model, config.compute_dtype
        state, env, action = config.robot_state_feature, config.env_state_feature, config.action_feature
        if config.use_vae:  # a BERT-like encoder of [cls, state, *actions]
            self.vae_encoder = ACTEncoder(config, config.n_vae_encoder_layers, torch_uniform, rngs=rngs)
            self.vae_encoder_cls_embed = WholeEmbedding(1, d, rngs=rngs)
            if state:
                self.vae_encoder_robot_state_input_proj = Linear(state.shape[0], d, dtype=dtype, rngs=rngs)
            self.vae_encoder_action_input_proj = Linear(action.shape[0], d, dtype=dtype, rngs=rngs)
            self.vae_encoder_latent_output_proj = Linear(d, 2 * config.latent_dim, rngs=rngs)
            num_tokens = 1 + (state is not None) + config.chunk_size
            self.vae_encoder_pos_enc = Buffer(jnp.asarray(sinusoid_table(num_tokens, d))[None])
        if config.image_features:
            self.backbone = ResNet(
                config.vision_backbone,
                dilate_last_stage=bool(config.replace_final_stride_with_dilation),
                dtype=dtype,
                rngs=rngs,
            )
            channels = self.backbone.out_channels
            self.encoder_img_feat_input_proj = Conv2d(channels, d, 1, dtype=dtype, rngs=rngs)
        xavier = nnx.initializers.xavier_uniform()
        self.encoder = ACTEncoder(config, config.n_encoder_layers, xavier, rngs=rngs)
        self.decoder = ACTDecoder(config, xavier, rngs=rngs)
        if state:
            self.encoder_robot_state_input_proj = Linear(state.shape[0], d, dtype=dtype, rngs=rngs)
        if env:
            self.encoder_env_state_input_proj = Linear(env.shape[0], d, dtype=dtype, rngs=rngs)
        self.encoder_latent_input_proj = Linear(config.latent_dim, d, dtype=dtype, rngs=rngs)
        num_1d_tokens = 1 + (state is not None) + (env is not None)
        self.encoder_1d_feature_pos_embed = WholeEmbedding(num_1d_tokens, d, rngs=rngs)
        self.decoder_pos_embed = WholeEmbedding(config.chunk_size, d, rngs=rngs)
        self.action_head = Linear(d, action.shape[0], dtype=dtype, rngs=rngs)
        self.config = config

    def __call__(
        self, batch: Batch, noise: Float[Array, "b z"] | None = None, dropout_key: PRNGKeyArray | None = None
    ) -> tuple[Float[Array, "b chunk act"], Latent | None]:
        """Predict actions. With `noise`, the latent is drawn around the batch's actions; else it is zero."""
        vae_key, encoder_key, decoder_key = split_key(dropout_key, 3)
        tokens, position = [], [self.encoder_1d_feature_pos_embed.embedding[...]]
        batch_size = len(next(batch[key] for key in self.config.input_features))

        latent, z = None, jnp.zeros((batch_size, self.config.latent_dim))
        if noise is not None:
            latent = self.encode_actions(batch, vae_key)
            z = latent.mu + jnp.exp(latent.log_sigma_x2 / 2) * noise  # the reparameterization trick
        tokens.append(self.encoder_latent_input_proj(z)[:, None])
        if self.config.robot_state_feature:
            tokens.append(self.encoder_robot_state_input_proj(batch[OBS_STATE])[:, None])
        if self.config.env_state_feature:
            tokens.append(self.encoder_env_state_input_proj(batch[OBS_ENV_STATE])[:, None])
        for camera in self.config.image_features:
            features = self.backbone(batch[camera].astype(self.config.compute_dtype))
            height, width = features.shape[1:3]
            tokens.append(
                einops.rearrange(self.encoder_img_feat_input_proj(features), "b h w d -> b (h w) d")
            )
            position.append(jnp.asarray(sinusoid_image(height, width, self.config.dim_model // 2)))

        x = jnp.concatenate(tokens, axis=1)  # b l d
        pos = jnp.concatenate(position).astype(x.dtype)  # l d
        memory = self.encoder(x, pos, key=encoder_key)
        queries = jnp.zeros((batch_size, self.config.chunk_size, self.config.dim_model), x.dtype)
        query_pos = self.decoder_pos_embed.embedding[...].astype(x.dtype)
        decoded = self.decoder(queries, memory, query_pos, pos, key=decoder_key)
        return self.action_head(decoded), latent

    def encode_actions(self, batch: Batch, key: PRNGKeyArray | None) -> Latent:
        """Run the VAE's encoder over [cls, state, *actions]; padded actions are not attended to."""
        actions, is_pad = batch[ACTION], batch[ACTION_IS_PAD]
        cls = jnp.broadcast_to(
            self.vae_encoder_cls_embed.embedding[...], (len(actions), 1, self.config.dim_model)
        )
        tokens = [cls.astype(self.config.compute_dtype)]
        if self.config.robot_state_feature:
            tokens.append(self.vae_encoder_robot_state_input_proj(batch[OBS_STATE])[:, None])
        mask = jnp.concatenate([jnp.zeros((len(actions), len(tokens)), bool), is_pad], axis=1)  # b l
        tokens.append(self.vae_encoder_action_input_proj(actions))
        x = jnp.concatenate(tokens, axis=1)  # b l d
        pos = self.vae_encoder_pos_enc[...][0].astype(x.dtype)
        encoded_cls = self.vae_encoder(x, pos, mask, key=key)[:, 0]
        return Latent(*jnp.split(self.vae_encoder_latent_output_proj(encoded_cls), 2, axis=-1))


class ACTEncoder(nnx.Module):
    """A stack of self-attention layers, normalized at the end when `pre_norm`."""

    def __init__(self, config: ACTConfig, num_layers: int, kernel_init: nnx.Initializer, *, rngs: nnx.Rngs):
        self.layers = nnx.List([ACTEncoderLayer(config, kernel_init, rngs=rngs) for _ in range(num_layers)])
        self.norm = (
            LayerNorm(config.dim_model, dtype=config.compute_dtype, rngs=rngs) if config.pre_norm else None
        )

    def __call__(
        self,
        x: Float[Array, "b l d"],
        pos: Float[Array, "l d"],
        key_padding_mask: Bool[Array, "b l"] | None = None,
        *,
        key: PRNGKeyArray | None,
    ) -> Float[Array, "b l d"]:
        for layer, layer_key in zip(self.layers, split_key(key, len(self.layers)), strict=True):
            x = run_block(layer, x, pos, key_padding_mask, key=layer_key)
        return self.norm(x) if self.norm else x


class ACTEncoderLayer(nnx.Module):
    def __init__(self, config: ACTConfig, kernel_init: nnx.Initializer, *, rngs: nnx.Rngs):
        d, hidden, dtype = config.dim_model, config.dim_feedforward, config.compute_dtype
        self.self_attn = _attention(config, kernel_init, rngs)
        self.linear1 = Linear(d, hidden, kernel_init=kernel_init, dtype=dtype, rngs=rngs)
        self.linear2 = Linear(hidden, d, kernel_init=kernel_init, dtype=dtype, rngs=rngs)
        self.norm1 = LayerNorm(d, dtype=dtype, rngs=rngs)
        self.norm2 = LayerNorm(d, dtype=dtype, rngs=rngs)
        self.config = config

    def __call__(
        self,
        x: Float[Array, "b l d"],
        pos: Float[Array, "l d"],
        key_padding_mask: Bool[Array, "b l"] | None = None,
        *,
        key: PRNGKeyArray | None,
    ) -> Float[Array, "b l d"]:
        pre, rate = self.config.pre_norm, self.config.dropout
        attn_key, key1, hidden_key, key2 = split_key(key, 4)
        y = self.norm1(x) if pre else x
        q = y + pos[None]
        x = x + dropout(self.self_attn(q, q, y, key_padding_mask, attn_key), rate, key1)
        x = x if pre else self.norm1(x)
        y = self.norm2(x) if pre else x
        y = dropout(_activation(self.config)(self.linear1(y)), rate, hidden_key)
        x = x + dropout(self.linear2(y), rate, key2)
        return x if pre else self.norm2(x)


class ACTDecoder(nnx.Module):
    """A stack of layers with self- and cross-attention, always normalized at the end."""

    def __init__(self, config: ACTConfig, kernel_init: nnx.Initializer, *, rngs: nnx.Rngs):
        num_layers = config.n_decoder_layers
        self.layers = nnx.List([ACTDecoderLayer(config, kernel_init, rngs=rngs) for _ in range(num_layers)])
        self.norm = LayerNorm(config.dim_model, dtype=config.compute_dtype, rngs=rngs)

    def __call__(
        self,
        x: Float[Array, "b chunk d"],
        memory: Float[Array, "b l d"],
        pos: Float[Array, "chunk d"],
        memory_pos: Float[Array, "l d"],
        *,
        key: PRNGKeyArray | None,
    ) -> Float[Array, "b chunk d"]:
        for layer, layer_key in zip(self.layers, split_key(key, len(self.layers)), strict=True):
            x = run_block(layer, x, memory, pos, memory_pos, key=layer_key)
        return self.norm(x)


class ACTDecoderLayer(nnx.Module):
    def __init__(self, config: ACTConfig, kernel_init: nnx.Initializer, *, rngs: nnx.Rngs):
        d, hidden, dtype = config.dim_model, config.dim_feedforward, config.compute_dtype
        self.self_attn = _attention(config, kernel_init, rngs)
        self.multihead_attn = _attention(config, kernel_init, rngs)
        self.linear1 = Linear(d, hidden, kernel_init=kernel_init, dtype=dtype, rngs=rngs)
        self.linear2 = Linear(hidden, d, kernel_init=kernel_init, dtype=dtype, rngs=rngs)
        self.norm1 = LayerNorm(d, dtype=dtype, rngs=rngs)
        self.norm2 = LayerNorm(d, dtype=dtype, rngs=rngs)
        self.norm3 = LayerNorm(d, dtype=dtype, rngs=rngs)
        self.config = config

    def __call__(
        self,
        x: Float[Array, "b chunk d"],
        memory: Float[Array, "b l d"],
        pos: Float[Array, "chunk d"],
        memory_pos: Float[Array, "l d"],
        *,
        key: PRNGKeyArray | None,
    ) -> Float[Array, "b chunk d"]:
        pre, rate = self.config.pre_norm, self.config.dropout
        self_key, key1, cross_key, key2, hidden_key, key3 = split_key(key, 6)
        y = self.norm1(x) if pre else x
        q = y + pos[None]
        x = x + dropout(self.self_attn(q, q, y, dropout_key=self_key), rate, key1)
        x = x if pre else self.norm1(x)
        y = self.norm2(x) if pre else x
        y = self.multihead_attn(y + pos[None], memory + memory_pos[None], memory, dropout_key=cross_key)
        x = x + dropout(y, rate, key2)
        x = x if pre else self.norm2(x)
        y = self.norm3(x) if pre else x
        y = dropout(_activation(self.config)(self.linear1(y)), rate, hidden_key)
        x = x + dropout(self.linear2(y), rate, key3)
        return x if pre else self.norm3(x)


def _attention(config: ACTConfig, kernel_init: nnx.Initializer, rngs: nnx.Rngs) -> MultiheadAttention:
    return MultiheadAttention(
        config.dim_model,
        config.n_heads,
        dropout=config.dropout,
        out_kernel_init=kernel_init,
        dtype=config.compute_dtype,
        rngs=rngs,
    )


def _activation(config: ACTConfig):
    return jax.nn.relu if config.feedforward_activation == "relu" else partial(jax.nn.gelu, approximate=False)


def sinusoid_table(length: int, d: int) -> Float[np.ndarray, "length d"]:
    """Position embeddings of "Attention is All You Need": sines in even columns, cosines in odd ones."""
    angle = np.arange(length)[:, None] / np.power(10000, 2 * (np.arange(d) // 2) / d)
    return np.where(np.arange(d) % 2 == 0, np.sin(angle), np.cos(angle)).astype(np.float32)


def sinusoid_image(height: int, width: int, d: int) -> Float[np.ndarray, "length channels"]:
    """Position embeddings of a feature map, row by row: the first half of a vector tells y, the second x.

    Positions run from 1/height (1/width) to 1 times 2 pi, as in the original code.
    """
    frequency = np.float32(10000) ** (2 * (np.arange(d, dtype=np.float32) // 2) / np.float32(d))

    def embed(length: int) -> np.ndarray:
        steps = np.arange(1, length + 1, dtype=np.float32)
        angle = (steps / (steps[-1] + np.float32(1e-6)) * np.float32(2 * math.pi))[:, None] / frequency
        return np.stack([np.sin(angle[:, 0::2]), np.cos(angle[:, 1::2])], axis=-1).reshape(length, d)

    y = np.broadcast_to(embed(height)[:, None], (height, width, d))
    x = np.broadcast_to(embed(width)[None], (height, width, d))
    return np.concatenate([y, x], axis=-1).reshape(height * width, 2 * d)
