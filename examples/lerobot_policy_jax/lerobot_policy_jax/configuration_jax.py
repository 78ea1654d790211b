"""The policy type `jax`: `--policy.type=jax --policy.pretrained_path=FOLDER_OR_HUB_NAME`."""

from dataclasses import dataclass

from lerobot.configs import PreTrainedConfig

TRAIN_ELSEWHERE = "a policy of type jax only acts: train it with `python -m lerobot_jax.train`"


@PreTrainedConfig.register_subclass("jax")
@dataclass
class JaxConfig(PreTrainedConfig):
    """What LeRobot asks of a policy. `JaxPolicy` fills the features in; all else stays in the policy's folder."""

    # Where torch hands the observations over. JAX computes on its own default device: a GPU, if it sees one.
    device: str | None = "cpu"

    @property
    def observation_delta_indices(self) -> None:
        return None

    @property
    def action_delta_indices(self) -> None:
        return None

    @property
    def reward_delta_indices(self) -> None:
        return None

    def get_optimizer_preset(self):
        raise NotImplementedError(TRAIN_ELSEWHERE)

    def get_scheduler_preset(self):
        raise NotImplementedError(TRAIN_ELSEWHERE)

    def validate_features(self) -> None:
        """Accept them: lerobot_jax has checked them."""
