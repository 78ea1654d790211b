"""A certificate beside the weights: what the trained policy was made of, and what it does.

`certificate.safetensors` in a `pretrained_model/` folder holds a few raw observations, the noise, and the actions
that the policy gives for them; its metadata keep the settings and a digest of every array. So a changed weight,
statistic or setting is found and named when the folder is loaded, and actions that differ although nothing was
changed (another machine, another version, another framework) are found too.
"""

import dataclasses
import functools
import hashlib
import json
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import numpy as np

from lerobot_jax import distributed, sharding, state_dict
from lerobot_jax.errors import InputError
from lerobot_jax.features import EMPTY_CAMERA, TASK, FeatureType, PolicyFeature
from lerobot_jax.files import read_json
from lerobot_jax.nn import execution
from lerobot_jax.processors import POSTPROCESSOR_NAME, PREPROCESSOR_NAME, Normalizer
from lerobot_jax.state_dict import StateDict

if TYPE_CHECKING:
    from lerobot_jax.policies.base import FunctionalPolicy

CERTIFICATE_NAME = "certificate.safetensors"
NUM_OBSERVATIONS = 2
OTHER_DEVICE = 10  # how many times further than rounding may move them, actions may be off on another device
TASKS = ["Pick up the red cube.", "Open the drawer"]
JSON_FILES = ("config.json", f"{PREPROCESSOR_NAME}.json", f"{POSTPROCESSOR_NAME}.json")
# Settings that say where a policy runs or is kept, not what it does.
_FREE = re.compile(
    r"(steps\.\d+\.config\.)?device|push_to_hub|repo_id|private|tags(\..*)?|license|pretrained_(path|revision)"
)
_MAX_NAMED = 8


class Certifier:
    """Computes a policy's certificate; compiled once, for any weights."""

    def __init__(self, policy: "FunctionalPolicy"):
        self.observations = make_observations(policy)
        self.noise = policy.sampling_draws(NUM_OBSERVATIONS, jax.random.key(0))
        self._act = jax.jit(functools.partial(_act_after_rounding, policy))
        self._inputs = policy.tokenize(self.observations)

    def act(self, params: Any, buffers: Any) -> dict[str, np.ndarray]:
        """Give what a certificate holds; all processes of a run take part, process 0 gets it.

        Returns:
            `observation/<key>` raw observations, `noise/<name>`, `action` of shape (b, chunk, act) in the robot's
            units, and `tolerance` (act): 1e-4 of the largest action, or, if that is more, ten times what one
            rounding error in every weight does.
        """
        action, moved = (
            sharding.to_host(self._act(params, buffers, self._inputs, self.noise, relative))
            for relative in (0.0, 1.0)
        )
        if not distributed.is_first():
            return {}
        tolerance = np.maximum(1e-4 * np.abs(action), 10 * np.abs(moved - action)).max(axis=(0, 1))
        observations = {k: v for k, v in self.observations.items() if k != TASK}
        return {
            **{f"observation/{key}": np.asarray(value) for key, value in observations.items()},
            **{f"noise/{name}": np.asarray(value) for name, value in self.noise.items()},
            "action": action,
            "tolerance": tolerance,
        }


def make_observations(policy: "FunctionalPolicy") -> dict[str, Any]:
    """Draw raw observations in the range of the policy's statistics: float32 vectors, uint8 channel-last images."""
    rng = np.random.default_rng(0)
    config = policy.config
    steps = () if config.observation_delta_indices is None else (len(config.observation_delta_indices),)
    outside = {new: old for old, new in policy.preprocessor.rename_map.items()}
    normalizers = [step for step in policy.preprocessor.steps if isinstance(step, Normalizer)]
    stats = normalizers[0].stats if normalizers else {}
    observations: dict[str, Any] = {}
    for key, feature in config.input_features.items():
        if key.startswith(EMPTY_CAMERA):
            continue
        value = _draw(rng, feature, (NUM_OBSERVATIONS, *steps), stats.get(key, {}))
        observations[outside.get(key, key)] = value
    if policy.preprocessor.has_text:
        observations[TASK] = TASKS
    return observations


def write(folder: Path, arrays: Mapping[str, np.ndarray], path: Path | None = None) -> None:
    """Write the certificate of the files in a folder.

    Args:
        folder: the policy's folder.
        arrays: what `Certifier.act` gave for its weights.
        path: where to, by default into the folder.
    """
    contents = {
        "settings": {name: read_json(folder / name) for name in JSON_FILES},
        "digests": _digests(folder),
        "task": TASKS,
    }
    metadata = {"certificate": "1"} | {key: json.dumps(value) for key, value in contents.items()}
    state_dict.write(StateDict.of(arrays, metadata), path or folder / CERTIFICATE_NAME)


def check_files(folder: Path) -> None:
    """Compare a folder's settings, statistics and weights with its certificate, if it has one.

    Raises:
        InputError: naming what was changed.
    """
    if not (folder / CERTIFICATE_NAME).exists():
        return
    certificate = _read(folder)
    changes = []
    for name, before in json.loads(certificate.metadata["settings"]).items():
        changes += [f"{name}: {change}" for change in setting_changes(before, read_json(folder / name))]
    before, after = json.loads(certificate.metadata["digests"]), _digests(folder)
    for name in sorted(before | after):
        kind = "weight" if name == state_dict.MODEL_NAME else "statistic"
        old, new = before.get(name, {}), after.get(name, {})
        for key in sorted(old | new):
            if old.get(key) != new.get(key):
                how = "is new" if key not in old else "is gone" if key not in new else "was changed"
                changes.append(f"{name}: {kind} '{key}' {how}")
    if changes:
        more = f"; and {len(changes) - _MAX_NAMED} more" if len(changes) > _MAX_NAMED else ""
        raise InputError(
            f"{folder} is not what was certified when it was saved: {'; '.join(changes[:_MAX_NAMED])}{more}. Put "
            "back what was saved, or, if this is what you want, run "
            f"`python -m lerobot_jax.convert certify {folder}`"
        )


def check_actions(policy: "FunctionalPolicy", folder: Path) -> None:
    """Compare the actions that a loaded policy gives with its folder's certificate, if there is one.

    Raises:
        InputError: saying how far they are off.
    """
    if not (folder / CERTIFICATE_NAME).exists():
        return
    certificate = _read(folder)
    action, tolerance = certificate["action"], OTHER_DEVICE * certificate["tolerance"]
    found = act(policy, certificate)
    excess = np.abs(found - action) / tolerance
    if not (excess <= 1).all():  # also when it is not a number
        worst = np.unravel_index(np.argmax(np.nan_to_num(excess, nan=np.inf)), excess.shape)
        raise InputError(
            f"{folder}: its files are what was saved, but the policy gives other actions than those in "
            f"{CERTIFICATE_NAME}: {found[worst]:.6g} instead of {action[worst]:.6g} in dimension {worst[-1]} "
            f"(allowed are {tolerance[worst[-1]]:.2g}); this version of lerobot_jax or JAX, or this machine, "
            "computes something else than the one that saved it"
        )


def preprocess(policy: "FunctionalPolicy", certificate: StateDict) -> dict[str, np.ndarray]:
    """Give what a policy sees of each of its inputs, for the observations of a certificate."""
    seen = jax.jit(policy.preprocess)(_inputs(policy, certificate))
    return {key: np.asarray(seen[key]) for key in policy.config.needed_inputs(seen)}


def act(policy: "FunctionalPolicy", certificate: StateDict) -> np.ndarray:
    """Give a policy's actions for the observations and the noise of a certificate, (b, chunk, act)."""
    noise = _entries(certificate, "noise/")
    arguments = (policy.params, policy.buffers, _inputs(policy, certificate), noise)
    return np.asarray(jax.jit(functools.partial(_act, policy))(*arguments))


def _inputs(policy: "FunctionalPolicy", certificate: StateDict) -> dict[str, Any]:
    observations: dict[str, Any] = _entries(certificate, "observation/")
    if policy.preprocessor.has_text:
        observations[TASK] = json.loads(certificate.metadata["task"])
    return policy.tokenize(observations)


def _entries(certificate: StateDict, prefix: str) -> dict[str, np.ndarray]:
    return {key.removeprefix(prefix): certificate[key] for key in certificate if key.startswith(prefix)}


def _act_after_rounding(
    policy: "FunctionalPolicy", params: Any, buffers: Any, inputs: Any, noise: Any, relative: Any
) -> Any:
    """Give actions in the robot's units after moving every weight by `relative` rounding errors, up or down.

    Weights are moved when it is their turn, so that no moved copy of a large policy exists.
    """
    moved = dataclasses.replace(
        execution.current(), changed=lambda x: _move(x, relative, policy.config.compute_dtype)
    )
    return moved(functools.partial(_act, policy))(params, buffers, inputs, noise)


def _act(policy: "FunctionalPolicy", params: Any, buffers: Any, inputs: Any, noise: Any) -> Any:
    """Give actions in the robot's units."""
    with jax.default_matmul_precision("highest"):  # the same numbers on a GPU, a TPU and a CPU
        batch = policy.preprocess(inputs)
        return policy.postprocess(
            policy.sample_actions(params, buffers, batch, jax.random.key(0), **noise), inputs
        )


def _move(weight: jax.Array, relative: jax.Array, dtype: jnp.dtype) -> jax.Array:
    if not jnp.issubdtype(weight.dtype, jnp.floating):
        return weight
    eps = max(float(jnp.finfo(weight.dtype).eps), float(jnp.finfo(dtype).eps))
    parity = sum(jax.lax.broadcasted_iota(jnp.int32, weight.shape, axis) for axis in range(weight.ndim)) % 2
    return weight * (1 + relative * eps * (1 - 2 * parity)).astype(weight.dtype)


def _draw(
    rng: np.random.Generator,
    feature: PolicyFeature,
    lead: tuple[int, ...],
    stats: Mapping[str, np.ndarray],
) -> np.ndarray:
    if feature.type == FeatureType.VISUAL:
        channels, height, width = feature.shape
        return rng.integers(0, 256, (*lead, height, width, channels), np.uint8)
    for low, high in (("min", "max"), ("q01", "q99"), ("q10", "q90")):
        if low in stats and high in stats:
            return rng.uniform(stats[low], stats[high], (*lead, *feature.shape)).astype(np.float32)
    noise = rng.standard_normal((*lead, *feature.shape))
    return (noise * stats.get("std", 1.0) + stats.get("mean", 0.0)).astype(np.float32)


def _read(folder: Path) -> StateDict:
    certificate = state_dict.read(folder / CERTIFICATE_NAME)
    if certificate.metadata.get("certificate") != "1":
        raise InputError(
            f"{folder / CERTIFICATE_NAME}: not a certificate, or one of a newer lerobot_jax; remove it to load "
            "the policy without"
        )
    return certificate


def _digests(folder: Path) -> dict[str, dict[str, str]]:
    """Give file name -> key -> digest of the weights' and the processors' arrays."""
    names = [path.name for path in folder.glob("policy_*.safetensors")]
    states = {name: state_dict.read(folder / name) for name in names}
    states[state_dict.MODEL_NAME] = state_dict.read(folder)
    return {
        name: {key: _digest(array) for key, array in state.read_ahead()} for name, state in states.items()
    }


def _digest(array: np.ndarray) -> str:
    digest = hashlib.sha256(f"{array.dtype} {array.shape} ".encode())
    digest.update(state_dict.as_bytes(array))
    return digest.hexdigest()[:16]


def setting_changes(before: Any, after: Any, name: str = "") -> Iterator[str]:
    """Say which values in a JSON file are others than before."""
    if isinstance(before, dict) and isinstance(after, dict):
        for key in sorted(before | after):
            yield from setting_changes(before.get(key), after.get(key), f"{name}.{key}" if name else key)
    elif isinstance(before, list) and isinstance(after, list) and len(before) == len(after):
        for i, (old, new) in enumerate(zip(before, after, strict=True)):
            yield from setting_changes(old, new, f"{name}.{i}")
    elif before != after and not _FREE.fullmatch(name):
        yield f"'{name}' is {json.dumps(after)}, was {json.dumps(before)}"
