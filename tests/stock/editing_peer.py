"""What stock LeRobot does (see tests/lerobot_peer.py), and its tools that edit datasets.

$LEROBOT_PYTHON tests/stock/editing_peer.py
"""

import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))

from lerobot.datasets import LeRobotDataset
from lerobot_peer import COMMANDS, Arrays, main


def merge(roots: list[str], output: str) -> Arrays:
    """Merge datasets."""
    from lerobot.datasets import merge_datasets

    merge_datasets([_open(root) for root in roots], "test/merged", output)
    return {}


def split(root: str, splits: dict, output: str) -> Arrays:
    """Split a dataset into folders of `output`."""
    from lerobot.datasets import split_dataset

    split_dataset(_open(root), splits, output)
    return {}


def delete(root: str, episodes: list[int], output: str) -> Arrays:
    """Write a dataset without some episodes."""
    from lerobot.datasets import delete_episodes

    delete_episodes(_open(root), episodes, output)
    return {}


def _open(root: str) -> LeRobotDataset:
    return LeRobotDataset("test/source", root=root, video_backend="pyav")


if __name__ == "__main__":
    commands: dict[str, Any] = COMMANDS
    commands |= {f.__name__: f for f in (merge, split, delete)}
    main()
