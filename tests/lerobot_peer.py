"""What stock LeRobot does, for tests marked `lerobot`: run by its own Python, talks through files.

    $LEROBOT_PYTHON tests/lerobot_peer.py COMMAND ARGUMENTS.json

Writes `result.npz` (and what else a command says) beside the arguments.
"""

import json
import sys
from pathlib import Path

import numpy as np
import torch
from lerobot.configs import PreTrainedConfig
from lerobot.datasets import LeRobotDataset
from lerobot.policies.factory import get_policy_class, make_pre_post_processors


def write_dataset(frames: str, features: dict, root: str, vcodec: str = "libsvtav1") -> dict:
    """Record the frames of an npz file: one array a feature, `episode_ends`, `tasks`."""
    from lerobot.configs import RGBEncoderConfig

    arrays = np.load(frames)
    features = {k: {**f, "shape": tuple(f["shape"])} for k, f in features.items()}
    dataset = LeRobotDataset.create(
        "test/stock", 10, features, root=root, rgb_encoder=RGBEncoderConfig(vcodec=vcodec)
    )
    start = 0
    for end, task in zip(arrays["episode_ends"], arrays["tasks"], strict=True):
        for t in range(start, end):
            dataset.add_frame({"task": str(task)} | {key: arrays[key][t] for key in features})
        dataset.save_episode()
        start = end
    dataset.finalize()
    return {}


def read_dataset(
    root: str, episodes: list | None, delta_timestamps: dict | None, eval_split: float = 0.0
) -> dict:
    """Read every item of a dataset; images come channel-last and uint8."""
    dataset = LeRobotDataset(
        "test/ours",
        root=root,
        episodes=episodes,
        delta_timestamps=delta_timestamps or None,
        return_uint8=True,
        video_backend="pyav",
    )
    items = [dataset[i] for i in range(len(dataset))]
    result = {}
    for key, first in items[0].items():
        if isinstance(first, str):
            result[key] = np.array([item[key] for item in items])
            continue
        values = torch.stack([item[key] for item in items])
        if key in dataset.meta.camera_keys:
            values = values if values.dtype == torch.uint8 else (values * 255).round().to(torch.uint8)
            values = values.movedim(-3, -1)
        result[key] = values.numpy()
    for key, stats in dataset.meta.stats.items():
        for name, value in stats.items():
            result[f"stats/{key}/{name}"] = value
    return result


def act(folder: str, observations: str, steps: int) -> dict:
    """Load a policy folder; give its chunk and its actions over some steps, in the environment's units."""
    config = PreTrainedConfig.from_pretrained(folder)
    config.device = "cpu"
    policy = get_policy_class(config.type).from_pretrained(folder, config=config, strict=True)
    policy.eval()
    pre, post = make_pre_post_processors(config, pretrained_path=folder)
    arrays = {k: torch.from_numpy(v) for k, v in np.load(observations).items()}  # step b ...
    policy.reset()
    with torch.no_grad():
        first = pre({k: v[0].clone() for k, v in arrays.items()})
        chunk = post(policy.predict_action_chunk(first)).numpy()
        policy.reset()
        actions = [
            post(policy.select_action(pre({k: v[t].clone() for k, v in arrays.items()})))
            for t in range(steps)
        ]
    return {"chunk": chunk, "actions": torch.stack(actions).numpy()}


def initialize(config: dict, folder: str) -> dict:
    """Make a new policy with LeRobot's own initialization; give every parameter's mean and standard deviation."""
    (Path(folder) / "config.json").write_text(json.dumps(config))
    config = PreTrainedConfig.from_pretrained(folder)
    config.device = "cpu"
    torch.manual_seed(0)
    policy = get_policy_class(config.type)(config)
    state = {k: v.float() for k, v in policy.state_dict().items()}
    return {
        k: np.array([v.mean(), v.std() if v.numel() > 1 else 0.0, v.abs().max()]) for k, v in state.items()
    }


COMMANDS = {f.__name__: f for f in (write_dataset, read_dataset, act, initialize)}

if __name__ == "__main__":
    arguments = Path(sys.argv[2])
    result = COMMANDS[sys.argv[1]](**json.loads(arguments.read_text()))
    np.savez(arguments.with_name("result.npz"), **result)
