"""What more devices and more processes cost, beside what they compute.

    python benchmarks/scaling.py

ACT of `configs/act_pusht.py:state`, in turns on this machine's processors, which all virtual devices share:
- weak scaling: 1, 2, 4 and 8 devices with the same samples each, whole weights on each (data) or a part (fsdp).
  The bytes that a device sends in a step are those of the compiled program. With N times the work on the same
  processors, a step should take N times as long; what it takes more is the overhead.
- processes: 4 devices in 1, 2 and 4 processes, with the same batch.
"""

import argparse
import os
import socket
import subprocess
import sys

import numpy as np
from act_state import make_program, make_steps, place_batch
from turns import Program, serve, take_turns

from lerobot_jax import distributed
from lerobot_jax import program as train_program
from lerobot_jax.planning.collectives import find_collectives
from lerobot_jax.planning.hlo import Module
from lerobot_jax.sharding import MeshConfig

DEVICES = (1, 2, 4, 8)
SAMPLES = 16  # of each device


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rounds", type=int, default=7, help="turns of each (default: %(default)s)")
    parser.add_argument("--steps", type=int, default=3, help="steps a turn (default: %(default)s)")
    parser.add_argument("--serve", nargs=2, metavar=("AXIS", "BATCH"), help=argparse.SUPPRESS)
    parser.add_argument("--traffic", nargs=2, metavar=("AXIS", "BATCH"), help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.serve:
        return serve(lambda: make_steps(_make_program(args.serve[0], int(args.serve[1]))))
    if args.traffic:
        return _print_traffic(args.traffic[0], int(args.traffic[1]))
    print("weak scaling: a device's samples stay the same")
    print(
        f"{'axis':6} {'devices':>7} {'batch':>6} {'ms a step':>10} {'overhead':>9} {'MB sent by a device':>20}"
    )
    for axis in ("data", "fsdp"):
        contestants = [[_program(axis, num * SAMPLES, num)] for num in DEVICES]
        times = take_turns(contestants, args.rounds, args.steps)
        for num, values in zip(DEVICES, times, strict=True):
            overhead = np.median(values / (num * times[0])) - 1
            sent = _sent(axis, num)
            print(
                f"{axis:6} {num:7d} {num * SAMPLES:6d} {np.median(values):10.1f} {overhead:9.0%} {sent / 1e6:20.1f}"
            )
    print("\nprocesses: 4 devices, batch 64, fsdp")
    print(f"{'processes':>9} {'ms a step':>10} {'of one process':>15}")
    counts = (1, 2, 4)
    times = take_turns([_processes(num, 4) for num in counts], args.rounds, args.steps)
    for num, values in zip(counts, times, strict=True):
        print(f"{num:9d} {np.median(values):10.1f} {np.median(values / times[0]):15.2f}")
    return None


def _program(axis: str, batch_size: int, num_devices: int, **environment: str) -> Program:
    command = [sys.executable, __file__, "--serve", axis, str(batch_size)]
    flags = f"--xla_force_host_platform_device_count={num_devices}"
    return Program(command, {"JAX_PLATFORMS": "cpu", "XLA_FLAGS": flags, **environment})


def _processes(num: int, num_devices: int) -> list[Program]:
    if num == 1:
        return [_program("fsdp", 64, num_devices)]
    with socket.socket() as free:
        free.bind(("localhost", 0))
        address = f"localhost:{free.getsockname()[1]}"
    who = {"JAX_COORDINATOR_ADDRESS": address, "JAX_NUM_PROCESSES": str(num)}
    return [_program("fsdp", 64, num_devices // num, **who, JAX_PROCESS_ID=str(i)) for i in range(num)]


def _sent(axis: str, num_devices: int) -> float:
    """Ask a process with so many devices for the bytes that each of them sends in a step."""
    program = _program(axis, num_devices * SAMPLES, num_devices)
    command = [argument.replace("--serve", "--traffic") for argument in program.command]
    environment = {**os.environ, **program.environment}
    return float(subprocess.run(command, env=environment, check=True, capture_output=True, text=True).stdout)


def _print_traffic(axis: str, batch_size: int) -> None:
    program = _make_program(axis, batch_size)
    compiled = program.trace_step(place_batch(program)).lower().compile()
    text = compiled.as_text()
    assert text is not None
    found = find_collectives(Module(text), dict(program.layout.mesh.shape))
    print(sum(each.sent * each.times for each in found))


def _make_program(axis: str, batch_size: int) -> train_program.Program:
    distributed.start("auto", str)
    sizes = {"data": 1, axis: -1}
    return make_program(batch_size=batch_size, mesh=MeshConfig(**sizes))


if __name__ == "__main__":
    main()
