"""Turn the human Push-T demonstrations of the Diffusion Policy project into a LeRobotDataset.

    python tools/import_pusht.py pusht_cchi_v7_replay.zarr datasets/pusht
    python tools/import_pusht.py pusht_human.npz datasets/pusht_keypoints --keypoints

The result has the features, rate and length of `lerobot/pusht` (206 episodes, 25,650 frames at 10 Hz) or, with
--keypoints, of `lerobot/pusht_keypoints`. The source is the public zarr folder (data/{state,action,img},
meta/episode_ends; needs the package zarr), or an npz file with the arrays state (n, 5), action (n, 2) and
episode_ends. Without images in the source, they are drawn from the states.
"""

import argparse
import sys
from pathlib import Path

import numpy as np

from lerobot_jax.envs.demonstrations import create_pusht_dataset, record_episode
from lerobot_jax.envs.pusht import FastPushTEnv
from lerobot_jax.errors import InputError, reported_on_one_line
from lerobot_jax.progress import progress_bar


def read_source(path: Path) -> dict[str, np.ndarray]:
    """Read state, action, episode_ends and, if there are any, img.

    Raises:
        InputError: naming the file, or the array that it lacks.
    """
    if path.is_dir():
        try:
            import zarr
        except ImportError:
            raise InputError(f"{path} is a zarr folder; reading it needs: pip install zarr") from None
        group = zarr.open_group(path, mode="r")
        names = {
            "state": "data/state",
            "action": "data/action",
            "episode_ends": "meta/episode_ends",
            "img": "data/img",
        }
        arrays = {name: np.asarray(group[key]) for name, key in names.items() if key in group}
    elif path.is_file():
        with np.load(path) as file:
            arrays = {name: file[name] for name in file.files}
    else:
        raise InputError(f"{path}: no such file or folder")
    missing = [name for name in ("state", "action", "episode_ends") if name not in arrays]
    if missing:
        raise InputError(f"{path}: lacks the arrays {missing}")
    return arrays


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("source", type=Path, help="zarr folder or npz file")
    parser.add_argument("root", type=Path, help="folder to create")
    parser.add_argument("--keypoints", action="store_true", help="the T's keypoints instead of images")
    parser.add_argument("--repo-id", default="lerobot/pusht", help="the dataset's name")
    args = parser.parse_args()
    arrays = read_source(args.source)
    writer = create_pusht_dataset(args.repo_id, args.root, args.keypoints)
    env = FastPushTEnv()
    env.reset(seed=0)
    ends = arrays["episode_ends"].astype(int)
    with progress_bar("importing", len(ends), "episode") as bar:
        for start, end in zip([0, *ends[:-1]], ends, strict=True):
            states = arrays["state"][start:end]
            coverages = []
            for state in states:
                env.show(state)
                coverages.append(env.coverage)
            # What an action led to is seen in the next frame; after the last one, only the last frame is known.
            following = np.array(coverages[1:] + coverages[-1:])
            images = arrays["img"][start:end].astype(np.uint8) if "img" in arrays else None
            record_episode(writer, env, states, arrays["action"][start:end], following, images)
            bar.update()
    writer.finalize()
    print(f"{len(ends)} episodes, {writer.info['total_frames']} frames: {args.root}")


if __name__ == "__main__":
    with reported_on_one_line():
        sys.exit(main())
