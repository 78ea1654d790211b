"""Record what stock LeRobot computes with PEFT's adapters on the recorded policies: writes tests/golden/peft.

    $LEROBOT_PYTHON tools/make_peft_golden.py

LEROBOT_PYTHON is the Python of an environment with lerobot[peft]==0.6.1. A folder NAME holds

    adapter_config.json, adapter_model.safetensors, config.json    what LeRobot writes of the adapters
    expected.safetensors    with the batch and the draws of the recorded policy that the adapters are on:
                            loss, grad/KEY     in training mode, dropout off, of each of the adapters' arrays
                            action             a chunk, where the recorded policy has one
                            step_loss, step_norm, after/KEY    3 updates by LeRobot's preset, the arrays after them
"""

import sys
from pathlib import Path
from typing import Any

import numpy as np
import safetensors.numpy
import torch
from peft.utils import get_peft_model_state_dict

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))  # stock LeRobot's environment does not have this project

from goldens import of_policy  # noqa: E402
from goldens.stock import cases  # noqa: E402
from goldens.stock.policy import load_stock  # noqa: E402
from goldens.stock.tape import Tape  # noqa: E402

from tests.goldens import Golden, random_generator  # noqa: E402

GOLDENS = ROOT / "tests" / "golden"
# Name -> the recorded policy, LeRobot's settings of PEFT, whether LeRobot can make an optimizer for them
ADAPTERS: dict[str, tuple[str, dict[str, Any], bool]] = {
    "act": (
        "act/env_vae_s0",
        {
            "target_modules": r"model\..*(self_attn|multihead_attn|linear1)|model\.vae_encoder_.*_proj",
            "full_training_modules": ["action_head", "decoder.norm"],
            "r": 3,
            "lora_alpha": 5,
        },
        True,
    ),
    "act_camera": (
        "act/vae_2cam_s0",
        {"target_modules": ["conv1", "downsample.0", "linear2", "encoder_img_feat_input_proj"], "r": 2},
        True,
    ),
    "diffusion": (
        "diffusion/ddpm_one_step_s0",
        {
            "target_modules": r"diffusion\.(unet\..*(conv[12]\.block\.0|cond_encoder\.1)"
            r"|unet\.down_modules\.0\.0\.residual_conv|rgb_encoder\..*conv1)",
            "r": 2,
        },
        True,
    ),
    "vqbet": (
        "vqbet/sequential_unused_input_s0",
        {"target_modules": ["wpe", "c_attn", "backbone.0", "map_to_cbet_preds_offset.0"], "r": 2},
        False,
    ),
    "multi_task_dit": (
        "multi_task_dit/ddpm_blind_s0",
        {"target_modules": "all-linear", "init_type": "gaussian", "r": 2, "lora_alpha": 4},
        True,
    ),
}


def record(name: str) -> None:
    base, settings, has_optimizer = ADAPTERS[name]
    golden = Golden(GOLDENS / base)
    seed = golden.meta["seed"]
    stock = load_stock(golden.path / "model", seed, golden.batch | golden.meta["strings"])
    stock.policy.config.pretrained_path = Path("tests/golden") / base / "model"
    policy = stock.policy = stock.policy.wrap_with_peft(peft_cli_overrides=settings)

    def run(case: str) -> Any:
        with Tape(golden.draws(case)):
            return of_policy(golden.meta["policy"], getattr(cases, case))(stock)

    move_trained(run, policy, name, seed)
    folder = GOLDENS / "peft" / name
    policy.save_pretrained(folder)
    policy.config.save_pretrained(folder)
    (folder / "README.md").unlink()

    def arrays(prefix: str, gradient: bool = False) -> dict[str, np.ndarray]:
        state = policy.state_dict(keep_vars=True)
        values = {k: v.grad if gradient else v for k, v in state.items()}
        values = {k: torch.zeros_like(state[k]) if v is None else v for k, v in values.items()}
        stored = get_peft_model_state_dict(policy, state_dict=values)
        return {f"{prefix}/{key}": value.detach().numpy().copy() for key, value in stored.items()}

    expected: dict[str, np.ndarray] = {}
    if "chunk" in golden.meta["cases"]:
        expected["action"] = run("chunk")["action"].detach().numpy()
    policy.train()
    expected["loss"] = run("loss_train")["loss"].detach().numpy()
    expected |= arrays("grad", gradient=True)
    policy.zero_grad()
    if has_optimizer:
        steps = run("train_steps")
        expected |= {"step_loss": steps["loss"].numpy(), "step_norm": steps["grad_norm"].numpy()}
        expected |= arrays("after")
    expected = {key: np.array(value, order="C") for key, value in expected.items()}  # others are stored wrong
    safetensors.numpy.save_file(expected, folder / "expected.safetensors")
    size = sum(path.stat().st_size for path in folder.iterdir())
    print(f"{folder}: {len(expected)} arrays, {size / 1000:.0f} kB", flush=True)


def move_trained(run: Any, policy: Any, name: str, seed: int) -> None:
    """Give what has a gradient a value that no initialization gives; LeRobot runs some modules without."""
    policy.train()
    run("loss_train")
    for key, parameter in policy.named_parameters():
        if parameter.grad is not None:
            noise = random_generator(f"{name}/{key}", seed).standard_normal(
                tuple(parameter.shape), np.float32
            )
            parameter.data.add_(torch.from_numpy(0.1 * noise))
    policy.zero_grad()
    policy.eval()


if __name__ == "__main__":
    torch.set_num_threads(1)
    for chosen in sys.argv[1:] or ADAPTERS:
        record(chosen)
