"""Stock LeRobot with the plugin `lerobot_policy_jax`, for tests/test_plugins.py: run by LeRobot's own Python.

    $LEROBOT_PYTHON tests/lerobot_plugin_peer.py COMMAND ARGUMENTS.json

Writes `result.npz` beside the arguments.
"""

import functools
import json
import signal
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import numpy as np
import torch
from lerobot.configs import PreTrainedConfig
from lerobot.policies.factory import get_policy_class, make_policy_config, make_pre_post_processors
from lerobot.robots import Robot, RobotConfig
from lerobot.scripts import lerobot_rollout
from lerobot.utils.import_utils import register_third_party_plugins


def act(folder: str, observations: str, episodes: list[int]) -> dict:
    """Run episodes of these lengths with PyTorch and with JAX; give the actions of both, and a first chunk."""
    register_third_party_plugins()
    arrays = {k: torch.from_numpy(v) for k, v in np.load(observations).items()}  # step b ...
    torch_config = PreTrainedConfig.from_pretrained(folder)
    torch_config.device = "cpu"
    result = {}
    for config in (torch_config, make_policy_config("jax", pretrained_path=folder)):
        policy = get_policy_class(config.type).from_pretrained(folder, config=config)
        pre, post = make_pre_post_processors(config, pretrained_path=folder)
        steps = iter(range(sum(episodes)))
        actions = []
        with torch.inference_mode():
            result[f"chunk/{config.type}"] = post(policy.predict_action_chunk(pre(row(arrays, 0)))).numpy()
            for length in episodes:
                policy.reset()
                actions += [post(policy.select_action(pre(row(arrays, next(steps))))) for _ in range(length)]
        result[f"actions/{config.type}"] = torch.stack(actions).numpy()
    return result


def act_as_ours(folder: str, observations: str, seed: int, episodes: list[int]) -> dict:
    """Run episodes of these lengths in LeRobot's way and in lerobot_jax's own, both with JAX."""
    from lerobot_jax.policies.base import load_policy

    register_third_party_plugins()
    arrays = {k: torch.from_numpy(v) for k, v in np.load(observations).items()}  # step b ...
    torch.manual_seed(seed)
    config = make_policy_config("jax", pretrained_path=folder)
    policy = get_policy_class("jax").from_pretrained(folder, config=config)
    pre, post = make_pre_post_processors(config, pretrained_path=folder)
    runner = load_policy(folder).make_runner(2, seed)
    steps = iter(range(sum(episodes)))
    stock, ours = [], []
    for i, length in enumerate(episodes):
        policy.reset()
        for slot in range(2):
            runner.reset(slot, 2 * i + slot)
        for _ in range(length):
            observation = row(arrays, next(steps))
            ours.append(runner.select_action({key: value.numpy() for key, value in observation.items()}))
            with torch.inference_mode():
                stock.append(post(policy.select_action(pre(observation))).numpy())
    return {"stock": np.array(stock), "ours": np.array(ours)}


def row(arrays: dict[str, torch.Tensor], step: int) -> dict[str, torch.Tensor]:
    """Give the observation of a step, in memory of its own as an environment's."""
    return {key: value[step].clone() for key, value in arrays.items()}


def rollout(arguments: list[str]) -> dict:
    """Run `lerobot-rollout` on a robot that is not there; give the actions that it got."""
    sys.argv = ["lerobot-rollout", "--robot.type=pretend", *arguments]
    lerobot_rollout.main()
    return {"actions": np.array(PretendRobot.actions)}


@RobotConfig.register_subclass("pretend")
@dataclass
class PretendRobotConfig(RobotConfig):
    """A robot with three joints and a camera, which shows the same in every run; for ten actions."""


class PretendRobot(Robot):
    config_class = PretendRobotConfig
    name = "pretend"
    joints: ClassVar = ("pan.pos", "lift.pos", "gripper.pos")
    actions: ClassVar = []
    is_connected = False
    is_calibrated = True

    def __init__(self, config: PretendRobotConfig):
        super().__init__(config)
        self._rng = np.random.default_rng(0)

    @functools.cached_property
    def action_features(self) -> dict:
        return dict.fromkeys(self.joints, float)

    @functools.cached_property
    def observation_features(self) -> dict:
        return {**self.action_features, "top": (32, 48, 3)}

    def get_observation(self) -> dict:
        angles = dict(zip(self.joints, self._rng.normal(0, 1, 3).tolist(), strict=True))
        return {**angles, "top": self._rng.integers(0, 256, (32, 48, 3), np.uint8)}

    def send_action(self, action: dict) -> dict:
        self.actions.append([action[joint] for joint in self.joints])
        if len(self.actions) == 10:
            signal.raise_signal(signal.SIGINT)
        return action

    def connect(self, calibrate: bool = True) -> None:
        self.is_connected = True

    def disconnect(self) -> None:
        self.is_connected = False

    def calibrate(self) -> None: ...

    def configure(self) -> None: ...


if __name__ == "__main__":
    arguments = Path(sys.argv[2])
    command = {f.__name__: f for f in (act, act_as_ours, rollout)}[sys.argv[1]]
    result = command(**json.loads(arguments.read_text()))
    np.savez(arguments.with_name("result.npz"), **result)
