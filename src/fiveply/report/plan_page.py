"""A plan as one self-contained HTML file: the ranked table, and for the row under the pointer its waterfall, its memory by
rank and its pipeline over time.

Values go into the page as JSON; `plan.js` draws what follows the chosen row. Nothing is loaded from outside.
"""

from __future__ import annotations

from typing import Any

from markupsafe import Markup

from fiveply.pipeline_schedule import COMPUTE, build
from fiveply.plan.explain import TERMS, Answer, Ranked, WhyNot, shape_warnings
from fiveply.plan.simulate import simulate
from fiveply.report.plan_text import COLUMNS, cells, compact, helpful, job_text, layout_text
from fiveply.report.template import beside, embedded, filled
from fiveply.report.text import bytes_text

MOST_DRAWN, MOST_MICRO_BATCHES = 1200, 24  # actions of a pipeline that can be told apart
CATEGORIES = ("parameters", "gradients", "optimizer", "activations", "working", "buffers")
WORDS = {"ideal": "the model's operations at peak", "below peak": "products and attention below peak", **TERMS}


def render(answer: Answer, model: str, reasons: list[WhyNot]) -> str:
    """The page's text."""
    data = {"plans": [_plan(answer, one) for one in answer.ranked], "words": WORDS, "categories": CATEGORIES}
    return filled(
        "plan.html",
        {},
        style=Markup(beside("page.css") + beside("plan.css")),
        script=Markup(beside("plan.js")),
        data=embedded(data),
        model=model,
        lead=job_text(answer),
        tiles=_tiles(answer, answer.ranked[0]),
        columns=COLUMNS,
        rows=[_row(number, one) for number, one in enumerate(answer.ranked, start=1)],
        searched=answer.searched,
        helps=helpful(answer),
        warnings=shape_warnings(answer),
        reasons=[(one.wish, one.reason, layout_text(one.best) if one.best else "") for one in reasons],
        unrunnable=any(one.refusal for one in answer.ranked),
    )


def _tiles(answer: Answer, top: Ranked) -> list[dict[str, str]]:
    seconds = top.prediction.seconds
    return [
        {"title": "Step", "value": f"{seconds.p50:.3g} s", "note": f"{seconds.p10:.3g} to {seconds.p90:.3g} s at 80%"},
        {"title": "Tokens/s a device", "value": f"{top.tokens_per_second_per_device:,.0f}", "note": f"bound by {top.bound_by}"},
        {"title": "MFU", "value": f"{top.mfu:.1%}", "note": "of the devices' peak"},
        {"title": "Memory, worst rank", "value": bytes_text(top.worst), "note": f"{top.worst / top.capacity:.0%} of a device"},
        {"title": "Out of memory", "value": f"{top.prediction.p_oom:.1%}", "note": "probability"},
        {"title": "Search", "value": f"{answer.seconds:.1f} s", "note": answer.proof},
    ]  # fmt: skip


def _row(number: int, one: Ranked) -> dict[str, Any]:
    return {"number": number, "layout": compact(one.prediction.layout), "refusal": one.refusal, "cells": cells(one)}


def _plan(answer: Answer, one: Ranked) -> dict[str, Any]:
    prediction = one.prediction
    return {
        "layout": str(prediction.layout),
        "refusal": one.refusal,
        "waterfall": [(name, seconds) for name, seconds in one.waterfall if seconds],
        "seconds": prediction.seconds.p50,
        "memory": [[found.categories[name] for name in CATEGORIES] for found in prediction.footprints],
        "when": [found.when for found in prediction.footprints],
        "capacity": one.capacity,
        "timeline": _timeline(answer, one),
    }


def _timeline(answer: Answer, one: Ranked) -> dict[str, Any]:
    """Compute actions of as many micro-batches as can be drawn: [rank, kind, chunk, micro-batch, start, end]."""
    layout = one.prediction.layout
    whole = answer.search.predictors[one.order].micro_batches(layout)
    drawn = max(1, min(whole, MOST_MICRO_BATCHES, MOST_DRAWN // (3 * layout.stage_count)))
    found = simulate(build(layout.schedule, layout.pp, drawn, layout.chunks), one.prediction.stages)
    actions = [
        (one.rank, COMPUTE.index(one.kind), one.chunk, one.micro_batch, round(one.start, 7), round(one.end, 7))
        for one in found.events
        if one.kind in COMPUTE
    ]
    return {
        "pp": layout.pp,
        "drawn": drawn,
        "of": whole,
        "end": found.seconds,
        "bubble": found.bubble,
        "actions": actions,
    }
