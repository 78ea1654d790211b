"""An SO-101 under lerobot-rollout, up to its serial port and its cameras' drivers."""

import json
from pathlib import Path

import numpy as np
import pytest

from lerobot_jax.features import FeatureType, PolicyFeature
from lerobot_jax.policies.act import ACTConfig
from lerobot_jax.policies.base import load_policy
from tests.stock.conftest import Peer
from tests.stock.policies import new_policy

pytestmark = pytest.mark.lerobot

JOINTS = ("shoulder_pan", "shoulder_lift", "elbow_flex", "wrist_flex", "wrist_roll", "gripper")
CAMERAS = {"front": 0, "wrist": 2}
CONFIG = ACTConfig(
    input_features={
        "observation.state": PolicyFeature(FeatureType.STATE, (6,)),
        **{f"observation.images.{c}": PolicyFeature(FeatureType.VISUAL, (3, 480, 640)) for c in CAMERAS},
    },
    dim_model=64,
    n_heads=4,
    dim_feedforward=96,
    n_encoder_layers=2,
    chunk_size=8,
    n_action_steps=3,
)
DEGREES = {"mean": np.array([5, -40, 50, 30, 0, 30.0]), "std": np.array([20, 15, 15, 20, 40, 20.0])}


def test_rollout_on_an_so101_acts_like_our_policy(stock: Peer, tmp_path: Path):
    """The joint angles that are sent to the arm are those of our policy for the same angles and pictures."""
    folder = tmp_path / "policy"
    new_policy(CONFIG, action=6, stats={"observation.state": DEGREES, "action": DEGREES}).save_pretrained(
        folder
    )
    calibration = {
        joint: {
            "id": i,
            "drive_mode": 0,
            "homing_offset": 10 * i,
            "range_min": 700 + i,
            "range_max": 3300 - i,
        }
        for i, joint in enumerate(JOINTS, 1)
    }
    (tmp_path / "my_arm.json").write_text(json.dumps(calibration))
    cameras = ", ".join(
        f"{name}: {{type: opencv, index_or_path: {index}, width: 640, height: 480, fps: 30}}"
        for name, index in CAMERAS.items()
    )
    arguments = [
        f"--policy.path={folder}",
        "--robot.type=so101_follower",
        "--robot.port=/dev/ttyACM0",
        "--robot.id=my_arm",
        f"--robot.calibration_dir={tmp_path}",
        f"--robot.cameras={{{cameras}}}",
        "--task=pick up the cube",
        "--return_to_initial_position=false",
    ]
    steps = 7  # three chunks
    recorded = stock("rollout", arguments=arguments, calibration=calibration, steps=steps)
    shown = [key for key in recorded if key.startswith("observation/")]
    assert shown == [f"observation/{name}" for name in (*(f"{joint}.pos" for joint in JOINTS), *CAMERAS)]
    assert [key for key in recorded if key.startswith("action/")] == [f"action/{j}.pos" for j in JOINTS]

    runner = load_policy(folder).make_runner()
    state = np.stack([recorded[f"observation/{joint}.pos"] for joint in JOINTS], -1).astype(np.float32)
    expected = np.stack([recorded[f"action/{joint}.pos"] for joint in JOINTS], -1)
    for t in range(steps):
        images = {f"observation.images.{name}": recorded[f"observation/{name}"][t, None] for name in CAMERAS}
        actions = runner.select_action({"observation.state": state[t, None], **images})
        np.testing.assert_allclose(actions[0], expected[t], rtol=1e-6, atol=2e-4, err_msg=f"step {t}")
    assert np.ptp(expected, axis=0).min() > 0.1  # degrees; the gripper's unit is percent
    assert (
        (np.diff(recorded["goals"], axis=0) != 0).any(1).all()
    )  # the servos were told something new each time
