"""PyTorch state dicts in safetensors files, read and written one array at a time.

A state dict of several gigabytes is never in memory twice: reading gives a mapping that loads an array when it is
asked for, and writing takes one that computes an array when its turn comes. Values are never cast. Pickles are
refused unopened, because opening one can run code.
"""

import json
import struct
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import ml_dtypes
import numpy as np
import safetensors

from lerobot_jax.errors import InputError
from lerobot_jax.files import read_json

T = TypeVar("T")

NUM_THREADS = 2  # two keep a disk busy; each holds an array or two
MODEL_NAME = "model.safetensors"
INDEX_NAME = "model.safetensors.index.json"
ADAPTER_NAME = "adapter_model.safetensors"  # of PEFT
PICKLE_SUFFIXES = (".bin", ".pt", ".pth", ".pkl", ".ckpt")
# The types that safetensors and numpy share, in the order in which the safetensors library stores arrays.
DTYPES = {
    "U64": np.dtype(np.uint64),
    "I64": np.dtype(np.int64),
    "F64": np.dtype(np.float64),
    "F32": np.dtype(np.float32),
    "U32": np.dtype(np.uint32),
    "I32": np.dtype(np.int32),
    "BF16": np.dtype(ml_dtypes.bfloat16),
    "F16": np.dtype(np.float16),
    "U16": np.dtype(np.uint16),
    "I16": np.dtype(np.int16),
    "F8_E4M3": np.dtype(ml_dtypes.float8_e4m3fn),
    "F8_E5M2": np.dtype(ml_dtypes.float8_e5m2),
    "I8": np.dtype(np.int8),
    "U8": np.dtype(np.uint8),
    "BOOL": np.dtype(np.bool_),
}
DTYPE_NAMES = {dtype: name for name, dtype in DTYPES.items()}


class Tensor(NamedTuple):
    """An array of a state dict that is read or computed each time `read` is called."""

    shape: tuple[int, ...]
    dtype: np.dtype
    read: Callable[[], np.ndarray]


class StateDict(Mapping[str, np.ndarray]):
    """Names -> arrays, each loaded when it is asked for and not kept.

    Attributes:
        tensors: the arrays, unread.
        metadata: safetensors' own texts; a name in it stands for an array that is stored under the other name.
        source: where it is from, for messages.
    """

    def __init__(
        self,
        tensors: Mapping[str, Tensor],
        metadata: Mapping[str, str] | None = None,
        source: str = "the state dict",
    ):
        self.tensors, self.metadata, self.source = dict(tensors), dict(metadata or {}), source

    @classmethod
    def of(cls, arrays: Mapping[str, np.ndarray], metadata: Mapping[str, str] | None = None) -> "StateDict":
        """Make a state dict of arrays in memory."""
        tensors = {key: Tensor(x.shape, x.dtype, lambda x=x: x) for key, x in arrays.items()}
        return cls(tensors, metadata)

    def __getitem__(self, key: str) -> np.ndarray:
        return self.tensors[key].read()

    def __contains__(self, key: object) -> bool:
        return key in self.tensors  # Mapping's own would read the array

    def __iter__(self) -> Iterator[str]:
        return iter(self.tensors)

    def __len__(self) -> int:
        return len(self.tensors)

    def renamed(self, names: Mapping[str, str]) -> "StateDict":
        """Give the part with the old names of `names`, under the new ones."""
        return StateDict({new: self.tensors[old] for old, new in names.items()}, self.metadata, self.source)

    def read_ahead(self) -> Iterator[tuple[str, np.ndarray]]:
        """Give (key, array) in order, preparing the next few arrays in threads meanwhile."""
        yield from zip(self, compute_ahead([tensor.read for tensor in self.tensors.values()]), strict=True)


def compute_ahead(functions: Iterable[Callable[[], T]]) -> Iterator[T]:
    """Give the functions' results in order, calling the next few of them in threads meanwhile."""
    with ThreadPoolExecutor(NUM_THREADS) as pool:
        waiting: deque[Future[T]] = deque()
        for function in functions:
            waiting.append(pool.submit(function))
            if len(waiting) == 2 * NUM_THREADS:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()


def read(path: Path) -> StateDict:
    """Open a safetensors file, or a folder's `model.safetensors` or its shards with an index.

    Raises:
        InputError: naming the file and what is wrong with it: missing, damaged, a pickle, an index that does not
            fit its shards.
    """
    if path.is_dir():
        return _read_folder(path)
    if path.suffix in PICKLE_SUFFIXES:
        raise InputError(
            f"{path} is a pickle, which can run code when it is opened; give safetensors instead"
        )
    return _read_file(path)


def write(state: Mapping[str, np.ndarray], path: Path) -> None:
    """Write one safetensors file, marked as PyTorch's; a `StateDict` is computed array by array.

    The bytes are those that the safetensors library writes for the same arrays.
    """
    if not isinstance(state, StateDict):
        state = StateDict.of(state)
    keys = sorted(state, key=lambda key: (list(DTYPE_NAMES).index(state.tensors[key].dtype), key))
    header: dict[str, Any] = {"__metadata__": {"format": "pt", **state.metadata}}
    end = 0
    for key in keys:
        shape, dtype, _ = state.tensors[key]
        start, end = end, end + int(np.prod(shape, dtype=np.int64)) * dtype.itemsize
        header[key] = {"dtype": DTYPE_NAMES[dtype], "shape": list(shape), "data_offsets": [start, end]}
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    with path.open("wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        for array in compute_ahead(state.tensors[key].read for key in keys):
            file.write(as_bytes(np.ascontiguousarray(array)))


def empty_aligned(shape: tuple[int, ...], dtype: np.dtype) -> np.ndarray:
    """Allocate an array where JAX can use it on the CPU without a copy: at a multiple of 64 bytes."""
    size = int(np.prod(shape, dtype=np.int64)) * dtype.itemsize
    memory = np.empty(size + 64, np.uint8)
    start = -memory.ctypes.data % 64
    return memory[start : start + size].view(dtype).reshape(shape)


def _read_folder(folder: Path) -> StateDict:
    if (folder / MODEL_NAME).exists():
        return _read_file(folder / MODEL_NAME)
    if (folder / INDEX_NAME).exists():
        return _read_shards(folder / INDEX_NAME)
    pickles = sorted(path.name for path in folder.iterdir() if path.suffix in PICKLE_SUFFIXES)
    if pickles:
        raise InputError(
            f"{folder} has no {MODEL_NAME}, only {pickles[0]}: a pickle, which can run code when it is opened; "
            "save the policy again as safetensors with the program that made it"
        )
    raise InputError(f"{folder / MODEL_NAME}: no such file")


def _read_shards(index: Path) -> StateDict:
    weight_map = read_json(index).get("weight_map")
    if not isinstance(weight_map, dict) or not all(isinstance(name, str) for name in weight_map.values()):
        raise InputError(f"{index}: 'weight_map' must give a file name for each key")
    tensors, metadata = {}, {}
    for name in sorted(set(weight_map.values())):
        if Path(name).name != name or Path(name).suffix != ".safetensors":
            raise InputError(f"{index}: '{name}' is not the name of a safetensors file beside it")
        shard = _read_file(index.parent / name)
        expected = {key for key, file in weight_map.items() if file == name}
        if expected != set(shard):
            wrong = ", ".join(sorted(expected ^ set(shard)))
            raise InputError(f"{index} and {name} disagree about {wrong}")
        tensors |= shard.tensors
        metadata |= shard.metadata
    return StateDict(tensors, metadata, str(index.parent))


def _read_file(path: Path) -> StateDict:
    try:
        with safetensors.safe_open(path, framework="numpy"):  # checks the whole header against the file
            pass
        with path.open("rb") as file:
            (length,) = struct.unpack("<Q", file.read(8))
            header = json.loads(file.read(length))
    except FileNotFoundError:
        raise InputError(f"{path}: no such file") from None
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({error.strerror or error})") from None
    except safetensors.SafetensorError as error:
        if _is_pickle(path):
            raise InputError(
                f"{path} is a pickle with another name: it is not opened, because that can run code"
            ) from None
        raise InputError(f"{path}: damaged or incomplete safetensors file ({error})") from None
    metadata = header.pop("__metadata__", None) or {}
    tensors = {}
    for key, entry in header.items():
        if entry["dtype"] not in DTYPES:
            known = ", ".join(DTYPES)
            raise InputError(f"{path}: {key} has the type {entry['dtype']}; known are {known}")
        shape, dtype = tuple(entry["shape"]), DTYPES[entry["dtype"]]
        offset = 8 + length + entry["data_offsets"][0]
        tensors[key] = Tensor(
            shape, dtype, lambda shape=shape, dtype=dtype, offset=offset: _load(path, shape, dtype, offset)
        )
    return StateDict(tensors, metadata, str(path))


def _load(path: Path, shape: tuple[int, ...], dtype: np.dtype, offset: int) -> np.ndarray:
    array = empty_aligned(shape, dtype)
    with path.open("rb") as file:
        file.seek(offset)
        # Read, not memory-mapped: mapped pages would count as this program's memory until all is read.
        if file.readinto(as_bytes(array)) != array.nbytes:
            raise InputError(f"{path}: became shorter while it was being read")
    return array


def as_bytes(array: np.ndarray) -> memoryview:
    """View the memory of an array in C order."""
    return array.reshape(-1).view(np.uint8).data


def _is_pickle(path: Path) -> bool:
    with path.open("rb") as file:
        start = file.read(4)
    return start[:1] == b"\x80" or start == b"PK\x03\x04"  # a pickle, and torch.save's archive of one
