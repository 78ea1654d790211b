"""What to change in a run that does not fit."""

from collections.abc import Mapping
from typing import Any

from lerobot_jax.planning.units import bytes_text

STATE = ("parameters", "optimizer", "EMA", "frozen parameters")


def advise(settings: Mapping[str, Any], plan: Mapping[str, Any], largest: int | None) -> list[str]:
    """Name the settings that save memory, those that save most first.

    Args:
        settings: the run's: `remat`, `batch_size`, `gradient_accumulation_steps`, `optimizer` (its type).
        plan: what was found: `memory`, `mesh`, `batch_unit`.
        largest: the largest batch that fits; None if that is not known.
    """
    memory, mesh = plan["memory"], plan["mesh"]
    saved: list[tuple[float, str]] = []
    state = sum(memory["parts"].get(name, 0) for name in STATE)
    if mesh["data"] > 1:
        fsdp = mesh["fsdp"] * mesh["data"]
        text = (
            f"--config.mesh.fsdp={fsdp}: the train state, {bytes_text(state)} on each device, is divided by up to "
            f"{mesh['data']} more"
        )
        saved.append((state * (1 - 1 / mesh["data"]), text))
    activations = memory["temporaries"]
    if settings["remat"] != "full":
        text = (
            f"--config.remat=full: keeps the inputs of blocks of layers only, of {bytes_text(activations)} of "
            "activations; a step computes up to a third more"
        )
        saved.append((activations / 2, text))
    if settings["batch_size"] > plan["batch_unit"]:
        saved.append(_smaller_batches(settings, plan, largest))
    optimizer = memory["parts"].get("optimizer", 0)
    if optimizer > 1.5 * memory["parts"].get("parameters", 0):
        text = (
            f"--config.optimizer.type=adafactor: factored second moments and no first ones, instead of "
            f"{bytes_text(optimizer)}"
        )
        saved.append((optimizer * 0.9, text))
    if memory["parts"].get("EMA"):
        text = f"--config.ema_decay=None: no average of the weights, {bytes_text(memory['parts']['EMA'])}"
        saved.append((memory["parts"]["EMA"], text))
    return [text for _, text in sorted(saved, key=lambda each: -each[0])]


def _smaller_batches(
    settings: Mapping[str, Any], plan: Mapping[str, Any], largest: int | None
) -> tuple[float, str]:
    unit, total = plan["batch_unit"], settings["batch_size"] * settings["gradient_accumulation_steps"]
    size = settings["batch_size"] // 2
    if largest:
        size = min(size, largest)
    while size > unit and (total % size or size % unit):
        size -= 1
    size = max(size, unit)
    share = 1 - size / settings["batch_size"]
    text = (
        f"--config.batch_size={size} --config.gradient_accumulation_steps={max(1, total // size)}: as many samples "
        f"a step, {size} at a time"
    )
    return plan["memory"]["temporaries"] * share, text
