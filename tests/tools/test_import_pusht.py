import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from lerobot_jax.data.dataset import LeRobotDataset

TOOL = Path(__file__).parents[2] / "tools" / "import_pusht.py"


def arrays() -> dict[str, np.ndarray]:
    rng = np.random.default_rng(0)
    state = rng.uniform(150, 350, (9, 5))
    state[:, 4] = rng.uniform(-3, 3, 9)
    state[3, 2:] = [256, 256, np.pi / 4]  # the second episode's first state is the goal
    images = rng.integers(0, 256, (9, 96, 96, 3)).astype(np.float32)
    return {
        "state": state.astype(np.float32),
        "action": rng.uniform(0, 512, (9, 2)).astype(np.float32),
        "episode_ends": np.array([3, 9]),
        "img": images,
    }


def run(*arguments: object) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, TOOL, *map(str, arguments)], capture_output=True, text=True, check=False
    )


def write_zarr(path: Path, content: dict[str, np.ndarray]) -> None:
    import zarr

    group = zarr.open_group(path, mode="w", zarr_format=2)
    for name, array in content.items():
        key = "meta/episode_ends" if name == "episode_ends" else f"data/{name}"
        group.create_array(key, data=array)


@pytest.mark.parametrize("keypoints", [False, True])
@pytest.mark.parametrize("source", ["demos.npz", "demos.zarr"])
def test_demonstrations_become_a_dataset(tmp_path: Path, source: str, keypoints: bool):
    content = arrays()
    if source.endswith("npz"):
        np.savez(tmp_path / source, **{k: v for k, v in content.items() if k != "img"})
    else:
        write_zarr(tmp_path / source, content)
    result = run(tmp_path / source, tmp_path / "out", *["--keypoints"] * keypoints)
    assert result.returncode == 0, result.stderr
    dataset = LeRobotDataset("lerobot/pusht", tmp_path / "out")
    assert (dataset.num_episodes, len(dataset), dataset.fps) == (2, 9, 10)
    np.testing.assert_array_equal(dataset.columns["action"], content["action"])
    np.testing.assert_array_equal(dataset.columns["observation.state"], content["state"][:, :2])
    assert dataset.columns["next.done"].tolist() == [False, False, True] + [False] * 5 + [True]
    assert not dataset.columns["next.success"].any()  # the goal is never what follows
    if keypoints:
        corners = dataset.columns["observation.environment_state"].reshape(9, 8, 2)
        sides = np.linalg.norm(corners[:, 0] - corners[:, 1], axis=-1)
        np.testing.assert_allclose(sides, sides[0], rtol=1e-4)  # a rigid body
    elif source.endswith("zarr"):
        error = np.abs(dataset[4]["observation.image"] - content["img"][4])
        assert error.mean() < 60  # noise, strongly compressed
    else:
        assert dataset[4]["observation.image"].shape == (96, 96, 3)


def test_mistakes_are_told_on_one_line(tmp_path: Path):
    np.savez(tmp_path / "bad.npz", state=np.zeros((3, 5)))
    for path, message in (
        ("nowhere.npz", "no such file or folder"),
        ("bad.npz", "lacks the arrays ['action', 'episode_ends']"),
    ):
        result = run(tmp_path / path, tmp_path / "out")
        assert result.returncode == 1
        assert message in result.stderr.splitlines()[-1]
