import pytest

from lerobot_jax.planning.units import bytes_text, count_text, seconds_text


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (bytes_text(0), "0 B"),
        (bytes_text(1023), "1023 B"),
        (bytes_text(1536), "1.50 KiB"),
        (bytes_text(15.75 * 2**30), "15.8 GiB"),
        (bytes_text(-3 * 2**20), "-3.00 MiB"),
        (count_text(956e12, "FLOP"), "956 TFLOP"),
        (count_text(51_600_000), "51.6 M"),
        (count_text(8), "8"),
        (seconds_text(0.0015), "1.50 ms"),
        (seconds_text(120), "120 s"),
    ],
)
def test_numbers_get_the_unit_that_fits(text, expected):
    assert text == expected
