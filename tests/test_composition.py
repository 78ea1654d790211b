"""Everything composes: what a run uses, times the devices and processes that it runs on, gives the same numbers."""

import functools
from pathlib import Path

import jax
import numpy as np
import pytest

from lerobot_jax import checkpoint, sharding, train
from lerobot_jax.metrics import read_metrics
from tests.data.recordings import record
from tests.runs import FEATURES, RECIPE, assert_same_run, final_arrays
from tests.test_processes import Run
from tests.test_weighted_training import write_progress

PUSHT = {"observation.environment_state": 16, "observation.state": 2, "action": 2}
FEATURES_OF_PUSHT = {key: FEATURES[key] | {"shape": (size,)} for key, size in PUSHT.items()}

USES = {
    "ema": ["--config.ema_decay=0.9"],
    "lora": ["--config.peft.r=2", "--config.peft.target_modules=transformer"],
    "accumulation": ["--config.gradient_accumulation_steps=2"],
    "bf16": ["--config.policy.use_amp=True"],
    "evaluation": [
        "--config.env.type=pusht",
        "--config.env.episode_length=3",
        "--config.env_eval_freq=3",
        "--config.eval.n_episodes=1",
        "--config.eval_steps=3",
    ],
    "weights": ["--config.sample_weighting.type=rabc", "--config.sample_weighting.kappa=0.4"],
}
EVERYTHING = [argument for name, arguments in USES.items() if name != "bf16" for argument in arguments]
MESHES = {
    "fsdp": ["--config.mesh.fsdp=8", "--config.mesh.min_shard_size=8"],
    "fsdp and tensor": [
        "--config.mesh.fsdp=4",
        "--config.mesh.tensor=2",
        "--config.mesh.min_shard_size=8",
    ],
}
# SGD: Adam would make whole steps of rounding errors where the gradient is zero.
SHORT = [
    "--config.optimizer.type=sgd",
    "--config.optimizer.lr=0.02",
    "--config.steps=6",
    "--config.save_freq=3",
    "--config.log_freq=1",
    "--config.eval_steps=0",
]


@pytest.fixture(scope="module")
def start(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """A command line: a recipe, and a policy to start from."""
    folder = tmp_path_factory.mktemp("composition")
    dataset = record(folder / "dataset", (9, 12, 8, 11), FEATURES_OF_PUSHT)
    write_progress(dataset, 0)
    recipe = folder / "tiny.py"
    recipe.write_text(RECIPE.format(root=dataset.root).replace("ema_decay=0.9", "ema_decay=None"))
    train.main([f"--config={recipe}", f"--config.output_dir={folder / 'base'}", *SHORT, "--config.steps=1"])
    base = folder / "base/checkpoints/last/pretrained_model"
    return [f"--config={recipe}", f"--config.policy.pretrained_path={base}", *SHORT]


def on_one_device(arguments: list[str], output: Path) -> Path:
    with pytest.MonkeyPatch.context() as patch:
        alone = functools.partial(sharding.make_mesh, devices=jax.devices()[:1])
        patch.setattr(train.sharding, "make_mesh", alone)
        train.main([*arguments, f"--config.output_dir={output}"])
    return output


@pytest.fixture(scope="module")
def reference(start: list[str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that uses everything, in float32, on one device."""
    return on_one_device([*start, *EVERYTHING], tmp_path_factory.mktemp("reference") / "run")


def assert_close(found: Path, expected: Path, rtol: float = 1e-5, atol: float = 2e-6) -> None:
    """Compare losses and whole train states; devices add up in another order."""
    for records in zip(
        read_metrics(found / "metrics.jsonl"), read_metrics(expected / "metrics.jsonl"), strict=True
    ):
        names = [name for name in ("loss", "eval_loss", "grad_norm") if name in records[1]]
        numbers, wanted = ([r[name] for name in names] for r in records)
        np.testing.assert_allclose(numbers, wanted, rtol=10 * rtol, err_msg=str(records))
    first, second = final_arrays(found), final_arrays(expected)
    assert set(first) == set(second)
    for key, value in first.items():
        same = functools.partial(np.testing.assert_allclose, rtol=rtol, atol=atol, err_msg=key)
        same(value.astype(np.float32), second[key].astype(np.float32))


@pytest.mark.parametrize("mesh", [pytest.param("fsdp", marks=pytest.mark.slow), "fsdp and tensor"])
def test_everything_at_once_is_the_same_on_a_mesh(mesh: str, start, reference, tmp_path: Path):
    train.main([*start, *EVERYTHING, *MESHES[mesh], f"--config.output_dir={tmp_path / 'run'}"])
    assert_close(tmp_path / "run", reference)


@pytest.mark.slow
@pytest.mark.parametrize("mesh", MESHES)
@pytest.mark.parametrize("use", USES)
def test_each_is_the_same_on_a_mesh(use: str, mesh: str, start: list[str], tmp_path: Path):
    expected = on_one_device([*start, *USES[use]], tmp_path / "alone")
    train.main([*start, *USES[use], *MESHES[mesh], f"--config.output_dir={tmp_path / 'run'}"])
    if use == "bf16":  # whose sums differ in the third digit
        assert_close(tmp_path / "run", expected, rtol=2e-2, atol=2e-3)
    else:
        assert_close(tmp_path / "run", expected)


@pytest.mark.slow
@pytest.mark.parametrize("precision", [[], USES["bf16"]])
@pytest.mark.parametrize("mesh", MESHES)
def test_everything_resumes_exactly_on_a_mesh(mesh: str, precision: list[str], start, tmp_path: Path):
    arguments = [*start, *EVERYTHING, *MESHES[mesh], *precision]
    train.main([*arguments, f"--config.output_dir={tmp_path / 'run'}"])
    half = [*arguments, f"--config.output_dir={tmp_path / 'half'}"]
    train.main([*half, "--config.steps=3"])
    train.main([*half, "--config.resume=True"])
    assert_same_run(tmp_path / "run", tmp_path / "half")


@pytest.mark.slow
@pytest.mark.parametrize("num", [2, 4])
@pytest.mark.parametrize("mesh", MESHES)
def test_everything_at_once_is_the_same_in_processes(num: int, mesh: str, start, reference, tmp_path: Path):
    """Saved by two, continued by four, and the other way round."""
    recipe = Path(start[0].removeprefix("--config="))
    run = Run(tmp_path, recipe)
    more = [*start[1:], *EVERYTHING, *MESHES[mesh]]
    run.start(num, 8 // num, [*more, "--config.steps=3"]).succeed()
    assert checkpoint.saved_steps(run.output) == [3]
    other = {2: 4, 4: 2}[num]
    run.start(other, 8 // other, [*more, "--config.resume=True"]).succeed()
    assert_close(run.output, reference)
