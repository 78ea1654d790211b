"""The cases: what a policy is asked to do. Each gets a `Stock` that it may change, and gives outputs."""

import copy
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from .. import find_policies
from .drawing import Arrays
from .policy import Stock
from .tape import Tape

TRAIN_STEPS = 3
SCHEDULE_STEPS = 10  # the length of the run for which learning rates are scheduled
HEAD = 8

Outputs = dict[str, Any]


def run_case(
    stock: Stock, case: str, seed: int, recording: Sequence[np.ndarray] | None = None
) -> tuple[Arrays, Tape]:
    """Run a case on a copy; give its outputs (`CASE/...`) and the tape. A recording is played back."""
    function = getattr(find_policies()[stock.policy.config.type], case, None) or globals()[case]
    torch.manual_seed(seed)
    with Tape(recording) as tape:
        outputs = function(copy.deepcopy(stock))
    return {f"{case}/{key}": torch.as_tensor(value).detach().numpy() for key, value in outputs.items()}, tape


def loss(stock: Stock) -> Outputs:
    """Loss and gradients in evaluation mode."""
    return _loss_and_gradients(stock)


def loss_train(stock: Stock) -> Outputs:
    """Loss, gradients and changed buffers in training mode."""
    stock.policy.train()
    return _loss_and_gradients(stock)


def loss_none(stock: Stock) -> Outputs:
    """One loss a sample, in evaluation mode."""
    return {"loss": stock.policy.forward(stock.batch, reduction="none")[0]}


def train_steps(stock: Stock) -> Outputs:
    """Updates by LeRobot's presets, as its training script makes them."""
    policy, settings = stock.policy, stock.policy.config.get_optimizer_preset()
    optimizer = settings.build(policy.get_optim_params())
    schedule = policy.config.get_scheduler_preset()
    scheduler = schedule and schedule.build(optimizer, SCHEDULE_STEPS)
    losses, norms, rates = [], [], []
    for _ in range(TRAIN_STEPS):
        policy.train()
        rates.append([group["lr"] for group in optimizer.param_groups])
        value, _ = policy.forward(stock.batch)
        value.backward()
        limit = settings.grad_clip_norm if settings.grad_clip_norm > 0 else float("inf")
        norms.append(nn.utils.clip_grad_norm_(policy.parameters(), limit))
        optimizer.step()
        optimizer.zero_grad()
        if scheduler:
            scheduler.step()
        if hasattr(policy, "update"):
            policy.update()
        losses.append(value.detach())
    state = _summarize([policy.state_dict()[name] for name in state_names(policy)])
    return {
        "loss": torch.stack(losses),
        "grad_norm": torch.stack(norms),
        "lr": np.array(rates),
        "state_norm": state["norm"],
        "state_head": state["head"],
    }


def chunk(stock: Stock) -> Outputs:
    """One chunk of actions: for the first observation, or for the batch if the policy sees windows."""
    if stock.policy.config.observation_delta_indices is None:
        observation = stock.preprocess(stock.observations[0])
    else:
        observation = {key: value for key, value in stock.batch.items() if key.startswith("observation.")}
    actions = stock.policy.predict_action_chunk(observation)
    return {"action": actions, "post/action": stock.postprocess(actions.clone())}


def select(stock: Stock) -> Outputs:
    """Actions step by step, through the policy's own queues."""
    stock.policy.reset()
    actions = [stock.policy.select_action(stock.preprocess(o)).clone() for o in stock.observations]
    processed = [stock.postprocess(action.clone()) for action in actions]
    return {"action": torch.stack(actions), "post/action": torch.stack(processed)}


def gradient_names(policy: nn.Module) -> list[str]:
    """Name what has a gradient, in the order of the recorded summaries."""
    return [name for name, parameter in policy.named_parameters() if parameter.requires_grad]


def state_names(policy: nn.Module) -> list[str]:
    """Name the floats of the state dict, in the order of the recorded summaries."""
    return [
        name for name, value in policy.state_dict().items() if value.is_floating_point() and value.numel()
    ]


def _loss_and_gradients(stock: Stock) -> Outputs:
    policy = stock.policy
    before = {name: buffer.clone() for name, buffer in policy.named_buffers()}
    value, info = policy.forward(stock.batch)
    value.backward()
    trained = [policy.get_parameter(name) for name in gradient_names(policy)]
    gradients = _summarize([torch.zeros_like(p) if p.grad is None else p.grad for p in trained])
    return {
        "loss": value,
        **{f"info/{key}": np.float64(number) for key, number in (info or {}).items()},
        **{f"grad_{key}": summary for key, summary in gradients.items()},
        **{
            f"buffers_after/{name}": buffer
            for name, buffer in policy.named_buffers()
            if not torch.equal(buffer, before[name])
        },
    }


def _summarize(tensors: list[Tensor]) -> dict[str, Tensor]:
    """Give each tensor's norm, sum and first entries, padded with zeros."""
    heads = torch.zeros(len(tensors), HEAD)
    for row, tensor in zip(heads, tensors, strict=True):
        entries = tensor.flatten()[:HEAD]
        row[: len(entries)] = entries
    return {
        # In float64: float32 sums of a million entries are off by 1e-4.
        "norm": torch.stack([tensor.double().norm() for tensor in tensors]),
        "sum": torch.stack([tensor.double().sum() for tensor in tensors]),
        "head": heads,
    }
