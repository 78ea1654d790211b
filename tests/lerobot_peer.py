"""What stock LeRobot does, for tests marked `lerobot`: a process of its Python that runs commands.

    $LEROBOT_PYTHON tests/lerobot_peer.py

Reads requests from standard input, one a line: {"command": ..., "arguments": {...}, "result": a path}. Each runs a
function of this file, writes the arrays that it gives into the npz file `result`, and is answered with a line:
"done", or the traceback in JSON.
"""

import enum
import json
import os
import signal
import sys
import time
import traceback
from pathlib import Path
from typing import Any, ClassVar
from unittest import mock

import cv2
import numpy as np
import torch
from lerobot.configs import FeatureType, PolicyFeature, PreTrainedConfig
from lerobot.datasets import LeRobotDataset
from lerobot.policies.factory import get_policy_class, make_policy_config, make_pre_post_processors
from lerobot.processor import RenameObservationsProcessorStep

Arrays = dict[str, np.ndarray]


def write_dataset(frames: str, features: dict, root: str, vcodec: str = "libsvtav1") -> Arrays:
    """Record the frames of an npz file: one array a feature, `episode_ends`, `tasks`."""
    from lerobot.configs import RGBEncoderConfig

    arrays = np.load(frames)
    features = {k: {**f, "shape": tuple(f["shape"])} for k, f in features.items()}
    dataset = LeRobotDataset.create(
        "test/stock", 10, features, root=root, rgb_encoder=RGBEncoderConfig(vcodec=vcodec)
    )
    start = 0
    for end, task in zip(arrays["episode_ends"], arrays["tasks"], strict=True):
        for t in range(start, end):
            dataset.add_frame({"task": str(task)} | {key: arrays[key][t] for key in features})
        dataset.save_episode()
        start = end
    dataset.finalize()
    return {}


def read_dataset(root: str, episodes: list | None, delta_timestamps: dict | None) -> Arrays:
    """Read every item of a dataset; images come channel-last and uint8."""
    dataset = LeRobotDataset(
        "test/ours",
        root=root,
        episodes=episodes,
        delta_timestamps=delta_timestamps or None,
        return_uint8=True,
        video_backend="pyav",
    )
    items = [dataset[i] for i in range(len(dataset))]
    result = {}
    for key, first in items[0].items():
        if isinstance(first, str):
            result[key] = np.array([item[key] for item in items])
            continue
        values = torch.stack([item[key] for item in items])
        if key in dataset.meta.camera_keys:
            values = values if values.dtype == torch.uint8 else (values * 255).round().to(torch.uint8)
            values = values.movedim(-3, -1)
        result[key] = values.numpy()
    for key, stats in dataset.meta.stats.items():
        for name, value in stats.items():
            result[f"stats/{key}/{name}"] = value
    return result


def act(folder: str, observations: str) -> Arrays:
    """Load a policy folder; give its first chunk and its actions over some steps, in the environment's units."""
    config = PreTrainedConfig.from_pretrained(folder)
    config.device = "cpu"
    policy = get_policy_class(config.type).from_pretrained(folder, config=config, strict=True)
    policy.eval()
    pre, post = make_pre_post_processors(config, pretrained_path=folder)
    arrays = {k: torch.from_numpy(v) for k, v in np.load(observations).items()}  # step b ...
    steps = len(next(iter(arrays.values())))
    with torch.no_grad():
        policy.reset()
        chunk = post(policy.predict_action_chunk(pre({k: v[0].clone() for k, v in arrays.items()})))
        policy.reset()
        actions = [
            post(policy.select_action(pre({k: v[t].clone() for k, v in arrays.items()})))
            for t in range(steps)
        ]
    return {"chunk": chunk.numpy(), "actions": torch.stack(actions).numpy()}


def make_stock(
    folder: str,
    kind: str,
    inputs: dict[str, list[int]],
    action: int,
    settings: dict,
    rename_map: dict[str, str],
) -> Arrays:
    """Save a policy as stock LeRobot makes it, with random weights and statistics."""
    kinds = {"observation.state": FeatureType.STATE, "observation.environment_state": FeatureType.ENV}
    features = {
        key: PolicyFeature(kinds.get(key, FeatureType.VISUAL), tuple(shape)) for key, shape in inputs.items()
    }
    outputs = {"action": PolicyFeature(FeatureType.ACTION, (action,))}
    settings = {key: tuple(value) if isinstance(value, list) else value for key, value in settings.items()}
    config = make_policy_config(
        kind, input_features=features, output_features=outputs, device="cpu", **settings
    )
    torch.manual_seed(0)
    policy = get_policy_class(kind)(config)
    for name, value in policy.state_dict().items():  # also what starts as zeros and ones
        if name.endswith("running_var"):
            value.uniform_(0.5, 1.5)
        elif value.is_floating_point():
            value.add_(0.02 * torch.randn(value.shape))
    stats = {key: _random_stats(feature) for key, feature in (features | outputs).items()}
    pre, post = make_pre_post_processors(config, dataset_stats=stats)
    rename = pre.steps[0]
    assert isinstance(rename, RenameObservationsProcessorStep)
    rename.rename_map = rename_map
    for part in (policy, pre, post):
        part.save_pretrained(folder)
    return {}


def _random_stats(feature: PolicyFeature) -> dict[str, torch.Tensor]:
    shape = (3, 1, 1) if feature.type == FeatureType.VISUAL else feature.shape
    quantiles = torch.cumsum(torch.rand(5, *shape) + 0.1, 0)
    names = ("min", "q01", "q10", "q90", "q99")
    return dict(zip(names, quantiles, strict=True)) | {
        "max": quantiles[-1] + 0.3,
        "mean": torch.randn(shape),
        "std": torch.rand(shape) + 0.5,
    }


def initialize(config: dict, folder: str) -> Arrays:
    """Make a new policy with LeRobot's own initialization; give each parameter's mean, deviation and maximum."""
    (Path(folder) / "config.json").write_text(json.dumps(config))
    settings = PreTrainedConfig.from_pretrained(folder)
    settings.device = "cpu"
    torch.manual_seed(0)
    policy = get_policy_class(settings.type)(settings)
    state = {k: v.float() for k, v in policy.state_dict().items()}
    return {
        k: np.array([v.mean(), v.std() if v.numel() > 1 else 0.0, v.abs().max()]) for k, v in state.items()
    }


# lerobot-rollout, on an SO-101 of which only the serial port and the cameras' drivers are not real


def rollout(arguments: list[str], calibration: dict[str, dict], steps: int) -> Arrays:
    """Run lerobot-rollout for some steps, then press Ctrl-C.

    Args:
        arguments: its command line.
        calibration: of each servo, as in the arm's calibration file.
        steps: how many actions are sent.

    Returns:
        What the robot showed (`observation/<name>`) and was sent (`action/<name>`), step by step, in the order that
        LeRobot has them in, and what the servos were told: `goals`, (steps, servos).
    """
    import serial
    from lerobot.robots.so_follower import SOFollower
    from lerobot.scripts import lerobot_rollout

    seen: list[dict[str, Any]] = []
    sent: list[dict[str, float]] = []
    goals: list[list[int]] = []
    get_observation, send_action = SOFollower.get_observation, SOFollower.send_action

    def watched_observation(robot: SOFollower) -> dict[str, Any]:
        seen.append(get_observation(robot))
        return seen[-1]

    def watched_action(robot: SOFollower, action: dict[str, float]) -> dict[str, float]:
        result = send_action(robot, action)
        sent.append(action)
        goals.append([servo.get(GOAL_POSITION) for servo in ServoPort.servos.values()])
        if len(sent) == steps:
            os.kill(os.getpid(), signal.SIGINT)
        return result

    ServoPort.servos = {entry["id"]: Servo(entry) for entry in calibration.values()}
    with (
        mock.patch.object(serial, "Serial", ServoPort),
        mock.patch.object(cv2, "VideoCapture", MovingPicture),
        mock.patch.object(SOFollower, "get_observation", watched_observation),
        mock.patch.object(SOFollower, "send_action", watched_action),
        mock.patch.object(sys, "argv", ["lerobot-rollout", *arguments]),
    ):
        lerobot_rollout.main()
    assert len(sent) == steps, f"{len(sent)} actions were sent"
    seen = seen[-steps:]  # the first was shown when the arm was connected
    return (
        {f"observation/{key}": np.array([row[key] for row in seen]) for key in seen[0]}
        | {f"action/{key}": np.array([row[key] for row in sent]) for key in sent[0]}
        | {"goals": np.array(goals)}
    )


# Addresses in the memory of a Feetech STS3215
MODEL, MIN_LIMIT, MAX_LIMIT, HOMING_OFFSET, GOAL_POSITION, PRESENT_POSITION = 3, 9, 11, 31, 42, 56


class Instruction(enum.IntEnum):
    """What a packet asks a servo to do."""

    PING, READ, WRITE, SYNC_READ, SYNC_WRITE = 1, 2, 3, 0x82, 0x83


class Servo:
    """The memory of a servo that is at once where it is told to be."""

    def __init__(self, calibration: dict[str, int]):
        self.memory = bytearray(128)
        middle = (calibration["range_min"] + calibration["range_max"]) // 2
        for address, value in (
            (MODEL, 777),
            (MIN_LIMIT, calibration["range_min"]),
            (MAX_LIMIT, calibration["range_max"]),
            (HOMING_OFFSET, calibration["homing_offset"]),
            (PRESENT_POSITION, middle + 50 * calibration["id"]),
        ):
            self.write(address, value.to_bytes(2, "little"))

    def write(self, address: int, data: bytes) -> None:
        self.memory[address : address + len(data)] = data
        if address == GOAL_POSITION:
            self.memory[PRESENT_POSITION : PRESENT_POSITION + 2] = data

    def get(self, address: int) -> int:
        return int.from_bytes(self.memory[address : address + 2], "little")


class ServoPort:
    """In place of `serial.Serial`: servos that answer Feetech's protocol."""

    servos: ClassVar[dict[int, Servo]] = {}

    def __init__(self, **settings: Any):
        self._answers = bytearray()

    def write(self, packet: list[int]) -> int:
        servo, _, instruction, *parameters = packet[2:-1]  # between the header and the check sum
        match instruction:
            case Instruction.PING:
                self._answer(servo, b"")
            case Instruction.READ:
                self._answer(servo, self._read(servo, *parameters))
            case Instruction.WRITE:
                address, *data = parameters
                self.servos[servo].write(address, bytes(data))
                self._answer(servo, b"")
            case Instruction.SYNC_READ:
                address, length, *servos = parameters
                for each in servos:
                    self._answer(each, self._read(each, address, length))
            case Instruction.SYNC_WRITE:
                address, length, *rest = parameters
                for i in range(0, len(rest), length + 1):
                    self.servos[rest[i]].write(address, bytes(rest[i + 1 : i + 1 + length]))
            case _:
                raise NotImplementedError(f"instruction {instruction}")
        return len(packet)

    def _read(self, servo: int, address: int, length: int) -> bytes:
        return bytes(self.servos[servo].memory[address : address + length])

    def _answer(self, servo: int, data: bytes) -> None:
        content = bytes([servo, len(data) + 2, 0]) + data
        self._answers += b"\xff\xff" + content + bytes([~sum(content) & 0xFF])

    def read(self, size: int) -> bytes:
        data = bytes(self._answers[:size])
        del self._answers[:size]
        return data

    def reset_input_buffer(self) -> None:
        self._answers.clear()

    def flush(self) -> None: ...

    def close(self) -> None: ...


class MovingPicture:
    """In place of `cv2.VideoCapture`: a camera of the wanted size whose picture moves."""

    def __init__(self, index: int, backend: int):
        self._settings: dict[int, float] = {}
        self._random = np.random.default_rng(index)

    def set(self, name: int, value: float) -> bool:
        self._settings[name] = value
        return True

    def get(self, name: int) -> float:
        return self._settings.get(name, 0.0)

    def isOpened(self) -> bool:
        return True

    def read(self) -> tuple[bool, np.ndarray]:
        time.sleep(1 / self._settings[cv2.CAP_PROP_FPS])
        coarse = self._random.integers(0, 255, (6, 8, 3), np.uint8)
        size = (int(self._settings[cv2.CAP_PROP_FRAME_WIDTH]), int(self._settings[cv2.CAP_PROP_FRAME_HEIGHT]))
        return True, cv2.resize(coarse, size)

    def release(self) -> None: ...


COMMANDS = {f.__name__: f for f in (write_dataset, read_dataset, act, make_stock, initialize, rollout)}


def main() -> None:
    answers, sys.stdout = sys.stdout, sys.stderr  # what LeRobot prints is not an answer
    for line in sys.stdin:
        request = json.loads(line)
        try:
            arrays = COMMANDS[request["command"]](**request["arguments"])
            np.savez(request["result"], allow_pickle=False, **arrays)
            answer = "done"
        except Exception:
            answer = json.dumps(traceback.format_exc())
        print(answer, file=answers, flush=True)


if __name__ == "__main__":
    main()
