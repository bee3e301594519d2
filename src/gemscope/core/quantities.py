"""Bytes, work and time as people read them: three digits and a unit, powers of 1000."""

_PREFIXES = ("", "k", "M", "G", "T", "P", "E", "Z")


def size_text(count: float | int) -> str:
    """``604 MB`` for 604,307,968 bytes; single bytes are not rounded."""
    return f"{count:.0f} B" if count < 999.5 else _three_digits(count, "B")


def work_text(flops: float | int) -> str:
    """``1.23 PFLOP``."""
    return _three_digits(flops, "FLOP")


def time_text(seconds: float | int) -> str:
    """``3.5 h``: in the largest unit of which there are at least two."""
    for size, unit in ((86400, "days"), (3600, "h"), (60, "min")):
        if seconds >= 2 * size:
            return f"{_digits(seconds / size)} {unit}"
    return f"{_digits(seconds)} s"


def _three_digits(value: float | int, unit: str) -> str:
    at = 0
    while value >= 999.5 and at < len(_PREFIXES) - 1:
        value, at = value / 1000, at + 1
    return f"{_digits(value)} {_PREFIXES[at]}{unit}"


def _digits(value: float | int) -> str:
    return f"{value:,.{max(0, 3 - len(str(int(value))))}f}"
