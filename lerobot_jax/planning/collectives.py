"""What devices send to each other in a step: found in the compiled program, by kind and by axis of the mesh."""

import dataclasses
import math
import re
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence

import numpy as np

from lerobot_jax.planning.hlo import Instruction, Module, Run, number_types, shape_bytes

KINDS = (
    "all-gather",
    "all-reduce",
    "reduce-scatter",
    "all-to-all",
    "ragged-all-to-all",
    "collective-permute",
)
BETWEEN_SLICES = "network"
INSIDE = "links"


@dataclasses.dataclass(frozen=True)
class Collective:
    """A collective operation, as each device sees it.

    Attributes:
        kind: one of `KINDS`.
        axes: of the mesh, along which devices exchange; ("?",) if that cannot be told.
        link: `INSIDE` a slice or host, or `BETWEEN_SLICES`.
        dtype: the type of number that travels.
        size: bytes of the whole array: after a gather, before a reduction.
        sent: bytes that a device sends through that link, by the usual ring algorithms.
        times: how often in a step.
        name: where it comes from in the Python program.
    """

    kind: str
    axes: tuple[str, ...]
    link: str
    dtype: str
    size: int
    sent: float
    times: int
    name: str


def find_collectives(
    module: Module, mesh_shape: Mapping[str, int], num_slices: int = 1, *, is_one_slice: bool = False
) -> list[Collective]:
    """List the collectives of a compiled program.

    Args:
        module: the program.
        mesh_shape: axis -> number of devices; slices, or hosts, lie along the first.
        num_slices: groups of devices that a network connects.
        is_one_slice: whether the program is written for the devices of one slice, which sends to others as to
            something outside (TPUs).
    """
    shape = dict(mesh_shape)
    if is_one_slice:
        first = next(iter(shape))
        shape[first] //= num_slices
    found: dict[tuple[str, str], Collective] = {}
    for run in module.runs():
        kind = _kind(run)
        if kind is None:
            continue
        if run.instruction.opcode == "send":
            collective = _between_slices(module, run, kind, num_slices, next(iter(shape)))
        else:
            collective = _of_devices(module, run, kind, shape, 1 if is_one_slice else num_slices)
        # One operation can be written in several places: where it starts, goes on and ends.
        channel = run.instruction.attribute(r"channel_id=(\d+)") or run.instruction.name
        key = (kind if run.instruction.opcode != "send" else "send", channel)
        if key not in found or found[key].times < collective.times:
            found[key] = collective
    return [each for each in found.values() if each.sent]


def _kind(run: Run) -> str | None:
    instruction = run.instruction
    if instruction.opcode == "send":
        kind = instruction.attribute(r'_xla_megascale_transfer_type="(\w+)"')
        return kind.lower().replace("_", "-") if kind else None
    kind = instruction.opcode.removesuffix("-start")
    if kind not in KINDS:
        return None
    # On TPUs, a reduction of which each device keeps a part is called so.
    return "reduce-scatter" if run.computation.startswith("all-reduce-scatter") else kind


def _of_devices(
    module: Module, run: Run, kind: str, mesh_shape: Mapping[str, int], num_slices: int
) -> Collective:
    given, dtype = _operands(module, run)
    groups = _groups(run.instruction, math.prod(mesh_shape.values()))
    axes, group_size, slices = ("?",), math.prod(mesh_shape.values()), 1
    if groups is not None:
        coordinates = np.stack(np.unravel_index(groups, tuple(mesh_shape.values())), axis=-1)
        varies = np.any(coordinates != coordinates[:, :1], axis=(0, 1))
        axes = tuple(axis for axis, each in zip(mesh_shape, varies, strict=True) if each)
        group_size = groups.shape[1]
        of_slice = groups // (math.prod(mesh_shape.values()) // num_slices)
        slices = max(len(set(row)) for row in of_slice.tolist())
    size = given * group_size if kind == "all-gather" else given
    # Between slices: first inside each, so that every device has a part for the network.
    share, members = (group_size // slices, slices) if slices > 1 else (1, group_size)
    sent = _sent(kind, given / share, members)
    link = BETWEEN_SLICES if slices > 1 else INSIDE
    return Collective(kind, axes, link, dtype, size, sent, run.times, _origin(run.instruction))


def _between_slices(module: Module, run: Run, kind: str, num_slices: int, axis: str) -> Collective:
    given, dtype = _operands(module, run)
    sent = _sent(kind, given, num_slices)
    return Collective(kind, (axis,), BETWEEN_SLICES, dtype, given, sent, run.times, _origin(run.instruction))


def _operands(module: Module, run: Run) -> tuple[int, str]:
    known = module.computations[run.computation]
    shapes = [known[name].shape for name in run.instruction.operands if name in known]
    if run.instruction.opcode == "send":
        shapes = shapes[:1]  # the other is the order of things
    return sum(map(shape_bytes, shapes)), next(iter(number_types(" ".join(shapes))), "?")


def _sent(kind: str, given: float, size: int) -> float:
    """Tell how many of its bytes a device of a group of some size sends."""
    if kind == "all-gather":
        return given * (size - 1)
    if kind == "all-reduce":
        return 2 * given * (size - 1) / size
    if kind == "collective-permute":
        return given
    return given * (size - 1) / size


def _groups(instruction: Instruction, num_devices: int) -> np.ndarray | None:
    """Give the groups of devices that exchange, one a row; None if they are written in an unknown way."""
    pairs = instruction.attribute(r"source_target_pairs=\{(\{[\d,{}]*\})\}")
    if pairs is not None:
        return np.array([_numbers(pair) for pair in re.findall(r"\{([\d,]+)\}", pairs)])
    lists = instruction.attribute(r"replica_groups=\{((?:\{[\d,]+\},?)+)\}")
    if lists is not None:
        rows = [_numbers(row) for row in re.findall(r"\{([\d,]+)\}", lists)]
        return np.array(rows) if len({len(row) for row in rows}) == 1 else None
    if "replica_groups={}" in instruction.attributes:
        return np.arange(num_devices)[None]
    iota = re.search(r"replica_groups=\[([\d,]+)\]<=\[([\d,]+)\](?:T\(([\d,]+)\))?", instruction.attributes)
    if iota is not None:
        ids = np.arange(num_devices).reshape(_numbers(iota[2]))
        ids = ids.transpose(_numbers(iota[3])) if iota[3] else ids
        return ids.reshape(_numbers(iota[1]))
    return _groups_of_mesh(instruction.attributes, num_devices)


def _groups_of_mesh(attributes: str, num_devices: int) -> np.ndarray | None:
    """Read `mesh['a'=2,'b'=4], device_ids=([4,2]T(1,0)) {'b'}`: groups along named axes of some mesh."""
    found = re.search(
        r"replica_groups=mesh\[([^\]]*)\](?:, device_ids=\(\[([\d,]+)\](?:T\(([\d,]+)\))?\))? \{([^}:]*)\}",
        attributes,
    )
    if found is None:
        return None
    sizes = {name: int(size) for name, size in re.findall(r"'(\w+)'=(\d+)", found[1])}
    chosen = re.findall(r"'(\w+)'", found[4])
    if math.prod(sizes.values()) != num_devices:
        return None
    ids = np.arange(num_devices)
    if found[3]:
        ids = ids.reshape(_numbers(found[2])).transpose(_numbers(found[3]))
    kept = [name for name in sizes if name not in chosen]
    order = [list(sizes).index(name) for name in (*kept, *chosen)]
    group_size = math.prod(sizes[name] for name in chosen)
    return ids.reshape(tuple(sizes.values())).transpose(order).reshape(-1, group_size)


def _numbers(text: str) -> list[int]:
    return [int(number) for number in text.split(",")]


def _origin(instruction: Instruction) -> str:
    return instruction.attribute(r'op_name="([^"]*)"') or ""


@dataclasses.dataclass(frozen=True)
class Total:
    """Collectives of one kind along the same axes: places in the program, runs, bytes a step on each device."""

    kind: str
    axes: tuple[str, ...]
    link: str
    sites: int
    runs: int
    size: int
    sent: float


def totals(collectives: Iterable[Collective]) -> list[Total]:
    """Sum up collectives by kind, axes and link, the most bytes first."""
    grouped: dict[tuple[str, tuple[str, ...], str], list[Collective]] = defaultdict(list)
    for each in collectives:
        grouped[each.kind, each.axes, each.link].append(each)
    result = [Total(*key, *_sums(members)) for key, members in grouped.items()]
    return sorted(result, key=lambda total: -total.sent)


def _sums(members: Sequence[Collective]) -> tuple[int, int, int, float]:
    runs = sum(each.times for each in members)
    size = sum(each.size * each.times for each in members)
    return len(members), runs, size, sum(each.sent * each.times for each in members)
