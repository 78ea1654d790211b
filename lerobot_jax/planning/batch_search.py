"""The largest batch that fits, found by a few real compilations."""

from collections.abc import Callable
from typing import Any

MAX_COMPILATIONS = 8
SPARE = 0.1  # part of the memory that is left free: compilers use more when they optimize in earnest
CLOSE = 0.03  # as near to the limit as this is near enough


def find_largest_batch(
    measure: Callable[[int], dict[str, Any]],
    first: dict[str, Any],
    limit: int,
    on_compiled: Callable[[dict[str, Any]], None] = lambda _: None,
) -> dict[str, Any]:
    """Search for the largest batch whose peak leaves `SPARE` of the memory free.

    Args:
        measure: compiles the step with a batch size; gives `Measurer.measure`'s numbers.
        first: what it gave for the run's own batch size.
        limit: bytes that a program may use on a device.
        on_compiled: is told what each compilation found.

    Returns:
        batch_size: 0 if not even the smallest fits.
        peak: its bytes on a device, None without a batch.
        compilations: how many it took.
        is_exact: whether the next larger batch is known not to fit.
    """
    unit, target = first["batch_unit"], (1 - SPARE) * limit
    peaks = {first["batch_size"]: first["memory"]["peak"]}
    base = sum(size for name, size in first["memory"]["parts"].items() if name != "batch")
    compilations = 0
    while compilations < MAX_COMPILATIONS:
        fitting = [size for size, peak in peaks.items() if peak <= target]
        others = [size for size, peak in peaks.items() if peak > target]
        low, high = max(fitting, default=0), min(others, default=None)
        is_close = low and peaks[low] >= (1 - CLOSE) * target
        if (high is not None and high - low <= unit) or is_close:
            break
        guess = _where(peaks, base, target)
        guess = max(low + unit, guess // unit * unit)
        if high is not None and not low < guess < high:
            guess = max(unit, (low + high) // 2 // unit * unit)
        found = measure(guess)
        on_compiled(found)
        peaks[guess] = found["memory"]["peak"]
        compilations += 1
    fitting = [size for size, peak in peaks.items() if peak <= target]
    others = [size for size, peak in peaks.items() if peak > target]
    low, high = max(fitting, default=0), min(others, default=None)
    return {
        "batch_size": low,
        "peak": peaks.get(low),
        "compilations": compilations,
        "is_exact": high is not None and high - low <= unit,
    }


def _where(peaks: dict[int, int], base: int, target: float) -> int:
    """Guess where the peak meets the target, by the line through the two nearest batches that are known."""
    known = {0: base} | peaks if len(peaks) == 1 else peaks
    (a, peak_a), (b, peak_b) = sorted(known.items(), key=lambda item: abs(item[1] - target))[:2]
    slope = (peak_b - peak_a) / (b - a)
    if slope <= 0:
        return 2 * max(peaks)
    return min(int(a + (target - peak_a) / slope), 16 * max(peaks))
