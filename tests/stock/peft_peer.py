"""Stock LeRobot's side of tests/stock/test_peft.py: policies with PEFT's adapters.

    PYTHON peft_peer.py ADAPTERS DATASET OBSERVATIONS OUT

Loads a folder of adapters with the policy that they are on, by LeRobot's `make_policy`, and writes the chunk of
actions for the observations: `adapted` with the adapters beside the weights, `merged` after PEFT has merged them.
"""

import sys

import numpy as np
import torch
from lerobot.configs import PreTrainedConfig
from lerobot.datasets import LeRobotDatasetMetadata
from lerobot.policies.factory import make_policy, make_pre_post_processors
from peft import PeftModel


@torch.no_grad()
def main(adapters: str, dataset: str, observations: str, out: str) -> None:
    config = PreTrainedConfig.from_pretrained(adapters)
    config.pretrained_path, config.device = adapters, "cpu"
    policy = make_policy(config, ds_meta=LeRobotDatasetMetadata("test/recorded", root=dataset))
    assert isinstance(policy, PeftModel)
    policy.eval()
    pre, post = make_pre_post_processors(config, pretrained_path=adapters)
    arrays = {key: torch.from_numpy(value) for key, value in np.load(observations).items()}
    results = {"adapted": post(policy.predict_action_chunk(pre(dict(arrays))))}
    merged = policy.merge_and_unload()
    results["merged"] = post(merged.predict_action_chunk(pre(dict(arrays))))
    np.savez(out, **{key: value.numpy() for key, value in results.items()})


if __name__ == "__main__":
    main(*sys.argv[1:])
