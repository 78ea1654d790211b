"""Codes for chunks of actions: a VQ-VAE with two codebooks, the second for what the first leaves.

Mirrors `VqVae` of `lerobot.policies.vqbet.modeling_vqbet`, and of `vqbet_utils`, which is Phil Wang's
vector-quantize-pytorch, what VQ-BeT uses. Papers: "Neural Discrete Representation Learning"
(https://arxiv.org/abs/1711.00937), whose appendix A.1 are the moving averages, and "SoundStream"
(https://arxiv.org/abs/2107.03312), whose algorithm 1 is the residual quantizer.

As in LeRobot, cluster sizes begin at 0. So in the first steps, codes to which nothing was assigned are huge.
"""

import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int, PRNGKeyArray

from lerobot_jax.nn.linear import Linear
from lerobot_jax.nn.sequential import Sequential
from lerobot_jax.nn.variables import Buffer, Counter, Progress
from lerobot_jax.policies.vqbet.config import VQBeTConfig

NUM_CODEBOOKS = 2
DECAY = 0.8  # of the moving averages
EPSILON = 1e-5
KMEANS_STEPS = 10
EXACT = jax.lax.Precision.HIGHEST  # codes are chosen by differences of large numbers


class MLP(Sequential):
    """Linear layers with ReLU between them."""

    def __init__(self, features: int, *widths: int, rngs: nnx.Rngs):
        layers = []
        for before, width in zip((features, *widths[:-1]), widths, strict=True):
            layers += [jax.nn.relu, Linear(before, width, rngs=rngs)]
        super().__init__(layers[1:])


class Quantized(NamedTuple):
    """What vectors become."""

    vectors: Float[Array, "n d"]
    codes: Int[Array, "n codebooks"]
    commitment: Float[Array, " n"]  # how far they were from their codes; 0 unless in training


class VqVae(nnx.Module):
    """Turns chunks of actions into codes, and codes into chunks."""

    def __init__(self, config: VQBeTConfig, *, rngs: nnx.Rngs):
        d, hidden, chunk = config.vqvae_embedding_dim, config.vqvae_enc_hidden_dim, config.action_chunk_size
        size = chunk * config.action_feature.shape[0]
        self.discretized = Progress(jnp.zeros((), bool))
        self.optimized_steps = Counter(jnp.zeros((), jnp.int32))
        self.vq_layer = ResidualVQ(config, rngs=rngs)
        self.encoder = MLP(size, hidden, hidden, d, rngs=rngs)
        self.decoder = MLP(d, hidden, hidden, size, rngs=rngs)

    def reconstruct(
        self, chunks: Float[Array, "n size"], train: bool, key: PRNGKeyArray
    ) -> tuple[Float[Array, "n size"], Quantized]:
        """Encode and decode chunks; in training, the codebooks learn from them."""
        quantized = self.vq_layer(self.encoder(chunks), train, key)
        return self.decoder(quantized.vectors), quantized

    def find_codes(self, chunks: Float[Array, "n size"]) -> Int[Array, "n codebooks"]:
        """Give the codes of chunks."""
        return self.vq_layer(self.encoder(chunks), False, None).codes

    def decode(self, codes: Int[Array, "n codebooks"]) -> Float[Array, "n size"]:
        """Give the chunks that codes stand for."""
        return self.decoder(sum(book.embed[0, codes[:, i]] for i, book in enumerate(self.vq_layer.codebooks)))

    def count_step(self, num_steps: int) -> None:
        """Count a step of training; after `num_steps`, the codes are settled."""
        self.optimized_steps[...] = self.optimized_steps[...] + 1
        is_last = self.optimized_steps[...] >= num_steps
        self.discretized[...] = is_last
        self.vq_layer.freeze_codebook[...] = is_last


class ResidualVQ(nnx.Module):
    """Approximates vectors by a code of the first codebook, plus one of the second for the rest."""

    def __init__(self, config: VQBeTConfig, *, rngs: nnx.Rngs):
        self.freeze_codebook = Progress(jnp.zeros((), bool))
        self.layers = nnx.List([VectorQuantize(config, rngs=rngs) for _ in range(NUM_CODEBOOKS)])

    @property
    def codebooks(self) -> list["EuclideanCodebook"]:
        return [layer._codebook for layer in self.layers]

    def __call__(self, x: Float[Array, "n d"], train: bool, key: PRNGKeyArray | None) -> Quantized:
        """Quantize vectors; in training, with straight-through gradients, and the codebooks learn.

        Args:
            x: the vectors.
            train: whether codebooks that are not frozen yet learn from them.
            key: with `vqvae_kmeans_init`, draws from which vectors the clusters begin; None: they are there.
        """
        total, rest, commitment, codes = jnp.zeros_like(x), x, jnp.zeros(len(x)), []
        keys = [None] * NUM_CODEBOOKS if key is None else jax.random.split(key, NUM_CODEBOOKS)
        for book, book_key in zip(self.codebooks, keys, strict=True):
            quantized, code = book(rest, train, book_key)
            if train:
                commitment += jnp.square(quantized - rest).mean(axis=1)
                quantized = rest + jax.lax.stop_gradient(quantized - rest)
            total, rest = total + quantized, rest - jax.lax.stop_gradient(quantized)
            codes.append(code)
        return Quantized(total, jnp.stack(codes, axis=1), commitment)


class VectorQuantize(nnx.Module):
    """Holds a codebook, under LeRobot's name for it."""

    def __init__(self, config: VQBeTConfig, *, rngs: nnx.Rngs):
        self._codebook = EuclideanCodebook(config, rngs=rngs)


class EuclideanCodebook(nnx.Module):
    """Codes that follow the mean of what is assigned to them."""

    def __init__(self, config: VQBeTConfig, *, rngs: nnx.Rngs):
        num, d = config.vqvae_n_embed, config.vqvae_embedding_dim
        bound = math.sqrt(6 / (num * d))  # kaiming_uniform_, to which all this is one input
        embed = jax.random.uniform(rngs.params(), (1, num, d), jnp.float32, -bound, bound)
        self.has_kmeans_init = config.vqvae_kmeans_init
        self.initted = Buffer(jnp.full(1, 0.0 if self.has_kmeans_init else 1.0))
        self.cluster_size = Buffer(jnp.zeros((1, num)))
        self.embed_avg = Buffer(embed)
        self.embed = Buffer(jnp.copy(embed))

    def __call__(
        self, x: Float[Array, "n d"], train: bool, key: PRNGKeyArray | None
    ) -> tuple[Float[Array, "n d"], Int[Array, " n"]]:
        """Give the nearest code of each vector, and its number; in training, move the codes first assigned."""
        x = jax.lax.stop_gradient(x)
        if self.has_kmeans_init and key is not None:
            self._start_from(x, key)
        embed = self.embed[0]
        distance = jnp.sqrt(
            jnp.square(x).sum(1, keepdims=True)
            + jnp.square(embed).sum(1)[None]
            - 2 * jnp.matmul(x, embed.T, precision=EXACT)
        )
        # A vector that is its code may be at a distance of sqrt(-tiny): argmax takes the first NaN, as PyTorch's.
        code = jnp.argmax(-distance, axis=1)
        if train:
            self._follow(x, jax.nn.one_hot(code, len(embed)))
        return embed[code], code

    def _follow(self, x: Float[Array, "n d"], assigned: Float[Array, "n codes"]) -> None:
        """Move the codes towards the means of the vectors that are assigned to them."""
        num, sums = assigned.sum(0), jnp.matmul(assigned.T, x, precision=EXACT)
        size = self.cluster_size[...] + (1 - DECAY) * (num[None] - self.cluster_size[...])
        average = self.embed_avg[...] + (1 - DECAY) * (sums[None] - self.embed_avg[...])
        total = size.sum()
        smooth = (size + EPSILON) / (total + size.size * EPSILON) * total  # Laplace: none is 0
        self.cluster_size[...], self.embed_avg[...] = size, average
        self.embed[...] = average / smooth[..., None]

    def _start_from(self, x: Float[Array, "n d"], key: PRNGKeyArray) -> None:
        """Let the codes be the centres of clusters, unless they are already."""
        before = tuple(v[...] for v in (self.initted, self.cluster_size, self.embed_avg, self.embed))

        def start():
            means, sizes = kmeans(x, self.embed.shape[1], key)
            return jnp.ones(1), sizes[None], (means * sizes[:, None])[None], means[None]

        after = jax.lax.cond(self.initted[0] == 0, start, lambda: before)
        self.initted[...], self.cluster_size[...], self.embed_avg[...], self.embed[...] = after


def kmeans(
    x: Float[Array, "n d"], num: int, key: PRNGKeyArray
) -> tuple[Float[Array, "num d"], Float[Array, " num"]]:
    """Find `num` clusters of vectors, beginning from some of them; give the centres and the sizes."""
    means = x[jax.random.choice(key, len(x), (num,), replace=len(x) < num)]

    def move(means: Array, _: None) -> tuple[Array, Array]:
        distance = jnp.square(x[:, None] - means[None]).sum(-1)  # n num
        assigned = jax.nn.one_hot(jnp.argmin(distance, axis=1), num)
        sizes = assigned.sum(0)
        sums = jnp.matmul(assigned.T, x, precision=EXACT)
        return jnp.where(sizes[:, None] > 0, sums / jnp.maximum(sizes, 1)[:, None], means), sizes

    means, sizes = jax.lax.scan(move, means, None, length=KMEANS_STEPS)
    return means, sizes[-1]
