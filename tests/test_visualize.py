import dataclasses
import json
from pathlib import Path

import jax
import numpy as np
import PIL.Image
import pytest

from lerobot_jax import visualize
from lerobot_jax.errors import InputError
from lerobot_jax.features import dataset_to_policy_features
from lerobot_jax.metrics import read_metrics
from lerobot_jax.policies.act import ACTConfig
from lerobot_jax.policies.base import make_policy
from tests.data.recordings import record

RECORDS = [
    {"step": 10, "loss": 2.0, "grad_norm": 1.0, "samples_per_s": 100.0},
    {"step": 10, "eval_loss": 2.5, "pc_success": 0.0, "avg_max_reward": 0.2},
    {"step": 20, "loss": 1.0, "grad_norm": 0.5, "samples_per_s": 110.0},
]


def test_curves(tmp_path: Path):
    (tmp_path / "metrics.jsonl").write_text(
        "".join(json.dumps(r) + "\n" for r in RECORDS) + '{"step": 30, "lo'
    )
    assert read_metrics(tmp_path / "metrics.jsonl") == RECORDS  # the torn last line is ignored
    visualize.main([f"--run={tmp_path}"])
    with PIL.Image.open(tmp_path / "curves.png") as picture:
        width, height = picture.size
    assert width > 3 * height  # a panel each for loss, reward, success, gradients, speed


def test_curves_of_several_seeds(tmp_path: Path):
    for seed in (9, 10):
        (tmp_path / f"seed_{seed}").mkdir()
        lines = [json.dumps(record | {"loss": seed / record["step"]}) for record in RECORDS]
        (tmp_path / f"seed_{seed}/metrics.jsonl").write_text("\n".join(lines[: seed - 7]))  # one is ahead
    visualize.main([f"--run={tmp_path}"])
    with PIL.Image.open(tmp_path / "curves.png") as picture:
        assert picture.width > 3 * picture.height


def test_action_chunks(tmp_path: Path):
    dataset = record(tmp_path / "dataset")
    features = dataset_to_policy_features(dataset.features)
    config = dataclasses.replace(
        ACTConfig.tiny(),
        input_features={k: f for k, f in features.items() if k != "action"},
        output_features={"action": features["action"]},
    )
    policy = make_policy(config, dataset.meta.stats)
    params, buffers = policy.init(jax.random.key(0))
    policy.replace(params=params, buffers=buffers).save_pretrained(tmp_path / "policy")
    arguments = [
        f"--policy.path={tmp_path / 'policy'}",
        f"--dataset.root={tmp_path / 'dataset'}",
        "--num_samples=3",
    ]
    visualize.main(arguments)
    with PIL.Image.open(tmp_path / "policy/action_chunks.png") as picture:
        assert np.asarray(picture).std() > 5
    visualize.main([*arguments, f"--output={tmp_path / 'other.png'}", "--dataset.episodes", "1"])
    assert (tmp_path / "other.png").exists()
    # Without a dataset, the one that the policy was trained on.
    source = {"repo_id": "test/recorded", "root": str(tmp_path / "dataset"), "image_transforms": {}}
    (tmp_path / "policy/train_config.json").write_text(json.dumps({"dataset": source}))
    visualize.main([arguments[0], "--num_samples=2", f"--output={tmp_path / 'default.png'}"])
    assert (tmp_path / "default.png").exists()


def test_mistakes(tmp_path: Path):
    with pytest.raises(InputError, match="give either --run"):
        visualize.main([])
    with pytest.raises(InputError, match=r"metrics.jsonl: no metrics to draw"):
        visualize.main([f"--run={tmp_path}"])
