"""Numbers as a person reads them: page and terminal share these."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any


def count_text(number: float, letters: str = "kMBT") -> str:
    """`1.23 M`: three significant digits, and a letter for each thousandfold."""
    for power in range(len(letters), 0, -1):
        if number >= 0.9995 * 1000**power:
            return f"{_digits(number / 1000**power)} {letters[power - 1]}"
    return _digits(number)


def bytes_text(number: float) -> str:
    for power, unit in ((30, "GiB"), (20, "MiB"), (10, "KiB")):
        if number >= 0.9995 * 2**power:
            return f"{_digits(number / 2**power)} {unit}"
    return f"{number:.0f} B"


def _digits(number: float) -> str:
    return f"{number:.{0 if number >= 99.95 or number == int(number) else 1 if number >= 9.995 else 2}f}"


def duration_text(seconds: float) -> str:
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes} min" if hours else f"{minutes} min {rest} s"


def coordinates(rank: Any, ranks: Iterable[Any], axes: Iterable[str] = ("dp", "cp", "tp", "pp")) -> str:
    """`dp 0, pp 1`: of the axes along which `ranks` are more than one."""
    ranks = list(ranks)
    return ", ".join(f"{axis} {getattr(rank, axis)}" for axis in axes if any(getattr(one, axis) for one in ranks))


def plural(number: int, word: str) -> str:
    return f"{number} {word}{'' if number == 1 else 's'}"
