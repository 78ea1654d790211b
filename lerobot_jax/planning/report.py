"""A plan for people: what a step needs, what it costs, and whether it fits."""

from collections.abc import Mapping, Sequence
from typing import Any

from lerobot_jax.planning.collectives import BETWEEN_SLICES
from lerobot_jax.planning.units import bytes_text, count_text, seconds_text

LIMIT_NAMES = {"compute": "compute", "memory": "memory traffic", "links": "links", "network": "network"}
SHOWN = 8  # lines of a list that can be long


def write_report(plan: Mapping[str, Any]) -> str:
    """Give the report of a plan, as `plan.make_plan` makes it."""
    sections = [_head(plan), _memory(plan)]
    if plan["replicated"]:
        sections.append(_replicated(plan))
    sections.append(_work(plan))
    if plan.get("collectives"):
        sections.append(_collectives(plan))
    if plan["estimates"] is not None:
        sections.append(_estimates(plan))
    sections.append(_verdict(plan))
    return "\n\n".join("\n".join(lines) for lines in sections)


def _head(plan: Mapping[str, Any]) -> list[str]:
    mesh = " x ".join(f"{axis} {size}" for axis, size in plan["mesh"].items() if size > 1) or "one device"
    slices = {"tpu": "slices", "gpu": "hosts"}.get(plan["platform"], "")
    several = f" in {plan['num_slices']} {slices}" if plan["num_slices"] > 1 else ""
    params = count_text(plan["num_parameters"])
    if plan["num_trained_parameters"] != plan["num_parameters"]:
        params += f" ({count_text(plan['num_trained_parameters'])} trained)"
    accumulation = plan["gradient_accumulation_steps"]
    times = f", {accumulation} times a step" if accumulation > 1 else ""
    seeds = f", {plan['num_seeds']} seeds" if plan["num_seeds"] > 1 else ""
    return [
        f"{plan['run']} on {plan['topology']}: {plan['num_devices']} x {plan['hardware']}{several}",
        f"{plan['policy']} with {params} parameters; mesh: {mesh}; batch {plan['batch_size']}{times}{seeds}",
    ]


def _memory(plan: Mapping[str, Any]) -> list[str]:
    memory = plan["memory"]
    rows = [[name, bytes_text(size)] for name, size in memory["parts"].items() if size]
    rows.append(["activations, gradients, buffers", bytes_text(memory["temporaries"])])
    share = f"{memory['peak'] / memory['limit']:.0%} of {bytes_text(memory['limit'])}"
    name = "all at once, at most" if memory["is_bound"] else "peak"
    rows.append([name, bytes_text(memory["peak"]), share])
    if memory["is_bound"]:
        rows.append(
            [
                "(processors compute in float32 and share this machine's memory: TPU's and GPU's plans say more)"
            ]
        )
    return ["Memory of a device", *_table(rows)]


def _replicated(plan: Mapping[str, Any]) -> list[str]:
    total = sum(entry["bytes"] for entry in plan["replicated"])
    rows = [
        [entry["name"], "x".join(map(str, entry["shape"])), bytes_text(entry["bytes"])]
        for entry in plan["replicated"][:SHOWN]
    ]
    if len(plan["replicated"]) > SHOWN:
        rows.append([f"and {len(plan['replicated']) - SHOWN} more"])
    why = "no axis can be divided, or a layer has fewer numbers than mesh.min_shard_size"
    return [f"Whole on every device: {bytes_text(total)} in arrays above 1 MiB ({why})", *_table(rows)]


def _work(plan: Mapping[str, Any]) -> list[str]:
    num = plan["num_devices"]
    rows = [["", "all devices", "each"]]
    for kind, count in plan["flops"].items():
        rows.append([f"products of {kind}", count_text(count, "FLOP"), count_text(count / num, "FLOP")])
    again = sum(plan["flops"].values()) - sum(plan["flops_once"].values())
    if again > 0:
        rows.append(["of these computed again", count_text(again, "FLOP"), count_text(again / num, "FLOP")])
    if "bytes_accessed" in plan:
        traffic = plan["bytes_accessed"]
        rows.append(
            ["memory traffic (from the program)", count_text(traffic * num, "B"), count_text(traffic, "B")]
        )
    return ["Work of a step", *_table(rows)]


def _collectives(plan: Mapping[str, Any]) -> list[str]:
    rows = [["", "along", "through", "times", "arrays", "sent by each"]]
    for each in plan["collectives"]:
        link = _link_name(plan["platform"], each["link"])
        size, sent = count_text(each["size"], "B"), count_text(each["sent"], "B")
        rows.append([each["kind"], " x ".join(each["axes"]), link, str(each["runs"]), size, sent])
    return ["Collectives of a step", *_table(rows)]


def _link_name(platform: str, link: str) -> str:
    if link == BETWEEN_SLICES:
        return "network"
    return {"tpu": "ICI", "gpu": "NVLink", "cpu": "memory"}[platform]


def _estimates(plan: Mapping[str, Any]) -> list[str]:
    estimates = plan["estimates"]
    seconds, bound = estimates["seconds"], LIMIT_NAMES[estimates["bound"]]
    parts = [f"{LIMIT_NAMES[name]} {seconds_text(value)}" for name, value in seconds.items() if value]
    samples = count_text(estimates["samples_per_second"])
    return [
        "Estimates (bounds at the maker's peak speeds, everything overlapping; no step was run)",
        f"  {', '.join(parts)}",
        f"  a step takes at least {seconds_text(estimates['step'])}, bound by {bound}",
        f"  at most {samples} samples/s, MFU at most {estimates['mfu']:.0%}",
    ]


def _verdict(plan: Mapping[str, Any]) -> list[str]:
    memory, largest = plan["memory"], plan["largest_batch"]
    lines = []
    if not plan["fits"]:
        missing = bytes_text(memory["peak"] - memory["limit"])
        lines.append(f"It does not fit: each device lacks {missing}. What would help, most first:")
        lines += [f"  {text}" for text in plan["advice"]]
    else:
        lines.append(f"It fits, with {bytes_text(memory['limit'] - memory['peak'])} to spare on each device.")
        if memory["peak"] > 0.9 * memory["limit"]:
            lines.append("  That is little: a compiler that optimizes in earnest takes 3 to 6 % more.")
    if largest is not None:
        if largest["batch_size"]:
            least = "" if largest["is_exact"] else "at least "
            lines.append(
                f"Largest batch that leaves 10 % free: {least}{largest['batch_size']} (peak "
                f"{bytes_text(largest['peak'])}; found by {largest['compilations']} compilations)"
            )
        else:
            lines.append(f"Not even a batch of {plan['batch_unit']} leaves 10 % free.")
    return lines


def _table(rows: Sequence[Sequence[str]]) -> list[str]:
    """Align columns: the first and words to the left, numbers to the right."""
    full = [row for row in rows if len(row) > 1]
    widths = [max(len(row[i]) for row in full if i < len(row)) for i in range(max(map(len, full), default=1))]
    lines = []
    for row in rows:
        if len(row) == 1:
            lines.append(f"  {row[0]}")
            continue
        cells = [
            cell.ljust(width) if i == 0 or not _is_number(rows, i) else cell.rjust(width)
            for i, (cell, width) in enumerate(zip(row, widths, strict=False))
        ]
        lines.append(f"  {'  '.join(cells)}".rstrip())
    return lines


def _is_number(rows: Sequence[Sequence[str]], column: int) -> bool:
    return all(row[column][:1].isdigit() for row in rows[1:] if len(row) > column)
