"""Time how long a robot waits for a chunk of actions on Push-T, beside stock LeRobot on the same machine.

    python benchmarks/chunk.py --lerobot_python=/path/to/lerobot/bin/python
    python benchmarks/chunk.py --lerobot_python=/path/to/lerobot/bin/python --policy=diffusion \\
        --options='{"noise_scheduler_type": "DDIM", "num_inference_steps": 10}'

From an observation in host memory to the first action in the environment's units: normalization, the policy, and
the way back, as `select_action` does it when its queue is empty. pusht_policies.py has the policies' sizes.
"""

from collections.abc import Callable
from typing import Any

import pusht_policies
import side_by_side


def make_lerobot_jax_chunk(name: str, batch_size: int, **options: Any) -> Callable[[int], None]:
    """Give a function that asks ours for some chunks."""
    import jax

    policy = pusht_policies.make_lerobot_jax_policy(name, **options)
    params, buffers = jax.jit(policy.init)(jax.random.key(0))
    runner = policy.replace(params=params, buffers=buffers).make_runner(batch_size)
    observation = pusht_policies.draw_observations(0, batch_size)

    def run(chunks: int) -> None:
        for _ in range(chunks):
            runner.reset()
            runner.select_action(observation)

    return run


def make_lerobot_chunk(name: str, batch_size: int, **options: Any) -> Callable[[int], None]:
    """Give a function that asks stock LeRobot for some chunks."""
    import torch  # pyright: ignore[reportMissingImports]

    policy, preprocess, postprocess = pusht_policies.make_lerobot_policy(name, **options)
    policy.eval()
    observation = pusht_policies.to_torch(pusht_policies.draw_observations(0, batch_size))

    def run(chunks: int) -> None:
        with torch.inference_mode():
            for _ in range(chunks):
                policy.reset()
                postprocess(policy.select_action(preprocess(dict(observation)))).cpu()

    return run


if __name__ == "__main__":
    work = {"lerobot_jax": make_lerobot_jax_chunk, "lerobot": make_lerobot_chunk}
    side_by_side.main(work, "chunk", pusht_policies.OPTIONS, batch_size=1, rounds=7, count=5)
