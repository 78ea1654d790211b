"""What stock LeRobot makes of relative actions; run by its own Python for test_target_statistics.py.

    PYTHON target_statistics_peer.py DATASET EXCLUDED_JOINT BATCH OUT POLICY ...

BATCH is an npz file with a batch of observations, later states, and action chunks. Writes the npz file OUT.
"""

import sys
from pathlib import Path

import numpy as np
import torch
from lerobot.configs import PreTrainedConfig
from lerobot.datasets import LeRobotDataset
from lerobot.datasets.compute_stats import compute_relative_action_stats
from lerobot.policies.factory import get_policy_class, make_pre_post_processors

OBSERVATION = ("observation.state", "observation.environment_state")


def main(root: str, excluded: str, batch_file: str, out: str, *folders: str) -> None:
    arrays = {key: torch.from_numpy(value) for key, value in np.load(batch_file).items()}
    result = {}
    dataset = LeRobotDataset("test/stock", root=root)
    chunk_size = arrays["action"].shape[1]
    for name, joints in (("all", []), ("excluded", [excluded])):
        stats = compute_relative_action_stats(
            dataset.hf_dataset, dataset.meta.features, chunk_size, exclude_joints=joints
        )
        result |= {f"stats/{name}/{key}": value for key, value in stats.items()}
    for folder in folders:
        try:
            found = run(folder, arrays)
        except Exception as error:
            found = {"error": np.array(f"{type(error).__name__}: {error}")}
        result |= {f"{Path(folder).name}/{key}": np.asarray(value) for key, value in found.items()}
    np.savez(out, **result)


@torch.no_grad()
def run(folder: str, arrays: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Preprocess a training batch; predict a chunk; select actions one by one while the state moves."""
    config = PreTrainedConfig.from_pretrained(folder)
    policy = get_policy_class(config.type).from_pretrained(folder, config=config, strict=True).eval()
    pre, post = make_pre_post_processors(config, pretrained_path=folder)
    observation = {key: arrays[key] for key in OBSERVATION}
    seen = pre({**observation, "action": arrays["action"]})
    found = {f"preprocessed/{key}": seen[key] for key in (*OBSERVATION, "action")}
    found["chunk"] = post(policy.predict_action_chunk(pre(dict(observation))))
    policy.reset()
    steps = [
        post(policy.select_action(pre({**observation, "observation.state": state})))
        for state in arrays["later_states"]
    ]
    return found | {"selected": torch.stack(steps)}


if __name__ == "__main__":
    main(*sys.argv[1:])
