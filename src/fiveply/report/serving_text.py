"""A plan for serving in the terminal: the ranked layouts, and one of them in a line."""

from __future__ import annotations

import math

from rich.console import Console

from fiveply.plan.serving import Answer, Choice, plain
from fiveply.report.terminal import plain_table
from fiveply.report.text import bytes_text, count_text, plural

SHOWN, WIDE = 10, 100
"""Layouts, and columns from which each stands beside its figures, not below them."""


def show(found: Answer, console: Console) -> None:
    load, bound = found.load, found.bound
    within = [
        f"{name} within {seconds * 1e3:.4g} ms"
        for name, seconds in (("first token", bound.ttft), ("time a token", bound.tpot))
        if seconds < math.inf
    ]
    asked = f"{bound.rate:g} requests a second" if bound.rate else "as many clients as can be"
    console.print(
        f"{load.prompt:,} tokens in, {load.output:,} out, {asked}, {', '.join(within) or 'no bound'}, on {found.cluster} in "
        f"{found.precision}", soft_wrap=True,
    )  # fmt: skip
    console.print(
        "waiting: " + ("arrivals Poisson, M/G/c by Allen-Cunneen for a place, M/D/1 for other prompts" if bound.rate else
        "each client asks again as soon as it is answered; M/D/1 for other prompts"), soft_wrap=True,
    )  # fmt: skip
    wide, words = console.width >= WIDE, ("limit", "layout")
    table = plain_table(
        "", "TTFT", "waiting", "TPOT", "requests", "tokens/s", "a device", "memory, of all", *words[: 1 + wide], left=words,
        gap=1,
    )  # fmt: skip
    for number, one in enumerate(found.ranked[:SHOWN], 1):
        latency = one.latency
        table.add_row(
            f"{number}{'*' if one.refusal else ' '}", f"{latency.ttft * 1e3:,.0f} ms", f"{latency.waiting * 1e3:,.0f}",
            f"{latency.tpot * 1e3:.3g} ms", f"{one.layout.dp} x {one.requests}", count_text(one.tokens_per_second),
            count_text(one.per_device), f"{bytes_text(one.memory_bytes)} {one.memory_bytes / one.capacity:.0%}",
            one.limit, *([plain(one.layout)] if wide else []),
        )  # fmt: skip
    console.print(table)
    if not wide:
        below = (f"{number} {plain(one.layout)}" for number, one in enumerate(found.ranked[:SHOWN], 1))
        console.print("layouts: " + "; ".join(below), soft_wrap=True)
    top = found.ranked[0].latency
    longest = sorted(top.terms.items(), key=lambda term: -term[1])
    console.print(
        "a token of the first: " + ", ".join(f"{name} {seconds / top.tpot:.0%}" for name, seconds in longest[:4])
    )
    if refused := next((one.refusal for one in found.ranked[:SHOWN] if one.refusal), ""):
        console.print(f"* can be planned, and not served by fiveply yet: {refused}", soft_wrap=True)


def line(one: Choice) -> str:
    """`dp=2: 31 ms a token, 240 ms to the first, 900 tokens/s from 2 x 8 requests; limit: memory`."""
    requests = f"{one.layout.dp} x {one.requests} requests" if one.layout.dp > 1 else plural(one.requests, "request")
    return (
        f"{plain(one.layout)}: {one.latency.tpot * 1e3:.3g} ms a token, {one.latency.ttft * 1e3:,.0f} ms to the first, "
        f"{count_text(one.tokens_per_second)} tokens/s from {requests}; limit: {one.limit}"
    )
