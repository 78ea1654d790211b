"""Export a policy to one file that runs without this package: its sampler as a compiled program, and its weights.

    python -m lerobot_jax.export --policy.path=outputs/act_pusht/checkpoints/last/pretrained_model \
        --output=act.safetensors --platforms=cpu,cuda

The program turns raw observations (uint8 images, the state, tokens of the task) and a key for noise into a chunk
of actions in the robot's units; pre- and postprocessing are inside. It gives the actions that the policy gives, bit
for bit on the same kind of device. To run it, copy lerobot_jax/exported.py; it says what it needs:

    from exported import ExportedPolicy

    policy = ExportedPolicy("act.safetensors")
    actions = policy({"observation.state": state, "observation.images.top": image}, key=0)

Which inputs, of which shapes and types, and how tokens are made: python exported.py act.safetensors. All shapes are
fixed, the batch too. JAX reads programs for six months after the version that wrote them; then export again.
"""

import dataclasses
import functools
import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from absl import logging
from flax.traverse_util import flatten_dict, unflatten_dict
from jax import export
from jaxtyping import Array, Float, UInt32

import lerobot_jax
from lerobot_jax import sharding, state_dict
from lerobot_jax.certificate import TASKS, make_observations
from lerobot_jax.config import option_values, parse
from lerobot_jax.errors import InputError, reported_on_one_line, writing
from lerobot_jax.exported import FORMAT, NAME, PROGRAM, WEIGHTS
from lerobot_jax.logs import setup_logging
from lerobot_jax.nn.weights import as_computed, cast_types
from lerobot_jax.policies.base import FunctionalPolicy, find_policy, load_config, load_policy
from lerobot_jax.policies.config import PolicyConfig
from lerobot_jax.processors.text import TextStep
from lerobot_jax.state_dict import StateDict, Tensor

PLATFORMS = ("cpu", "cuda", "rocm", "tpu")
BACKENDS = {"gpu": "cuda"}  # JAX's name of a backend -> of its platform, where they differ


@dataclasses.dataclass(frozen=True)
class ExportConfig:
    """What to export, and for what."""

    policy: PolicyConfig | None = None
    """The policy, given as --policy.path=FOLDER_OR_HUB_NAME; its settings can be overridden."""
    output: str = ""
    """The new file, e.g. act.safetensors."""
    platforms: str | None = None
    """Where it can run, with commas between: cpu, cuda, rocm, tpu; None: on devices like this machine's."""
    batch_size: int = 1
    """How many observations at a time."""

    def __post_init__(self):
        if self.batch_size < 1:
            raise ValueError(f"batch_size must be at least 1, not {self.batch_size}")
        unknown = sorted(set(self.platform_names) - set(PLATFORMS))
        if unknown:
            raise ValueError(f"platforms: '{unknown[0]}' is unknown; known are {', '.join(PLATFORMS)}")

    @property
    def platform_names(self) -> list[str]:
        """The platforms, one by one."""
        here = BACKENDS.get(jax.default_backend(), jax.default_backend())
        return [name.strip() for name in (self.platforms or here).split(",")]


def export_policy(
    policy: FunctionalPolicy, path: Path, platforms: Sequence[str], batch_size: int = 1
) -> dict[str, Any]:
    """Write a policy's sampler to a file; give what the file says of itself.

    Args:
        policy: with its arrays.
        path: the new file.
        platforms: of `PLATFORMS`.
        batch_size: how many observations at a time.

    Raises:
        InputError: if the file is there already or cannot be written.
    """
    if path.exists():
        raise InputError(f"{path} exists already; choose another --output")
    params = as_computed(policy.params, cast_types(policy.module))  # the same actions, half of the file
    policy = policy.replace(params=params)
    observation = policy.tokenize(make_observations(policy))
    inputs = {
        name: jax.ShapeDtypeStruct((batch_size, *value.shape[1:]), value.dtype)
        for name, value in observation.items()
    }
    flat: dict[Any, Any] = {**flatten_dict({"params": policy.params, "buffers": policy.buffers})}
    arrays = {".".join(map(str, place)): (place, x) for place, x in flat.items()}
    lower = functools.partial(_export, policy, inputs, platforms)
    used = lower(arrays, arrays).module_kept_var_idx
    names = [name for i, name in enumerate(sorted(arrays)) if i in used]
    program = lower(arrays, {name: arrays[name] for name in names})
    description = _describe(policy, program, inputs, observation)
    tensors = {
        WEIGHTS + name: Tensor(x.shape, np.dtype(x.dtype), functools.partial(sharding.host_view, x))
        for name, (_, x) in arrays.items()
        if name in names
    }
    data = np.frombuffer(program.serialize(), np.uint8)
    tensors[PROGRAM] = Tensor(data.shape, data.dtype, lambda: data)
    metadata = {"format_version": FORMAT, NAME: json.dumps(description)}
    partial = path.with_name(f".{path.name}.partial")
    with writing(path):
        state_dict.write(StateDict(tensors, metadata), partial)
        partial.rename(path)
    return description


def _export(
    policy: FunctionalPolicy,
    inputs: Mapping[str, jax.ShapeDtypeStruct],
    platforms: Sequence[str],
    arrays: Mapping[str, tuple[Any, jax.Array]],
    given: Mapping[str, tuple[Any, jax.Array]],
) -> export.Exported:
    """Lower the sampler with some arrays as arguments; the others are those that it does not use."""
    unused = {path: (x.shape, x.dtype) for name, (path, x) in arrays.items() if name not in given}

    def sample(
        weights: dict[str, Any], observation: dict[str, Any], key: UInt32[Array, "2"]
    ) -> Float[Array, "b chunk act"]:
        trees: dict[Any, Any] = {path: jnp.zeros(*form) for path, form in unused.items()}
        trees |= {arrays[name.removeprefix(WEIGHTS)][0]: x for name, x in weights.items()}
        tree = {"params": {}, "buffers": {}} | unflatten_dict(trees)
        wrapped = jax.random.wrap_key_data(key, impl="threefry2x32")
        batch = policy.preprocess(observation)
        chunk = policy.sample_actions(tree["params"], tree["buffers"], batch, wrapped)
        return policy.postprocess(chunk, observation)

    weights = {WEIGHTS + name: jax.ShapeDtypeStruct(x.shape, x.dtype) for name, (_, x) in given.items()}
    key = jax.ShapeDtypeStruct((2,), np.uint32)
    return export.export(jax.jit(sample), platforms=platforms)(weights, dict(inputs), key)


def _describe(
    policy: FunctionalPolicy,
    program: export.Exported,
    inputs: Mapping[str, jax.ShapeDtypeStruct],
    observation: Mapping[str, Any],
) -> dict[str, Any]:
    def form(x: Any) -> dict[str, Any]:
        return {"shape": list(x.shape), "dtype": np.dtype(x.dtype).name}

    described = {
        "policy": policy.config.type,
        "inputs": {name: form(x) for name, x in inputs.items()},
        "output": form(program.out_avals[0]),
        "n_action_steps": getattr(policy.config, "n_action_steps", None),
        "platforms": list(program.platforms),
        "versions": {"lerobot_jax": lerobot_jax.__version__, "jax": jax.__version__},
    }
    steps = [step for step in policy.preprocessor.steps if isinstance(step, TextStep)]
    if steps:
        written = {key for step in steps for key in step.writes if key in observation}
        described["tokens"] = {
            "steps": [{"name": step.registry_name, **step.to_config()} for step in steps],
            "example": {"task": TASKS[0]}
            | {key: np.asarray(observation[key][0]).tolist() for key in sorted(written)},
        }
    return described


def load_export_config(argv: Sequence[str]) -> tuple[str, ExportConfig]:
    """Parse the command line; `--policy.path` is taken first because it says which settings a policy has."""
    path = next(iter(option_values(argv, "--policy.path")), None)
    wants_help = bool({"-h", "--help"} & set(argv))
    if path is None and not wants_help:
        raise InputError("--policy.path=FOLDER_OR_HUB_NAME is missing, see --help")
    default = ExportConfig()
    if path is not None:
        default = dataclasses.replace(default, policy=load_config(find_policy(path)))
    others = [a for a in argv if a not in ("--policy.path", path, f"--policy.path={path}")]
    config = parse(ExportConfig, default, others, "lerobot_jax.export", __doc__ or "")
    if not config.output and not wants_help:
        raise InputError("--output=FILE is missing, e.g. --output=policy.safetensors")
    return path or "", config


def main(argv: Sequence[str]) -> None:
    path, config = load_export_config(argv)
    output = Path(config.output)
    if output.exists() or not output.absolute().parent.is_dir():
        reason = "exists already" if output.exists() else "is in no folder that there is"
        raise InputError(f"--output={output} {reason}; choose another")
    rtc = getattr(config.policy, "rtc_config", None)
    if rtc is not None and rtc.enabled:
        raise InputError(
            "policy.rtc_config: an exported program takes no old chunk; give --policy.rtc_config.enabled=False"
        )
    policy = load_policy(path, config=config.policy)
    described = export_policy(policy, output, config.platform_names, config.batch_size)
    for name, entry in described["inputs"].items():
        logging.info("input %s: %s %s", name, entry["dtype"], tuple(entry["shape"]))
    logging.info("actions: %s", tuple(described["output"]["shape"]))
    logging.info("written to %s, for %s", config.output, ", ".join(described["platforms"]))


if __name__ == "__main__":
    setup_logging()
    with reported_on_one_line():
        main(sys.argv[1:])
