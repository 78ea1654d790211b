"""What stock LeRobot computes for a policy's folder; run by the Python of its own environment, not imported here.

    PYTHON stock_lerobot.py FOLDER CERTIFICATE OUT

CERTIFICATE is a safetensors file with raw observations and noise. Writes the safetensors file OUT:
`preprocessed/<key>`, `chunk` (normalized actions) and `action` (in the robot's units). Weights are loaded strictly:
a missing or a left-over key is an error.
"""

import json
import sys
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from lerobot.configs import PreTrainedConfig
from lerobot.policies.factory import get_policy_class, make_pre_post_processors
from safetensors import safe_open
from safetensors.torch import save_file


def main(folder: str, certificate: str, out: str) -> None:
    with safe_open(certificate, framework="pt") as file:
        given = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
        metadata = file.metadata()
    config = PreTrainedConfig.from_pretrained(folder)
    config.device = "cpu"
    policy = load_strictly(folder, config)
    preprocess, postprocess = make_pre_post_processors(
        policy.config,
        pretrained_path=folder,
        preprocessor_overrides={"device_processor": {"device": "cpu"}},
    )
    observation = {
        key.removeprefix("observation/"): to_lerobot(value)
        for key, value in given.items()
        if key.startswith("observation/")
    }
    if "task" in metadata:
        observation["task"] = json.loads(metadata["task"])
    noise = {key.removeprefix("noise/"): value for key, value in given.items() if key.startswith("noise/")}
    batch = preprocess(observation)
    play_back(noise.pop("step_noise", torch.empty(0)))
    if config.type == "vqbet":
        choose_codes(noise.pop("gumbel"), config.sequentially_select)
        fill_queues(policy, batch)
    with torch.inference_mode():
        chunk = predict_chunk(policy, batch, noise)
    found = {f"preprocessed/{key}": batch[key] for key in config.input_features if key in batch}
    found |= {"chunk": chunk, "action": postprocess(chunk)}
    save_file({key: value.detach().clone().contiguous() for key, value in found.items()}, Path(out))


def load_strictly(folder: str, config: Any) -> Any:
    """Load a policy; of what does not fit, LeRobot's pi0 and pi0.5 would print a line and go on."""
    kind = get_policy_class(config.type)
    problems: list[Exception] = []

    def load_state_dict(policy: Any, *args: Any, **kwargs: Any) -> Any:
        try:
            return torch.nn.Module.load_state_dict(policy, *args, **kwargs)
        except RuntimeError as problem:
            problems.append(problem)
            raise

    with mock.patch.object(kind, "load_state_dict", load_state_dict):
        policy = kind.from_pretrained(folder, config=config, strict=True)
    if problems:
        raise problems[0]
    return policy


def predict_chunk(policy: Any, batch: dict[str, Any], noise: dict[str, torch.Tensor]) -> torch.Tensor:
    """Give a chunk of normalized actions for (windows of) observations, from this noise."""
    if policy.config.type != "multi_task_dit":
        return policy.predict_action_chunk(batch, **noise)
    # Its predict_action_chunk takes windows from the queues only; and it draws the noise itself.
    with mock.patch.object(torch, "randn", return_value=noise["noise"]):
        return policy._generate_actions(policy._prepare_batch(batch))


def play_back(step_noise: torch.Tensor) -> None:
    """Let the steps of diffusers' DDPM add this noise, a tensor a step, in the place of their own."""
    if len(step_noise):
        from diffusers.schedulers import scheduling_ddpm

        remaining = iter(step_noise)
        scheduling_ddpm.randn_tensor = lambda *args, **kwargs: next(remaining)


def choose_codes(gumbel: torch.Tensor, one_by_one: bool) -> None:
    """Let VQ-BeT draw codes by this noise, (b, 1, codebooks, codes), for every step."""
    remaining = iter(gumbel.split(1, dim=2) if one_by_one else [gumbel])

    def multinomial(probabilities: torch.Tensor, num_samples: int) -> torch.Tensor:
        noise = next(remaining)
        steps = len(probabilities) // (len(noise) * noise.shape[2])
        noise = noise.expand(-1, steps, -1, -1).reshape(probabilities.shape)
        return (probabilities.log() + noise).argmax(-1, keepdim=True)

    torch.multinomial = multinomial


def fill_queues(policy: Any, batch: dict[str, Any]) -> None:
    """Show VQ-BeT what it predicts from: it reads observations from its own queues, whatever it is given."""
    cameras = [batch[key] for key in policy.config.image_features]
    batch["observation.images"] = torch.stack(cameras, dim=-4)  # b t v c h w
    batch.pop("action", None)  # that queue is empty
    for key, queue in policy._queues.items():
        if key in batch:
            queue.extend(batch[key].unbind(1))


def to_lerobot(value: torch.Tensor) -> torch.Tensor:
    """Turn uint8 channel-last images into LeRobot's: float in 0..1, channel-first."""
    return value.movedim(-1, -3).float() / 255 if value.dtype == torch.uint8 else value


if __name__ == "__main__":
    main(*sys.argv[1:])
