"""Safetensors files: streamed, byte for byte as the library writes them; hostile ones are refused."""

import json
import pickle
import struct
from pathlib import Path

import numpy as np
import pytest
import safetensors.numpy

from lerobot_jax import state_dict
from lerobot_jax.errors import InputError
from lerobot_jax.state_dict import StateDict, Tensor


def arrays_of_every_type() -> dict[str, np.ndarray]:
    rng = np.random.default_rng(0)
    arrays = {
        f"layer.{i % 4}.{name}": rng.integers(0, 2, (3, i % 4, 2)).astype(dtype)
        for i, (name, dtype) in enumerate(state_dict.DTYPES.items())
    }
    return arrays | {"scalar": np.array(3, np.float32), "ünïcode": np.ones(1, np.float16)}


def test_files_equal_the_librarys_byte_for_byte(tmp_path: Path):
    arrays = arrays_of_every_type()
    state_dict.write(arrays, tmp_path / "ours.safetensors")
    safetensors.numpy.save_file(arrays, tmp_path / "theirs.safetensors", metadata={"format": "pt"})
    assert (tmp_path / "ours.safetensors").read_bytes() == (tmp_path / "theirs.safetensors").read_bytes()
    read = state_dict.read(tmp_path / "theirs.safetensors")
    assert set(read) == set(arrays)
    for key, array in arrays.items():
        assert (read[key].dtype, read[key].shape) == (array.dtype, array.shape)
        assert read[key].tobytes() == array.tobytes()


def test_arrays_are_computed_one_after_the_other(tmp_path: Path):
    alive, most_alive = 0, 0

    class Counted(np.ndarray):
        def __del__(self):
            nonlocal alive
            alive -= 1

    def compute() -> np.ndarray:
        nonlocal alive, most_alive
        alive += 1
        most_alive = max(most_alive, alive)
        return np.ones(1000, np.float32).view(Counted)

    tensors = {f"k{i:03d}": Tensor((1000,), np.dtype(np.float32), compute) for i in range(60)}
    state_dict.write(StateDict(tensors), tmp_path / "x.safetensors")
    assert most_alive < 20
    assert len(state_dict.read(tmp_path / "x.safetensors")) == 60


def test_asking_for_a_name_reads_nothing():
    def refuse() -> np.ndarray:
        raise AssertionError("read")

    state = StateDict({"a": Tensor((1,), np.dtype(np.float32), refuse)})
    assert "a" in state
    assert "b" not in state


def write_shards(folder: Path) -> dict[str, np.ndarray]:
    arrays = {
        "a": np.arange(4, dtype=np.float32),
        "b": np.ones((2, 2), np.int64),
        "c": np.zeros(3, np.float16),
    }
    state_dict.write({"a": arrays["a"]}, folder / "model-00001-of-00002.safetensors")
    state_dict.write({k: arrays[k] for k in "bc"}, folder / "model-00002-of-00002.safetensors")
    weight_map = {k: f"model-0000{1 if k == 'a' else 2}-of-00002.safetensors" for k in arrays}
    (folder / state_dict.INDEX_NAME).write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    return arrays


def test_shards_are_read_through_their_index(tmp_path: Path):
    arrays = write_shards(tmp_path)
    state = state_dict.read(tmp_path)
    assert set(state) == set(arrays)
    for key, array in arrays.items():
        np.testing.assert_array_equal(state[key], array)


def test_an_index_that_does_not_fit_is_reported(tmp_path: Path):
    write_shards(tmp_path)
    index = tmp_path / state_dict.INDEX_NAME
    good = json.loads(index.read_text())["weight_map"]
    faults = {
        "disagree about d": good | {"d": good["a"]},
        "disagree about a": {k: v for k, v in good.items() if k == "b" or k == "c"} | {"a": good["b"]},
        "disagree about c": {k: v for k, v in good.items() if k != "c"},
        r"'\.\./model-00001-of-00002\.safetensors' is not the name": good | {"a": "../" + good["a"]},
        "'code.py' is not the name": good | {"a": "code.py"},
        "must give a file name": ["a"],
        r"model-9\.safetensors: no such file": good | {"a": "model-9.safetensors"},
    }
    for message, weight_map in faults.items():
        index.write_text(json.dumps({"weight_map": weight_map}))
        with pytest.raises(InputError, match=message):
            state_dict.read(tmp_path)


def entry(dtype: str = "F32", shape: tuple = (2,), offsets: tuple = (0, 8)) -> dict:
    return {"dtype": dtype, "shape": list(shape), "data_offsets": list(offsets)}


@pytest.mark.parametrize(
    ("header", "length", "body"),
    [
        ({"a": entry()}, 10**12, 8),  # header larger than the file
        ({"a": entry()}, 2**64 - 1, 8),
        ({"a": entry(), "b": entry(offsets=(4, 12))}, None, 12),  # overlapping
        ({"a": entry(offsets=(8, 16))}, None, 16),  # a hole
        ({"a": entry(offsets=(0, 2**40))}, None, 8),  # past the end
        ({"a": entry(shape=(2**62, 4))}, None, 8),
        ({"a": entry(shape=(-1,))}, None, 8),
        ({"a": entry(dtype="F64")}, None, 8),  # a type that does not fit the length
        ({"a": entry(dtype="OBJECT")}, None, 8),
        ({"a": entry()}, None, 4),  # truncated
        ({"a": 1}, None, 0),
        ([1], None, 0),
    ],
)
def test_hostile_files_are_refused(header, length: int | None, body: int, tmp_path: Path):
    text = json.dumps(header).encode()
    path = tmp_path / "model.safetensors"
    path.write_bytes(struct.pack("<Q", len(text) if length is None else length) + text + b"\0" * body)
    with pytest.raises(InputError, match=r"model.safetensors: damaged or incomplete"):
        state_dict.read(tmp_path)


def test_small_rubbish_is_refused(tmp_path: Path):
    path = tmp_path / "model.safetensors"
    for content in (
        b"",
        b"\0" * 7,
        b"\0" * 8,
        b"version https://git-lfs.github.com/spec/v1\noid sha256:00\n",
    ):
        path.write_bytes(content)
        with pytest.raises(InputError, match=r"model.safetensors: damaged or incomplete"):
            state_dict.read(path)


def test_types_that_numpy_lacks_are_named(tmp_path: Path):
    text = json.dumps({"a": entry(dtype="F8_E8M0", offsets=(0, 2))}).encode()
    (tmp_path / "model.safetensors").write_bytes(struct.pack("<Q", len(text)) + text + b"\0\0")
    with pytest.raises(InputError, match=r"a has the type F8_E8M0; known are U64"):
        state_dict.read(tmp_path)


class Bomb:
    def __reduce__(self):
        return (Path.touch, (Path("exploded"),))


def test_pickles_are_never_opened(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)
    for name in ("pytorch_model.bin", "model.pt"):
        (tmp_path / name).write_bytes(pickle.dumps(Bomb()))
        with pytest.raises(InputError, match=rf"{name} is a pickle"):
            state_dict.read(tmp_path / name)
    with pytest.raises(InputError, match=r"no model.safetensors, only model.pt: a pickle"):
        state_dict.read(tmp_path)
    (tmp_path / "model.safetensors").write_bytes(pickle.dumps(Bomb()))
    with pytest.raises(InputError, match=r"model.safetensors is a pickle with another name"):
        state_dict.read(tmp_path)
    assert not Path("exploded").exists()
