"""Policies go to the Hub, of which a small copy runs on this machine, and come back from it."""

import dataclasses
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import jax
import numpy as np
import pytest
from huggingface_hub import ModelCard

from lerobot_jax import push_to_hub as push
from lerobot_jax import train
from lerobot_jax.checkpoint import Checkpoint, find_checkpoint
from lerobot_jax.config import (
    DatasetConfig,
    EnvConfig,
    SchedulerConfig,
    SourceConfig,
    TrainConfig,
    WandBConfig,
)
from lerobot_jax.errors import InputError
from lerobot_jax.features import FeatureType, PolicyFeature
from lerobot_jax.files import write_json
from lerobot_jax.model_card import write_card
from lerobot_jax.policies.act import ACTConfig
from lerobot_jax.policies.base import load_policy, make_policy
from lerobot_jax.processors.actions import ActionTarget
from lerobot_jax.push_to_hub import push_to_hub
from lerobot_jax.recipe import rebuild_config, write_recipe
from lerobot_jax.transforms import ImageTransformConfig, ImageTransformsConfig
from tests.data.recordings import record
from tests.fake_hub import FakeHub, Repository, connected
from tests.runs import FEATURES, RECIPE
from tests.test_hub import fetched, tiny_files, tiny_policy, weights

# What huggingface_hub's own uploads warn of.
pytestmark = pytest.mark.filterwarnings("ignore:Use 'content=:DeprecationWarning")

CONFIG = TrainConfig(
    policy=dataclasses.replace(ACTConfig.tiny(), push_to_hub=True, repo_id="alice/arm", tags=("so101",)),
    dataset=DatasetConfig(repo_id="alice/blocks", root="/home/alice/blocks", episodes=(0, 2)),
    env=EnvConfig(type="pusht"),
    scheduler=SchedulerConfig(type="cosine", num_warmup_steps=5),
    wandb=WandBConfig(entity="alice"),
    output_dir="/home/alice/run",
    resume=True,
    steps=20,
    ema_decay=0.9,
)
MIXTURE = DatasetConfig(
    mixture=(
        SourceConfig("alice/blocks", 2.0, revision="0" * 40, rename_map={"observation.images.a": "top"}),
        SourceConfig("bob/cups", root="/home/alice/cups", episodes=(1, 3)),
    ),
    image_size=(96, 128),
    image_transforms=ImageTransformsConfig(
        enable=True, tfs={"crop": ImageTransformConfig(type="RandomCrop", kwargs={"size": (84, 84)})}
    ),
)
METRICS = [{"step": 10, "loss": 2.0}, {"step": 10, "eval_loss": 3.25}, {"step": 20, "loss": 1.0, "lr": 0.1}]
RESULT = {"avg_sum_reward": 75.3, "avg_max_reward": 0.88, "pc_success": 70.0, "n_episodes": 10}


@pytest.fixture
def fake(tmp_path: Path) -> Iterator[FakeHub]:
    with connected(tmp_path) as server:
        yield server


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """Make a run's folder with the checkpoints 10 and 20, whose weights differ."""
    folder = tmp_path / "run"
    for seed, name in enumerate(("000010", "000020")):
        model = folder / "checkpoints" / name / "pretrained_model"
        model.mkdir(parents=True)
        for file, data in tiny_files(seed).items():
            (model / file).write_bytes(data)
        settings = json.loads((model / "config.json").read_text())
        write_json(settings | {"tags": ["so101"]}, model / "config.json")
        write_json(CONFIG.to_dict(), model / "train_config.json")
    (folder / "checkpoints/last").symlink_to("000020")
    (folder / "metrics.jsonl").write_text("".join(json.dumps(record) + "\n" for record in METRICS))
    write_json(
        {"per_group": {"pusht": RESULT}, "overall": RESULT}, folder / "eval/step_000020/eval_info.json"
    )
    return folder


def metadata(card: str) -> dict:
    """Parse what the Hub reads at the top of a model card."""
    return ModelCard(card).data.to_dict()


def test_a_run_goes_up_in_one_commit_and_comes_back_by_its_name(fake: FakeHub, run: Path):
    url = push_to_hub(run, "alice/arm", step=10)
    assert url == f"{fake.url}/alice/arm"
    repository = fake.repositories["alice/arm"]
    first = repository.refs["main"]
    assert len(repository.commits) == 2  # the Hub makes the one before
    folder = run / "checkpoints/000010/pretrained_model"
    sent = fake.files("alice/arm")
    assert set(sent) == {p.name for p in folder.iterdir()} | {"README.md", ".gitattributes"}
    for path in folder.iterdir():
        assert sent[path.name] == path.read_bytes()
    np.testing.assert_array_equal(weights(load_policy("alice/arm")), weights(tiny_policy(0)))
    push_to_hub(run / "checkpoints/last", "alice/arm")
    assert len(repository.commits) == 3
    assert fetched("alice/arm") == tiny_files(1)["model.safetensors"]
    assert fetched("alice/arm", first) == tiny_files(0)["model.safetensors"]
    card = fake.files("alice/arm")["README.md"].decode()
    assert "after 20 steps" in card
    assert "so101" in metadata(card)["tags"]


def test_files_of_an_earlier_policy_do_not_stay(fake: FakeHub, run: Path):
    fake.repositories["alice/arm"] = Repository()
    others = {
        "model-00001-of-00002.safetensors": b"",
        "model.safetensors.index.json": b"",
        "demo.gif": b"gif",
    }
    fake.repositories["alice/arm"].commit(others | {"videos/policy_a.json": b""})
    push_to_hub(run, "alice/arm")
    names = set(fake.files("alice/arm"))
    assert {"model.safetensors", "demo.gif", "videos/policy_a.json"} <= names
    assert not {"model-00001-of-00002.safetensors", "model.safetensors.index.json"} & names


def test_private_repositories_and_branches(fake: FakeHub, run: Path, monkeypatch):
    url = push_to_hub(run, "alice/secret", private=True, revision="half way", step=10)
    assert url.endswith("/alice/secret/tree/half way")
    push_to_hub(run, "alice/secret", private=True)
    assert fake.repositories["alice/secret"].private
    assert fetched("alice/secret") == tiny_files(1)["model.safetensors"]
    assert fetched("alice/secret", "half way") == tiny_files(0)["model.safetensors"]
    before = fake.repositories["alice/secret"].refs["main"]
    with pytest.raises(InputError, match=r"'alice/secret' is there already and is private; make it public"):
        push_to_hub(run, "alice/secret", private=False)
    assert fake.repositories["alice/secret"].refs["main"] == before


def test_mistakes_are_told_before_anything_is_sent(fake: FakeHub, run: Path, tmp_path: Path, monkeypatch):
    policy = run / "checkpoints/last/pretrained_model"
    old = shutil.copytree(policy, tmp_path / "old")
    (old / "model.safetensors").unlink()
    (old / "pytorch_model.bin").write_bytes(b"\x80\x04")
    damaged = shutil.copytree(policy, tmp_path / "damaged")
    (damaged / "model.safetensors").write_bytes(b"not safetensors")
    (tmp_path / "empty").mkdir()
    for folder, settings, message in (
        (tmp_path / "nowhere", {}, r"nowhere: no such folder"),
        (
            tmp_path / "empty",
            {},
            r"empty has no config.json; give a run's folder, a checkpoint's, or a pretrained",
        ),
        (old, {}, r"old has no model.safetensors, only pytorch_model.bin: a pickle"),
        (damaged, {}, r"model.safetensors: damaged"),
        (run, {"step": 15}, r"no checkpoint of step 15; there are those of the steps 10, 20"),
        (policy, {"step": 10}, r"step chooses among a run's checkpoints"),
        (run, {"repo_id": "arm"}, r"repo_id: 'arm' must be USER/NAME"),
        (run, {"repo_id": "alice/my arm"}, r"repo_id: Repo id must use alphanumeric"),
        (run, {"repo_id": "https://huggingface.co/alice/arm"}, r"repo_id: Repo id must be in the form"),
    ):
        with pytest.raises(InputError, match=message):
            push_to_hub(folder, **{"repo_id": "alice/arm", **settings})
    monkeypatch.delenv("HF_TOKEN")
    with pytest.raises(
        InputError, match=r"no token for the Hub: log in with `hf auth login`, or set HF_TOKEN"
    ):
        push_to_hub(run, "alice/arm")
    assert fake.calls == []


def test_what_the_hub_refuses_is_told_on_one_line(fake: FakeHub, run: Path, monkeypatch):
    for token, message in (
        ("hf_bob", r"'alice/arm' could not be uploaded: your token may not do this; check its permissions"),
        ("hf_expired", r"the Hub does not accept your token; log in with `hf auth login`"),
    ):
        with pytest.raises(InputError, match=message) as caught:
            push_to_hub(run, "alice/arm", token=token)
        assert "\n" not in str(caught.value)
    fake.repositories["alice/arm"] = Repository()
    fake.repositories["alice/arm"].commit({})
    with pytest.raises(InputError, match=r"your token may not do this"):
        push_to_hub(run, "alice/arm", token="hf_bob")
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", "http://127.0.0.1:9")  # where nobody listens
    with pytest.raises(InputError, match=r"the connection to the Hub failed \(ConnectError.*; try again"):
        push_to_hub(run, "alice/arm")


def test_the_card_says_what_the_run_tells(run: Path, tmp_path: Path):
    dataset = record(tmp_path / "blocks").meta  # episodes of 5, 8 and 4 frames
    checkpoint = find_checkpoint(run)
    assert checkpoint == Checkpoint(run / "checkpoints/000020/pretrained_model", run.resolve(), 20)
    text = write_card(checkpoint, "alice/arm", license="cc-by-4.0", tags=["so101"], dataset=dataset)
    data = metadata(text)
    assert data["tags"] == ["robotics", "lerobot", "act", "lerobot_jax", "jax", "so101"]
    expected = {"library_name": "lerobot", "pipeline_tag": "robotics", "license": "cc-by-4.0"}
    assert expected.items() <= data.items()
    assert data["datasets"] == ["alice/blocks"]
    assert data["model-index"][0]["name"] == "act"
    result = data["model-index"][0]["results"][0]
    assert result["dataset"]["type"] == "pusht"
    assert {m["type"]: m["value"] for m in result["metrics"]}["success_rate"] == 70.0
    for line in (
        "| step 20 (this one) | pusht | 10 | 70.0 % (39.7 to 89.2) | 0.880 | 75.3 |",
        "| `observation.images.top` | input | VISUAL | `(3, 32, 32)` |",
        "- **Episodes:** 2 (numbers 0, 2) of 3",
        "- **Frames:** 9",
        '- **Tasks:** "task 0", "task 1"',
        "| eval_loss | 3.25 | held-out episodes | 10 |",
        "| loss | 1 | training | 20 |",
        "    --fps=10 \\",
        '--robot.cameras="{ top: {type: opencv, index_or_path: <index_or_path>, width: 48, height: 32, fps: 30} }"',
        "python -m lerobot_jax.eval",
    ):
        assert line in text
    assert "/home/alice" not in text  # nor any other path of this machine
    assert str(tmp_path) not in text


def test_the_recipe_in_the_card_is_the_run(run: Path):
    text = write_card(find_checkpoint(run), "alice/arm")
    scope: dict = {}
    exec(text.split("```python\n")[1].split("```")[0], scope)
    config = scope["get_config"]()
    expected = dataclasses.replace(
        CONFIG,
        policy=dataclasses.replace(CONFIG.policy, push_to_hub=False, repo_id=None, tags=None),
        dataset=dataclasses.replace(CONFIG.dataset, root=None),
        wandb=WandBConfig(),
        resume=False,
        output_dir=None,
    )
    assert config == expected
    assert "name yours with `--config.dataset.root=FOLDER`" in text
    tuned = dataclasses.replace(CONFIG, policy=dataclasses.replace(CONFIG.policy, pretrained_path="./mine"))
    assert 'pretrained_path="FOLDER"' in write_recipe(tuned)


def test_the_card_of_a_run_on_a_mixture(run: Path):
    target = ActionTarget("relative", exclude_joints=("gripper",))
    config = dataclasses.replace(
        CONFIG, policy=dataclasses.replace(CONFIG.policy, action_target=target), dataset=MIXTURE
    )
    write_json(config.to_dict(), run / "checkpoints/last/pretrained_model/train_config.json")
    card = write_card(find_checkpoint(run), "alice/arm")
    assert metadata(card)["datasets"] == ["alice/blocks", "bob/cups"]
    assert "| [bob/cups](https://huggingface.co/datasets/bob/cups) | 1.0 | - | 2 (numbers 1, 3) |" in card
    assert "normalized as for [alice/blocks]" in card
    assert "/home/alice" not in card
    scope: dict = {}
    exec(card.split("```python\n")[1].split("```")[0], scope)
    again = scope["get_config"]()
    assert again.policy.action_target == target
    cups = dataclasses.replace(MIXTURE.mixture[1], root=None)
    assert again.dataset == dataclasses.replace(MIXTURE, mixture=(MIXTURE.mixture[0], cups))
    assert rebuild_config(json.loads(json.dumps(config.to_dict()))) == config


def test_what_is_not_known_is_left_out_in_plain_words(run: Path, tmp_path: Path):
    alone = shutil.copytree(run / "checkpoints/last/pretrained_model", tmp_path / "alone")
    without_run = write_card(find_checkpoint(alone), "alice/arm")
    assert "The metrics of the run are not known." in without_run
    assert "The policy comes without evaluation results." in without_run
    assert "Frames, frame rate, tasks and robot are not recorded" in without_run
    assert "--robot.type=<type_of_the_robot>" in without_run
    settings = json.loads((alone / "train_config.json").read_text())
    assert rebuild_config(settings) == CONFIG
    write_json(
        {"dataset": {"repo_id": "bob/cups"}, "steps": 100_000, "batch_size": 8}, alone / "train_config.json"
    )
    by_another = write_card(find_checkpoint(alone), "alice/arm")
    assert "| Steps of the run | 100,000 |" in by_another
    assert "no recipe here" in by_another
    assert "trained with lerobot_jax" not in by_another
    (alone / "train_config.json").unlink()
    bare = write_card(find_checkpoint(alone), "alice/arm")
    assert "Which dataset the policy was trained on is not recorded." in bare
    assert "How it was trained is not recorded" in bare
    assert "datasets" not in metadata(bare)
    (run / "eval/step_000020/eval_info.json").write_text("{")
    assert "Could not be read: eval/step_000020/eval_info.json" in write_card(find_checkpoint(run), "a/b")


def test_only_the_very_dataset_is_described(fake: FakeHub, tmp_path: Path, monkeypatch):
    dataset = record(tmp_path / "home/alice/blocks")
    monkeypatch.setenv("HF_LEROBOT_HOME", str(tmp_path / "home"))

    def found(**source):
        write_json({"dataset": source}, tmp_path / "policy/train_config.json")
        return push.find_dataset(tmp_path / "policy")

    for source in ({"repo_id": "alice/blocks"}, {"repo_id": "a/b", "root": str(dataset.root)}):
        metadata = found(**source)
        assert metadata is not None
        assert metadata.total_frames == 17
    assert found(repo_id="builtin/pusht") is None  # not made here: nobody else's of that name is looked for
    assert fake.calls == []
    assert found(repo_id="alice/blocks", revision="0" * 40) is None  # the local folder may be another version
    assert push.find_dataset(tmp_path) is None


def test_a_training_run_uploads_its_policy(fake: FakeHub, tmp_path: Path, monkeypatch, caplog):
    """The whole path: recipe, training, checkpoint, card, Hub, loading."""
    dataset = record(tmp_path / "dataset", features=FEATURES)
    recipe = tmp_path / "tiny.py"
    recipe.write_text(RECIPE.format(root=dataset.root))
    arguments = [
        f"--config={recipe}",
        f"--config.output_dir={tmp_path / 'run'}",
        "--config.policy.push_to_hub=True",
    ]
    arguments += ["--config.steps=2", "--config.eval_steps=0", "--config.dataset.eval_split=0"]
    named = [*arguments, "--config.policy.repo_id=alice/arm", "--config.policy.private=True"]
    with pytest.raises(InputError, match=r"policy.repo_id is missing"):
        train.main(arguments)
    with pytest.raises(InputError, match=r"policy.repo_id: 'arm' must be USER/NAME"):
        train.main([*arguments, "--config.policy.repo_id=arm"])
    with pytest.raises(InputError, match=r"policy.push_to_hub .* needs save_checkpoint"):
        train.main([*named, "--config.save_checkpoint=False"])
    monkeypatch.delenv("HF_TOKEN")
    with pytest.raises(
        InputError, match=r"policy.push_to_hub: no token for the Hub: log in with `hf auth login`"
    ):
        train.main(named)
    monkeypatch.setenv("HF_TOKEN", "hf_alice")
    assert not (tmp_path / "run").exists()
    caplog.set_level("INFO")
    train.main(named)
    assert f"Model pushed to {fake.url}/alice/arm" in caplog.text
    assert fake.repositories["alice/arm"].private
    card = fake.files("alice/arm")["README.md"].decode()
    assert metadata(card)["datasets"] == ["test/recorded"]
    assert "- **Frames:** 17" in card
    here = load_policy(tmp_path / "run/checkpoints/last/pretrained_model")
    np.testing.assert_array_equal(weights(load_policy("alice/arm")), weights(here))


def test_the_command(fake: FakeHub, run: Path, tmp_path: Path):
    for arguments, message in (
        ([], r"the folder is missing: python -m lerobot_jax.push_to_hub FOLDER --repo_id=USER/NAME"),
        ([str(run)], r"--repo_id=USER/NAME is missing"),
        ([str(run), "--repo_ids=a/b"], r"Unrecognized options: --repo_ids=a/b"),
    ):
        with pytest.raises(InputError, match=message):
            push.main(arguments)
    environment = os.environ | {"HF_ENDPOINT": fake.url, "HF_TOKEN": "hf_alice", "HF_HUB_OFFLINE": "0"}
    environment |= {"HF_HUB_DISABLE_XET": "1", "HF_HOME": str(tmp_path / "hf_home")}
    command = [sys.executable, "-m", "lerobot_jax.push_to_hub", str(run), "--repo_id=alice/arm", "--step=10"]
    command += ["--private=True", "--license=mit", "--tags", "one", "two"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert f"Model pushed to {fake.url}/alice/arm" in done.stderr
    data = metadata(fake.files("alice/arm")["README.md"].decode())
    assert data["license"] == "mit"
    assert data["tags"][-2:] == ["one", "two"]


STOCK = """
import sys
import numpy as np, torch
from lerobot.configs import PreTrainedConfig
from lerobot.policies.factory import get_policy_class, make_pre_post_processors

name, observation = sys.argv[1], np.load(sys.argv[2])
config = PreTrainedConfig.from_pretrained(name)
policy = get_policy_class(config.type).from_pretrained(name, config=config, strict=True)
preprocess, postprocess = make_pre_post_processors(config, pretrained_path=name)
with torch.no_grad():
    chunk = policy.predict_action_chunk(preprocess({k: torch.from_numpy(v) for k, v in observation.items()}))
np.save(sys.argv[3], postprocess(chunk).numpy())
"""


@pytest.mark.lerobot
def test_stock_lerobot_loads_it_by_its_name(fake: FakeHub, tmp_path: Path):
    features = {
        "observation.environment_state": (FeatureType.ENV, (4,)),
        "observation.state": (FeatureType.STATE, (3,)),
    }
    inputs = {key: PolicyFeature(*feature) for key, feature in features.items()}
    config = dataclasses.replace(ACTConfig.tiny(), input_features=inputs, vision_backbone="resnet18")
    features = {**config.input_features, **config.output_features}
    stats = {k: {"mean": np.full(f.shape, 0.2), "std": np.full(f.shape, 0.7)} for k, f in features.items()}
    policy = make_policy(config, stats)
    params, buffers = policy.init(jax.random.key(0))
    policy.replace(params=params, buffers=buffers).save_pretrained(tmp_path / "policy")
    push_to_hub(tmp_path / "policy", "alice/arm", private=True)
    rng = np.random.default_rng(0)
    observation = {key: rng.normal(size=(2, *f.shape)).astype(np.float32) for key, f in inputs.items()}
    np.savez(tmp_path / "observation.npz", **observation)  # type: ignore[arg-type]
    environment = os.environ | {"HF_ENDPOINT": fake.url, "HF_TOKEN": "hf_alice", "HF_HUB_OFFLINE": "0"}
    environment |= {"HF_HUB_DISABLE_XET": "1", "HF_HOME": str(tmp_path / "hf_home")}
    files = [tmp_path / "observation.npz", tmp_path / "actions.npy"]
    command = [os.environ["LEROBOT_PYTHON"], "-c", STOCK, "alice/arm", *map(str, files)]
    subprocess.run(command, env=environment, check=True)
    ours = load_policy("alice/arm")
    chunk = ours.sample_actions(ours.params, ours.buffers, ours.preprocess(observation), jax.random.key(0))
    np.testing.assert_allclose(np.load(files[1]), ours.postprocess(chunk), atol=1e-5)
