"""Weights of samples: LeRobot's numbers in awkward cases, where the file comes from, what can be wrong with it."""

import logging
from pathlib import Path
from typing import Any

import huggingface_hub.constants
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from lerobot_jax.data.dataset import LeRobotDataset
from lerobot_jax.data.sample_weights import PROGRESS_NAME, SampleWeightingConfig, sample_weights
from lerobot_jax.errors import InputError
from tests.data.recordings import FEATURES, record

LENGTHS = (5, 8, 4)
NAN = float("nan")
# Unknown at frame 2; falls; the same for a chunk (8 -> 9); exactly kappa=0.25 (10 - 8)
SPARSE = [
    0.0,
    0.25,
    NAN,
    0.5,
    0.75,
    0.5,
    0.25,
    0.25,
    0.375,
    0.375,
    0.625,
    1.0,
    0.9375,
    0.0,
    0.125,
    0.25,
    0.1875,
]
COLUMNS = {
    "index": np.arange(17),
    "episode_index": np.repeat([0, 1, 2], LENGTHS),
    "progress_sparse": np.array(SPARSE, np.float32),
    "progress_flat": np.full(17, 0.5, np.float32),
    "progress_back": -np.arange(17, dtype=np.float32),
    "progress_unknown": np.full(17, NAN),
}
LOW, HALF = 0.343403488, 0.499999851
# (chunk size, settings, what stock LeRobot 0.6.1 gives each frame); the file lacks frame 15
RECORDED: dict[str, tuple[int, dict[str, Any], list[float]]] = {
    "default": (2, {}, [1, 1, 1, 1, LOW, 0, 1, 1, 1, 1, 1, 0, LOW, 1, 1, 1, LOW]),
    "kappa is a gain": (
        2,
        {"kappa": 0.25},
        [
            1,
            0.64499563,
            1,
            0.64499563,
            LOW,
            0,
            0.494199544,
            0.494199544,
            0.64499563,
            1,
            1,
            0,
            LOW,
            1,
            0.418801516,
            1,
            LOW,
        ],
    ),
    "kappa just below": (
        2,
        {"kappa": 0.24},
        [1, 1, 1, 1, LOW, 0, 0.494199544, 0.494199544, 1, 1, 1, 0, LOW, 1, 0.418801516, 1, LOW],
    ),
    "kappa below zero": (2, {"kappa": -0.07}, [1, 1, 1, 1, 1, 0, *[1] * 11]),
    "another fallback": (
        2,
        {"kappa": 0.3, "epsilon": 0.1, "extra_params": {"fallback_weight": 0.5}},
        [
            0.5,
            0.575562298,
            0.5,
            0.575562298,
            0.30643636,
            0,
            0.440999299,
            0.440999299,
            0.575562298,
            1,
            1,
            0,
            0.30643636,
            0.5,
            0.373717844,
            0.5,
            0.30643636,
        ],
    ),
    "longer than episodes": (
        9,
        {"kappa": 0.5},
        [
            1,
            0.653584421,
            1,
            0.428826123,
            0.204067782,
            0.597394884,
            1,
            1,
            1,
            1,
            0.48501569,
            0,
            0.204067782,
            0.372636527,
            0.260257393,
            1,
            0.204067782,
        ],
    ),
    "no progress": (2, {"head_mode": "flat"}, [*[0.400000006] * 13, 1, 0.400000006, 1, 0.400000006]),
    "backwards": (2, {"head_mode": "back"}, [0, 0, 0, 0, HALF, *[0] * 7, HALF, 1, 0, 1, HALF]),
    "nothing is known": (2, {"head_mode": "unknown"}, [1] * 17),
    "nothing counts": (
        2,
        {"head_mode": "unknown", "extra_params": {"fallback_weight": 0.0}},
        [0] * 17,
    ),
}


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> LeRobotDataset:
    features = {key: FEATURES[key] for key in ("observation.state", "action")}
    return record(tmp_path_factory.mktemp("data") / "dataset", LENGTHS, features)


def write(path: Path, **changes: Any) -> Path:
    """Write the file of the cases above, rows in no order; what is changed to None is left out."""
    rows = np.random.default_rng(0).permutation(17)
    columns = {name: column[rows[rows != 15]] for name, column in COLUMNS.items()} | changes
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.table({name: column for name, column in columns.items() if column is not None}), path)
    return path


def weigh(
    dataset: LeRobotDataset, path: Path | str | None, chunk_size: int = 2, **settings: Any
) -> np.ndarray:
    config = SampleWeightingConfig(progress_path=None if path is None else str(path), **settings)
    return sample_weights(config, dataset.meta, chunk_size, root=str(dataset.root), episodes=range(3))


@pytest.mark.parametrize("case", RECORDED)
def test_weights_are_what_lerobot_computes(dataset: LeRobotDataset, tmp_path: Path, case: str):
    chunk_size, settings, expected = RECORDED[case]
    weights = weigh(dataset, write(tmp_path / "progress.parquet"), chunk_size, **settings)
    assert weights.dtype == np.float32
    np.testing.assert_allclose(weights, expected, rtol=1e-7, atol=0)


def test_a_sample_has_the_weight_of_its_frame(dataset: LeRobotDataset):
    weights = np.linspace(0, 1, 17, dtype=np.float32)
    some = LeRobotDataset(
        "test/recorded", dataset.root, episodes=[2, 1], added_columns={"sample_weight": weights}
    )
    batch = some.read(np.array([11, 0, 5]))
    np.testing.assert_array_equal(batch["sample_weight"], weights[batch["index"]])
    assert set(some.read(np.array([3]), ["sample_weight"])) == {"sample_weight"}


def test_frames_of_unknown_progress_are_counted(dataset: LeRobotDataset, tmp_path: Path, caplog):
    """Frame 2 has none; frame 15, where a chunk from 13 ends, is not in the file."""
    caplog.set_level(logging.INFO)
    config = SampleWeightingConfig(
        progress_path=str(write(tmp_path / "p.parquet")), extra_params={"fallback_weight": 0.5}
    )
    for episodes, unknown in ((range(3), "4 of 17"), ([0, 1], "2 of 13")):
        caplog.clear()
        sample_weights(config, dataset.meta, 2, root=None, episodes=episodes)
        assert f"progress of {unknown} frames is not known; they have the weight 0.5" in caplog.text
    caplog.clear()
    full = write(tmp_path / "full.parquet", **COLUMNS)
    weigh(dataset, full, head_mode="flat")
    assert "0 of 17 frames count fully, 0 not at all, 0.400 in the mean" in caplog.text
    assert "not known" not in caplog.text


def test_the_file_lies_beside_the_dataset_or_on_the_hub(dataset: LeRobotDataset, tmp_path: Path, monkeypatch):
    with pytest.raises(
        InputError, match=rf"{dataset.root}/{PROGRESS_NAME}: no such file; set sample_weighting"
    ):
        weigh(dataset, None)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    config = SampleWeightingConfig()
    with pytest.raises(
        InputError, match=r"'test/recorded' was not found in .*/dataset, .*; set sample_weighting"
    ):
        sample_weights(config, dataset.meta, 2, root=None, episodes=range(3))

    commits = ("a" * 40, "b" * 40)
    for commit, value in zip(commits, (0.0, 0.25), strict=True):
        folder = tmp_path / f"hub/datasets--test--recorded/snapshots/{commit}"
        rising = np.where(COLUMNS["index"] % 2, value, 0.0)
        write(folder / PROGRESS_NAME, **COLUMNS | {"progress_sparse": rising})
        write(folder / "more/other.parquet", **COLUMNS | {"progress_sparse": 2 * rising})
    refs = tmp_path / "hub/datasets--test--recorded/refs"
    refs.mkdir()
    (refs / "main").write_text(commits[0])
    flat = sample_weights(config, dataset.meta, 1, root=None, episodes=range(3))
    assert (flat == flat[0]).all()
    url = "hf://datasets/test/recorded"
    np.testing.assert_array_equal(weigh(dataset, f"{url}/{PROGRESS_NAME}", 1), flat)
    other = weigh(dataset, f"{url}@{commits[1]}/more/other.parquet", 1)
    np.testing.assert_array_equal(
        other == 1, (COLUMNS["index"] % 2 == 0) & ~np.isin(COLUMNS["index"], (4, 12, 16))
    )
    with pytest.raises(InputError, match=r"'test/recorded' was not found in .*"):
        weigh(dataset, f"{url}/absent.parquet")
    with pytest.raises(
        InputError, match=r"hf://models/a/b/c is not of the form hf://datasets/USER/NAME/FILE"
    ):
        weigh(dataset, "hf://models/a/b/c")

    beside = write(dataset.root / PROGRESS_NAME)
    try:
        _, _, expected = RECORDED["default"]
        np.testing.assert_allclose(weigh(dataset, None), expected, rtol=1e-7)
        np.testing.assert_array_equal(
            sample_weights(config, dataset.meta, 2, root=None, episodes=range(3)), weigh(dataset, None)
        )
    finally:
        beside.unlink()


N = np.arange(16)
EPISODES = np.repeat([0, 1, 2], (5, 8, 3))
FAULTS: dict[str, dict[str, Any]] = {
    r"lacks the columns \['progress_sparse'\]; it has \['index', 'episode_index', 'progress_flat'": {
        "progress_sparse": None
    },
    r"lacks the columns \['index', 'episode_index'\]; it has": {"index": None, "episode_index": None},
    r"'progress_sparse' holds string, not numbers": {"progress_sparse": ["x"] * 16},
    r"'index' holds double, not integers": {"index": N.astype(float)},
    r"'index' has empty cells": {"index": pa.array([None, *range(15)], pa.int64())},
    r"row 3 is frame 99 in episode 0, so it is not of test/recorded": {
        "index": np.where(N == 3, 99, N),
        "episode_index": EPISODES,
    },
    r"row 5 is frame 5 in episode 0, so it is not of": {
        "index": N,
        "episode_index": np.where(N == 5, 0, EPISODES),
    },
    r"row 15 is frame 15 in episode 3, so it is not of": {
        "index": N,
        "episode_index": np.where(N == 15, 3, EPISODES),
    },
    r"frame 6 is there 2 times": {"index": np.where(N == 7, 6, N), "episode_index": EPISODES},
    r"'progress_sparse' is infinite in row 2": {"progress_sparse": np.where(N == 2, np.inf, 0.5)},
}


@pytest.mark.parametrize("message", FAULTS)
def test_a_file_that_does_not_fit_is_refused(dataset: LeRobotDataset, tmp_path: Path, message: str):
    path = write(tmp_path / "progress.parquet", **FAULTS[message])
    with pytest.raises(InputError, match=rf"{path}: .*{message}"):
        weigh(dataset, path)


def test_a_missing_or_damaged_file_is_named(dataset: LeRobotDataset, tmp_path: Path):
    with pytest.raises(InputError, match=r"/nowhere.parquet: no such file"):
        weigh(dataset, tmp_path / "nowhere.parquet")
    (tmp_path / "damaged.parquet").write_text("no parquet")
    with pytest.raises(InputError, match=r"damaged.parquet: damaged or incomplete parquet file"):
        weigh(dataset, tmp_path / "damaged.parquet")


WRONG: dict[str, dict[str, Any]] = {
    r"type must be rabc or uniform, not 'best'": {"type": "best"},
    r"kappa must be finite, it is nan": {"kappa": NAN},
    r"epsilon must be positive and finite, it is 0.0": {"epsilon": 0.0},
    r"extra_params: there is only fallback_weight, not \['fallback'\]": {"extra_params": {"fallback": 1.0}},
    r"extra_params: fallback_weight must be finite and not negative, it is -1.0": {
        "extra_params": {"fallback_weight": -1.0}
    },
}


@pytest.mark.parametrize("message", WRONG)
def test_wrong_settings_are_named(message: str):
    with pytest.raises(ValueError, match=f"sample_weighting.{message}"):
        SampleWeightingConfig(**WRONG[message])
