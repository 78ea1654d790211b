"""Names of hardware, and what is known of it."""

import importlib.util

import pytest

from lerobot_jax.errors import InputError
from lerobot_jax.planning.hardware import GIB, parse_topology


@pytest.mark.parametrize(
    ("name", "kind", "devices", "slices", "shape"),
    [
        ("v5e:16x16", "v5e", 256, 1, (16, 16)),
        ("2xv5e:4x4", "v5e", 32, 2, (4, 4)),
        ("2*v5e:4x4", "v5e", 32, 2, (4, 4)),
        ("v6e:1x1", "v6e", 1, 1, (1, 1)),
        ("v4:2x2x4", "v4", 16, 1, (2, 2, 4)),
        ("v5p:4x4x4", "v5p", 64, 1, (4, 4, 4)),
        ("tpu7x:2x2x1", "tpu7x", 8, 1, (2, 2, 1)),
        ("v5litepod-256", "v5e", 256, 1, (16, 16)),
        ("v5p-8", "v5p", 4, 1, (2, 2, 1)),
        ("4xv4-32", "v4", 64, 4, (2, 2, 4)),
        ("gpu:8xH200", "H200", 8, 1, (8,)),
        ("gpu:4x8xa100", "A100", 32, 4, (8,)),
        ("cpu:8", "cpu", 8, 1, (8,)),
    ],
)
def test_names_of_hardware(name, kind, devices, slices, shape):
    found = parse_topology(name)
    assert (found.kind, found.num_devices, found.num_slices, found.shape) == (kind, devices, slices, shape)
    assert found.memory > 0


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("h100", "there are v5e:AxB"),
        ("v9:2x2", "there is no 'v9'; there are v5e:AxB"),
        ("v5e:3x3", "cannot be; a host has 2x2 chips"),
        ("v4:4x4", "2x2x1, v4:2x2x2"),
        ("v5p-7", "v5p-N with N = 8, 16"),
        ("v5litepod-12", "has no shape of its own; there are v5e-N with N = 1, 4, 8"),
        ("gpu:8xV100", "no GPU 'V100'; there are A100, H100, H200, B200"),
        ("gpu:16xH100", "1 to 8 GPUs a host"),
        ("cpu:0", "1 to 4096"),
    ],
)
def test_wrong_names_are_told_what_there_is(name, message):
    with pytest.raises(InputError, match=message):
        parse_topology(name)


def test_memory_of_gpus_is_what_xla_reserves(monkeypatch):
    monkeypatch.delenv("XLA_PYTHON_CLIENT_MEM_FRACTION", raising=False)
    assert parse_topology("gpu:8xH200").memory == int(0.75 * 151_397_597_184)
    monkeypatch.setenv("XLA_PYTHON_CLIENT_MEM_FRACTION", "0.9")
    assert parse_topology("gpu:8xH200").memory == int(0.9 * 151_397_597_184)
    assert parse_topology("v5e:4x4").memory == 15.75 * GIB


def test_speed_depends_on_the_type_of_number():
    tpu, gpu = parse_topology("v5e:4x4").chip, parse_topology("gpu:8xH100").chip
    assert tpu is not None
    assert gpu is not None
    assert tpu.speed("bfloat16") == tpu.speed("float32") == 197e12
    assert tpu.speed("float32 highest") == 197e12 / 6
    assert gpu.speed("bfloat16") == 2 * gpu.speed("float32") == 989e12
    assert gpu.speed("float32 highest") == 67e12


def test_what_is_missing_is_told(monkeypatch):
    from lerobot_jax.planning.compiler_process import check_installed

    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(InputError, match=r"pip install 'lerobot_jax\[plan\]'"):
        check_installed(parse_topology("v5e:4x4"))
    with pytest.raises(InputError, match="pip install --no-deps jax-cuda12-plugin=="):
        check_installed(parse_topology("gpu:8xH100"))
    check_installed(parse_topology("cpu:8"))
