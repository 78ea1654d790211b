"""The hardware that a plan can be made for, under names like `v5e:16x16`: devices, memory, speeds.

| name              | hardware                                                              |
|-------------------|-----------------------------------------------------------------------|
| `v5e:AxB`         | a slice of A x B TPU v5e chips; `v6e:AxB` likewise                    |
| `v5p:AxBxC`       | a slice of A x B x C TPU v5p chips; `v4:AxBxC`, `tpu7x:AxBxC` likewise |
| `2xv5e:16x16`     | two such slices, which a slower network connects                      |
| `v5litepod-256`   | Google Cloud's name of `v5e:16x16`; also `v6e-N`, `v5p-N`, `v4-N`     |
| `gpu:8xH200`      | a host with 8 GPUs: A100, H100, H200 or B200 (SXM modules)            |
| `gpu:4x8xH200`    | four such hosts                                                       |
| `cpu:8`           | 8 virtual devices on this machine's processors                        |

Speeds are the makers' peak numbers; sources: Google Cloud's pages on each TPU version, NVIDIA's data sheets. The
memory of a TPU is what its compiler accepts (measured); that of a GPU is what XLA reserves of it, by default 75 %.
"""

import dataclasses
import math
import os
import re
from typing import Any, Literal

from lerobot_jax.errors import InputError
from lerobot_jax.planning.memory import host_memory

GIB = 2**30
GPU_SHARE = 0.75  # what XLA reserves unless XLA_PYTHON_CLIENT_MEM_FRACTION says something else

# Slices that Google Cloud offers, by number of chips.
FLAT = {1: "1x1", 4: "2x2", 8: "2x4", 16: "4x4", 32: "4x8", 64: "8x8", 128: "8x16", 256: "16x16"}
CUBIC = {
    4: "2x2x1",
    8: "2x2x2",
    16: "2x2x4",
    32: "2x4x4",
    64: "4x4x4",
    128: "4x4x8",
    256: "4x8x8",
    512: "8x8x8",
}
CUBIC |= {768: "8x8x12", 1024: "8x8x16", 2048: "8x16x16"}


@dataclasses.dataclass(frozen=True)
class Chip:
    """One device, as JAX counts them.

    Attributes:
        name: its name.
        memory: bytes that a program may use.
        flops: multiplications and additions a second: of bfloat16 numbers.
        float32_flops: of float32 numbers at the default precision.
        exact_flops: of float32 numbers at the highest precision.
        bandwidth: bytes a second from and to its memory.
        link: bytes a second that it sends to others of its slice or host.
        network: bytes a second that it sends to other slices or hosts.
    """

    name: str
    memory: float
    flops: float
    float32_flops: float
    exact_flops: float
    bandwidth: float
    link: float
    network: float

    def speed(self, number_type: str) -> float:
        """Give the operations a second for a type of number, as `flops.count_flops` writes it."""
        if number_type == "float32":
            return self.float32_flops
        if number_type == "float32 high":  # three products of bfloat16 parts; highest: six
            return min(self.float32_flops, 2 * self.exact_flops)
        return self.exact_flops if number_type in ("float32 highest", "float64") else self.flops


def _tpu(name: str, memory: float, tflops: float, bandwidth: float, link: float, network: float) -> Chip:
    flops = tflops * 1e12  # float32 numbers are rounded to bfloat16 unless a higher precision is asked for
    return Chip(name, memory * GIB, flops, flops, flops / 6, bandwidth * 1e9, link * 1e9, network * 1e9)


# GB/s: memory, links to neighbours (all together, one direction), data-center network.
TPUS = {
    "v4": _tpu("TPU v4", 30.75, 275, 1200, 300, 6.25),
    "v5e": _tpu("TPU v5e", 15.75, 197, 819, 200, 3.125),
    "v5p": _tpu("TPU v5p", 95.74, 459, 2765, 600, 6.25),
    "v6e": _tpu("TPU v6e", 31.25, 918, 1638, 400, 12.5),
    "tpu7x": _tpu("TPU7x core", 94.75, 2307 / 2, 7380 / 2, 300, 6.25),  # two devices a chip
}


def _gpu(name: str, memory: int, tflops: tuple[float, float, float], *gb_per_second: float) -> Chip:
    flops, tf32, float32 = (speed * 1e12 for speed in tflops)
    bandwidth, link, network = (speed * 1e9 for speed in gb_per_second)
    return Chip(name, memory, flops, tf32, float32, bandwidth, link, network)


# TFLOP/s of dense bfloat16, TF32 (JAX's default for float32) and float32; GB/s of memory, NVLink (one direction),
# and of the network of NVIDIA's DGX of that generation.
GPUS = {
    "A100": _gpu("NVIDIA A100-SXM4-80GB", 85_100_068_864, (312, 156, 19.5), 2039, 300, 25),
    "H100": _gpu("NVIDIA H100 80GB HBM3", 84_942_979_072, (989, 494.5, 67), 3352, 450, 50),
    "H200": _gpu("NVIDIA H200 141GB HBM3e", 151_397_597_184, (989, 494.5, 67), 4800, 450, 50),
    "B200": _gpu("NVIDIA B200", 191_514_411_008, (2250, 1125, 75), 7672, 900, 50),
}


@dataclasses.dataclass(frozen=True)
class Topology:
    """Some hardware.

    Attributes:
        name: in the words of this module.
        platform: tpu, gpu or cpu.
        kind: which chip: `v5e`, `H200`, ...
        chip: a device; None for CPUs, whose speed is not known.
        memory: bytes that a program may use on a device.
        num_devices: all of them.
        num_slices: groups of devices that a slower network connects: slices of TPUs, hosts with GPUs.
        shape: how the chips of a slice are arranged.
    """

    name: str
    platform: Literal["tpu", "gpu", "cpu"]
    kind: str
    chip: Chip | None
    memory: int
    num_devices: int
    num_slices: int
    shape: tuple[int, ...]


def parse_topology(name: str) -> Topology:
    """Find the hardware of a name.

    Raises:
        InputError: saying which names there are, or which is the right one.
    """
    if match := re.fullmatch(r"cpu:(\d+)", name):
        return _cpu(name, int(match[1]))
    if match := re.fullmatch(r"gpu:(?:(\d+)x)?(\d+)x(\w+)", name):
        return _gpus(name, int(match[1] or 1), int(match[2]), match[3].upper())
    if match := re.fullmatch(r"(?:(\d+)[x*])?(\w+):(\d+(?:x\d+)+)", name):
        shape = tuple(int(size) for size in match[3].split("x"))
        return _slices(name, int(match[1] or 1), match[2], shape)
    if match := re.fullmatch(r"(?:(\d+)[x*])?(v4|v5p|v5litepod|v5e|v6e|tpu7x)-(\d+)", name):
        return parse_topology(_from_cloud(name, match[1], match[2], int(match[3])))
    raise InputError(f"--topology: there is no '{name}'; {_known()}")


def _known() -> str:
    return (
        "there are v5e:AxB and v6e:AxB (e.g. v5e:16x16), v4:AxBxC, v5p:AxBxC and tpu7x:AxBxC (e.g. v5p:2x2x4), "
        "several slices of them (2xv5e:16x16), Google Cloud's names (v5litepod-256), "
        f"gpu:NxKIND (e.g. gpu:8xH200; {', '.join(GPUS)}), several hosts of them (gpu:4x8xH200), and cpu:N"
    )


def _cpu(name: str, num: int) -> Topology:
    if not 1 <= num <= 4096:
        raise InputError(f"--topology: {name} should have 1 to 4096 devices")
    return Topology(name, "cpu", "cpu", None, host_memory() // num, num, 1, (num,))


def _gpus(name: str, hosts: int, per_host: int, kind: str) -> Topology:
    if kind not in GPUS:
        raise InputError(f"--topology: there is no GPU '{kind}'; there are {', '.join(GPUS)}")
    if not hosts or not 1 <= per_host <= 8:
        raise InputError(f"--topology: {name} should have 1 to 8 GPUs a host, gpu:HOSTSxGPUSx{kind}")
    share = float(os.environ.get("XLA_PYTHON_CLIENT_MEM_FRACTION", GPU_SHARE))
    chip = GPUS[kind]
    return Topology(name, "gpu", kind, chip, int(chip.memory * share), hosts * per_host, hosts, (per_host,))


def _slices(name: str, num: int, kind: str, shape: tuple[int, ...]) -> Topology:
    kind = {"v5": "v5p", "v7x": "tpu7x", "v5litepod": "v5e"}.get(kind, kind)
    if kind not in TPUS:
        raise InputError(f"--topology: there is no '{kind}'; {_known()}")
    dimensions = 2 if kind in ("v5e", "v6e") else 3
    known = FLAT if dimensions == 2 else CUBIC
    hosts = (1, 1) if shape == (1, 1) else (2, 2) if dimensions == 2 else (2, 2, 1)
    if len(shape) != dimensions or any(n < 1 or n % m for n, m in zip(shape, hosts, strict=True)):
        examples = ", ".join(f"{kind}:{each}" for each in known.values())
        raise InputError(
            f"--topology: {name} cannot be; a host has {'x'.join(map(str, hosts))} chips of {kind}, so each of "
            f"the {dimensions} sides must be a multiple of that: {examples}, ..."
        )
    if not num:
        raise InputError(f"--topology: {name} has no slice")
    devices = num * math.prod(shape) * (2 if kind == "tpu7x" else 1)
    chip = TPUS[kind]
    return Topology(name, "tpu", kind, chip, int(chip.memory), devices, num, shape)


def _from_cloud(name: str, slices: str | None, kind: str, number: int) -> str:
    """Give our name for Google Cloud's, which counts chips of v5e and v6e, cores (two a chip) of the others."""
    is_flat = kind in ("v5litepod", "v5e", "v6e")
    kind = "v5e" if kind == "v5litepod" else kind
    known = FLAT if is_flat else CUBIC
    chips = number if is_flat else number / 2
    if chips not in known:
        numbers = ", ".join(str(size if is_flat else 2 * size) for size in known)
        raise InputError(f"--topology: {name} has no shape of its own; there are {kind}-N with N = {numbers}")
    return f"{slices}x{kind}:{known[int(chips)]}" if slices else f"{kind}:{known[int(chips)]}"


def tpu_settings(topology: Topology) -> dict[str, Any]:
    """Give the arguments of `jax.experimental.topologies.get_topology_desc` for TPUs."""
    kind = "v5" if topology.kind == "v5p" else topology.kind
    name = f"{kind}:{'x'.join(map(str, topology.shape))}"
    settings: dict[str, Any] = {"platform": "tpu", "topology_name": name}
    if topology.num_slices > 1:
        settings["num_slices"] = topology.num_slices
    if topology.kind in ("v5e", "v6e"):
        settings["chips_per_host_bounds"] = (1, 1, 1) if topology.shape == (1, 1) else (2, 2, 1)
        if topology.shape == (16, 16):  # a whole pod is closed to a torus
            settings["wrap"] = (True, True, False)
    elif topology.kind in ("v4", "v5p"):
        settings["chip_config_name"] = "megacore"  # both cores of a chip are one device
    return settings


def gpu_settings(topology: Topology) -> dict[str, Any]:
    """Give the arguments of `jax.experimental.topologies.get_topology_desc` for GPUs."""
    (per_host,) = topology.shape
    return {
        "platform": "cuda",
        "target_config": _target_config(topology.kind),
        "topology": f"{topology.num_slices}x1x{per_host}",  # slices, hosts of a slice, GPUs of a host
    }


# Compute capability, multiprocessors, float units and bytes of shared memory of each, bytes of L2 cache, GHz.
_PROCESSORS = {
    "A100": (8, 108, 64, 167_936, 41_943_040, 1.41),
    "H100": (9, 132, 128, 233_472, 52_428_800, 1.98),
    "H200": (9, 132, 128, 233_472, 52_428_800, 1.98),
    "B200": (10, 148, 128, 233_472, 132_644_864, 1.965),
}


def _target_config(kind: str) -> str:
    """Describe a GPU to XLA: the text form of its `GpuTargetConfigProto`."""
    major, cores, units, shared, cache, clock = _PROCESSORS[kind]
    chip = GPUS[kind]
    device = {
        "threads_per_block_limit": 1024,
        "threads_per_warp": 32,
        "shared_memory_per_block": 49_152,
        "shared_memory_per_core": shared,
        "shared_memory_per_block_optin": shared - 1024,
        "threads_per_core_limit": 2048,
        "core_count": cores,
        "fpus_per_core": units,
        "block_dim_limit_x": 2**31 - 1,
        "block_dim_limit_y": 65_535,
        "block_dim_limit_z": 65_535,
        "memory_bandwidth": int(chip.bandwidth),
        "l2_cache_size": cache,
        "clock_rate_ghz": clock,
        "device_memory_size": int(chip.memory),
        "registers_per_core_limit": 65_536,
        "registers_per_block_limit": 65_536,
    }
    lines = [f"  {name}: {value}" for name, value in device.items()]
    lines.append(f"  cuda_compute_capability {{ major: {major} }}")
    return "\n".join(
        [
            "gpu_device_info {",
            *lines,
            "}",
            'platform_name: "CUDA"',
            "dnn_version_info { major: 9 minor: 8 }",
            "runtime_version { major: 12 minor: 9 patch: 0 }",
            f'device_description_str: "{chip.name}"',
        ]
    )
