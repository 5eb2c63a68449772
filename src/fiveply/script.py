"""`fiveply train script.py --layout ...`: start a user's own script on every rank of a layout, as torchrun would.

A rank runs the script as `__main__`, with its own arguments, in a default process group that is there already;
`fiveply.join` in it takes the layout from here. Under torchrun or Slurm the ranks are theirs, and each runs it itself.
"""

from __future__ import annotations

import runpy
import sys
from pathlib import Path

from fiveply.own_module import AUTO, command_line
from fiveply.spec.errors import InputError, RunError
from fiveply.spec.layout import Layout
from fiveply.spec.plan import layout_text
from fiveply.world.launch import launch


def find(args: list[str]) -> int | None:
    """Where the script stands in the arguments of `fiveply train`, which may begin with `--layout`; None: there is none."""
    place = 0
    while place < len(args) and args[place].partition("=")[0] == "--layout":
        place += 1 if "=" in args[place] else 2
    return place if place < len(args) and args[place].endswith(".py") else None


def split_arguments(args: list[str]) -> tuple[str, list[str]]:
    """`--layout L` (before any `--`), and the script's own arguments. Raises InputError for a `--layout` without a value."""
    layout, own, rest = "", list[str](), list(args)
    while rest:
        arg = rest.pop(0)
        if arg == "--":
            return layout, own + rest
        name, equals, value = arg.partition("=")
        if name != "--layout":
            own.append(arg)
        elif equals or rest:
            layout = value if equals else rest.pop(0)
        else:
            raise InputError("--layout has no value", where="fiveply train", fix="give one, as --layout dp=2,tp=2")
    return layout, own


def run(script: str, args: list[str]) -> None:
    """Run it on the ranks of `--layout`, one without; rank 0 prints to the terminal, the others to
    `runs/NAME/logs`. Raises InputError, and RunError naming the rank that failed first."""
    layout, own = split_arguments(args)
    if not Path(script).is_file():
        raise InputError("no such file", where=script, fix="give a Python script, or a run's TOML file")
    text = layout_text(layout)
    if text == AUTO:
        raise InputError("'auto' says not how many ranks to start", where="--layout", fix="give one, as --layout dp=2")
    ranks = Layout.parse(text, "--layout").world if text else 1
    logs = Path("runs") / Path(script).stem / "logs"
    launch(_rank, ranks, script, own, text, log_folder=logs if ranks > 1 else None)


def _rank(script: str, args: list[str], layout: str) -> None:
    command_line.set(layout)
    before = sys.argv, sys.path[0]
    sys.argv, sys.path[0] = [script, *args], str(Path(script).resolve().parent)
    try:
        runpy.run_path(script, run_name="__main__")
    except SystemExit as stop:
        if stop.code not in (None, 0):
            raise RunError(f"{script} ended with {stop.code}") from None
    except KeyboardInterrupt:
        raise RunError(f"{script} stopped as asked") from None
    finally:
        sys.argv, sys.path[0] = before
