"""The real program on a dataset that lies on a web server, and on camera frames that are resized and augmented."""

import functools
import http.server
import json
import threading
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from lerobot_jax import train
from lerobot_jax.errors import InputError
from lerobot_jax.metrics import read_metrics
from lerobot_jax.policies.base import load_policy
from tests.data.recordings import record
from tests.runs import FEATURES as STATE_FEATURES
from tests.runs import RECIPE, assert_same_run


class _Quiet(http.server.SimpleHTTPRequestHandler):
    def log_message(self, *_: object) -> None: ...


@pytest.fixture(scope="module")
def root(tmp_path_factory) -> Path:
    return record(tmp_path_factory.mktemp("data") / "dataset", (9, 12, 8, 11), STATE_FEATURES).root


@pytest.fixture
def url(root: Path) -> Iterator[str]:
    handler = functools.partial(_Quiet, directory=str(root))
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()


def test_a_streamed_run_resumes_exactly_and_leaves_no_files(
    root: Path, url: str, tmp_path: Path, monkeypatch
):
    monkeypatch.setenv("LEROBOT_JAX_CACHE", str(tmp_path / "cache"))
    recipe = tmp_path / "tiny.py"
    recipe.write_text(RECIPE.format(root=url))
    arguments = [f"--config={recipe}", "--config.dataset.streaming=True", "--config.dataset.buffer_size=12"]
    train.main([*arguments, f"--config.output_dir={tmp_path / 'whole'}"])
    records = read_metrics(tmp_path / "whole/metrics.jsonl")
    losses = [r["loss"] for r in records if "loss" in r]
    assert losses[-1] < losses[0]
    assert [r["step"] for r in records if "eval_loss" in r] == [10, 20]
    stopped = [*arguments, f"--config.output_dir={tmp_path / 'stopped'}"]
    train.main([*stopped, "--config.steps=10"])
    train.main([*stopped, "--config.resume=True", "--config.num_workers=1", "--config.prefetch_factor=1"])
    assert_same_run(tmp_path / "whole", tmp_path / "stopped")
    assert not list((tmp_path / "cache").glob("streams/mirror-*/*"))

    relative = "--config.policy.action_target.representation=relative"
    with pytest.raises(InputError, match=r"statistics need all actions of the dataset, so dataset.streaming"):
        train.main([*arguments, relative, f"--config.output_dir={tmp_path / 'relative'}"])
    elsewhere = [f"--config.dataset.root={url}/nothing", f"--config.output_dir={tmp_path / 'elsewhere'}"]
    with pytest.raises(InputError, match=f"{url}/nothing/meta/info.json"):
        train.main([*arguments, *elsewhere])


@pytest.mark.slow
def test_frames_are_resized_and_augmented_and_the_policy_resizes_what_it_sees(tmp_path: Path, monkeypatch):
    monkeypatch.setenv("LEROBOT_JAX_CACHE", str(tmp_path / "cache"))
    image = {"dtype": "video", "shape": (48, 64, 3), "names": ["height", "width", "channels"]}
    features = {"observation.images.top": image} | {
        k: STATE_FEATURES[k] for k in ("observation.state", "action")
    }
    root = record(tmp_path / "dataset", (9, 12), features).root
    recipe = tmp_path / "tiny.py"
    recipe.write_text(RECIPE.format(root=root))
    arguments = [f"--config={recipe}", "--config.eval_steps=0", "--config.dataset.eval_split=0"]
    arguments += [
        "--config.policy.pretrained_backbone_weights=None",
        "--config.steps=2",
        "--config.log_freq=1",
    ]
    arguments += ["--config.dataset.image_size", "24", "32", "--config.dataset.image_transforms.enable=True"]
    train.main([*arguments, f"--config.output_dir={tmp_path / 'run'}"])
    model = tmp_path / "run/checkpoints/last/pretrained_model"
    policy = load_policy(model)
    assert policy.config.input_features["observation.images.top"].shape == (3, 24, 32)
    steps = json.loads((model / "policy_preprocessor.json").read_text())["steps"]
    (resize,) = [step for step in steps if step["registry_name"] == "image_crop_resize_processor"]
    assert resize["config"]["resize_size"] == [24, 32]
    frame = np.random.default_rng(0).integers(0, 256, (1, 48, 64, 3), np.uint8)
    observation = {"observation.images.top": frame, "observation.state": np.zeros((1, 3), np.float32)}
    assert policy.preprocess(observation)["observation.images.top"].shape == (1, 24, 32, 3)
    assert np.isfinite(np.asarray(policy.make_runner().select_action(observation))).all()
