"""Push-T demonstrations as LeRobotDatasets, with the features of `lerobot/pusht` and `lerobot/pusht_keypoints`.

The built-in ones are an expert's actions, committed as one small file; the first use replays them in the simulator
and writes the dataset into LeRobot's cache, so that nothing has to be downloaded.
"""

import hashlib
import os
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float, UInt8

from lerobot_jax import hub
from lerobot_jax.data.writer import DatasetWriter
from lerobot_jax.envs import pusht_expert
from lerobot_jax.envs.pusht import FastPushTEnv
from lerobot_jax.errors import InputError
from lerobot_jax.progress import progress_bar

BUILTIN = {"builtin/pusht": False, "builtin/pusht_keypoints": True}  # name -> keypoints instead of images
DEMONSTRATIONS = Path(__file__).with_name("pusht_demonstrations.npz")
SOURCE_NAME = "demonstrations.sha256"  # in a built-in dataset: what it was made of
FPS = 10


def pusht_features(keypoints: bool) -> dict[str, dict[str, Any]]:
    """Give the features of a Push-T dataset: with the T's keypoints, or with camera images."""
    motors = {"motors": ["motor_0", "motor_1"]}
    features: dict[str, dict[str, Any]] = {}
    if keypoints:
        names = {"keypoints": [f"{axis}_{i}" for i in range(8) for axis in "xy"]}
        features["observation.environment_state"] = {"dtype": "float32", "shape": (16,), "names": names}
    else:
        names = ["height", "width", "channel"]
        features["observation.image"] = {"dtype": "video", "shape": (96, 96, 3), "names": names}
    return features | {
        "observation.state": {"dtype": "float32", "shape": (2,), "names": motors},
        "action": {"dtype": "float32", "shape": (2,), "names": motors},
        "next.reward": {"dtype": "float32", "shape": (1,), "names": None},
        "next.done": {"dtype": "bool", "shape": (1,), "names": None},
        "next.success": {"dtype": "bool", "shape": (1,), "names": None},
    }


def builtin_features(repo_id: str) -> dict[str, dict[str, Any]]:
    """Give the features of a built-in dataset.

    Raises:
        InputError: for a name that is not built in.
    """
    if repo_id not in BUILTIN:
        raise InputError(f"dataset '{repo_id}': no such built-in dataset; there are {', '.join(BUILTIN)}")
    return pusht_features(BUILTIN[repo_id])


def create_pusht_dataset(repo_id: str, root: Path, keypoints: bool) -> DatasetWriter:
    """Start a Push-T dataset."""
    return DatasetWriter(repo_id, root, FPS, pusht_features(keypoints), robot_type="2d pointer")


def record_episode(
    writer: DatasetWriter,
    env: FastPushTEnv,
    states: Float[np.ndarray, "t 5"],
    actions: Float[np.ndarray, "t 2"],
    next_coverages: Float[np.ndarray, " t"],
    images: UInt8[np.ndarray, "t 96 96 3"] | Sequence[None] | None = None,
) -> None:
    """Write one episode.

    Args:
        writer: the dataset.
        env: draws the images and gives the keypoints.
        states: agent x, y, block x, y (pixels), block angle (radians), before each action.
        actions: target x, y of the agent (pixels).
        next_coverages: how much of the goal is covered after each action.
        images: the camera's images; drawn from the states unless given.
    """
    for t, (state, action) in enumerate(zip(states, actions, strict=True)):
        env.show(state)
        frame: dict[str, Any] = {
            "observation.state": state[:2].astype(np.float32),
            "action": action.astype(np.float32),
            "next.reward": np.array([np.clip(next_coverages[t] / env.success_threshold, 0, 1)], np.float32),
            "next.done": np.array([t == len(states) - 1]),
            "next.success": np.array([next_coverages[t] > env.success_threshold]),
            "task": env.task_description,
        }
        if "observation.image" in writer.features:
            frame["observation.image"] = env.picture if images is None else images[t]
        else:
            frame["observation.environment_state"] = env.keypoints.astype(np.float32)
        writer.add_frame(frame)
    writer.save_episode()


def make_builtin_dataset(repo_id: str) -> None:
    """Write a built-in dataset into LeRobot's cache unless it is there, made of the same demonstrations.

    Raises:
        InputError: for a name that is not built in, or if another dataset is in its place.
    """
    builtin_features(repo_id)
    root = hub.lerobot_home() / repo_id
    source = hashlib.sha256(DEMONSTRATIONS.read_bytes()).hexdigest()
    stamp = root / SOURCE_NAME
    if root.exists() and any(root.iterdir()) and not stamp.exists():
        raise InputError(f"{root}: this is not the built-in dataset {repo_id}; move it away")
    if stamp.exists() and stamp.read_text() == source:
        return
    partial = root.with_name(f".{root.name}.partial-{os.getpid()}")
    writer = create_pusht_dataset(repo_id, partial, keypoints=BUILTIN[repo_id])
    env, episodes = FastPushTEnv(), load_demonstrations()
    try:
        with progress_bar(f"replaying the demonstrations ({repo_id}, once)", len(episodes), "episode") as bar:
            for seed, actions in episodes:
                states = replay(env, seed, actions)
                record_episode(writer, env, states[:-1], actions, coverage_of(states[1:]))
                bar.update()
        writer.finalize()
        (partial / SOURCE_NAME).write_text(source)
        if stamp.exists() and stamp.read_text() == source:  # another process was faster
            return
        if root.exists():  # of other demonstrations
            shutil.rmtree(root)
        partial.rename(root)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def load_demonstrations() -> list[tuple[int, Float[np.ndarray, "t 2"]]]:
    """Give the seed and the expert's actions of every built-in episode."""
    with np.load(DEMONSTRATIONS) as file:
        seeds, lengths, actions = file["seeds"], file["lengths"].astype(int), file["actions"]
    return list(zip(seeds.tolist(), np.split(actions, lengths.cumsum()[:-1]), strict=True))


def replay(
    env: FastPushTEnv, seed: int, actions: Float[np.ndarray, "t 2"]
) -> Float[np.ndarray, "t_plus_1 5"]:
    """Give the states of an episode: the environment's own physics, without what it computes around it."""
    env.reset(seed=seed)
    agent, space, dt = env.agent, env.space, env.dt
    env.collision_handeler.post_solve = _ignore_contacts
    states = [env.state]
    for x, y in actions.tolist():
        (px, py), (vx, vy) = agent.position, agent.velocity
        for _ in range(int(1 / (dt * env.control_hz))):
            vx += (env.k_p * (x - px) + env.k_v * (0 - vx)) * dt
            vy += (env.k_p * (y - py) + env.k_v * (0 - vy)) * dt
            agent.velocity = vx, vy
            space.step(dt)
            px, py = agent.position
        states.append(env.state)
    return np.array(states)


def _ignore_contacts(*_: object) -> None: ...


def coverage_of(states: Float[np.ndarray, "t 5"]) -> Float[np.ndarray, " t"]:
    """Give how much of the goal is covered in each state."""
    angle = states[:, 4]
    return pusht_expert.coverage(states[:, 2:4] + pusht_expert.rotate(pusht_expert.CENTRE, angle), angle)
