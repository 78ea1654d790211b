"""New processors of pi0 and pi05 are, byte by byte, those that stock LeRobot wrote."""

import json
from pathlib import Path

import pytest

from lerobot_jax.policies.base import make_policy
from lerobot_jax.policies.config import read_config
from lerobot_jax.policies.registry import config_class
from lerobot_jax.processors import Unnormalizer, load_pipelines
from tests.goldens import ROOT

FOLDERS = sorted(path for kind in ("pi0", "pi05") for path in ROOT.glob(f"{kind}/*/model"))


@pytest.mark.parametrize("folder", FOLDERS, ids=lambda path: f"{path.parent.parent.name}-{path.parent.name}")
def test_new_processors_are_those_of_stock(folder: Path, tmp_path: Path):
    described = read_config(folder)
    config = config_class(described["type"]).from_dict(described)  # what it says of actions, it says itself
    unnormalizer = load_pipelines(folder)[1].steps[0]
    assert isinstance(unnormalizer, Unnormalizer)
    stats = unnormalizer.stats
    target_stats = stats["action"] if config.action_target.is_transformed else None
    policy = make_policy(config, stats, target_stats=target_stats)
    policy.save_processors(tmp_path)
    policy.config.exported().save(tmp_path)
    files = {path.name for path in folder.glob("policy_*")} | {"config.json"}
    assert {path.name for path in tmp_path.iterdir()} == files
    for name in files:
        ours, theirs = (tmp_path / name).read_bytes(), (folder / name).read_bytes()
        if name == "config.json":
            ours, theirs = json.loads(ours), json.loads(theirs)
        assert ours == theirs, name
