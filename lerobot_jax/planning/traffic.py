"""Bytes that a compiled program reads from and writes to a device's memory, loops counted as often as they run.

Every instruction reads its operands and writes its result, a fusion as a whole; of an array of which it takes a
slice only that counts, and of one that it changes in place only the change. What the compiler keeps on the chip
does not count.
"""

import re
from collections.abc import Mapping

from lerobot_jax.planning.hlo import Instruction, Module, shape_bytes

# They name, order or call; those that are "done" were counted at their start.
_FREE = {
    "parameter",
    "constant",
    "tuple",
    "get-tuple-element",
    "bitcast",
    "while",
    "conditional",
    "call",
    "iota",
}
_FREE |= {
    "after-all",
    "partition-id",
    "replica-id",
    "opt-barrier",
    "domain",
    "async-update",
    "add-dependency",
}
_ROOM = re.compile(r"\bs8\[(\d+)\]")
_SLICES = {"dynamic-slice", "slice", "gather"}


def bytes_accessed(module: Module) -> int:
    """Count the bytes of one run of a program on each device."""
    total = 0
    for run in module.runs():
        instruction = run.instruction
        if run.is_fused or instruction.opcode in _FREE or instruction.opcode.endswith("-done"):
            continue
        total += run.times * _bytes_of(instruction, module, module.computations[run.computation])
    return total


def _bytes_of(instruction: Instruction, module: Module, known: Mapping[str, Instruction]) -> int:
    read = [_size(known[name]) if name in known else 0 for name in instruction.operands]
    written = _size(instruction)
    if instruction.opcode == "custom-call":  # on GPUs, room to work in comes as a part of the result
        written -= sum(map(int, _ROOM.findall(instruction.shape)))
    if instruction.opcode in _SLICES:
        return 2 * written
    if instruction.opcode == "dynamic-update-slice":
        return 2 * read[1]
    if instruction.opcode == "fusion" and instruction.called:
        inside = module.computations[instruction.called[0]]
        parameters = [each for each in inside.values() if each.opcode == "parameter"]
        for each in parameters:
            i = int(each.operands[0])
            if i < len(read):
                read[i] = min(read[i], _bytes_used(each, inside))
        written = min(written, _bytes_changed(list(inside.values())[-1], inside))
    return sum(read) + written


def _bytes_used(parameter: Instruction, inside: Mapping[str, Instruction]) -> int:
    """Tell how much of a fusion's operand it reads."""
    total = 0
    for user in (each for each in inside.values() if parameter.name in each.operands):
        if user.opcode in _SLICES and user.operands[0] == parameter.name:
            total += shape_bytes(user.shape)
        elif user.opcode != "dynamic-update-slice" or user.operands[0] != parameter.name:
            return _size(parameter)
    return total


def _bytes_changed(root: Instruction, inside: Mapping[str, Instruction]) -> int:
    """Tell how much of a fusion's result it writes, if it changes an operand in place."""
    while root.opcode == "bitcast" and root.operands[0] in inside:
        root = inside[root.operands[0]]
    if root.opcode == "dynamic-update-slice" and root.operands[1] in inside:
        return shape_bytes(inside[root.operands[1]].shape)
    return _size(root)


def _size(instruction: Instruction) -> int:
    return shape_bytes(instruction.shape, main_memory_only=True)
