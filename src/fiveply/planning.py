"""plan: from what a user types to a plan, its reasons, and the file that other verbs read."""

from __future__ import annotations

import re
import sys
from pathlib import Path
from typing import Any

from rich.console import Console

from fiveply.plan import explain
from fiveply.plan import software as systems
from fiveply.plan.explain import Answer, Objective, WhyNot
from fiveply.plan.space import Limits
from fiveply.report import plan_page, plan_text
from fiveply.spec.architecture import ModelSpec
from fiveply.spec.cluster import ClusterSpec
from fiveply.spec.errors import InputError, RunError

LETTERS = {"": 1, "k": 2**10, "m": 2**20, "g": 2**30}


def plan(
    model: str, cluster: str, *, sequence: int, batch_tokens: str, precision: str = "bf16", objective: Objective = "time",
    fix: tuple[str, ...] = (), most: tuple[str, ...] = (), wishes: tuple[str, ...] = (), emit: str = "",
    out: str = "run.plan", html: str = "", json: bool = False,
) -> dict[str, Any]:  # fmt: skip
    """Plan, print, and write `out` (and `html`); returns what `--json` prints. Raises InputError."""
    spec, devices = ModelSpec.load(model), ClusterSpec.parse(cluster)
    limits, system = Limits.parse(fix, most), None
    if emit:
        from fiveply.plan import dialects

        dialect = dialects.load(emit)
        limits = Limits(limits.fixed, limits.most, dialects.choices(emit))
        system = systems.load(dialect.software)
    found = explain.answer(
        spec, devices, sequence=sequence, global_batch=rows(batch_tokens, sequence), precision=precision,
        objective=objective, limits=limits, system=system,
    )  # fmt: skip
    reasons = [explain.why(found, wish, limits) for wish in wishes]
    chosen = found.ranked[0] if emit else next((one for one in found.ranked if not one.refusal), found.ranked[0])
    values = explain.values(found) | {
        "why": {one.wish: one.reason for one in reasons},
        "sensitivities": explain.sensitivities(found),
        "warnings": explain.shape_warnings(found),
        "plan": out,
    }
    if emit:
        from fiveply.plan import advice

        chosen, text, comments = advice.expressible(emit, found, model)
        values |= {"emitted": text, "comments": comments}
    _write(out, lambda path: explain.plan_of(found, model, chosen).save(path))
    if html:
        _write(html, lambda path: path.write_text(plan_page.render(found, model, reasons), encoding="utf-8"))
    _say(found, reasons, values, chosen is found.ranked[0], html, json)
    return values


def _say(
    found: Answer, reasons: list[WhyNot], values: dict[str, Any], first: bool, html: str, json: bool
) -> None:  # fmt: skip
    """The table on standard output, or on standard error beside JSON or another system's flags."""
    emitted = values.get("emitted")
    console = Console(file=sys.stderr if json or emitted else sys.stdout, highlight=False)
    plan_text.show(found, console, reasons)
    which = "the first layout" if first else "the first that fiveply's runtime runs"
    console.print(f"wrote {values['plan']} ({which})" + (f" and {html}" if html else ""), soft_wrap=True)
    if emitted and not json:
        for comment in values["comments"]:
            print(f"# {comment}", file=sys.stderr)
        print(emitted, end="")


def megatron(flags: str, cluster: str, *, fix: tuple[str, ...] = (), most: tuple[str, ...] = ()) -> dict[str, Any]:
    """What Megatron-LM arguments (or a file of them) lead to, and what to change; `text` is for the terminal."""
    from fiveply.plan import advice
    from fiveply.plan.dialects import megatron as arguments
    from fiveply.report import advice_text

    devices = ClusterSpec.parse(cluster)
    file = Path(flags)
    given = arguments.read(file.read_text() if len(flags) < 256 and file.is_file() else flags, devices.count)
    found = advice.advise(given, devices, Limits.parse(fix, most))
    return advice.values(found) | {"text": advice_text.shown(found)}


def rows(tokens: str, sequence: int) -> int:
    """Rows of a global batch from `4M` (4 x 2^20 tokens) or a plain number; raises InputError."""
    match = re.fullmatch(r"(\d+(?:\.\d+)?)([kKmMgG]?)", tokens.strip())
    if sequence < 1:
        raise InputError(f"{sequence} is not a length", where="--seq", fix="give a whole number from 1")
    if not match or not (count := float(match[1]) * LETTERS[match[2].lower()]):
        raise InputError(
            f"'{tokens}' is not a number of tokens", where="--batch-tokens", fix="write 4M, 512k or 4194304"
        )
    if count % sequence:
        nearest = max(1, round(count / sequence)) * sequence
        raise InputError(f"{count:,.0f} tokens are not whole rows of {sequence}", where="--batch-tokens",
                         fix=f"give {nearest}")  # fmt: skip
    return int(count) // sequence


def _write(path: str, write: Any) -> None:
    try:
        write(Path(path))
    except OSError as error:
        raise RunError(f"{path}: {error.strerror}; give another place") from None
