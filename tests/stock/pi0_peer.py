"""Stock LeRobot's side of tests/stock/test_pi0.py: commands for pi0 and pi0.5 of small sizes.

Runs as tests/lerobot_peer.py does, with its commands and these. `use_sizes` comes first: LeRobot has names for two
sizes only, both of billions of parameters.
"""

import sys
from pathlib import Path
from typing import Any

import numpy as np
import torch
from lerobot.configs import PreTrainedConfig
from lerobot.policies.factory import make_pre_post_processors
from lerobot.policies.pi0 import modeling_pi0
from lerobot.policies.pi05 import modeling_pi05
from peft import PeftModel

sys.path.insert(0, str(Path(__file__).parents[2]))
from lerobot_jax import stock_lerobot
from tests import lerobot_peer
from tests.lerobot_peer import Arrays


def use_sizes(sizes: dict[str, Any]) -> Arrays:
    """Let the names of sizes stand for these (as `pi_tiny` in a recorded policy), in this whole process."""
    vocab_size = sizes["vocab_size"]

    def shrink(config: Any) -> Any:
        config.vocab_size = vocab_size
        if hasattr(config, "vision_config"):
            config.image_token_index = config._vocab_size = config.text_config.vocab_size = vocab_size
            config.vision_config.projection_dim = config.text_config.hidden_size
            for name, value in sizes["vision"].items():
                setattr(config.vision_config, name, value)
        return config

    def made_small(kind: Any) -> Any:
        return lambda config: kind(config=shrink(config))

    for module in (modeling_pi0, modeling_pi05):
        for name in ("PaliGemmaForConditionalGenerationWithPiGemma", "PiGemmaForCausalLM"):
            setattr(module, name, made_small(getattr(module, name)))
        module.get_gemma_config = lambda name, kind=module.GemmaConfig: kind(**sizes[name], num_kv_heads=1)
    return {}


def compute(folder: str, given: str, tasks: list[str], adapters: str | None = None) -> Arrays:
    """Compute a policy's loss, gradients and a chunk.

    Args:
        folder: the policy's.
        given: an npz file with a raw batch, `noise` and `time`.
        tasks: one for each sample.
        adapters: a folder with PEFT's adapters, which are trained instead of the rest.

    Returns:
        `loss`, `loss_per_dim`, `losses` (of each sample), `grad/KEY`, `chunk` in the robot's units.
    """
    policy = load(folder)
    networks = policy.model
    if adapters:
        policy = PeftModel.from_pretrained(policy, adapters, is_trainable=True)
    pre, post = make_pre_post_processors(policy.config, pretrained_path=adapters or folder)
    arrays = read(given)
    noise, time = arrays.pop("noise"), arrays.pop("time")
    networks.sample_noise = lambda shape, device: noise
    networks.sample_time = lambda batch_size, device: time
    batch = pre(arrays | {"task": tasks})
    policy.train()
    loss, info = policy.forward(batch)
    loss.backward()
    gradients = {key: x.grad for key, x in policy.named_parameters() if x.grad is not None}
    found = {"loss": loss, "loss_per_dim": torch.tensor(info["loss_per_dim"])}
    found |= {f"grad/{key}": x.float() for key, x in gradients.items()}
    policy.eval()
    with torch.no_grad():
        found["losses"], _ = policy.forward(batch, reduction="none")
        found["chunk"] = post(policy.predict_action_chunk(batch, noise=noise))
    return {key: value.detach().numpy() for key, value in found.items()}


def adapt(folder: str, adapters: str, settings: dict[str, Any]) -> Arrays:
    """Write adapters of a policy, with LeRobot's defaults and these settings; not zero, as new ones are."""
    policy = load(folder)
    policy.config.pretrained_path = folder
    adapted = policy.wrap_with_peft(peft_cli_overrides=settings)
    torch.manual_seed(0)
    for parameter in adapted.parameters():
        if parameter.requires_grad:
            parameter.data.add_(0.1 * torch.randn(parameter.shape))
    for part in (adapted, adapted.config, *make_pre_post_processors(policy.config, pretrained_path=folder)):
        part.save_pretrained(adapters)
    return {}


def load(folder: str) -> Any:
    config = PreTrainedConfig.from_pretrained(folder)
    config.device = "cpu"
    return stock_lerobot.load_strictly(folder, config)


def try_to_load(folder: str) -> Arrays:
    load(folder)
    return {}


def verify(folder: str, given: str, out: str) -> Arrays:
    """Do what `lerobot_jax.convert verify` runs in LeRobot's Python."""
    stock_lerobot.main(folder, given, out)
    return {}


def preprocess(folder: str, given: str, tasks: list[str]) -> Arrays:
    """Give what a policy's preprocessor makes of a raw batch."""
    config = PreTrainedConfig.from_pretrained(folder)
    pre, _ = make_pre_post_processors(config, pretrained_path=folder)
    batch = pre(read(given) | {"task": tasks})
    return {key: value.numpy() for key, value in batch.items() if isinstance(value, torch.Tensor)}


def read(given: str) -> dict[str, Any]:
    return {key: torch.from_numpy(value) for key, value in np.load(given).items()}


if __name__ == "__main__":
    lerobot_peer.COMMANDS |= {
        f.__name__: f for f in (use_sizes, compute, adapt, try_to_load, verify, preprocess)
    }
    lerobot_peer.main()
