"""Numbers for people: the unit that fits, three digits."""


def bytes_text(count: float) -> str:
    """Write bytes with the binary unit that fits: `1.50 GiB`."""
    return _scaled(count, 1024, ("B", "KiB", "MiB", "GiB", "TiB", "PiB"))


def count_text(count: float, unit: str = "") -> str:
    """Write a number with the decimal prefix that fits: `1.50 TFLOP`."""
    prefixes = ("", "k", "M", "G", "T", "P", "E")
    return _scaled(count, 1000, tuple(f"{prefix}{unit}" for prefix in prefixes)).rstrip()


def seconds_text(seconds: float) -> str:
    """Write a duration with the unit that fits: `1.50 ms`."""
    return _scaled(seconds * 1e9, 1000, ("ns", "µs", "ms", "s"))


def _scaled(value: float, base: int, units: tuple[str, ...]) -> str:
    power = 0
    while abs(value) >= base and power < len(units) - 1:
        value, power = value / base, power + 1
    digits = 0 if power == 0 and value == int(value) else max(0, 2 - (abs(value) >= 10) - (abs(value) >= 100))
    return f"{value:.{digits}f} {units[power]}"
