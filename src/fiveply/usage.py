"""What stands between a shell and the verbs: flags made as the parser takes them, its complaints as one line, values as JSON."""

from __future__ import annotations

import re
import sys
from typing import Any

import msgspec


def spread_settings(args: list[str]) -> list[str]:
    """`--set a=1 b=2` as `--set a=1 --set b=2`."""
    spread: list[str] = []
    inside = False
    for value in args:
        if inside and (value.startswith("-") or "=" not in value):
            inside = False
        if inside and spread[-1] != "--set":
            spread.append("--set")
        inside = inside or value == "--set"
        spread.append(value)
    return spread


def folded(box: str) -> str:
    """The parser's box of complaints as one line."""
    lines = [line.strip("│╭╮╰╯ \n") for line in box.splitlines()]
    problem = [line for line in lines[1:] if line]
    end = next((index for index, line in enumerate(problem) if set(line) == {"─"}), len(problem))
    return re.sub(r"\s+", " ", " ".join(problem[:end])).rstrip(".")


def toml(value: Any) -> str:
    return str(value).lower() if isinstance(value, (int, float)) else f'"{value}"'


def finish(result: dict[str, Any], json: bool, line: str = "") -> None:
    """The result as JSON, or the line that says it."""
    if json:
        print_json(result)
    elif line:
        print(line)


def print_json(result: dict[str, Any]) -> None:
    sys.stdout.write(msgspec.json.encode(result).decode() + "\n")
