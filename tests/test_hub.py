"""Policies from the Hub, of which a small copy runs on this machine."""

import functools
import json
import tempfile
from collections.abc import Iterator
from pathlib import Path

import jax
import numpy as np
import pytest
import safetensors.numpy

from lerobot_jax import hub
from lerobot_jax.errors import InputError
from lerobot_jax.policies.act import ACTConfig
from lerobot_jax.policies.base import FunctionalPolicy, find_policy, load_policy, make_policy
from tests.fake_hub import FakeHub, Repository, connected


@pytest.fixture
def fake(tmp_path: Path) -> Iterator[FakeHub]:
    with connected(tmp_path) as server:
        yield server


@functools.cache
def tiny_policy(seed: int) -> FunctionalPolicy:
    config = ACTConfig.tiny()
    stats = {}
    for key, feature in {**config.input_features, **config.output_features}.items():
        shape = (3, 1, 1) if len(feature.shape) == 3 else feature.shape
        stats[key] = {"mean": np.full(shape, 0.2, np.float32), "std": np.full(shape, 0.7, np.float32)}
    policy = make_policy(config, stats)
    rng = np.random.default_rng(seed)
    shapes = jax.eval_shape(policy.init, jax.random.key(0))
    params, buffers = jax.tree.map(lambda x: rng.uniform(0.1, 0.2, x.shape).astype(x.dtype), shapes)
    return policy.replace(params=params, buffers=buffers)


@functools.cache
def tiny_files(seed: int) -> dict[str, bytes]:
    """Give the files of a policy's folder; other seeds give other weights."""
    with tempfile.TemporaryDirectory() as folder:
        tiny_policy(seed).save_pretrained(Path(folder))
        return {path.name: path.read_bytes() for path in Path(folder).iterdir()}


@pytest.fixture
def policies() -> list[dict[str, bytes]]:
    return [tiny_files(0), tiny_files(1)]


def fetched(name: str, revision: str | None = None) -> bytes:
    """Give the weights that are downloaded, or found in the cache, for a name on the Hub."""
    return (find_policy(name, revision) / "model.safetensors").read_bytes()


def weights(policy: FunctionalPolicy) -> np.ndarray:
    return np.asarray(policy.params["model"]["action_head"]["kernel"])


def test_a_name_loads_the_branch_the_tag_or_the_commit(fake: FakeHub, policies):
    repository = fake.repositories["alice/arm"] = Repository()
    first = repository.commit(policies[0])
    repository.refs["v1"] = first
    repository.commit(policies[1])
    repository.refs["other"] = first
    expected = [weights(tiny_policy(seed)) for seed in (0, 1)]
    np.testing.assert_array_equal(weights(load_policy("alice/arm")), expected[1])
    np.testing.assert_array_equal(weights(load_policy("alice/arm", revision="v1")), expected[0])
    for revision in ("v1", "other", first):
        assert fetched("alice/arm", revision) == policies[0]["model.safetensors"]
    with pytest.raises(
        InputError, match=r"'alice/arm' \(revision v9\).*no such branch, tag or commit; check"
    ):
        fetched("alice/arm", "v9")
    with pytest.raises(InputError, match="no such branch, tag or commit"):
        fetched("alice/arm", "0" * 40)


def test_private_repositories_need_the_right_token(fake: FakeHub, policies, monkeypatch, tmp_path: Path):
    fake.repositories["alice/secret"] = Repository(private=True)
    fake.repositories["alice/secret"].commit(policies[0])
    monkeypatch.setenv("HF_TOKEN", "hf_bob")
    with pytest.raises(InputError, match=r"private and your token \(see `hf auth whoami`\) may not see it"):
        fetched("alice/secret")
    monkeypatch.setenv("HF_TOKEN", "hf_expired")
    with pytest.raises(InputError, match="does not accept your token; log in with `hf auth login`"):
        fetched("alice/secret")
    monkeypatch.delenv("HF_TOKEN")
    with pytest.raises(
        InputError, match=r"private and you must log in with `hf auth login`, or set HF_TOKEN"
    ):
        fetched("alice/secret")
    (tmp_path / "token").write_text("hf_alice")  # where `hf auth login` puts it
    assert fetched("alice/secret") == policies[0]["model.safetensors"]


def test_gated_repositories_say_how_to_get_in(fake: FakeHub, policies, monkeypatch, tmp_path: Path):
    fake.repositories["alice/gated"] = Repository(gated=True)
    fake.repositories["alice/gated"].commit(policies[0])
    fetched("alice/gated")
    monkeypatch.setenv("HF_TOKEN", "hf_bob")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "other"))
    with pytest.raises(InputError, match=r"owner must grant you access; ask for it on the repository's page"):
        fetched("alice/gated")


@pytest.mark.parametrize("name", ["nobody/nothing", "alice/arm"])
def test_what_is_not_there_is_reported(fake: FakeHub, name: str):
    with pytest.raises(InputError, match=rf"model '{name}' was not found in .* there is no such repository"):
        fetched(name)


def test_pickled_weights_are_never_fetched(fake: FakeHub, policies):
    files = {name: data for name, data in policies[0].items() if name != "model.safetensors"}
    fake.repositories["alice/old"] = Repository()
    fake.repositories["alice/old"].commit({**files, "pytorch_model.bin": b"\x80\x04never read"})
    with pytest.raises(
        InputError, match=r"no model.safetensors, only pytorch_model.bin: a pickle.*never unpick"
    ):
        fetched("alice/old")
    assert not [call for call in fake.calls if "pytorch_model.bin" in call]
    fake.repositories["alice/old"].commit(files)
    with pytest.raises(InputError, match=r"it has no model.safetensors"):
        fetched("alice/old")


def test_sharded_weights_are_fetched(fake: FakeHub, policies, tmp_path: Path):
    files = dict(policies[0])
    arrays = safetensors.numpy.load(files.pop("model.safetensors"))
    shards = {"model-00001-of-00002.safetensors": {}, "model-00002-of-00002.safetensors": {}}
    for i, (key, array) in enumerate(arrays.items()):
        shards[sorted(shards)[i % 2]][key] = array
    weight_map = {key: name for name, part in shards.items() for key in part}
    files["model.safetensors.index.json"] = json.dumps({"metadata": {}, "weight_map": weight_map}).encode()
    files |= {name: safetensors.numpy.save(part) for name, part in shards.items()}
    fake.repositories["alice/sharded"] = Repository()
    fake.repositories["alice/sharded"].commit(files | {"checkpoints/1/model.safetensors": b"not asked for"})
    np.testing.assert_array_equal(weights(load_policy("alice/sharded")), weights(tiny_policy(0)))
    assert not [call for call in fake.calls if "checkpoints/1" in call and "resolve" in call]
    with pytest.raises(InputError, match=r"it has no model.safetensors"):
        hub.fetch("alice/sharded", "model", ["model.safetensors"])


def test_a_download_that_breaks_off_is_taken_up_again(fake: FakeHub, policies, monkeypatch):
    monkeypatch.setattr("huggingface_hub.file_download.time.sleep", lambda _: None)
    fake.repositories["alice/arm"] = Repository()
    fake.repositories["alice/arm"].commit(policies[0])
    fake.cut["model.safetensors"] = 1
    assert fetched("alice/arm") == policies[0]["model.safetensors"]
    assert fake.cut["model.safetensors"] == 0


def test_a_connection_that_stays_down_is_reported(fake: FakeHub, policies, monkeypatch):
    monkeypatch.setattr("huggingface_hub.file_download.time.sleep", lambda _: None)
    fake.repositories["alice/arm"] = Repository()
    fake.repositories["alice/arm"].commit(policies[0])
    fake.cut["model.safetensors"], fake.cut_after = 100, 0.0
    with pytest.raises(
        InputError, match=r"the connection to the Hub failed \(RemoteProtocolError.*; try again"
    ):
        fetched("alice/arm")
    fake.cut.clear()
    fetched("alice/arm")
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", "http://127.0.0.1:9")  # where nobody listens
    fetched("alice/arm")  # from the cache
    with pytest.raises(
        InputError,
        match=r"lacks it, or a part of it, and the Hub cannot be reached; check the name",
    ):
        fetched("alice/leg")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    fetched("alice/arm")
    with pytest.raises(
        InputError, match="the Hub cannot be reached because HF_HUB_OFFLINE is set; check the name"
    ):
        fetched("alice/leg")
