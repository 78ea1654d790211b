from pathlib import Path

import matplotlib.image
import pytest

from benchmarks import rtc
from lerobot_jax.errors import InputError
from tests.policies import flow_policy


def test_success_against_the_delay(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    flow_policy.make(256.0, 90.0, 5).save_pretrained(tmp_path / "policy")
    small = ["--n_episodes=2", "--batch_size=1", "--episode_length=6", "--guidance", "lerobot", "trained"]
    picture = tmp_path / "rtc.png"
    rtc.main([str(tmp_path / "policy"), "--delays", "0", "2", f"--output={picture}", *small])
    head, none, two, drawn = capsys.readouterr().out.splitlines()
    assert [word for word in head.split() if word.endswith(":")] == ["naive:", "lerobot:", "trained:"]
    assert none.split()[0] == "0"
    assert two.split()[0] == "2"
    assert two.count("0 (0 to 66)") == 3
    assert drawn == f"drawn in {picture}"
    assert matplotlib.image.imread(picture).shape[2] == 4
    with pytest.raises(InputError, match="inference_delay=5 is more than half of the 8 actions"):
        rtc.main([str(tmp_path / "policy"), "--delays", "0", "5", *small])


def test_policies_without_real_time_chunking_have_one_way():
    from lerobot_jax.policies.act import ACTConfig
    from lerobot_jax.policies.base import FunctionalPolicy
    from lerobot_jax.processors import Pipeline

    policy = FunctionalPolicy(ACTConfig.tiny(), None, Pipeline("pre", ()), Pipeline("post", ()))
    assert rtc.make_ways(policy, ["vjp"], "LINEAR", 4) == {"naive": policy}
