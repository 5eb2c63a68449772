"""plan: from what a user types to a plan, its reasons, and the file that other verbs read."""

from __future__ import annotations

import math
import re
import sys
from pathlib import Path
from typing import Any

import msgspec
from rich.console import Console

from fiveply.plan import advice, dialects, explain
from fiveply.plan import serving as serve_plan
from fiveply.plan import software as systems
from fiveply.plan.dialects import megatron as arguments
from fiveply.plan.explain import Objective
from fiveply.plan.inference import Load
from fiveply.plan.space import Limits
from fiveply.report import plan_page, plan_text, serving_text
from fiveply.spec.architecture import ModelSpec
from fiveply.spec.cluster import ClusterSpec
from fiveply.spec.errors import InputError, RunError
from fiveply.spec.plan import Plan

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
        chosen, text, comments = advice.expressible(emit, found, model)
        values |= {"emitted": text, "comments": comments}
    _write(out, lambda path: explain.plan_of(found, model, chosen).save(path))
    if html:
        _write(html, lambda path: path.write_text(plan_page.render(found, model, reasons), encoding="utf-8"))
    # On standard error beside JSON or another system's flags.
    console = Console(file=sys.stderr if json or emit else sys.stdout, highlight=False)
    plan_text.show(found, console, reasons)
    which = "the first layout" if chosen is found.ranked[0] else "the first that fiveply's runtime runs"
    console.print(f"wrote {out} ({which})" + (f" and {html}" if html else ""), soft_wrap=True)
    if emit and not json:
        for comment in values["comments"]:
            print(f"# {comment}", file=sys.stderr)
        print(values["emitted"], end="")
    return values


def serving(
    model: str, cluster: str, *, prompt: int, output: int, ttft: float = 0.0, tpot: float = 0.0, rate: float = 0.0,
    precision: str = "bf16", fix: tuple[str, ...] = (), most: tuple[str, ...] = (), wishes: tuple[str, ...] = (),
    out: str = "run.plan", json: bool = False,
) -> dict[str, Any]:  # fmt: skip
    """Plan for serving, print, and write `out`; returns what `--json` prints. Raises InputError where nothing keeps the bound,
    with the least that is attainable."""
    for flag, given in (("--ttft", ttft), ("--tpot", tpot), ("--rate", rate)):
        if not 0 <= given < math.inf:
            raise InputError(f"{given} is no bound", where=flag, fix="give a number above 0, or leave it out")
    devices, limits = ClusterSpec.parse(cluster), Limits.parse(fix, most)
    bound = serve_plan.Bound(ttft or math.inf, tpot or math.inf, rate)

    def ask(limits: Limits) -> serve_plan.Answer:
        load = Load(prompt, output)
        return serve_plan.answer(ModelSpec.load(model), devices, load, bound, precision=precision, limits=limits)

    found = ask(limits)
    if not found.ranked:
        raise InputError(f"no layout keeps the bound: {serve_plan.unmet(found)}", where="--serve",
                         fix="allow more time, or give more or faster devices")  # fmt: skip
    reasons: dict[str, str] = {}
    for wish in wishes:
        fixed = limits.fixed | Limits.parse([piece for piece in wish.split(",") if piece]).fixed
        other = ask(msgspec.structs.replace(limits, fixed=fixed))
        reasons[wish] = (
            serving_text.line(other.ranked[0]) if other.ranked else f"beyond the bound: {serve_plan.unmet(other)}"
        )
    chosen = next((one for one in found.ranked if not one.refusal), found.ranked[0])
    plan = Plan(
        serve_plan.plain(chosen.layout), model, devices, prompt + output, chosen.layout.dp * chosen.requests, precision,
        requests=chosen.requests,
    )  # fmt: skip
    _write(out, plan.save)
    console = Console(file=sys.stderr if json else sys.stdout, highlight=False)
    serving_text.show(found, console)
    for wish, reason in reasons.items():
        console.print(f"Why not {wish}? {reason}", soft_wrap=True)
    which = "the first layout" if chosen is found.ranked[0] else "the first that fiveply serves"
    console.print(f"wrote {out} ({which}); fiveply serve MODEL --plan {out}", soft_wrap=True)
    return serve_plan.values(found) | {"why": reasons, "plan": out}


def megatron(flags: str, cluster: str, *, fix: tuple[str, ...] = (), most: tuple[str, ...] = ()) -> dict[str, Any]:
    """What Megatron-LM arguments (or a file of them) lead to, and what to change; `text` is for the terminal."""
    devices = ClusterSpec.parse(cluster)
    file = Path(flags)
    given = arguments.read(file.read_text() if len(flags) < 256 and file.is_file() else flags, devices.count)
    found = advice.advise(given, devices, Limits.parse(fix, most))
    return advice.values(found) | {"text": plan_text.advice_text(found)}


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
