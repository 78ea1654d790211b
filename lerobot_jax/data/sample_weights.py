"""Weights of samples in the training loss: reward-aligned behavior cloning (RA-BC).

A frame counts as far as the task gets on in the chunk that begins there: not at all if the task goes back, fully if
it gets on by more than `kappa`, in between by where its gain lies among all gains (equations 8 and 9 of SARM,
https://arxiv.org/abs/2509.25358). How far the task is, at each frame, comes from a parquet file that LeRobot's
`lerobot.rewards.sarm.compute_rabc_weights` writes. So a weight is a pure function of the frame.

Mirrors `lerobot.utils.sample_weighting` and `lerobot.rewards.sarm.rabc`, number by number. Differences: the weights
of all frames are computed at once; a file that does not belong to the dataset (frames or episodes that it does not
have, a frame twice, infinite progress) is refused; a file beside a dataset in LeRobot's cache is used before one on
the Hub; `hf://datasets/USER/NAME@REVISION/FILE` pins a version.
"""

import dataclasses
import math
import re
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pyarrow as pa
from absl import logging
from jaxtyping import Float, Float32, Int

from lerobot_jax import hub
from lerobot_jax.data import metadata
from lerobot_jax.errors import InputError

SAMPLE_WEIGHT = "sample_weight"
PROGRESS_NAME = "sarm_progress.parquet"
_HUB_URL = "hf://"
_ADVICE = "set sample_weighting.progress_path, or make it with lerobot.rewards.sarm.compute_rabc_weights"


@dataclasses.dataclass(frozen=True)
class SampleWeightingConfig:
    """How much each sample counts in the training loss."""

    type: str = "rabc"
    """rabc: by the progress that the task makes in the chunk; uniform: all the same."""
    progress_path: str | None = None
    """Parquet file with the progress at each frame: a path, or hf://datasets/USER/NAME/FILE; None:
    sarm_progress.parquet of the dataset."""
    head_mode: str = "sparse"
    """Which progress: that in the column progress_<head_mode>; sparse or dense."""
    kappa: float = 0.01
    """Chunks with more progress than this count fully."""
    epsilon: float = 1e-6
    """Keeps divisions from being by zero."""
    extra_params: dict[str, float] = dataclasses.field(default_factory=dict, hash=False)
    """fallback_weight: the weight of frames whose progress is not known; 1 by default."""

    def __post_init__(self):
        if self.type not in ("rabc", "uniform"):
            raise ValueError(f"sample_weighting.type must be rabc or uniform, not '{self.type}'")
        if not math.isfinite(self.kappa):
            raise ValueError(f"sample_weighting.kappa must be finite, it is {self.kappa}")
        if not 0 < self.epsilon < math.inf:
            raise ValueError(f"sample_weighting.epsilon must be positive and finite, it is {self.epsilon}")
        if unknown := sorted(set(self.extra_params) - {"fallback_weight"}):
            raise ValueError(f"sample_weighting.extra_params: there is only fallback_weight, not {unknown}")
        if not 0 <= self.fallback_weight < math.inf:
            raise ValueError(
                "sample_weighting.extra_params: fallback_weight must be finite and not negative, it is "
                f"{self.fallback_weight}"
            )

    @property
    def fallback_weight(self) -> float:
        """The weight of frames whose progress is not known."""
        return self.extra_params.get("fallback_weight", 1.0)

    @property
    def has_local_path(self) -> bool:
        """Whether progress_path is a file of one machine."""
        return self.progress_path is not None and not self.progress_path.startswith(_HUB_URL)


def sample_weights(
    config: SampleWeightingConfig,
    meta: metadata.LeRobotDatasetMetadata,
    chunk_size: int,
    *,
    root: str | None,
    episodes: Sequence[int],
) -> Float32[np.ndarray, " frames"]:
    """Compute the weights of all frames of a dataset, by their index; say what they are like.

    Args:
        config: how they are computed.
        meta: of the dataset.
        chunk_size: over how many frames progress counts.
        root: the folder or URL that the user named for the dataset, if any.
        episodes: those that are trained on, for what is said.

    Raises:
        InputError: naming the file, and what it lacks or has wrong.
    """
    path = _find_progress(config.progress_path, meta, root)
    index, episode, progress = read_progress(path, f"progress_{config.head_mode}", meta)
    gains = progress_gains(index, episode, progress, chunk_size)
    frame_gains = np.full(meta.total_frames, np.nan)
    frame_gains[index] = gains
    weights = rabc_weights(
        frame_gains, *gain_scale(gains, config.epsilon), config.kappa, config.epsilon, config.fallback_weight
    )
    starts, ends = (np.asarray(meta.episodes[f"dataset_{name}_index"]) for name in ("from", "to"))
    used = np.concatenate([np.arange(starts[e], ends[e]) for e in episodes])
    logging.info(
        "%s: weights of samples from %s: %d of %d frames count fully, %d not at all, %.3f in the mean",
        meta.repo_id,
        path,
        np.sum(weights[used] == 1),
        len(used),
        np.sum(weights[used] == 0),
        np.mean(weights[used]),
    )
    if unknown := int(np.isnan(frame_gains[used]).sum()):
        logging.warning(
            "%s: the progress of %d of %d frames is not known; they have the weight %g (fallback_weight)",
            meta.repo_id,
            unknown,
            len(used),
            config.fallback_weight,
        )
    return weights


def _find_progress(path: str | None, meta: metadata.LeRobotDatasetMetadata, root: str | None) -> Path:
    """Find the file: where it is said to be, beside the dataset, or on the Hub."""
    if path is None:
        beside = meta.root / PROGRESS_NAME
        if beside.exists():
            return beside
        if root is not None:
            raise InputError(f"{root.rstrip('/')}/{PROGRESS_NAME}: no such file; {_ADVICE}")
        return hub.fetch(meta.repo_id, "dataset", [PROGRESS_NAME], looked_at=meta.root, advice=_ADVICE) / (
            PROGRESS_NAME
        )
    if not path.startswith(_HUB_URL):
        return Path(path).expanduser()
    found = re.fullmatch(r"hf://datasets/([^/@]+/[^/@]+)(?:@([^/]+))?/(.+)", path)
    if found is None:
        raise InputError(
            f"sample_weighting.progress_path: {path} is not of the form hf://datasets/USER/NAME/FILE"
        )
    return hub.fetch(found[1], "dataset", [found[3]], revision=found[2]) / found[3]


def read_progress(
    path: Path, column: str, meta: metadata.LeRobotDatasetMetadata
) -> tuple[Int[np.ndarray, " n"], Int[np.ndarray, " n"], Float[np.ndarray, " n"]]:
    """Read how far the task is at some frames of a dataset.

    Returns:
        For each row of the file: the frame's index, its episode, its progress (NaN: unknown).

    Raises:
        InputError: naming the file, and what it lacks or has wrong.
    """
    names = metadata.read_parquet_names(path)
    wanted = ["index", "episode_index", column]
    if missing := [name for name in wanted if name not in names]:
        raise InputError(f"{path}: lacks the columns {missing}; it has {names}")
    table = metadata.read_parquet(path, wanted)
    for name in wanted:
        kind = table[name].type
        is_number = pa.types.is_integer(kind) or (name == column and pa.types.is_floating(kind))
        if not is_number:
            raise InputError(
                f"{path}: '{name}' holds {kind}, not {'numbers' if name == column else 'integers'}"
            )
        if name != column and table[name].null_count:
            raise InputError(f"{path}: '{name}' has empty cells")
    index, episode = (table[name].to_numpy().astype(np.int64) for name in wanted[:2])
    progress = table[column].to_numpy().astype(np.float64)  # an empty cell is NaN
    where = f"{path}: row %d %s, so it is not of {meta.repo_id}"
    is_episode = (episode >= 0) & (episode < meta.total_episodes)
    known = np.where(is_episode, episode, 0)
    starts, ends = (np.asarray(meta.episodes[f"dataset_{name}_index"])[known] for name in ("from", "to"))
    if len(bad := np.flatnonzero(~is_episode | (index < starts) | (index >= ends))):
        row = bad[0]
        raise InputError(where % (row, f"is frame {index[row]} in episode {episode[row]}"))
    frames, counts = np.unique(index, return_counts=True)
    if len(twice := frames[counts > 1]):
        raise InputError(f"{path}: frame {twice[0]} is there {counts.max()} times")
    if np.isinf(progress).any():
        raise InputError(f"{path}: '{column}' is infinite in row {np.flatnonzero(np.isinf(progress))[0]}")
    return index, episode, progress


def progress_gains(
    index: Int[np.ndarray, " n"],
    episode: Int[np.ndarray, " n"],
    progress: Float[np.ndarray, " n"],
    chunk_size: int,
) -> Float[np.ndarray, " n"]:
    """Tell how much progress there is in the chunk that begins at each frame; NaN where that is not known.

    A chunk that reaches beyond the episode's last frame in the file ends there.
    """
    if len(index) == 0:
        return progress
    progress_at = np.full(index.max() + 1, np.nan)
    progress_at[index] = progress
    last = np.zeros(episode.max() + 1, np.int64)
    np.maximum.at(last, episode, index)
    return progress_at[np.minimum(index + chunk_size, last[episode])] - progress


def gain_scale(gains: Float[np.ndarray, " n"], epsilon: float) -> tuple[float, float]:
    """Give the mean of the known gains, at least 0, and their deviation, at least `epsilon`."""
    known = gains[~np.isnan(gains)]
    if len(known) == 0:
        return 0.0, epsilon
    return max(float(np.mean(known)), 0.0), max(float(np.std(known)), epsilon)


def rabc_weights(
    gains: Float[np.ndarray, " frames"],
    mean: float,
    deviation: float,
    kappa: float,
    epsilon: float,
    fallback: float,
) -> Float32[np.ndarray, " frames"]:
    """Weigh frames by their gains (equations 8 and 9 of SARM), in float32 as LeRobot does.

    Args:
        gains: of each frame; NaN: not known.
        mean: see `gain_scale`.
        deviation: see `gain_scale`.
        kappa: larger gains count fully.
        epsilon: see `SampleWeightingConfig`.
        fallback: the weight where the gain is not known.
    """
    gains = gains.astype(np.float32)
    between = np.clip((gains - (mean - 2 * deviation)) / (4 * deviation + epsilon), 0.0, 1.0)
    weights = np.where(gains >= 0, between, np.float32(0))
    weights[gains > kappa] = 1
    weights[np.isnan(gains)] = fallback
    return weights.astype(np.float32)
