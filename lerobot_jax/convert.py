"""Convert policies between this project and stock LeRobot, and prove that nothing was lost.

    python -m lerobot_jax.convert to-torch RUN --output_dir=FOLDER         a checkpoint, for stock LeRobot
    python -m lerobot_jax.convert from-torch POLICY --output_dir=FOLDER    any LeRobot policy in today's form
    python -m lerobot_jax.convert openpi CHECKPOINT --output_dir=FOLDER    a checkpoint of openpi's pi0 or pi0.5
    python -m lerobot_jax.convert verify POLICY --lerobot_python=PYTHON    run it in stock LeRobot, compare all
    python -m lerobot_jax.convert diff A B                                 compare two policies array by array
    python -m lerobot_jax.convert certify POLICY                           accept what was changed in its folder
    python -m lerobot_jax.convert average RUN --output_dir=FOLDER          the mean of several checkpoints' weights

Checkpoints of a run hold a `pretrained_model/` that stock LeRobot loads as it is; `to-torch` is for other weights
(raw instead of EMA), another type of numbers, or a checkpoint without its model.safetensors. Add --help to a
command for more.
"""

import dataclasses
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

import jax.numpy as jnp
import numpy as np
import tyro
from absl import logging

from lerobot_jax import certificate, openpi, state_dict, torch_state
from lerobot_jax.certificate import CERTIFICATE_NAME, JSON_FILES, Certifier, setting_changes
from lerobot_jax.checkpoint import (
    TRAIN_CONFIG_NAME,
    TRAINING_STATE,
    find_pretrained_model,
    load_variant,
    restore_weights,
    saved_steps,
)
from lerobot_jax.compilation import keep_compiled_programs
from lerobot_jax.config import parse
from lerobot_jax.errors import InputError, reported_on_one_line
from lerobot_jax.files import read_json
from lerobot_jax.logs import setup_logging
from lerobot_jax.policies import base
from lerobot_jax.policies.base import FunctionalPolicy
from lerobot_jax.progress import progress_bar
from lerobot_jax.state_dict import StateDict

Place = Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="FOLDER")]
Dtype = Literal["float32", "bfloat16", "float16"]


@dataclasses.dataclass(frozen=True)
class ToTorch:
    """Write a checkpoint as the folder that stock LeRobot loads."""

    path: Place = tyro.MISSING
    """A run's folder (its last checkpoint), a checkpoint's folder, or its training_state."""
    output_dir: str = tyro.MISSING
    """The new folder."""
    weights: Literal["ema", "raw"] | None = None
    """ema: the averaged weights, also of SWA; raw: those of the last step; None: averaged ones if there are any."""
    dataset: str | None = None
    """For a run on a mixture: the dataset whose robot the policy is for; None: the first one."""
    dtype: Dtype | None = None
    """Round the weights to this type; None: as they are."""


@dataclasses.dataclass(frozen=True)
class FromTorch:
    """Read a LeRobot policy, check all of it, and write it in today's form with a certificate.

    Policies from before LeRobot's processors, with the normalization inside model.safetensors, are migrated.
    """

    path: Place = tyro.MISSING
    """A LeRobot policy's folder, or its name on the Hub."""
    output_dir: str = tyro.MISSING
    """The new folder."""
    revision: str | None = None
    """Branch, tag or commit on the Hub."""
    dtype: Dtype | None = None
    """Round the weights to this type; None: as they are."""


@dataclasses.dataclass(frozen=True)
class OpenPI(openpi.Settings):
    """Read a checkpoint of openpi's pi0 or pi0.5, and write it as a LeRobot policy with a certificate.

    Weights and statistics are in the checkpoint; what else its training config says must be said here. Adapters are
    merged. What openpi's transforms for a robot change in states and actions, the policy does not.
    """

    path: Place = tyro.MISSING
    """The checkpoint's folder, which has params and assets."""
    output_dir: str = tyro.MISSING
    """The new folder."""
    chunk_size: int = tyro.MISSING
    """openpi's action_horizon: 50 by default, 10 in pi0_droid and pi05_libero, 15 in pi05_droid."""
    dtype: Literal["float32", "bfloat16"] | None = None
    """The type of the transformers' weights, in which they compute, too (openpi: bfloat16); None: as stored."""


@dataclasses.dataclass(frozen=True)
class Verify:
    """Run a policy in stock LeRobot and here, on the observations of its certificate; exit with 1 if they differ.

    Compared are what the policy sees after preprocessing and the actions it gives; LeRobot loads the weights
    strictly, so that a key that is missing or left over is an error.
    """

    path: Place = tyro.MISSING
    """A run's, a checkpoint's or a LeRobot policy's folder, or a name on the Hub."""
    lerobot_python: str = os.environ.get("LEROBOT_PYTHON") or tyro.MISSING
    """The Python of the environment where stock LeRobot is installed; default: $LEROBOT_PYTHON."""
    revision: str | None = None
    """Branch, tag or commit on the Hub."""


@dataclasses.dataclass(frozen=True)
class Diff:
    """Compare two policies: keys, shapes, types, largest differences, settings; exit with 1 if they differ."""

    a: Place = tyro.MISSING
    """A run's, a checkpoint's or a policy's folder, a safetensors file, or a name on the Hub."""
    b: Place = tyro.MISSING
    """Another."""
    all: bool = False
    """List the arrays that are equal, too."""


@dataclasses.dataclass(frozen=True)
class Certify:
    """Write a new certificate for a policy's folder as it is now."""

    path: Place = tyro.MISSING
    """A run's, a checkpoint's or a policy's folder."""


@dataclasses.dataclass(frozen=True)
class Average:
    """Write a policy whose weights are the mean of those that a run's checkpoints export.

    Whole numbers, which are counts, are those of the last of these checkpoints.
    """

    path: Place = tyro.MISSING
    """A run's folder."""
    output_dir: str = tyro.MISSING
    """The new folder."""
    steps: tuple[int, ...] = ()
    """The checkpoints; none given: all that are there."""


def to_torch(config: ToTorch) -> None:
    folder = find_pretrained_model(Path(config.path))
    policy = base.load_structure(folder)
    if config.dataset is not None:
        policy = load_variant(policy, folder, config.dataset)
    policy = restore_weights(policy, folder.parent / TRAINING_STATE, config.weights)
    _save(policy, config.dtype, Path(config.output_dir), folder)


def from_torch(config: FromTorch) -> None:
    folder = base.find_policy(config.path, config.revision)
    _save(base.load_policy(folder), config.dtype, Path(config.output_dir), folder)


def from_openpi(config: OpenPI) -> None:
    folder, output_dir = Path(config.path), Path(config.output_dir)
    _check_free(output_dir)
    _save(openpi.read_policy(folder, config, config.dtype), None, output_dir, folder)


def verify(config: Verify) -> None:
    folder = _find_policy(config.path, config.revision)
    policy = base.load_policy(folder)
    with tempfile.TemporaryDirectory() as temporary:
        given, out = Path(temporary) / "given.safetensors", Path(temporary) / "out.safetensors"
        if (folder / CERTIFICATE_NAME).exists():
            shutil.copyfile(folder / CERTIFICATE_NAME, given)
        else:
            certificate.write(folder, Certifier(policy).act(policy.params, policy.buffers), given)
        _run_stock(config.lerobot_python, folder, given, out)
        stock, recorded = dict(state_dict.read(out)), dict(state_dict.read(given))
        seen = certificate.preprocess(policy, state_dict.read(given))
        mine = {f"preprocessed/{key}": value for key, value in seen.items()}
        mine["action"] = certificate.act(policy, state_dict.read(given))
    rows, num_different = [], 0
    for name, value in mine.items():
        if name.removeprefix("preprocessed/") in policy.config.image_features:
            value = np.moveaxis(value, -1, -3)
        largest = np.abs(value).max()
        allowed = recorded["tolerance"] if name == "action" else np.float32(1e-6 * max(1.0, largest))
        if stock[name].shape != value.shape:
            raise InputError(f"{name} has shape {stock[name].shape} in stock LeRobot, {value.shape} here")
        difference = np.abs(stock[name] - value)
        fits = bool((difference <= allowed).all())
        num_different += not fits
        numbers = [f"{number:.2g}" for number in (largest, difference.max(), allowed.max())]
        rows.append([name, _shape(value), *numbers, "" if fits else "DIFFERS"])
    _print_table(["quantity", "shape", "largest", "difference", "allowed", ""], rows)
    if num_different:
        raise InputError(f"{folder}: stock LeRobot and lerobot_jax differ in {num_different} quantities")
    print("Stock LeRobot loads every weight, and computes the same.")


def diff(config: Diff) -> None:
    places = [_find_arrays(config.a), _find_arrays(config.b)]
    only_weights = any(place.is_file() for place in places)
    a, b = (state_dict.read(place) if only_weights else _read_arrays(place) for place in places)
    rows, num_different = [], 0
    with progress_bar("comparing", len(a.keys() | b.keys()), "array") as bar:
        for key in sorted(a.keys() | b.keys()):
            row, is_equal = _compare_arrays(key, a, b)
            num_different += not is_equal
            if config.all or not is_equal:
                rows.append(row)
            bar.update()
    if rows:
        _print_table(["key", "a", "b", "largest difference"], rows)
    changes = []
    for name in () if only_weights else JSON_FILES:
        before, after = (read_json(place / name) for place in places)
        changes += [f"{name}: {change}" for change in setting_changes(before, after)]
    for change in changes:
        print(change)
    if num_different or changes:
        raise InputError(
            f"{num_different} of {len(a.keys() | b.keys())} arrays and {len(changes)} settings differ"
        )
    print(f"{len(a)} arrays{'' if only_weights else ' and all settings'} are equal, bit for bit.")


def certify(config: Certify) -> None:
    folder = find_pretrained_model(Path(config.path))
    policy = base.load_policy(folder, check_certificate=False)
    certificate.write(folder, Certifier(policy).act(policy.params, policy.buffers))
    logging.info("certified %s", folder)


def average(config: Average) -> None:
    run = Path(config.path)
    steps = sorted(set(config.steps)) or saved_steps(run)
    folders = [
        find_pretrained_model(run, step) for step in steps or [None]
    ]  # without any, it says what is wrong
    if len(folders) < 2:
        raise InputError(
            f"{run}: an average needs at least two checkpoints, not only that of step {steps[0]}"
        )
    states = [state_dict.read(folder) for folder in folders]
    for folder, state in zip(folders, states, strict=True):
        _check_averageable(folders[-1], folder, states[-1], state)
    policy = base.load_structure(folders[-1])
    params, buffers = torch_state.from_torch(policy.module, _mean(states))
    _save(policy.replace(params=params, buffers=buffers), None, Path(config.output_dir), folders[-1])


COMMANDS: dict[str, tuple[type, Callable[[Any], None]]] = {
    "to-torch": (ToTorch, to_torch),
    "from-torch": (FromTorch, from_torch),
    "openpi": (OpenPI, from_openpi),
    "verify": (Verify, verify),
    "diff": (Diff, diff),
    "certify": (Certify, certify),
    "average": (Average, average),
}


def _check_averageable(last: Path, folder: Path, reference: StateDict, state: StateDict) -> None:
    """Raise `InputError` unless a folder has the last one's settings, statistics and forms of arrays."""
    for name in JSON_FILES:
        for change in setting_changes(read_json(folder / name), read_json(last / name)):
            raise InputError(f"{last} and {folder} are different policies: {name}: {change}")
    a, b = _read_arrays(last), _read_arrays(folder)
    for key in sorted(a.keys() | b.keys()):
        is_weight = key in reference or key in state
        if _form(a, key) != _form(b, key) or not (is_weight or np.array_equal(a[key], b[key])):
            raise InputError(f"{last} and {folder} are different policies: '{key}' differs")


def _mean(states: Sequence[StateDict]) -> StateDict:
    """Give the mean of the floating-point arrays, each computed when it is asked for; of the others, the last."""

    def mean(key: str) -> np.ndarray:
        values = [state[key] for state in states]
        if not jnp.issubdtype(values[-1].dtype, jnp.floating):
            return values[-1]
        total = np.zeros(values[-1].shape, np.float64)
        for value in values:
            total += value
        return (total / len(values)).astype(values[-1].dtype)

    tensors = {
        key: tensor._replace(read=lambda key=key: mean(key)) for key, tensor in states[-1].tensors.items()
    }
    return StateDict(tensors, states[-1].metadata, states[-1].source)


def _save(policy: FunctionalPolicy, dtype: str | None, output_dir: Path, source: Path) -> None:
    """Write a policy's folder; it appears whole or not at all."""
    _check_free(output_dir)
    if dtype is not None:
        _round_in_place(policy.params, jnp.dtype(dtype))
        _round_in_place(policy.buffers, jnp.dtype(dtype))
    partial = output_dir.with_name(f".{output_dir.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    try:
        policy.save_pretrained(partial)
        if (source / TRAIN_CONFIG_NAME).exists():
            shutil.copyfile(source / TRAIN_CONFIG_NAME, partial / TRAIN_CONFIG_NAME)
        partial.rename(output_dir)
    except OSError as error:
        shutil.rmtree(partial, ignore_errors=True)
        raise InputError(f"{output_dir}: could not be written ({error})") from None
    logging.info("written to %s", output_dir)


def _check_free(output_dir: Path) -> None:
    if output_dir.exists():
        raise InputError(f"{output_dir} exists already; choose another --output_dir")


def _round_in_place(tree: dict[Any, Any], dtype: np.dtype) -> None:
    """Round a tree's floating-point arrays one by one, so that only one of them is in memory twice."""
    for name, value in tree.items():
        if isinstance(value, dict):
            _round_in_place(value, dtype)
        elif jnp.issubdtype(value.dtype, jnp.floating):
            tree[name] = value.astype(dtype)


def _run_stock(python: str, folder: Path, given: Path, out: Path) -> None:
    script = Path(__file__).with_name("stock_lerobot.py")
    command = [python, "-P", str(script), str(folder.resolve()), str(given), str(out)]
    try:
        process = subprocess.run(command, capture_output=True, text=True, check=False)
    except OSError as error:
        raise InputError(f"--lerobot_python={python} cannot be run ({error.strerror})") from None
    if process.returncode:
        lines = [line.strip() for line in process.stderr.splitlines() if line.strip(" ^~")][-3:]
        raise InputError(f"stock LeRobot ({python}) could not run {folder}: {' / '.join(lines)}")


def _find_policy(path: str, revision: str | None = None) -> Path:
    """Find a policy's folder: a run's, a checkpoint's, its own, or from the Hub."""
    return find_pretrained_model(Path(path)) if Path(path).is_dir() else base.find_policy(path, revision)


def _find_arrays(path: str) -> Path:
    return Path(path) if Path(path).is_file() else _find_policy(path)


def _read_arrays(place: Path) -> StateDict:
    """Open the weights, and in a folder the processors' statistics with their file's name before the key."""
    arrays = dict(state_dict.read(place).tensors)
    for path in sorted(place.glob("policy_*.safetensors")):
        arrays |= {f"{path.stem}: {key}": tensor for key, tensor in state_dict.read(path).tensors.items()}
    return StateDict(arrays)


def _compare_arrays(key: str, a: StateDict, b: StateDict) -> tuple[list[str], bool]:
    """Give a row of the table, and whether the arrays are equal bit for bit."""
    forms = [_form(state, key) for state in (a, b)]
    if key not in a or key not in b or a.tensors[key].shape != b.tensors[key].shape:
        return [key, *forms, ""], False
    x, y = a[key], b[key]
    if forms[0] == forms[1] and x.tobytes() == y.tobytes():
        return [key, *forms, "0"], True
    with np.errstate(invalid="ignore"):
        largest = np.abs(x.astype(np.float64) - y.astype(np.float64)).max(initial=0.0)
    return [key, *forms, f"{largest:.3g}"], False


def _form(state: StateDict, key: str) -> str:
    if key not in state:
        return "missing"
    shape, dtype, _ = state.tensors[key]
    return f"{dtype} {' x '.join(map(str, shape))}"


def _shape(array: np.ndarray) -> str:
    return " x ".join(map(str, array.shape))


def _print_table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    widths = [max(map(len, column)) for column in zip(header, *rows, strict=True)]
    for row in (header, *rows):
        print("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip())


def main(argv: Sequence[str]) -> None:
    name, *rest = argv or ["--help"]
    if name in ("-h", "--help"):
        print(__doc__)
        return
    if name not in COMMANDS:
        raise InputError(f"there is no command '{name}'; there are {', '.join(COMMANDS)}")
    keep_compiled_programs()
    kind, run = COMMANDS[name]
    config = parse(kind, kind(), rest, f"lerobot_jax.convert {name}", kind.__doc__ or "")
    run(config)


if __name__ == "__main__":
    setup_logging()
    with reported_on_one_line():
        main(sys.argv[1:])
