"""The process that compiles for hardware that is not here; it alone has the settings that this needs.

It reads requests from its standard input, one JSON value a line, and answers each with one line of JSON: first the
run and the hardware, then batch sizes. What compilers print on its standard output goes to the standard error.
"""

import contextlib
import importlib.util
import json
import os
import subprocess
import sys
from collections.abc import Iterator, Sequence
from typing import IO, Any

import jax

from lerobot_jax.errors import InputError
from lerobot_jax.planning.hardware import Topology, parse_topology

GPU_PLUGINS = ("jax_plugins.xla_cuda13", "jax_plugins.xla_cuda12")
_TPU = {
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",  # several plans at a time
    "JAX_EXEC_TIME_OPTIMIZATION_EFFORT": "-1.0",  # compiles 4 times as fast
    "TPU_ACCELERATOR_TYPE": "v5litepod-16",  # only so that it is not asked for
    "TPU_SKIP_MDS_QUERY": "1",
    "TPU_WORKER_HOSTNAMES": "localhost",
    "TPU_WORKER_ID": "0",
}
_GPU_FLAGS = (
    "--xla_gpu_autotune_level=0 --xla_gpu_enable_triton_gemm=false"  # there is nothing to try them on
)


class CompilerProcess:
    """A process that compiles the train step of a run for some hardware.

    Args:
        argv: the run's command line, `--config=...` and overrides.
        topology: the hardware.

    Raises:
        InputError: when the compiler is not installed, or what is wrong with the run.
    """

    def __init__(self, argv: Sequence[str], topology: Topology):
        check_installed(topology)
        command = [sys.executable, "-m", __name__]
        self._process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment(topology)
        )
        self.description = self._ask({"argv": list(argv), "topology": topology.name})

    def measure(self, batch_size: int) -> dict[str, Any]:
        """Give `Measurer.measure`'s answer."""
        return self._ask(batch_size)

    def __enter__(self) -> "CompilerProcess":
        return self

    def __exit__(self, *_: object) -> None:
        self._process.kill()
        self._process.communicate()

    def _ask(self, request: Any) -> dict[str, Any]:
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        with contextlib.suppress(BrokenPipeError):  # that there is no answer tells as much
            self._process.stdin.write(json.dumps(request) + "\n")
            self._process.stdin.flush()
        answer = self._process.stdout.readline()
        if not answer:
            code = self._process.wait()
            reason = f"was ended by signal {-code}" if code < 0 else f"ended with code {code}"
            hint = "; if by 9, this machine has too little memory" if code < 0 else ""
            raise InputError(f"the compiler's process {reason}{hint}; what it printed is above")
        found = json.loads(answer)
        if "error" in found:
            self.__exit__()
            raise InputError(found["error"])
        return found


def check_installed(topology: Topology) -> None:
    """Raise `InputError` that says what to install if there is no compiler for the hardware."""
    if topology.platform == "tpu" and importlib.util.find_spec("libtpu") is None:
        raise InputError(
            f"planning for {topology.name} needs TPU's compiler (no TPU): pip install 'lerobot_jax[plan]', or "
            f"pip install 'jax[tpu]=={jax.__version__}'"
        )
    if topology.platform == "gpu" and not any(map(_is_there, GPU_PLUGINS)):
        version = jax.__version__
        raise InputError(
            f"planning for {topology.name} needs JAX's CUDA plugin (no GPU, no CUDA): pip install --no-deps "
            f"jax-cuda12-plugin=={version} jax-cuda12-pjrt=={version}; to train on GPUs as well: pip install "
            "'lerobot_jax[cuda]'"
        )


def _is_there(module: str) -> bool:
    try:
        return importlib.util.find_spec(module) is not None
    except ModuleNotFoundError:
        return False


def environment(topology: Topology) -> dict[str, str]:
    """Give the environment variables with which the process compiles."""
    settings = dict(os.environ)
    for name in ("JAX_COMPILATION_CACHE_DIR", "JAX_NUM_PROCESSES"):  # what it compiles cannot run here
        settings.pop(name, None)
    flags = [
        flag
        for flag in settings.get("XLA_FLAGS", "").split()
        if not flag.startswith("--xla_force_host_platform_device_count")
    ]
    if topology.platform == "cpu":
        flags += [f"--xla_force_host_platform_device_count={topology.num_devices}"]
        flags += ["--xla_backend_optimization_level=0"]  # machine code is not what is looked at
    elif topology.platform == "gpu":
        flags += [_GPU_FLAGS]
    else:
        settings |= _TPU
    return settings | {"JAX_PLATFORMS": "cpu", "XLA_FLAGS": " ".join(flags), "TF_CPP_MIN_LOG_LEVEL": "3"}


def _serve(requests: Iterator[str], answers: IO[str]) -> None:
    from lerobot_jax.config import load_config
    from lerobot_jax.planning.measurement import Measurer

    measurer: Measurer | None = None
    for line in requests:
        request = json.loads(line)
        try:
            if measurer is None:
                config = load_config(request["argv"])
                measurer = Measurer(config, parse_topology(request["topology"]))
                answer = measurer.describe()
            else:
                answer = measurer.measure(request)
        except InputError as error:
            answer = {"error": str(error)}
        print(json.dumps(answer), file=answers, flush=True)


def main() -> None:
    from lerobot_jax.logs import setup_logging

    setup_logging()
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    with contextlib.suppress(KeyboardInterrupt):
        _serve(iter(sys.stdin), answers)


if __name__ == "__main__":
    main()
