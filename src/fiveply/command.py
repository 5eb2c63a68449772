"""How a verb becomes a command: registered with its flags, parsed apart from being run, its result printed once."""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable
from typing import Any

import msgspec
import tyro
from tyro.conf import FlagCreatePairsOff

Flag = FlagCreatePairsOff[bool]
app = tyro.extras.SubcommandApp()


def command(verb: Callable[..., None], of: tyro.extras.SubcommandApp = app, name: str = "") -> Callable[..., None]:
    """Register a verb such that parsing returns it bound to its flags: parsing and running fail in different ways."""

    @functools.wraps(verb)
    def bound(*args: Any, **kwargs: Any) -> Callable[[], None]:
        return functools.partial(verb, *args, **kwargs)

    of.command(name=name or verb.__name__)(bound)
    return verb


def finish(result: Any, json: bool, told: str | Callable[[], object] = "") -> None:
    """Print the result as JSON; or what a person is told of it, a line or something that prints."""
    if json:
        sys.stdout.write(msgspec.json.encode(result).decode() + "\n")
    elif callable(told):
        told()
    elif told:
        print(told)
