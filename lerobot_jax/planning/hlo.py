"""Read the text of a compiled program (HLO): its instructions, and how often each of them runs."""

import dataclasses
import math
import re
from collections.abc import Iterator

_BITS = {"pred": 8, "s4": 4, "u4": 4, "bf16": 16, "c64": 64, "c128": 128, "token": 0, "opaque": 0}
_ARRAY = re.compile(r"\b([a-z]\w*)\[([\d,]*)\](\{[^{}]*\})?")
_NAME = re.compile(r"%([\w.\-]+)")
_CALLED = re.compile(r"(?:calls|to_apply|called_computations|branch_computations)=\{?((?:%[\w.\-]+(?:, )?)+)")
_LAYOUT_SPACE = re.compile(r"S\(([1-9])\)")
# What their computations do is not a step of its own.
_REDUCING = {"all-reduce", "all-reduce-start", "reduce", "reduce-scatter", "reduce-window", "scatter", "sort"}
_REDUCING |= {"select-and-scatter", "map"}


@dataclasses.dataclass(frozen=True)
class Instruction:
    """One line: `name = shape opcode(operands), attributes`."""

    name: str
    shape: str
    opcode: str
    operands: tuple[str, ...]
    attributes: str

    def attribute(self, pattern: str) -> str | None:
        """Find the first group of a regular expression in the attributes."""
        found = re.search(pattern, self.attributes)
        return found[1] if found else None

    @property
    def called(self) -> tuple[str, ...]:
        """The computations that it calls, other than a loop's."""
        return tuple(name for names in _CALLED.findall(self.attributes) for name in _NAME.findall(names))


@dataclasses.dataclass(frozen=True)
class Run:
    """An instruction that runs.

    Attributes:
        instruction: which.
        computation: the name of the computation that it is in.
        times: how often it runs in one run of the program.
        is_fused: whether it is a part of another instruction, a fusion.
    """

    instruction: Instruction
    computation: str
    times: int
    is_fused: bool


class Module:
    """A compiled program: computation -> name -> instruction, and which computation it begins with."""

    def __init__(self, text: str):
        self.computations: dict[str, dict[str, Instruction]] = {}
        self.entry = ""
        current: dict[str, Instruction] = {}
        for line in text.splitlines():
            if not line.startswith(" "):
                head = re.match(r"(ENTRY )?%?([\w.\-]+) \(.*\{\s*$", line)
                if head:
                    current = self.computations.setdefault(head[2], {})
                    self.entry = head[2] if head[1] else self.entry
            elif (instruction := _parse(line)) is not None:
                current[instruction.name] = instruction

    def runs(self) -> Iterator[Run]:
        """Give all instructions that run, those of loops once with the number of turns."""
        yield from self._runs_of(self.entry, 1, is_fused=False)

    def _runs_of(self, computation: str, times: int, *, is_fused: bool) -> Iterator[Run]:
        for each in self.computations[computation].values():
            yield Run(each, computation, times, is_fused)
            if each.opcode == "while":
                body, condition = (
                    each.attribute(r"body=%([\w.\-]+)"),
                    each.attribute(r"condition=%([\w.\-]+)"),
                )
                assert body is not None
                assert condition is not None
                turns = each.attribute(r'known_trip_count.*?"n":"(\d+)"')
                turns = int(turns) if turns else self._turns(condition)
                yield from self._runs_of(body, times * turns, is_fused=is_fused)
            elif each.opcode not in _REDUCING:
                for name in each.called:
                    inside = is_fused or each.opcode == "fusion"
                    yield from self._runs_of(name, times, is_fused=inside)

    def _turns(self, condition: str) -> int:
        """Tell how often a loop runs that counts from 0: to the constant in its condition."""
        constants = [1]
        for each in self.computations[condition].values():
            if each.opcode == "constant" and re.match(r"[su]\d+\[\]", each.shape):
                constants += [int(value) for value in re.findall(r"^\d+$", "".join(each.operands))]
            constants += [self._turns(name) for name in each.called if name in self.computations]
        return max(constants)


def _parse(line: str) -> Instruction | None:
    head = re.match(r"\s+(?:ROOT )?%?([\w.\-]+) = ", line)
    if head is None:
        return None
    rest = line[head.end() :]
    end = _closing(rest) if rest.startswith("(") else rest.index(" ")
    shape, rest = rest[:end], rest[end:].lstrip()
    opcode, _, _ = rest.partition("(")
    rest = rest[len(opcode) :]
    end = _closing(rest)
    inside = rest[1 : end - 1]
    operands = (inside,) if opcode in ("constant", "parameter") else tuple(_NAME.findall(inside))
    return Instruction(head[1], shape, opcode, operands, rest[end:])


def _closing(text: str) -> int:
    """Find the end of the parenthesis that a text begins with."""
    depth = 0
    for found in re.finditer(r"[()]", text):
        depth += 1 if found[0] == "(" else -1
        if depth == 0:
            return found.end()
    return len(text)


def shape_bytes(shape: str, *, main_memory_only: bool = False) -> int:
    """Count the bytes of an array, or of a tuple of arrays.

    Args:
        shape: as HLO writes it.
        main_memory_only: leave out what the compiler keeps on the chip.
    """
    total = 0
    for kind, sizes, layout in _ARRAY.findall(shape):
        if main_memory_only and _LAYOUT_SPACE.search(layout):
            continue
        total += math.prod(int(size) for size in sizes.split(",") if size) * _bits(kind) // 8
    return total


def number_types(shape: str) -> list[str]:
    """List the types of number in a shape, the largest array's first."""
    arrays = sorted(_ARRAY.findall(shape), key=lambda found: -shape_bytes(f"{found[0]}[{found[1]}]"))
    return list(dict.fromkeys(kind for kind, _, _ in arrays))


def _bits(kind: str) -> int:
    if kind in _BITS:
        return _BITS[kind]
    digits = re.match(r"[a-z]+(\d+)", kind)
    return int(digits[1]) if digits else 0
