import json
from pathlib import Path

import pytest

from lerobot_jax.checkpoint import Checkpoint
from lerobot_jax.comparison import runs
from lerobot_jax.comparison.runs import make_names, training_seconds
from lerobot_jax.errors import InputError
from tests.fake_hub import Repository, connected
from tests.test_hub import tiny_files


def checkpoint(run: Path, step: int) -> Checkpoint:
    return Checkpoint(run / f"checkpoints/{step:06d}/pretrained_model", run, step)


def test_names_come_from_the_folders(tmp_path: Path):
    a, b, other = tmp_path / "first/act", tmp_path / "first/diffusion", tmp_path / "second/act"
    bare = tmp_path / "downloaded/pretrained_model"
    for folder in (a, b, other, bare):
        folder.mkdir(parents=True)
    given = {
        str(a): checkpoint(a, 10),
        str(b): checkpoint(b, 10),
        str(other): checkpoint(other, 10),
        str(bare): Checkpoint(bare),
        "lerobot/diffusion_pusht": Checkpoint(tmp_path / "hub/snapshots/0123abcd"),
    }

    def names(*chosen: str) -> list[str]:
        return make_names(chosen, [given[run] for run in chosen])

    assert names(str(a), str(b)) == ["act", "diffusion"]
    assert names(str(a), str(other), str(b)) == ["first_act", "second_act", "first_diffusion"]
    assert names(str(bare), "lerobot/diffusion_pusht") == ["downloaded", "diffusion_pusht"]


def test_checkpoints_of_one_run_are_named_by_their_steps(tmp_path: Path):
    run, other = tmp_path / "act", tmp_path / "diffusion"
    run.mkdir()
    other.mkdir()
    checkpoints = [checkpoint(run, 10), checkpoint(run, 20), checkpoint(other, 5)]
    found = make_names([str(run), str(run), str(other)], checkpoints)
    assert found == ["act@10", "act@20", "diffusion"]


def test_names_that_do_not_differ_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    folders = [tmp_path / "a/pretrained_model", tmp_path / "a"]
    for folder in folders:
        folder.mkdir(exist_ok=True, parents=True)
    monkeypatch.setattr(runs, "find_checkpoint", Checkpoint)
    with pytest.raises(InputError, match="names do not tell the policies apart"):
        runs.find_contestants([str(folder) for folder in folders], ())
    found = runs.find_contestants([str(folder) for folder in folders], ("a", "b"))
    assert [contestant.name for contestant in found] == ["a", "b"]


def test_names_on_the_hub_are_found(tmp_path: Path):
    files = tiny_files(0)
    with connected(tmp_path) as server:
        for name in ("alice/arm", "bob/arm"):
            server.repositories[name] = Repository()
            server.repositories[name].commit(files)
        alice, bob = runs.find_contestants(["alice/arm", "bob/arm"], ())
    assert (alice.name, bob.name) == ("alice_arm", "bob_arm")
    assert alice.checkpoint.step is None
    assert alice.settings == {}
    assert (alice.checkpoint.folder / "config.json").read_bytes() == files["config.json"]


def test_training_time(tmp_path: Path):
    def write(*records: dict) -> None:
        (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))

    def logged(step: int, steps_per_s: float) -> dict:
        return {"step": step, "loss": 0.1, "steps_per_s": steps_per_s}

    write(logged(100, 10), {"step": 100, "avg_max_reward": 0.5}, logged(200, 20), logged(250, 5))
    assert training_seconds(checkpoint(tmp_path, 250)) == 100 / 10 + 100 / 20 + 50 / 5
    assert training_seconds(checkpoint(tmp_path, 100)) == 10
    assert training_seconds(checkpoint(tmp_path, 150)) == 100 / 10 + 50 / 20  # saved between two records
    assert training_seconds(checkpoint(tmp_path, 300)) is None  # the log is not of the whole run
    assert training_seconds(Checkpoint(tmp_path)) is None
    (tmp_path / "metrics.jsonl").unlink()
    assert training_seconds(checkpoint(tmp_path, 100)) is None
