"""Flow matching over actions: noise at time 0 flows to actions at time 1 along straight lines.

Paper: "Flow Matching for Generative Modeling" (https://arxiv.org/abs/2210.02747). Mirrors `FlowMatchingObjective`
of `lerobot.policies.multi_task_dit.modeling_multi_task_dit`; sampling is one `lax.scan`.
"""

import dataclasses
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, PRNGKeyArray

METHODS = ("euler", "rk4")
STRATEGIES = ("uniform", "beta")
Velocity = Callable[[Float[Array, "b chunk act"], Float[Array, ""]], Float[Array, "b chunk act"]]


@dataclasses.dataclass(frozen=True)
class FlowMatching:
    """How noise and actions are mixed, how times are drawn and how the flow is integrated; fields as LeRobot's."""

    sigma_min: float = 0.0
    num_steps: int = 100
    method: str = "euler"
    strategy: str = "beta"
    s: float = 0.999
    alpha: float = 1.5
    beta: float = 1.0

    def check(self) -> None:
        """Raise `ValueError` naming a setting that cannot be, by its name in the policy's config."""
        if not 0 <= self.sigma_min <= 1:
            raise ValueError(f"sigma_min must be in 0..1, not {self.sigma_min}")
        if self.num_steps < 1:
            raise ValueError(f"num_integration_steps must be at least 1, not {self.num_steps}")
        if self.method not in METHODS:
            raise ValueError(f"integration_method must be {' or '.join(METHODS)}, not '{self.method}'")
        if self.strategy not in STRATEGIES:
            known = " or ".join(STRATEGIES)
            raise ValueError(f"timestep_sampling_strategy must be {known}, not '{self.strategy}'")
        if self.strategy == "uniform":
            return
        if not 0 < self.s <= 1:
            raise ValueError(f"timestep_sampling_s must be in (0, 1], not {self.s}")
        for name in ("alpha", "beta"):
            if not getattr(self, name) > 0:
                raise ValueError(f"timestep_sampling_{name} must be positive, not {getattr(self, name)}")

    def draw_time(self, key: PRNGKeyArray, batch_size: int) -> Float[Array, " b"]:
        """Draw the times to train at."""
        if self.strategy == "uniform":
            return jax.random.uniform(key, (batch_size,))
        return self.s * (1 - jax.random.beta(key, self.alpha, self.beta, (batch_size,)))

    def mix(
        self,
        actions: Float[Array, "b chunk act"],
        noise: Float[Array, "b chunk act"],
        time: Float[Array, " b"],
    ) -> tuple[Float[Array, "b chunk act"], Float[Array, "b chunk act"]]:
        """Give what lies between noise and actions at some times, and the velocity there."""
        t, lost = time[:, None, None], 1 - self.sigma_min
        return t * actions + (1 - lost * t) * noise, actions - lost * noise

    def sample(self, velocity: Velocity, noise: Float[Array, "b chunk act"]) -> Float[Array, "b chunk act"]:
        """Follow the flow from noise to actions.

        Args:
            velocity: the model: (what is between, time) -> velocity.
            noise: where to begin.
        """
        grid = np.linspace(0, 1, self.num_steps + 1).astype(np.float32)
        # As LeRobot: differences are rounded to float32, times between the grid's are not before they are used.
        starts, steps = grid[:-1].astype(np.float64), np.diff(grid).astype(np.float64)
        times = {"start": starts, "middle": starts + steps / 2, "end": starts + steps}
        inputs = {name: jnp.asarray(x, jnp.float32) for name, x in times.items()}
        inputs |= {"step": jnp.asarray(steps, jnp.float32), "sixth": jnp.asarray(steps / 6, jnp.float32)}
        advance = self._euler if self.method == "euler" else self._rk4

        def body(x: Array, c: dict[str, Array]) -> tuple[Array, None]:
            return advance(velocity, x, c), None

        return jax.lax.scan(body, noise, inputs)[0]

    @staticmethod
    def _euler(velocity: Velocity, x: Array, c: dict[str, Array]) -> Array:
        return x + c["step"] * velocity(x, c["start"])

    @staticmethod
    def _rk4(velocity: Velocity, x: Array, c: dict[str, Array]) -> Array:
        """The classical Runge-Kutta method of fourth order."""
        k1 = velocity(x, c["start"])
        k2 = velocity(x + c["step"] * k1 / 2, c["middle"])
        k3 = velocity(x + c["step"] * k2 / 2, c["middle"])
        k4 = velocity(x + c["step"] * k3, c["end"])
        return x + c["sixth"] * (k1 + 2 * k2 + 2 * k3 + k4)
