"""A plan in the terminal: the ranked table, the waterfall of the best layout, reasons."""

from __future__ import annotations

from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from fiveply.plan.advice import Advice
from fiveply.plan.explain import TERMS, Answer, Ranked, WhyNot, interval_text, sensitivities, shape_warnings
from fiveply.report.terminal import plain_table
from fiveply.report.text import bytes_text, count_text
from fiveply.spec.layout import Layout

BAR, WIDE = 24, 118
"""Cells of the longest bar; columns from which a layout stands beside its figures, not below them."""
COLUMNS = ("step, 10\N{EN DASH}90%", "tokens/s/device", "MFU", "memory, of all", "OOM", "bound by")
"""What `cells` are, in the terminal and on the page."""


def show(answer: Answer, console: Console, whys: list[WhyNot]) -> None:
    """Print all of it."""

    def say(text: str, style: str = "") -> None:
        console.print(Text(text, style=style), soft_wrap=True)

    top, wide = answer.ranked[0], console.width >= WIDE
    say(headline(answer) + "\n")
    console.print(table(answer, wide))
    say("")
    if not wide:
        for number, one in enumerate(answer.ranked, start=1):
            say(f"{number:>2}{'*' if one.refusal else ' '} {_named(answer, one)}")
        say("")
    if any(one.refusal for one in answer.ranked):
        say("* can be planned, and not run by fiveply yet", "dim")
    waterfall(top, console)
    say("")
    if helps := helpful(answer):
        say("What would help: " + ", ".join(f"{name}: {gain:.1%}" for name, gain in helps))
    for warning in shape_warnings(answer):
        say(f"Shape: {warning}", "yellow")
    for one in whys:
        say(f"Why not {one.wish}? {one.reason}" + (f" ({layout_text(one.best)})" if one.best else ""))
    if top.refusal:
        say(f"fiveply's runtime does not run the first layout yet: {top.refusal}", "yellow")
        first = next((one for one in answer.ranked if not one.refusal), None)
        if first:
            share = first.prediction.seconds.p50 / top.prediction.seconds.p50 - 1
            say(f"the first that it runs takes {share:.1%} longer: {layout_text(first)}")


def headline(answer: Answer) -> str:
    searched = answer.searched
    return (
        f"{job_text(answer)}\n"
        f"{searched.legal:,} legal layouts, {searched.fit:,} may fit, {searched.priced:,} simulated in {answer.seconds:.1f} s: "
        f"the first is {answer.proof}"
    )


def job_text(answer: Answer) -> str:
    job, cluster = answer.job, answer.cluster
    return (
        f"{count_text(job.global_batch * job.sequence)} tokens a step in {job.global_batch:,} rows of {job.sequence:,} on "
        f"{cluster.count:,} of {cluster.device}, {job.precision}"
    )


def helpful(answer: Answer) -> list[tuple[str, float]]:
    """What makes a step a thousandth quicker or more."""
    return [(name, gain) for name, gain in sensitivities(answer).items() if gain >= 0.001]


def layout_text(one: Ranked) -> str:
    """Without what is default; even stages as their number."""
    layout = one.prediction.layout
    return compact(layout) + ("" if one.order.startswith("tp,cp,dp") else f"  ranks {one.order}")


def compact(layout: Layout) -> str:
    """The layout's text, its stages shortened where there are many."""
    text = str(layout)
    stages = "+".join(map(str, layout.stages))
    if len(layout.stages) > 8:
        sizes = sorted(set(layout.stages))
        text = text.replace(
            stages, f"({len(layout.stages)} of {sizes[0]}" + (f" to {sizes[-1]})" if len(sizes) > 1 else ")")
        )
    elif len(layout.stages) == 1:
        text = text.replace(f",stages={stages}", "").replace(f"stages={stages},", "")
    return text


def cells(one: Ranked) -> list[tuple[str, Any]]:
    """What stands in COLUMNS: as text, and as what a table is sorted by."""
    seconds = one.prediction.seconds
    return [
        (interval_text(seconds), seconds.p50),
        (f"{one.tokens_per_second_per_device:,.0f}", one.tokens_per_second_per_device),
        (f"{one.mfu:.1%}", one.mfu),
        (f"{bytes_text(one.worst)} {one.worst / one.capacity:.0%}", one.worst),
        (f"{one.prediction.p_oom:.1%}", one.prediction.p_oom),
        (one.bound_by, one.bound_by),
    ]


def table(answer: Answer, wide: bool) -> Table:
    """The ranked layouts; on a narrow terminal each below its figures."""
    drawn = plain_table("", *COLUMNS, *["layout"][:wide], left=("bound by", "layout"), folds="layout")
    for number, one in enumerate(answer.ranked, start=1):
        texts = [text for text, _ in cells(one)]
        drawn.add_row(f"{number}{'*' if one.refusal else ' '}", *texts, *([_named(answer, one)] if wide else []))
    return drawn


def _named(answer: Answer, one: Ranked) -> str:
    worlds = {other.world for other in answer.ranked}
    return layout_text(one) + (f"  on {one.world} devices" if len(worlds) > 1 else "")


def waterfall(one: Ranked, console: Console) -> None:
    """From the ideal to the prediction, as bars."""
    whole, at = one.prediction.seconds.p50, 0.0
    words = {"ideal": "the model at peak speed", "below peak": "products, attention below peak", **TERMS}
    console.print("From the ideal to the first layout's step:")
    for name, seconds in one.waterfall:
        if abs(seconds) < 0.0005 * whole:
            continue
        begin, size = round(BAR * at / whole), max(1, round(BAR * abs(seconds) / whole))
        at += seconds
        console.print(
            Text.assemble(
                f"{seconds:10.3f} s {seconds / whole:6.1%}  ", " " * begin,
                ("#" * size, "green" if name == "ideal" else "red"), " " * max(1, BAR + 2 - begin - size), words[name],
            )
        )  # fmt: skip
    console.print(f"{whole:10.3f} s 100.0%")


def advice_text(advice: Advice) -> str:
    """Advice on another system's arguments: what was understood, what they lead to, and what to change."""
    given, now, best = advice.given, advice.now, advice.best
    lines = [
        f"Understood: {layout_text(now)}, {given.global_batch:,} rows of {given.sequence:,} tokens, {given.precision}",
        *(f"Note: {note}" for note in given.notes),
        *_figures(now),
        "Lost to: " + ", ".join(f"{TERMS.get(name, name)} {seconds:.2f} s" for name, seconds in now.waterfall[1:6]),
    ]
    if best is None:
        fits = now.worst <= now.capacity
        return "\n".join(
            [*lines, "Nothing that Megatron-LM runs is faster." if fits else "No layout of these devices fits."]
        )
    gain = now.prediction.seconds.p50 / best.prediction.seconds.p50 - 1
    lines += [
        "",
        f"Better: {layout_text(best)}" + (f" ({gain:.1%} more tokens a second)" if gain > 0 else ""),
        *_figures(best),
        "Change:",
        *(f"  {change}" for change in advice.changes),
    ]
    return "\n".join(lines)


def _figures(one: Ranked) -> list[str]:
    over = "" if one.worst <= one.capacity else ", more than there is"
    return [
        f"Step: {interval_text(one.prediction.seconds)}, {count_text(one.tokens_per_second_per_device)} tokens/s a device, "
        f"MFU {one.mfu:.1%}",
        f"Memory of the worst rank: {bytes_text(one.worst)} of {bytes_text(one.capacity)}{over} "
        f"(out of memory: {one.prediction.p_oom:.0%})",
    ]
