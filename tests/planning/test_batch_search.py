"""The search for the largest batch, on programs whose memory is known."""

import pytest

from lerobot_jax.planning.batch_search import MAX_COMPILATIONS, SPARE, find_largest_batch


@pytest.mark.parametrize("start", [8, 64, 4096])
@pytest.mark.parametrize("limit", [3000, 10_000, 1_000_000])
@pytest.mark.parametrize("bend", [0.0, 0.002])
def test_the_largest_batch_is_found_in_few_compilations(start, limit, bend):
    tried = []

    def peak(size: int) -> int:
        return int(1000 + 7 * size + bend * size**2)

    def measure(size: int) -> dict:
        tried.append(size)
        memory = {"peak": peak(size), "parts": {"parameters": 1000, "batch": size}}
        return {"batch_size": size, "batch_unit": 8, "memory": memory}

    first = measure(start)
    found = find_largest_batch(measure, first, limit)
    target = (1 - SPARE) * limit
    assert len(tried) - 1 == found["compilations"] <= MAX_COMPILATIONS
    assert found["batch_size"] % 8 == 0
    assert found["peak"] == peak(found["batch_size"]) <= target
    best = max(size for size in range(8, 200_000, 8) if peak(size) <= target)
    assert found["batch_size"] >= 0.9 * best
    if found["is_exact"]:
        assert found["batch_size"] == best


def test_when_nothing_fits_the_largest_batch_is_none():
    def measure(size: int) -> dict:
        memory = {"peak": 5000 + size, "parts": {"parameters": 5000}}
        return {"batch_size": size, "batch_unit": 4, "memory": memory}

    found = find_largest_batch(measure, measure(64), 4000)
    assert found["batch_size"] == 0
    assert found["peak"] is None
