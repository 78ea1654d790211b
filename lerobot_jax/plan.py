"""Plan a run for hardware that is not here: does it fit, what does a step cost, how large can a batch be?

    python -m lerobot_jax.plan --config=configs/act_pusht.py --topology=v5e:4x4 --config.mesh.fsdp=4

The real train step is compiled for that hardware by its own compiler, for which none of the hardware is needed:
for TPUs `pip install 'lerobot_jax[plan]'`, for GPUs JAX's CUDA plugin. No frame and no weight is read. Printed are
the memory that each device needs, operations, memory traffic, collectives, arrays that are not divided, and what
follows from these; everything that is derived from peak speeds is called an estimate.

Topologies: v5e:16x16, v6e:AxB, v4:AxBxC, v5p:AxBxC, tpu7x:AxBxC; 2xv5e:16x16 (two slices); Google Cloud's names
such as v5litepod-256; gpu:8xH200 (A100, H100, H200, B200), gpu:4x8xH200 (four hosts); cpu:8.

Exit code 0: it fits; 2: it does not, and the report says by how much and what would help; 1: something is wrong
with what was given. The same plan is compiled once: its numbers are kept in the cache folder.
"""

import dataclasses
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from absl import logging

from lerobot_jax.config import TrainConfig, load_config, parse
from lerobot_jax.errors import InputError, reported_on_one_line, writing
from lerobot_jax.files import write_json
from lerobot_jax.logs import setup_logging
from lerobot_jax.planning.advice import advise
from lerobot_jax.planning.batch_search import MAX_COMPILATIONS, find_largest_batch
from lerobot_jax.planning.compiler_process import CompilerProcess
from lerobot_jax.planning.estimates import roofline
from lerobot_jax.planning.hardware import Topology, parse_topology
from lerobot_jax.planning.report import write_report
from lerobot_jax.progress import progress_bar

DOES_NOT_FIT = 2


@dataclasses.dataclass(frozen=True)
class PlanConfig:
    """What to plan, besides the run."""

    topology: str = ""
    """The hardware, e.g. v5e:16x16, gpu:8xH200 or cpu:8."""
    largest_batch: bool = True
    """Search for the largest batch that fits, by up to eight more compilations."""
    json: str | None = None
    """Write all numbers to this file too."""


def main(argv: Sequence[str]) -> None:
    run_args, own_args = split_arguments(argv)
    options = parse(PlanConfig, PlanConfig(), own_args, "lerobot_jax.plan", __doc__ or "")
    if not options.topology:
        raise InputError("--topology is missing, e.g. --topology=v5e:16x16; --help lists what there is")
    topology, config = parse_topology(options.topology), load_config(run_args)
    plan = make_plan(run_args, config, topology, with_largest_batch=options.largest_batch)
    print(write_report(plan))
    if options.json is not None:
        path = Path(options.json)
        with writing(path):
            write_json(plan, path)
    if not plan["fits"]:
        sys.exit(DOES_NOT_FIT)


def split_arguments(argv: Sequence[str]) -> tuple[list[str], list[str]]:
    """Divide a command line into what is about the run, `--config...`, and the rest."""
    run, own = [], []
    rest = iter(argv)
    for argument in rest:
        is_of_run = argument == "--config" or argument.startswith(("--config=", "--config."))
        chosen = run if is_of_run else own
        chosen.append(argument)
        if is_of_run and "=" not in argument:
            chosen.extend(each for each in [next(rest, None)] if each is not None)
    return run, own


def make_plan(
    run_args: Sequence[str], config: TrainConfig, topology: Topology, *, with_largest_batch: bool
) -> dict[str, Any]:
    """Compile the train step of a run for some hardware, and give all numbers.

    Args:
        run_args: the run's command line.
        config: what it says.
        topology: the hardware.
        with_largest_batch: whether to search for the largest batch.

    Raises:
        InputError: when the run cannot be on this hardware, or a compiler is not installed.
    """
    logging.info("compiling the train step for %s; a large one takes a minute", topology.name)
    with CompilerProcess(run_args, topology) as compiler:
        found = compiler.measure(config.batch_size)
        largest = None
        if with_largest_batch:
            with progress_bar("largest batch", MAX_COMPILATIONS, "compilation") as bar:

                def show(tried: dict[str, Any]) -> None:
                    fits = tried["memory"]["peak"] <= topology.memory
                    bar.set_postfix({"batch": tried["batch_size"], "fits": fits}, refresh=False)
                    bar.update()

                largest = find_largest_batch(compiler.measure, found, topology.memory, show)
    plan = {
        "run": str(config.name),
        "policy": config.policy.type,
        "topology": topology.name,
        "platform": topology.platform,
        "hardware": topology.chip.name if topology.chip else "virtual device",
        "num_devices": topology.num_devices,
        "num_slices": topology.num_slices,
        "gradient_accumulation_steps": config.gradient_accumulation_steps,
        "num_seeds": config.num_seeds,
        "largest_batch": largest,
        **compiler.description,
        **found,
    }
    plan["fits"] = found["memory"]["peak"] <= topology.memory
    plan["estimates"] = _estimate(topology, plan)
    settings = {
        # Deep stacks compute their layers again unless they are told not to.
        "remat": config.remat or ("full" if plan["flops"] != plan["flops_once"] else None),
        "batch_size": config.batch_size,
        "gradient_accumulation_steps": config.gradient_accumulation_steps,
    }
    limit = largest["batch_size"] if largest else None
    plan["advice"] = [] if plan["fits"] else advise(settings, plan, limit)
    return plan


def _estimate(topology: Topology, plan: dict[str, Any]) -> dict[str, Any] | None:
    """Give the roofline; None for hardware of unknown speed, or when there is no compiled program."""
    if topology.chip is None or "collectives" not in plan:
        return None
    found = roofline(
        topology.chip,
        topology.num_devices,
        plan["flops"],
        plan["flops_once"],
        plan["bytes_accessed"],
        plan["collectives"],
        plan["samples_per_step"],
    )
    return dataclasses.asdict(found) | {"step": found.step, "bound": found.bound}


if __name__ == "__main__":
    setup_logging()
    with reported_on_one_line():
        main(sys.argv[1:])
