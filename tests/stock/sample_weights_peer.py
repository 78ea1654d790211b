"""What stock LeRobot makes of weights of samples; run by its own Python for test_sample_weights.py.

    PYTHON sample_weights_peer.py FOLDER

FOLDER holds `cases.json` (name -> settings of sample_weighting, and a chunk size), a policy (`policy/`) and a batch
with the latent's noise (`batch.npz`) that it is trained with for a step by the settings of the case "step". Writes
FOLDER/out.npz.
"""

import json
import sys
from pathlib import Path
from types import SimpleNamespace
from unittest import mock

import numpy as np
import torch
from accelerate import Accelerator
from lerobot.configs import PreTrainedConfig
from lerobot.policies.factory import get_policy_class, make_pre_post_processors
from lerobot.scripts.lerobot_train import update_policy
from lerobot.utils.logging_utils import AverageMeter, MetricsTracker
from lerobot.utils.sample_weighting import SampleWeightingConfig, make_sample_weighter


def main(folder: Path) -> None:
    cases = json.loads((folder / "cases.json").read_text())
    result = {}
    for name, case in cases.items():
        result[f"{name}/weights"] = weigh(**case)
    settings = cases["step"]["settings"]
    result |= {f"step/{key}": value for key, value in step(folder, settings).items()}
    np.savez(folder / "out.npz", **result)


def weigh(settings: dict, chunk_size: int, num_frames: int) -> np.ndarray:
    """Give each frame's weight, as it is before a batch's weights are made to sum to its size."""
    policy = SimpleNamespace(config=SimpleNamespace(chunk_size=chunk_size))
    weighter = make_sample_weighter(SampleWeightingConfig(**settings), policy, torch.device("cpu"))
    stats = [weighter.compute_batch_weights({"index": torch.tensor([i])})[1] for i in range(num_frames)]
    return np.array([each["mean_weight"] for each in stats])


def step(folder: Path, settings: dict) -> dict[str, np.ndarray]:
    """Take a training step; give the metrics and the gradients.

    This policy has no losses of single samples in stock LeRobot; they are those of batches of one.
    """
    config = PreTrainedConfig.from_pretrained(folder / "policy")
    policy = get_policy_class(config.type).from_pretrained(folder / "policy", config=config, strict=True)
    pre, _ = make_pre_post_processors(config, pretrained_path=str(folder / "policy"))
    arrays = {key: torch.from_numpy(value) for key, value in np.load(folder / "batch.npz").items()}
    noise = arrays.pop("noise")
    whole_loss = policy.forward

    def losses_of_samples(batch: dict, reduction: str):
        assert reduction == "none"
        losses = []
        for i, row in enumerate(noise):
            sample = {k: v[i : i + 1] for k, v in batch.items() if isinstance(v, torch.Tensor)}
            with mock.patch.object(torch, "randn_like", lambda _, row=row: row[None]):
                losses.append(whole_loss(sample)[0])
        return torch.stack(losses), {}

    gradients = {}

    class Watch:
        """A context around the optimizer's step that looks at the gradients."""

        def __enter__(self):
            gradients.update({k: p.grad.numpy().copy() for k, p in policy.named_parameters()})

        def __exit__(self, *_: object): ...

    policy.forward = losses_of_samples
    accelerator = Accelerator(cpu=True)
    meters = {key: AverageMeter(key) for key in ("loss", "grad_norm", "lr", "update_s")}
    tracker = MetricsTracker(len(noise), 100, 10, meters)
    _, metrics = update_policy(
        tracker,
        policy,
        pre(arrays),
        torch.optim.SGD(policy.parameters(), 1.0),
        0.0,
        accelerator,
        lock=Watch(),
        sample_weighter=make_sample_weighter(SampleWeightingConfig(**settings), policy, torch.device("cpu")),
    )
    found = {f"metrics/{key}": np.array(value) for key, value in metrics.items()}
    found |= {"metrics/loss": np.array(tracker.loss.val)}
    return found | {f"gradients/{key}": value for key, value in gradients.items()}


if __name__ == "__main__":
    main(Path(sys.argv[1]))
