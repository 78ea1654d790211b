import json
from pathlib import Path

import pytest

from lerobot_jax.config import TrainConfig, load_config
from lerobot_jax.errors import InputError
from lerobot_jax.features import NormalizationMode
from lerobot_jax.policies.act import ACTConfig
from lerobot_jax.policies.base import config_class
from lerobot_jax.policies.rtc import RTCConfig
from tests.goldens import ROOT

RECIPE = """
from lerobot_jax.config import TrainConfig
from lerobot_jax.policies.act import ACTConfig

def get_config(variant=""):
    if variant not in ("", "small"):
        raise ValueError(f"no variant '{variant}'; there is small")
    return TrainConfig(policy=ACTConfig(chunk_size=20, n_action_steps=10), batch_size=4 if variant else 32)
"""


@pytest.fixture
def recipe(tmp_path: Path) -> str:
    path = tmp_path / "recipe.py"
    path.write_text(RECIPE)
    return str(path)


def test_recipes_variants_and_overrides(recipe: str):
    assert load_config([f"--config={recipe}"]).batch_size == 32
    config = load_config(
        [
            f"--config={recipe}:small",
            "--config.policy.chunk_size=50",
            "--config.policy.normalization_mapping.STATE=MIN_MAX",
            "--config.policy.use_vae=False",
            "--config.dataset.episodes",
            "3",
            "5",
            "--config.ema_decay=0.99",
            "--config.env.type=pusht",
        ]
    )
    assert (config.batch_size, config.policy.chunk_size, config.policy.n_action_steps) == (4, 50, 10)
    assert config.policy.normalization_mapping["STATE"] == NormalizationMode.MIN_MAX
    assert (config.policy.use_vae, config.dataset.episodes, config.ema_decay) == (False, (3, 5), 0.99)
    assert config.name == "pusht_act"
    assert load_config(["--config", recipe, "--config.batch_size", "7"]).batch_size == 7


WRONG = {
    "--config.batch_sise=3": r"Unrecognized options: --config.batch_sise=3; perhaps you meant --config.batch_size$",
    "--config.polcy.dropout=0": r"perhaps you meant --config.policy.dropout$",
    "--config.batch_size=many": r"--config.batch_size: invalid literal for int\(\) with base 10: 'many'$",
    "--config.batch_size=0": r"batch_size must be at least 1, not 0$",
    "--config.policy.chunk_size=5": r"n_action_steps must be in 1..chunk_size=5, not 10$",
    "--config.policy.vision_backbone=vgg": r"vision_backbone must be one of resnet10, .*, not 'vgg'$",
    "--config.policy.feedforward_activation=glu": r"must be relu or gelu, not 'glu'$",
    "--config.policy.temporal_ensemble_coeff=0.01": r"n_action_steps must be 1 with temporal_ensemble_coeff",
    "--config.policy.replace_final_stride_with_dilation=True": r"needs resnet50 or larger",
    "--config.policy.dim_model=30": r"dim_model=30 must be a multiple",
    "--config.policy.normalization_mapping.STATE=Z": r"Expected one of \('MIN_MAX', 'MEAN_STD'",
    "--config.policy.n_heads=0": r"n_heads must be at least 1, not 0$",
    "--config.policy.optimizer_lr=-1": r"optimizer_lr must not be negative, it is -1.0$",
    "--config.optimizer.lr=nan": r"optimizer.lr must be finite and not negative, it is nan$",
    "--config.scheduler.num_warmup_steps=-1": r"scheduler.num_warmup_steps must not be negative, it is -1$",
    "--config.policy.n_obs_steps=2": r"n_obs_steps must be 1, not 2",
    "--config.dataset.eval_split=1.5": r"dataset.eval_split must be in \[0, 1\), not 1.5$",
    "--config.eval_steps=10": r"eval_steps needs held-out episodes",
    "--config.env.type=mars": r"invalid choice 'mars'",
    "--config.env.task=Ant-v4": r"invalid choice 'Ant-v4'",
    "--config.ema_decay=2": r"ema_decay must be between 0 and 1",
    "--config.resume=yes": r"--config.resume",
    "--config.policy.pretrained_path=/nowhere": r"/nowhere: no such folder$",
    "stray": r"Unrecognized options: stray$",
}


@pytest.mark.parametrize("argument", WRONG)
def test_mistakes_are_told_on_one_line(recipe: str, argument: str):
    with pytest.raises(InputError, match=WRONG[argument]) as error:
        load_config([f"--config={recipe}", argument])
    assert "\n" not in str(error.value)


def test_missing_recipes(recipe: str):
    with pytest.raises(InputError, match="--config=RECIPE is missing"):
        load_config([])
    with pytest.raises(InputError, match=r"no recipe 'nowhere.py'"):
        load_config(["--config=nowhere.py"])
    with pytest.raises(InputError, match="no variant 'huge'; there is small"):
        load_config([f"--config={recipe}:huge"])


def test_help_lists_every_field_with_its_meaning(recipe: str, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    for arguments in (["--help"], [f"--config={recipe}", "--help"]):
        with pytest.raises(SystemExit) as stop:
            load_config(arguments)
        assert not stop.value.code
        text = capsys.readouterr().out
        names = [
            f"--config.{n}"
            for n in ("batch_size", "policy.chunk_size", "dataset.repo_id", "env.type", "eval.n_episodes")
        ]
        names += [
            f"--config.{n}"
            for n in ("optimizer.lr", "scheduler.type", "wandb.enable", "resume", "policy.dropout")
        ]
        for name in names:
            after = text[text.index(f"{name} ") :]
            description = after.split("\n")[1].strip(" │")
            assert description, name
            assert not description.startswith("--"), name


@pytest.mark.parametrize(
    "path", sorted(ROOT.glob("*/*/model/config.json")), ids=lambda p: p.parent.parent.name
)
def test_lerobots_config_files_survive_a_round_trip(path: Path):
    data = json.loads(path.read_text())
    assert config_class(data["type"]).from_dict(data).to_dict() == data


def test_unknown_policy_fields_are_reported():
    data = ACTConfig.tiny().to_dict() | {"chunk_sise": 3}
    with pytest.raises(InputError, match=r"unknown setting 'chunk_sise'.*nearest known is 'chunk_size'"):
        ACTConfig.from_dict(data, "config.json")
    with pytest.raises(InputError, match="no policy of type 'dance'"):
        config_class("dance")


def test_the_config_is_json_and_hashable():
    config = TrainConfig(policy=ACTConfig.tiny())
    assert json.loads(json.dumps(config.to_dict()))["policy"]["type"] == "act"
    assert hash(config) == hash(TrainConfig(policy=ACTConfig.tiny()))


def test_a_pretrained_policy_brings_its_settings(recipe: str):
    folder = ROOT / "act/env_prenorm_s0/model"
    config = load_config(
        [
            f"--config={recipe}",
            f"--config.policy.pretrained_path={folder}",
            "--config.policy.optimizer_lr=0.5",
        ]
    )
    assert (config.policy.dim_model, config.policy.chunk_size, config.policy.optimizer_lr) == (32, 5, 0.5)
    assert config.policy.pretrained_path == str(folder)


def test_parts_that_are_none_have_options_too(recipe: str):
    """Real-time chunking of a policy whose config.json has null, as adapters of a run."""
    arguments = [f"--config={recipe}", f"--config.policy.pretrained_path={ROOT / 'pi0/2cam_empty_s0/model'}"]
    assert load_config(arguments).policy.rtc_config is None
    config = load_config([*arguments, "--config.policy.rtc_config.execution_horizon=4", "--config.peft.r=2"])
    assert config.policy.rtc_config == RTCConfig(execution_horizon=4)
    assert config.peft is not None
    assert config.peft.r == 2
    assert config.sample_weighting is None
