"""A plan in the terminal: the ranked table, the waterfall of the best layout, reasons."""

from __future__ import annotations

from rich.console import Console, Group, RenderableType
from rich.table import Table
from rich.text import Text

from fiveply.plan.explain import TERMS, Answer, Ranked, WhyNot, interval_text, sensitivities, shape_warnings
from fiveply.report.text import bytes_text, count_text
from fiveply.spec.layout import Layout

BAR, WIDE = 24, 118
"""Cells of the longest bar; columns from which a layout stands beside its figures, not below them."""


def show(answer: Answer, console: Console, whys: list[WhyNot]) -> None:
    """Print all of it."""
    for part in parts(answer, whys, console.width):
        console.print(part, soft_wrap=isinstance(part, Text))


def parts(answer: Answer, whys: list[WhyNot], width: int) -> list[RenderableType]:
    top = answer.ranked[0]
    found: list[RenderableType] = [headline(answer), "", table(answer, width), ""]
    if width < WIDE:
        found += [
            Text(f"{number:>2}{'*' if one.refusal else ' '} {_named(answer, one)}")
            for number, one in enumerate(answer.ranked, start=1)
        ]
        found.append(Text(""))
    if any(one.refusal for one in answer.ranked):
        found.append(Text("* can be planned, and not run by fiveply yet", style="dim"))
    found += [waterfall(top), ""]
    helps = [f"{name}: {gain:.1%}" for name, gain in sensitivities(answer).items() if gain >= 0.001]
    if helps:
        found.append(Text("What would help: " + ", ".join(helps)))
    found += [Text(f"Shape: {warning}", style="yellow") for warning in shape_warnings(answer)]
    found += [
        Text(f"Why not {one.wish}? {one.reason}" + (f" ({layout_text(one.best)})" if one.best else "")) for one in whys
    ]
    if top.refusal:
        found.append(Text(f"fiveply's runtime does not run the first layout yet: {top.refusal}", style="yellow"))
        first = next((one for one in answer.ranked if not one.refusal), None)
        if first:
            share = first.prediction.seconds.p50 / top.prediction.seconds.p50 - 1
            found.append(Text(f"the first that it runs takes {share:.1%} longer: {layout_text(first)}"))
    return found


def headline(answer: Answer) -> Text:
    searched, job = answer.searched, answer.job
    return Text(
        f"{count_text(job.global_batch * job.sequence)} tokens a step in {job.global_batch:,} rows of {job.sequence:,} on "
        f"{answer.cluster.count:,} of {answer.cluster.device}, {job.precision}\n"
        f"{searched.legal:,} legal layouts, {searched.fit:,} may fit, {searched.priced:,} simulated in {answer.seconds:.1f} s: "
        f"the first is {answer.proof}"
    )


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


def table(answer: Answer, width: int) -> Table:
    """The ranked layouts; on a narrow terminal each below its figures."""
    wide = width >= WIDE
    drawn = Table(box=None, pad_edge=False, header_style="dim", padding=(0, 2, 0, 0))
    drawn.add_column("", justify="right", no_wrap=True)
    for name in ("step, 10\N{EN DASH}90%", "tokens/s/device", "MFU", "memory, of all", "OOM"):
        drawn.add_column(name, justify="right", no_wrap=True)
    drawn.add_column("bound by", no_wrap=True)
    if wide:
        drawn.add_column("layout", overflow="fold")
    for number, one in enumerate(answer.ranked, start=1):
        drawn.add_row(
            f"{number}{'*' if one.refusal else ' '}", interval_text(one.prediction.seconds),
            f"{one.tokens_per_second_per_device:,.0f}", f"{one.mfu:.1%}", f"{bytes_text(one.worst)} {one.worst / one.capacity:.0%}",
            f"{one.prediction.p_oom:.1%}", one.bound_by, *([_named(answer, one)] if wide else []),
        )  # fmt: skip
    return drawn


def _named(answer: Answer, one: Ranked) -> str:
    worlds = {other.world for other in answer.ranked}
    return layout_text(one) + (f"  on {one.world} devices" if len(worlds) > 1 else "")


def waterfall(one: Ranked) -> Group:
    """From the ideal to the prediction, as bars."""
    whole, at = one.prediction.seconds.p50, 0.0
    lines = [Text("From the ideal to the first layout's step:")]
    for name, seconds in one.waterfall:
        if abs(seconds) < 0.0005 * whole:
            continue
        begin, size = round(BAR * at / whole), max(1, round(BAR * abs(seconds) / whole))
        at += seconds
        words = {"ideal": "the model at peak speed", "below peak": "products, attention below peak"}
        lines.append(
            Text.assemble(
                f"{seconds:10.3f} s {seconds / whole:6.1%}  ", " " * begin,
                ("#" * size, "green" if name == "ideal" else "red"), " " * max(1, BAR + 2 - begin - size),
                words.get(name) or TERMS.get(name, name),
            )
        )  # fmt: skip
    lines.append(Text(f"{whole:10.3f} s 100.0%"))
    return Group(*lines)
