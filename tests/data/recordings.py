"""Small datasets that tests record for themselves."""

from pathlib import Path
from typing import Any

import numpy as np

from lerobot_jax.data.dataset import LeRobotDataset

FEATURES: dict[str, dict[str, Any]] = {
    "observation.images.top": {
        "dtype": "video",
        "shape": (32, 48, 3),
        "names": ["height", "width", "channels"],
    },
    "observation.state": {"dtype": "float32", "shape": (3,), "names": ["a", "b", "c"]},
    "action": {"dtype": "float32", "shape": (2,), "names": None},
    "next.reward": {"dtype": "float32", "shape": (1,), "names": None},
    "next.done": {"dtype": "bool", "shape": (1,), "names": None},
}


def picture(episode: int, t: int, shape: tuple[int, ...] = (32, 48, 3)) -> np.ndarray:
    """Draw a frame that tells its episode (by brightness) and time (by the place of a bright column)."""
    image = np.full(shape, 40 + 30 * episode, np.uint8)
    image[:, t % shape[1]] = 250
    return image


def record(
    root: Path,
    lengths: tuple[int, ...] = (5, 8, 4),
    features: dict[str, dict[str, Any]] | None = None,
    tasks: tuple[str, str] = ("task 0", "task 1"),
    **settings: Any,
) -> LeRobotDataset:
    """Record episodes of these lengths, with two tasks in turn, and open the dataset."""
    features = FEATURES if features is None else features
    writer = LeRobotDataset.create("test/recorded", fps=10, features=features, root=root, **settings)
    rng = np.random.default_rng(0)
    for episode, length in enumerate(lengths):
        for t in range(length):
            writer.add_frame(
                {"task": tasks[episode % 2]} | {k: _value(rng, f, episode, t) for k, f in features.items()}
            )
        writer.save_episode()
    writer.finalize()
    return LeRobotDataset("test/recorded", root=root)


def _value(rng: np.random.Generator, feature: dict[str, Any], episode: int, t: int) -> Any:
    dtype, shape = feature["dtype"], feature["shape"]
    if dtype in ("image", "video"):
        return picture(episode, t, shape)
    if dtype == "string":
        return f"episode {episode}, frame {t}"
    return rng.normal(10, 3, shape).astype(dtype)
