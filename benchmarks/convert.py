"""Convert the weights of a pi0-sized policy to and from PyTorch's form; report speed beside `cp`, and memory.

    python benchmarks/convert.py [--folder=/tmp/convert] [--layers=18]

The modules have the shapes of pi0's two language models and its image encoder (3.5 G parameters of random bfloat16
numbers, 7 GB); the file is made on the spot, read into the module tree, written again and compared. Needs three
times its size on the disk and a little more than its size in memory.
"""

import argparse
import functools
import os
import shutil
import subprocess
import threading
import time
from pathlib import Path

import jax
import ml_dtypes
import numpy as np
from flax import nnx

from lerobot_jax import state_dict, torch_state
from lerobot_jax.nn.linear import Embedding, LayerNorm, Linear
from lerobot_jax.nn.stack import Stack
from lerobot_jax.state_dict import StateDict, Tensor


class Block(nnx.Module):
    """The matrices of a transformer block."""

    def __init__(self, width: int, attention: int, keys: int, mlp: int, num_matrices: int, rngs: nnx.Rngs):
        self.q_proj = Linear(width, attention, rngs=rngs)
        self.k_proj = Linear(width, keys, rngs=rngs)
        self.v_proj = Linear(width, keys, rngs=rngs)
        self.o_proj = Linear(attention, width, rngs=rngs)
        self.mlp = nnx.List([Linear(width, mlp, rngs=rngs) for _ in range(num_matrices - 1)])
        self.down_proj = Linear(mlp, width, rngs=rngs)
        self.norm = LayerNorm(width, rngs=rngs)


class Pi0Sized(nnx.Module):
    """SigLIP So400m, Gemma 2B and its 300M expert, by their matrices."""

    def __init__(self, layers: int, rngs: nnx.Rngs):
        def stack(depth: int, *shape: int) -> Stack:
            return Stack(lambda rngs: Block(*shape, rngs=rngs), depth, rngs=rngs)

        self.vision = stack(layers + layers // 2, 1152, 1152, 1152, 4304, 2)
        self.embed_tokens = Embedding(257152, 2048, rngs=rngs)
        self.layers = stack(layers, 2048, 2048, 256, 16384, 3)
        self.expert = stack(layers, 1024, 2048, 256, 4096, 3)
        self.expert_lm_head = Linear(1024, 257152, rngs=rngs)


class MemoryWatch:
    """The most memory that the process has held at one time, above what it held at the start."""

    def __enter__(self) -> "MemoryWatch":
        self.start, self.peak, self._done = _resident(), 0.0, threading.Event()
        self._thread = threading.Thread(target=self._watch)
        self._thread.start()
        return self

    def _watch(self) -> None:
        while not self._done.wait(0.02):
            self.peak = max(self.peak, _resident() - self.start)

    def __exit__(self, *_: object) -> None:
        self._done.set()
        self._thread.join()


def _resident() -> float:
    """Give the process's resident memory in GB."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * 4096 / 1e9


def _random_state(module: nnx.Module) -> StateDict:
    def draw(shape: tuple[int, ...], seed: int) -> np.ndarray:
        bits = np.random.default_rng(seed).integers(0, 2**16, shape, np.uint16)
        return (bits & 0xBFFF).view(ml_dtypes.bfloat16)  # without the bit that makes infinities and NaNs

    tensors = {}
    for seed, entry in enumerate(torch_state.entries(module)):
        shape, _ = entry.torch_form(np.dtype(np.float32))
        read = functools.partial(draw, shape, seed)
        tensors[entry.keys[0]] = Tensor(shape, np.dtype(ml_dtypes.bfloat16), read)
    return StateDict(tensors)


def _sync_and_forget(path: Path) -> None:
    """Have the file on the disk and out of the page cache, so that every reading starts alike."""
    descriptor = os.open(path, os.O_RDONLY)
    os.fsync(descriptor)
    os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
    os.close(descriptor)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--folder", type=Path, default=Path("/tmp/convert"), help="for the files")
    parser.add_argument("--layers", type=int, default=18, help="18 is pi0's depth; fewer for a quick look")
    parser.add_argument("--rounds", type=int, default=2, help="how often everything is measured")
    args = parser.parse_args()
    args.folder.mkdir(parents=True, exist_ok=True)
    original, copy, written = (args.folder / f"{n}.safetensors" for n in ("original", "copy", "written"))
    module = nnx.eval_shape(lambda: Pi0Sized(args.layers, nnx.Rngs(0)))
    print("making random weights ...", flush=True)
    state_dict.write(_random_state(module), original)
    size = original.stat().st_size / 1e9
    print(f"{size:.2f} GB, {len(state_dict.read(original))} arrays\n")
    print("| what | s | GB/s | of cp | GB above the arrays |\n|---|---|---|---|---|", flush=True)
    for _ in range(args.rounds):
        params = buffers = None
        _sync_and_forget(original)
        start = time.monotonic()
        subprocess.run(["cp", original, copy], check=True)
        _sync_and_forget(copy)
        cp = time.monotonic() - start
        print(f"| cp | {cp:.1f} | {size / cp:.2f} | 1.00 | |", flush=True)

        _sync_and_forget(original)
        start = time.monotonic()
        with MemoryWatch() as watch:
            params, buffers = torch_state.from_torch(module, state_dict.read(original))
            jax.block_until_ready(params)
        _report("file to module tree", time.monotonic() - start, cp, size, watch.peak - size)

        start = time.monotonic()
        with MemoryWatch() as watch:
            state_dict.write(torch_state.to_torch(module, params, buffers), written)
            _sync_and_forget(written)
        _report("module tree to file", time.monotonic() - start, cp, size, watch.peak)
    same = subprocess.run(["cmp", original, written], check=False).returncode == 0
    print(f"\nthe file written is {'the same' if same else 'NOT THE SAME'}, byte for byte")
    shutil.rmtree(args.folder)


def _report(what: str, seconds: float, cp: float, size: float, memory: float) -> None:
    print(
        f"| {what} | {seconds:.1f} | {size / seconds:.2f} | {cp / seconds:.2f} | {memory:.2f} |", flush=True
    )


if __name__ == "__main__":
    main()
