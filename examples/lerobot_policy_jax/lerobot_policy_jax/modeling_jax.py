"""A policy of lerobot_jax behind the interface of stock LeRobot's policies.

LeRobot runs its own pre- and post-processors around it, read from the policy's folder as for any policy. So
observations come normalized and actions leave normalized, and `--rename_map` works as usual.
"""

from pathlib import Path

import jax
import numpy as np
import torch
from lerobot.configs import FeatureType, PolicyFeature
from lerobot.policies.pretrained import PreTrainedPolicy
from torch import Tensor

from lerobot_jax.compilation import keep_compiled_programs
from lerobot_jax.errors import InputError
from lerobot_jax.policies.base import load_policy
from lerobot_jax.processors import Pipeline
from lerobot_policy_jax.configuration_jax import TRAIN_ELSEWHERE, JaxConfig


class JaxPolicy(PreTrainedPolicy):
    """Computes actions with JAX; for acting only."""

    config_class = JaxConfig
    name = "jax"

    def __init__(self, config: JaxConfig, **kwargs):
        super().__init__(config)
        if config.pretrained_path is None:
            raise InputError("--policy.pretrained_path is missing: the folder or Hub name of the policy")
        if config.use_amp:
            raise InputError(
                "--policy.use_amp: a policy of type jax follows use_amp in its folder's config.json"
            )
        keep_compiled_programs()
        self._saved = load_policy(config.pretrained_path, config.pretrained_revision)
        config.n_obs_steps = self._saved.config.n_obs_steps
        config.input_features = _to_lerobot(self._saved.config.input_features)
        config.output_features = _to_lerobot(self._saved.config.output_features)

        nothing = Pipeline("nothing", ())
        self._policy = self._saved.replace(preprocessor=nothing, postprocessor=nothing)
        self._sample = jax.jit(self._sample_actions)
        self._seed = torch.initial_seed() % 2**32  # follows lerobot-eval's --seed
        self._key = jax.random.key(self._seed)
        self._batch_size, self._num_episodes = 1, 0
        self._runner = self._policy.make_runner(self._batch_size, self._seed)
        self._warm_up()
        self.reset()

    @classmethod
    def from_pretrained(cls, pretrained_name_or_path, *, config=None, revision=None, **kwargs) -> "JaxPolicy":
        """Load a policy from a folder or from the Hub."""
        config = config or JaxConfig()
        config.pretrained_path, config.pretrained_revision = pretrained_name_or_path, revision
        return cls(config).eval()

    def reset(self) -> None:
        """Begin new episodes with the next step."""
        self._begins = True

    def select_action(self, batch: dict[str, Tensor], **kwargs) -> Tensor:
        """Give the next normalized action of each robot or environment, (b act)."""
        observation = _to_numpy(batch)
        if self._begins:
            self._begin_episodes(len(next(iter(observation.values()))))
        return torch.from_numpy(self._runner.select_action(observation))

    def predict_action_chunk(self, batch: dict[str, Tensor], **kwargs) -> Tensor:
        """Give a chunk of normalized actions, (b chunk act)."""
        if self.config.n_obs_steps > 1:
            raise InputError("predict_action_chunk: the policy looks at past steps too; use select_action")
        self._key, key = jax.random.split(self._key)
        chunk = self._sample(self._policy.params, self._policy.buffers, _to_numpy(batch), key)
        return torch.from_numpy(np.array(chunk))

    def forward(self, batch: dict[str, Tensor]):
        raise NotImplementedError(TRAIN_ELSEWHERE)

    def get_optim_params(self):
        raise NotImplementedError(TRAIN_ELSEWHERE)

    def _save_pretrained(self, save_directory: Path, state_dict=None) -> None:
        self._saved.save_pretrained(save_directory)

    def _sample_actions(self, params, buffers, observation, key):
        return self._policy.sample_actions(params, buffers, self._policy.preprocess(observation), key)

    def _begin_episodes(self, batch_size: int) -> None:
        """Number the episodes as `lerobot_jax.eval` does: their noise follows from the seed and their number."""
        if batch_size != self._batch_size:
            self._runner, self._batch_size = self._policy.make_runner(batch_size, self._seed), batch_size
        for slot in range(batch_size):
            self._runner.reset(slot, self._num_episodes + slot)
        self._num_episodes += batch_size
        self._begins = False

    def _warm_up(self) -> None:
        """Compile for one robot now, so that it never waits for the compiler."""
        features = self._policy.config.input_features
        self._runner.select_action({key: np.zeros((1, *f.shape), np.float32) for key, f in features.items()})


def _to_lerobot(features) -> dict[str, PolicyFeature]:
    return {key: PolicyFeature(FeatureType(f.type.value), f.shape) for key, f in features.items()}


def _to_numpy(batch: dict[str, Tensor]) -> dict[str, np.ndarray]:
    """Take the observations out of a batch."""
    return {key: value.cpu().numpy() for key, value in batch.items() if key.startswith("observation.")}
