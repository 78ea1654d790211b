"""Time a train step of a policy on Push-T against stock LeRobot's on the same machine.

    python benchmarks/train_step.py --lerobot_python=/path/to/lerobot/bin/python
    python benchmarks/train_step.py --lerobot_python=/path/to/lerobot/bin/python --policy=diffusion

A step is normalization, forward, backward, clipping and the optimizer, from a batch in host memory.
pusht_policies.py has the policies' sizes.
"""

from collections.abc import Callable
from typing import Any

import numpy as np
import pusht_policies
import side_by_side


def make_batches(batch_size: int, config: Any) -> list[dict[str, np.ndarray]]:
    """Draw two batches; observations have a time axis if the policy wants one."""
    past = () if config.observation_delta_indices is None else (len(config.observation_delta_indices),)
    shape = (batch_size, len(config.action_delta_indices))
    return [
        pusht_policies.draw_observations(seed, batch_size, *past)
        | {
            "action": np.random.default_rng(seed).normal(size=(*shape, 2)).astype(np.float32),
            "action_is_pad": np.zeros(shape, bool),
        }
        for seed in range(2)
    ]


def make_lerobot_jax_step(name: str, batch_size: int, **options: Any) -> Callable[[int], None]:
    """Give a function that runs some steps of ours."""
    import jax
    import jax.numpy as jnp

    from lerobot_jax import optim
    from lerobot_jax.config import TrainConfig
    from lerobot_jax.train_step import make_loss, make_train_step

    policy = pusht_policies.make_lerobot_jax_policy(name, **options)
    train_config = TrainConfig(policy=policy.config, batch_size=batch_size)
    params, buffers = jax.jit(policy.init)(jax.random.key(0))
    optimizer = optim.make_optimizer(train_config, params)
    state = {"step": jnp.zeros((), jnp.int32), "params": params, "buffers": buffers}
    state["opt_state"] = optimizer.init(params)
    loss_fn = make_loss(policy, policy.preprocess, ["pusht"])
    train_step = jax.jit(make_train_step(loss_fn, optimizer, train_config), donate_argnums=0)
    key = jax.random.key(0)
    batches = make_batches(batch_size, policy.config)

    def run(steps: int) -> None:
        nonlocal state
        for i in range(steps):
            state, _ = train_step(state, batches[i % len(batches)], key)
        jax.block_until_ready(state)

    return run


def make_lerobot_step(name: str, batch_size: int, **options: Any) -> Callable[[int], None]:
    """Give a function that runs some steps of stock LeRobot's, as its `update_policy` does."""
    import torch  # pyright: ignore[reportMissingImports]

    policy, preprocess, _ = pusht_policies.make_lerobot_policy(name, **options)
    policy.train()
    optimizer = policy.config.get_optimizer_preset().build(policy.get_optim_params())
    batches = [pusht_policies.to_torch(batch) for batch in make_batches(batch_size, policy.config)]

    def run(steps: int) -> None:
        for i in range(steps):
            loss, _ = policy.forward(preprocess(dict(batches[i % len(batches)])))
            loss.backward()
            torch.nn.utils.clip_grad_norm_(policy.parameters(), 10.0, error_if_nonfinite=False)
            optimizer.step()
            optimizer.zero_grad()
        if policy.config.device == "cuda":
            torch.cuda.synchronize()

    return run


if __name__ == "__main__":
    work = {"lerobot_jax": make_lerobot_jax_step, "lerobot": make_lerobot_step}
    side_by_side.main(work, "step", pusht_policies.OPTIONS, batch_size=8, rounds=7, count=5)
