"""Time data loading against stock LeRobot's on the same datasets and the same machine.

    python benchmarks/loader.py --lerobot_python=/path/to/lerobot/bin/python

Three cases: the built-in Push-T demonstrations as ACT reads them (chunk of 100) and as Diffusion Policy does
(horizon 16, 2 observations), and a dataset of an arm with two 480x640 cameras at 30 Hz that is made on the spot
with stock LeRobot's encoder settings. Stock LeRobot reads with its DataLoader as `lerobot-train` sets it up; here
frames are decoded on demand (cold), come from the cache of decoded frames (warm) or from device memory. Every side
runs in a process of its own; they take turns, so that all see the same machine.

Printed are samples a second, samples a second of processor time (all processes and threads together), seconds from
nothing to the first batch, host memory that is not page cache, and for how much of a run whose train steps take
20 ms (simulated) the accelerator waits for data. As `lerobot-train` does, stock LeRobot asks for a batch when the
step before has ended; as `lerobot_jax.train` does, we ask while it runs.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

OBSERVATIONS = [-1, 0]
CASES: dict[str, dict[str, Any]] = {
    "Push-T, ACT": {"repo_id": "builtin/pusht", "fps": 10, "batch": 64, "action": range(100)},
    "Push-T, Diffusion": {
        "repo_id": "builtin/pusht",
        "fps": 10,
        "batch": 64,
        "action": range(-1, 15),
        "observation.state": OBSERVATIONS,
        "observation.image": OBSERVATIONS,
    },
    "arm, 2 x 480x640, ACT": {"repo_id": "made/arm", "fps": 30, "batch": 8, "action": range(100)},
}
SIDES = ("lerobot", "cold", "warm", "device")
NOT_DELTAS = ("repo_id", "fps", "batch")
STEP_S = 0.02  # a train step on a GPU


def make_arm_dataset(root: Path, episodes: int = 4, length: int = 300) -> None:
    """Record textured pictures that move, with noise as cameras have it."""
    from lerobot_jax.data.dataset import LeRobotDataset
    from lerobot_jax.progress import progress_bar

    cameras = ("observation.images.front", "observation.images.wrist")
    image = {"dtype": "video", "shape": (480, 640, 3), "names": ["height", "width", "channels"]}
    vector = {"dtype": "float32", "shape": (6,), "names": None}
    features = dict.fromkeys(cameras, image) | {"observation.state": vector, "action": vector}
    writer = LeRobotDataset.create("made/arm", fps=30, features=features, root=root)
    rng = np.random.default_rng(0)
    coarse = rng.integers(0, 256, (40, 54, 3)).astype(np.float32)
    texture = np.kron(coarse, np.ones((16, 16, 1)))[: 480 + 160, : 640 + 220]
    with progress_bar("recording the arm", episodes * length, "frame") as bar:
        for _ in range(episodes):
            for t in range(length):
                y, x = 80 + int(70 * np.sin(t / 40)), 100 + int(90 * np.cos(t / 55))
                frame: dict[str, Any] = {"task": "move"}
                for key in cameras:
                    noisy = texture[y : y + 480, x : x + 640] + rng.normal(0, 3, (480, 640, 1))
                    frame[key] = noisy.clip(0, 255).astype(np.uint8)
                frame |= {
                    key: rng.normal(size=6).astype(np.float32) for key in ("observation.state", "action")
                }
                writer.add_frame(frame)
                bar.update()
            writer.save_episode()
    writer.finalize()


def deltas(case: dict[str, Any]) -> dict[str, list[float]]:
    return {key: [i / case["fps"] for i in steps] for key, steps in case.items() if key not in NOT_DELTAS}


def open_ours(case: dict[str, Any], root: str, side: str, workers: int) -> Iterator[Any]:
    """Give our batches, as train.py reads them."""
    from lerobot_jax import sharding
    from lerobot_jax.data import loader
    from lerobot_jax.data.dataset import LeRobotDataset
    from lerobot_jax.data.samples import DeviceRows, ShuffledRows

    dataset = LeRobotDataset(case["repo_id"], root, delta_timestamps=deltas(case))
    mesh = sharding.make_mesh()
    split = sharding.batch_sharding(mesh, case["batch"])
    keys = [*dataset.cameras, "observation.state", "action", "action_is_pad"]
    if side != "cold":
        dataset.cache_frames(budget_gb=50)
    rows = np.arange(len(dataset))
    if side == "device":
        samples = DeviceRows(dataset, rows, keys, 0, sharding.replicated(mesh), split)
    else:
        samples = ShuffledRows(dataset, rows, keys, 0)
    batches = loader.training_batches(samples, case["batch"], num_workers=workers)
    return loader.prefetch_to_device(batches, sharding.BatchPlacement.of(split, case["batch"]))


def open_lerobot(case: dict[str, Any], root: str, workers: int) -> Iterator[Any]:
    """Give stock LeRobot's batches, as `lerobot_train.train` reads them."""
    import torch  # pyright: ignore[reportMissingImports]
    from lerobot.datasets import EpisodeAwareSampler, LeRobotDataset  # pyright: ignore[reportMissingImports]

    dataset = LeRobotDataset(case["repo_id"], root=root, delta_timestamps=deltas(case), return_uint8=True)
    episodes = dataset.meta.episodes
    sampler = EpisodeAwareSampler(
        episodes["dataset_from_index"], episodes["dataset_to_index"], shuffle=True, seed=0
    )
    batches = torch.utils.data.DataLoader(
        dataset,
        num_workers=workers,
        batch_size=case["batch"],
        sampler=sampler,
        drop_last=False,
        prefetch_factor=4,
        persistent_workers=True,
    )
    while True:
        yield from batches


def processor_seconds() -> float:
    """Sum the processor time of this process and of those that it has started."""
    ticks = 0
    for pid in _family():
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
        ticks += int(fields[11]) + int(fields[12])
    return ticks / os.sysconf("SC_CLK_TCK")


def anonymous_bytes() -> int:
    """Sum the memory of these processes that is no page cache; what they share counts once."""
    total = 0
    for pid in _family():
        lines = Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()
        sizes = {line.split()[0]: int(line.split()[1]) * 1024 for line in lines[1:]}
        total += sizes.get("Pss_Anon:", 0) + sizes.get("Pss_Shmem:", 0)
    return total


def _family() -> list[int]:
    me = os.getpid()
    children = Path(f"/proc/{me}/task/{me}/children").read_text().split()
    return [me, *map(int, children)]


def measure(side: str, case: dict[str, Any], root: str, workers: int, seconds: float) -> dict[str, float]:
    started = time.perf_counter()
    if side == "lerobot":
        batches, wait_for = open_lerobot(case, root, workers), id
    else:
        import jax

        batches, wait_for = open_ours(case, root, side, workers), jax.block_until_ready
    wait_for(next(batches))
    first = time.perf_counter() - started
    for _ in range(8):  # what was read ahead does not count
        next(batches)
    num, begun, spent = 0, time.perf_counter(), processor_seconds()
    while time.perf_counter() - begun < seconds:
        wait_for(next(batches))
        num += case["batch"]
    wall, cpu = time.perf_counter() - begun, processor_seconds() - spent
    memory = anonymous_bytes()
    idle, begun = 0.0, time.perf_counter()
    until = now = begun  # the accelerator is at work until then
    while now - begun < seconds:
        idle += max(0.0, now - until)
        before, until = until, max(now, until) + STEP_S
        if side == "lerobot":
            sleep_until(until)
            next(batches)
        else:
            wait_for(next(batches))
            sleep_until(before)
        now = time.perf_counter()
    return {
        "samples_per_s": num / wall,
        "samples_per_cpu_s": num / max(cpu, 1e-2),
        "first_s": first,
        "memory_gb": memory / 1e9,
        "data_wait": idle / (now - begun),
    }


def sleep_until(moment: float) -> None:
    time.sleep(max(0.0, moment - time.perf_counter()))


def print_table(name: str, case: dict[str, Any], found: dict[str, list[dict[str, float]]]) -> None:
    print(f"\n{name}, batches of {case['batch']} (medians; in brackets: ratio to lerobot)")
    print(f"{'':8} {'samples/s':>18} {'per CPU s':>18} {'first batch':>12} {'memory':>9} {'data wait':>10}")
    medians = {side: {k: np.median([r[k] for r in runs]) for k in runs[0]} for side, runs in found.items()}
    for side, m in medians.items():
        speed, per_cpu = (
            f"{m[k]:9.0f} ({m[k] / medians['lerobot'][k]:5.1f}x)"
            for k in ("samples_per_s", "samples_per_cpu_s")
        )
        rest = f"{m['first_s']:10.1f} s {m['memory_gb']:6.2f} GB {m['data_wait']:10.1%}"
        print(f"{side:8} {speed:>18} {per_cpu:>18} {rest}")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--lerobot_python", help="the Python of an environment with lerobot==0.6.1")
    parser.add_argument("--rounds", type=int, default=3, help="turns of each side (default: %(default)s)")
    parser.add_argument(
        "--seconds", type=float, default=10, help="of each measurement (default: %(default)s)"
    )
    parser.add_argument("--workers", type=int, default=os.cpu_count(), help="default: %(default)s")
    parser.add_argument("--case", choices=CASES, action="append", help="default: all")
    parser.add_argument("--measure", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.measure:
        side, name, root, answer = json.loads(args.measure)
        result = measure(side, CASES[name], root, args.workers, args.seconds)
        os.write(answer, json.dumps(result).encode())
        os._exit(0)  # without waiting for workers
    if not args.lerobot_python:
        parser.error("--lerobot_python is needed: the Python of an environment with lerobot==0.6.1")

    from lerobot_jax import hub
    from lerobot_jax.envs.demonstrations import make_builtin_dataset

    with tempfile.TemporaryDirectory() as folder:
        for name in args.case or CASES:
            case = CASES[name]
            root = Path(folder) / "arm"
            if case["repo_id"].startswith("builtin/"):
                make_builtin_dataset(case["repo_id"])
                root = hub.lerobot_home() / case["repo_id"]
            elif not root.exists():
                make_arm_dataset(root)
            found: dict[str, list[dict[str, float]]] = {side: [] for side in SIDES}
            for _ in range(args.rounds):
                for side in SIDES:
                    python = args.lerobot_python if side == "lerobot" else sys.executable
                    found[side].append(run(python, [side, name, str(root)], args))
            print_table(name, case, found)


def run(python: str, what: list[str], args: argparse.Namespace) -> dict[str, float]:
    """Measure one side in a process of its own."""
    read, write = os.pipe()
    arguments = [
        f"--measure={json.dumps([*what, write])}",
        f"--workers={args.workers}",
        f"--seconds={args.seconds}",
    ]
    with subprocess.Popen([python, __file__, *arguments], stdout=sys.stderr, pass_fds=[write]) as process:
        os.close(write)
        with os.fdopen(read) as answer:
            text = answer.read()
    if process.returncode or not text:
        raise SystemExit(f"{what} failed: see above")
    return json.loads(text)


if __name__ == "__main__":
    main()
