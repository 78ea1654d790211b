"""Time a train step of several seeds at once against a step of one.

    python benchmarks/seeds.py
    python benchmarks/seeds.py --num_seeds=4 --batch_sizes 8 32

The policy is ACT with the sizes of `configs/act_pusht.py:state`; a step is normalization, forward, backward,
clipping, the optimizer and the average of the weights. The two take turns, so that both see the same machine.
"""

import argparse
import dataclasses
import time
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np

from lerobot_jax import optim
from lerobot_jax.config import load_recipe
from lerobot_jax.features import FeatureType, PolicyFeature
from lerobot_jax.policies.base import make_policy
from lerobot_jax.seeds import SeedLayout
from lerobot_jax.sharding import make_mesh
from lerobot_jax.train_step import make_loss, make_train_step

WIDTHS = {"observation.environment_state": 16, "observation.state": 2, "action": 2}


def make_run(num_seeds: int, batch_size: int) -> Callable[[int], float]:
    """Give a function that runs some steps and returns the seconds that one took."""
    state_feature = PolicyFeature(FeatureType.STATE, (WIDTHS["observation.state"],))
    env_feature = PolicyFeature(FeatureType.ENV, (WIDTHS["observation.environment_state"],))
    recipe = load_recipe("configs/act_pusht.py:state")
    policy_config = dataclasses.replace(
        recipe.policy,
        input_features={
            "observation.environment_state": env_feature,
            "observation.state": state_feature,
        },
        output_features={"action": PolicyFeature(FeatureType.ACTION, (WIDTHS["action"],))},
    )
    config = dataclasses.replace(recipe, policy=policy_config, batch_size=batch_size, num_seeds=num_seeds)
    stats = {
        key: {"mean": np.zeros(n, np.float32), "std": np.ones(n, np.float32)} for key, n in WIDTHS.items()
    }
    policy = make_policy(policy_config, stats)
    layout = SeedLayout(num_seeds, make_mesh())
    keys = [jax.random.key(run.seed) for run in config.runs]
    init = jax.jit(policy.init)
    optimizer = optim.make_optimizer(config, jax.eval_shape(init, keys[0])[0])

    def make_state(params, buffers):
        state = {"step": jnp.zeros((), jnp.int32), "params": params, "buffers": buffers}
        average = jax.tree.map(jnp.copy, {"params": params, "buffers": buffers})
        return state | {"opt_state": optimizer.init(params), "ema": average}

    make_states = jax.jit(layout.over_seeds(make_state, (0, 0)), out_shardings=layout.state)
    state = make_states(*layout.stack([init(key) for key in keys]))
    loss_fn = make_loss(policy, policy.preprocess, ["pusht"])
    train_step = layout.over_seeds(make_train_step(loss_fn, optimizer, config), (0, 0, 0))
    train_step = jax.jit(train_step, donate_argnums=0)
    batch = jax.device_put(draw_batch((*layout.lead, batch_size)), layout.batches(batch_size))
    key = layout.stack(keys)

    def run(steps: int) -> float:
        nonlocal state
        start = time.perf_counter()
        for _ in range(steps):
            state, _ = train_step(state, batch, key)
        jax.block_until_ready(state)
        return (time.perf_counter() - start) / steps

    return run


def draw_batch(lead: tuple[int, ...], chunk: int = 16) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(0)
    shapes = {key: (*lead, *((chunk,) if key == "action" else ()), n) for key, n in WIDTHS.items()}
    batch = {key: rng.normal(size=shape).astype(np.float32) for key, shape in shapes.items()}
    return batch | {"action_is_pad": np.zeros((*lead, chunk), bool)}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--num_seeds", type=int, default=8, help="default: %(default)s")
    parser.add_argument("--batch_sizes", type=int, nargs="+", default=[64, 8], help="default: %(default)s")
    parser.add_argument("--rounds", type=int, default=7, help="turns of each (default: %(default)s)")
    parser.add_argument("--steps", type=int, default=5, help="steps a turn (default: %(default)s)")
    args = parser.parse_args()

    devices = f"{jax.device_count()} {jax.default_backend()} device(s)"
    print(f"ACT of configs/act_pusht.py:state, {devices}, {args.rounds} turns of {args.steps} steps, medians")
    print(
        f"{'batch':>5} {'1 seed, ms':>12} {f'{args.num_seeds} seeds, ms':>12} {'ratio':>7}   ms a seed's step"
    )
    for batch_size in args.batch_sizes:
        one, several = make_run(1, batch_size), make_run(args.num_seeds, batch_size)
        one(2), several(2)
        turns = 1e3 * np.array([(one(args.steps), several(args.steps)) for _ in range(args.rounds)])
        alone, together = np.median(turns, axis=0)
        ratio = np.median(turns[:, 1] / turns[:, 0])
        print(
            f"{batch_size:5d} {alone:12.1f} {together:12.1f} {ratio:7.2f}   "
            f"{alone:.1f} alone, {together / args.num_seeds:.1f} together",
            flush=True,
        )


if __name__ == "__main__":
    main()
