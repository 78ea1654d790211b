"""Run a policy that `python -m lerobot_jax.export` wrote. This file may be copied: it needs nothing of the package.

    pip install jax numpy safetensors flatbuffers

    from exported import ExportedPolicy      # or from lerobot_jax.exported

    policy = ExportedPolicy("act.safetensors")
    print(policy.description["inputs"])
    actions = policy({"observation.state": state, "observation.images.top": image}, key=0)  # (batch, chunk, action)

The file is a safetensors file: `weights/<name>` are arrays, `program` is what `jax.export` serialized, for the
platforms in its metadata. Show what it says of itself:

    python exported.py act.safetensors
"""

import json
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np
import safetensors
from jax import export

FORMAT = "1"
# The description's name in the metadata, the program's, and what precedes the weights' names.
NAME, PROGRAM, WEIGHTS = "exported_policy", "program", "weights/"


class ExportedPolicy:
    """A policy's sampler: raw observations to actions in the robot's units.

    Attributes:
        description: what the file says of itself: `inputs` (name -> shape and dtype), `output`, `platforms`, the
            versions that made it, and of a policy that is told what to do, how its `tokens` are made.
    """

    def __init__(self, path: str | Path, device: Any = None):
        """Read the file and compile its program, so that the first actions do not wait for it.

        Args:
            path: the file.
            device: where to run; by default JAX's first.

        Raises:
            ValueError: if it is no such file, or not for this device or version of JAX.
        """
        device = device or jax.devices()[0]
        with _opened(path) as file:
            self.description = describe(path)
            _check_platform(self.description, device, path)
            program = self._read_program(file.get_tensor(PROGRAM), path)
            # One at a time: a large policy is never in the host's memory as a whole and on the device too.
            self._weights = {
                name: jax.device_put(file.get_tensor(name), device).block_until_ready()
                for name in file.keys()  # noqa: SIM118
                if name.startswith(WEIGHTS)
            }
        self._device = device
        self._inputs = {
            name: jax.ShapeDtypeStruct(tuple(entry["shape"]), np.dtype(entry["dtype"]))
            for name, entry in self.description["inputs"].items()
        }
        key = jax.ShapeDtypeStruct((2,), np.uint32)
        with jax.default_device(device):
            self._run = jax.jit(program.call).lower(self._weights, self._inputs, key).compile()

    def __call__(self, observation: Mapping[str, Any], key: int | np.ndarray) -> np.ndarray:
        """Give a chunk of actions, (batch, chunk, action).

        Args:
            observation: what `description["inputs"]` lists: images uint8 with channels last, numbers as the robot
                gives them.
            key: what the policy's noise is drawn from: a seed, or two uint32 as in `jax.random.key_data`. The same
                key gives the same actions.

        Raises:
            ValueError: naming an input that is missing, unknown, or of another shape or type.
        """
        data = jax.random.key_data(jax.random.key(key)) if isinstance(key, int) else np.asarray(key)
        if data.shape != (2,) or data.dtype != np.uint32:
            raise ValueError(f"key must be an int or two uint32, it is {data.dtype} of shape {data.shape}")
        inputs = {name: np.asarray(value) for name, value in observation.items()}
        problems = [f"'{name}' is missing" for name in self._inputs if name not in inputs]
        problems += [f"'{name}' is unknown" for name in inputs if name not in self._inputs]
        for name, wanted in self._inputs.items():
            if name in inputs and (inputs[name].shape, inputs[name].dtype) != (wanted.shape, wanted.dtype):
                has = f"{inputs[name].dtype} of shape {inputs[name].shape}"
                problems.append(f"'{name}' must be {wanted.dtype} of shape {wanted.shape}, it is {has}")
        if problems:
            raise ValueError(f"the observation does not fit: {'; '.join(problems)}")
        return np.asarray(self._run(self._weights, *jax.device_put((inputs, data), self._device)))

    def _read_program(self, data: np.ndarray, path: str | Path) -> export.Exported:
        try:
            return export.deserialize(bytearray(data.tobytes()))
        except ImportError:
            raise
        except Exception as error:  # JAX and MLIR raise many kinds
            made, here = self.description["versions"]["jax"], jax.__version__
            raise ValueError(
                f"{path}: JAX {here} cannot read the program ({error}); JAX {made} wrote it, and reads it. JAX "
                "reads programs of the six months before it; export the policy again for a later one"
            ) from None


def describe(path: str | Path) -> dict[str, Any]:
    """Give what the file says of itself.

    Raises:
        ValueError: if it is no exported policy.
    """
    with _opened(path) as file:
        metadata = file.metadata() or {}
    if metadata.get("format_version") != FORMAT or NAME not in metadata:
        raise ValueError(f"{path}: not an exported policy, or one of a newer lerobot_jax")
    return json.loads(metadata[NAME])


def _opened(path: str | Path) -> Any:
    try:
        return safetensors.safe_open(path, framework="numpy")
    except FileNotFoundError:
        raise ValueError(f"{path}: no such file") from None
    except (OSError, safetensors.SafetensorError) as error:
        raise ValueError(f"{path}: not a safetensors file, or an incomplete one ({error})") from None


def _check_platform(description: Mapping[str, Any], device: Any, path: str | Path) -> None:
    names = {"gpu": ("cuda", "rocm")}.get(device.platform, (device.platform,))
    if not set(names) & set(description["platforms"]):
        known = ", ".join(description["platforms"])
        raise ValueError(
            f"{path}: exported for {known}, and this device is a {device.platform}; export it again with "
            f"--platforms={','.join([*description['platforms'], names[0]])}"
        )


if __name__ == "__main__":
    if len(sys.argv) != 2 or sys.argv[1] in ("-h", "--help"):
        sys.exit(__doc__)
    print(json.dumps(describe(sys.argv[1]), indent=2))
