"""Time a train step of a policy on Push-T against stock LeRobot's on the same machine.

    python benchmarks/train_step.py --lerobot_python=/path/to/lerobot/bin/python
    python benchmarks/train_step.py --lerobot_python=/path/to/lerobot/bin/python --policy=diffusion

ACT has LeRobot's default sizes, Diffusion Policy those of the published `lerobot/diffusion_pusht`, VQ-BeT those of
`lerobot/vqbet_pusht`, after it has learned its codes (before: `--options='{"n_vqvae_training_steps": 1000}'`); one
96x96 camera, batch 8. A step is normalization, forward, backward, clipping and the optimizer, from a batch in host
memory. Each side has a process of its own; they take turns, so that both see the same machine.
"""

import argparse
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from typing import Any

import numpy as np

SIDES = ("lerobot_jax", "lerobot")
OPTIONS: dict[str, dict[str, Any]] = {
    "act": {},
    "diffusion": {"horizon": 16, "n_action_steps": 8, "crop_shape": (84, 84), "use_group_norm": True},
    "vqbet": {"n_vqvae_training_steps": 1, "n_action_pred_token": 7, "use_group_norm": True},
}


def make_batches(batch_size: int, config: Any) -> list[dict[str, np.ndarray]]:
    """Draw two batches; images are uint8 `b h w c`, behind a time axis if the policy wants one."""
    rng = np.random.default_rng(0)
    past = () if config.observation_delta_indices is None else (len(config.observation_delta_indices),)
    chunk = len(config.action_delta_indices)
    return [
        {
            "observation.image": rng.integers(0, 256, (batch_size, *past, 96, 96, 3), np.uint8),
            "observation.state": rng.normal(size=(batch_size, *past, 2)).astype(np.float32),
            "action": rng.normal(size=(batch_size, chunk, 2)).astype(np.float32),
            "action_is_pad": np.zeros((batch_size, chunk), bool),
        }
        for _ in range(2)
    ]


def statistics() -> dict[str, dict[str, np.ndarray]]:
    shapes = {"observation.image": (3, 1, 1), "observation.state": (2,), "action": (2,)}
    numbers = {"mean": 0.0, "std": 1.0, "min": -3.0, "max": 3.0}
    return {
        key: {name: np.full(shape, number, np.float32) for name, number in numbers.items()}
        for key, shape in shapes.items()
    }


def make_lerobot_jax_step(name: str, batch_size: int, **options: Any) -> Callable[[int], None]:
    """Give a function that runs some steps of ours."""
    import jax
    import jax.numpy as jnp

    from lerobot_jax import optim
    from lerobot_jax.config import TrainConfig
    from lerobot_jax.features import FeatureType, PolicyFeature
    from lerobot_jax.policies.base import config_class, make_policy
    from lerobot_jax.train import make_loss, make_train_step

    new_config: Any = config_class(name)
    config = new_config(
        input_features={
            "observation.image": PolicyFeature(FeatureType.VISUAL, (3, 96, 96)),
            "observation.state": PolicyFeature(FeatureType.STATE, (2,)),
        },
        output_features={"action": PolicyFeature(FeatureType.ACTION, (2,))},
        pretrained_backbone_weights=None,
        **options,
    )
    policy = make_policy(config, statistics())
    train_config = TrainConfig(policy=config, batch_size=batch_size)
    params, buffers = jax.jit(policy.init)(jax.random.key(0))
    optimizer = optim.make_optimizer(train_config, params)
    state = {"step": jnp.zeros((), jnp.int32), "params": params, "buffers": buffers}
    state["opt_state"] = optimizer.init(params)
    loss_fn = make_loss(policy, policy.preprocess, ["pusht"])
    train_step = jax.jit(make_train_step(loss_fn, optimizer, train_config), donate_argnums=0)
    key = jax.random.key(0)
    batches = make_batches(batch_size, config)

    def run(steps: int) -> None:
        nonlocal state
        for i in range(steps):
            state, _ = train_step(state, batches[i % len(batches)], key)
        jax.block_until_ready(state)

    return run


def make_lerobot_step(name: str, batch_size: int, **options: Any) -> Callable[[int], None]:
    """Give a function that runs some steps of stock LeRobot's, as its `update_policy` does."""
    import torch  # pyright: ignore[reportMissingImports]
    from lerobot.configs import FeatureType, PolicyFeature  # pyright: ignore[reportMissingImports]
    from lerobot.policies.factory import (  # pyright: ignore[reportMissingImports]
        get_policy_class,
        make_policy_config,
        make_pre_post_processors,
    )

    device = "cuda" if torch.cuda.is_available() else "cpu"
    config = make_policy_config(
        name,
        input_features={
            "observation.image": PolicyFeature(type=FeatureType.VISUAL, shape=(3, 96, 96)),
            "observation.state": PolicyFeature(type=FeatureType.STATE, shape=(2,)),
        },
        output_features={"action": PolicyFeature(type=FeatureType.ACTION, shape=(2,))},
        pretrained_backbone_weights=None,
        device=device,
        **options,
    )
    policy = get_policy_class(name)(config).to(device)
    policy.train()
    stats = {k: {n: torch.from_numpy(v) for n, v in s.items()} for k, s in statistics().items()}
    preprocess, _ = make_pre_post_processors(config, dataset_stats=stats)
    optimizer = config.get_optimizer_preset().build(policy.get_optim_params())
    batches = []
    for batch in make_batches(batch_size, config):
        tensors = {k: torch.from_numpy(v) for k, v in batch.items()}
        tensors["observation.image"] = tensors["observation.image"].movedim(-1, -3).contiguous() / 255
        batches.append(tensors)

    def run(steps: int) -> None:
        for i in range(steps):
            loss, _ = policy.forward(preprocess(dict(batches[i % len(batches)])))
            loss.backward()
            torch.nn.utils.clip_grad_norm_(policy.parameters(), 10.0, error_if_nonfinite=False)
            optimizer.step()
            optimizer.zero_grad()
        if device == "cuda":
            torch.cuda.synchronize()

    return run


def serve(side: str, name: str, batch_size: int, options: dict[str, Any]) -> None:
    """Read how many steps to run, write how long they took, until the input ends."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what a library prints must not get between the answers
    make_step: Any = {"lerobot_jax": make_lerobot_jax_step, "lerobot": make_lerobot_step}[side]
    options = {key: tuple(value) if isinstance(value, list) else value for key, value in options.items()}
    run = make_step(name, batch_size, **(OPTIONS[name] | options))
    run(3)
    print("ready", file=answers, flush=True)
    for line in sys.stdin:
        start = time.perf_counter()
        run(int(line))
        print(time.perf_counter() - start, file=answers, flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--lerobot_python", help="the Python of an environment with lerobot==0.6.1")
    parser.add_argument("--policy", choices=OPTIONS, default="act", help="default: %(default)s")
    parser.add_argument("--batch_size", type=int, default=8, help="default: %(default)s")
    parser.add_argument("--rounds", type=int, default=7, help="turns of each side (default: %(default)s)")
    parser.add_argument("--steps", type=int, default=5, help="steps a turn (default: %(default)s)")
    parser.add_argument(
        "--options", type=json.loads, default={}, help="settings of both policies, as '{\"use_vae\": false}'"
    )
    parser.add_argument("--serve", choices=SIDES, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.serve:
        return serve(args.serve, args.policy, args.batch_size, args.options)
    if not args.lerobot_python:
        parser.error("--lerobot_python is needed: the Python of an environment with lerobot==0.6.1")

    pythons = {"lerobot_jax": sys.executable, "lerobot": args.lerobot_python}
    arguments = [
        f"--policy={args.policy}",
        f"--batch_size={args.batch_size}",
        f"--options={json.dumps(args.options)}",
    ]
    processes = {}
    for side in SIDES:
        command = [pythons[side], __file__, f"--serve={side}", *arguments]
        processes[side] = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        if processes[side].stdout.readline() != "ready\n":
            raise SystemExit(f"{side} did not start: see above")

    milliseconds: dict[str, list[float]] = {side: [] for side in SIDES}
    for _ in range(args.rounds):
        for side, process in processes.items():
            process.stdin.write(f"{args.steps}\n")
            process.stdin.flush()
            milliseconds[side].append(float(process.stdout.readline()) / args.steps * 1e3)
    for process in processes.values():
        process.communicate()

    sizes = OPTIONS[args.policy] | args.options or "default sizes"
    print(f"{args.policy} train step, batch {args.batch_size}, one 96x96 camera, {sizes}")
    print(
        f"{'':12} {'min':>9} {'median':>9} {'max':>9}   ms a step, {args.rounds} turns of {args.steps} steps"
    )
    for side, values in milliseconds.items():
        print(f"{side:12} {min(values):9.1f} {np.median(values):9.1f} {max(values):9.1f}")
    ours, stock = (np.array(milliseconds[side]) for side in SIDES)
    print(f"lerobot_jax / lerobot: {np.median(ours / stock):.2f} of its time (median over turns)")
    return None


if __name__ == "__main__":
    main()
