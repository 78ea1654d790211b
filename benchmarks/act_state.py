"""ACT of `configs/act_pusht.py:state` on random numbers: its program and its state, for benchmarks."""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import numpy as np

from lerobot_jax.config import load_recipe
from lerobot_jax.features import FeatureType, PolicyFeature
from lerobot_jax.policies.base import make_policy
from lerobot_jax.program import Program
from lerobot_jax.sharding import make_mesh

WIDTHS = {"observation.environment_state": 16, "observation.state": 2, "action": 2}


def make_program(policy: dict[str, Any] | None = None, **settings: Any) -> Program:
    """Make the program of the recipe, with other settings of the policy and of the run."""
    kinds = {"observation.environment_state": FeatureType.ENV, "observation.state": FeatureType.STATE}
    recipe = load_recipe("configs/act_pusht.py:state")
    policy_config = dataclasses.replace(
        recipe.policy,
        input_features={key: PolicyFeature(kind, (WIDTHS[key],)) for key, kind in kinds.items()},
        output_features={"action": PolicyFeature(FeatureType.ACTION, (WIDTHS["action"],))},
        **(policy or {}),
    )
    config = dataclasses.replace(recipe, policy=policy_config, **settings)
    stats = {
        key: {"mean": np.zeros(n, np.float32), "std": np.ones(n, np.float32)} for key, n in WIDTHS.items()
    }
    return Program(config, [make_policy(policy_config, stats)], ["pusht"], make_mesh(config.mesh))


def draw_batch(lead: tuple[int, ...], chunk: int) -> dict[str, np.ndarray]:
    """Draw a batch with some leading axes."""
    rng = np.random.default_rng(0)
    shapes = {key: (*lead, *((chunk,) if key == "action" else ()), n) for key, n in WIDTHS.items()}
    batch = {key: rng.normal(size=shape).astype(np.float32) for key, shape in shapes.items()}
    return batch | {"action_is_pad": np.zeros((*lead, chunk), bool)}


def place_batch(program: Program) -> dict[str, jax.Array]:
    """Put a random batch where the program wants it."""
    chunk = len(program.config.policy.action_delta_indices or [])
    data = draw_batch((*program.layout.lead, program.config.batch_size), chunk)
    return {
        key: jax.make_array_from_callback(x.shape, program.batch_sharding, lambda index, x=x: x[index])
        for key, x in data.items()
    }


def make_steps(program: Program) -> Callable[[int], None]:
    """Give a function that runs some train steps."""
    batch = place_batch(program)
    state, (key, _) = program.first_state(), program.keys()
    step = program.trace_step(batch).lower().compile()

    def run(steps: int) -> None:
        nonlocal state
        for _ in range(steps):
            state, _ = step(state, batch, key)
        jax.block_until_ready(state)

    return run
