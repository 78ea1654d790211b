"""What stock LeRobot makes of a dataset's statistics; run by its own Python for test_statistics.py.

    PYTHON statistics_peer.py ROOT FRAMES OUT

Writes the npz file OUT: `stored/...`, the statistics that it reads of the dataset in the folder ROOT;
`computed/...`, those that it then computes anew; `camera/...`, those of the folder FRAMES, which has a folder of
PNG files for each episode.
"""

import sys
from pathlib import Path

import numpy as np
from lerobot.datasets import LeRobotDataset
from lerobot.datasets.compute_stats import aggregate_stats, compute_episode_stats
from lerobot.datasets.dataset_tools import recompute_stats


def main(root: str, frames: str, out: str) -> None:
    dataset = LeRobotDataset("test/stock", root=root)
    result = flat("stored", dataset.meta.stats)
    result |= flat("computed", recompute_stats(dataset).meta.stats)
    features = {"observation.images.top": {"dtype": "image"}}
    parts = []
    for folder in sorted(Path(frames).iterdir()):
        paths = [str(path) for path in sorted(folder.iterdir())]
        parts.append(compute_episode_stats({"observation.images.top": paths}, features))
    np.savez(out, allow_pickle=False, **result, **flat("camera", aggregate_stats(parts)))


def flat(kind: str, stats: dict) -> dict[str, np.ndarray]:
    return {
        f"{kind}/{key}/{name}": np.asarray(v) for key, values in stats.items() for name, v in values.items()
    }


if __name__ == "__main__":
    main(*sys.argv[1:])
