"""Ranks, schedule and memory of a run, as the values that `page.html` fills in: what is shown, what folds, what is said."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import groupby
from typing import Any

from fiveply import pipeline_schedule as schedules
from fiveply.pipeline_schedule import Kind, Schedule, ScheduleError
from fiveply.report.record import STATE, Facts, Rank, Record
from fiveply.report.text import count_text, plural
from fiveply.spec.errors import InputError
from fiveply.spec.layout import Layout

MOST_EVENTS = 3000  # of the schedule's picture; beyond, fewer micro-batches are drawn
MOST_BLOCKS = 40  # of the strip that shows which part of the model a stage holds
MOST_ROWS = 16  # of the grid before replicas fold
MOST_CARDS = 32  # ranks shown with all they hold; more get a small cell each
MOST_BARS = 24  # of memory before the ranks of a stage fold into their worst
CATEGORIES = (*STATE, "activations", "rest")
TRANSIENT = ("activations", "working", "buffers")
"""What a step holds beside its state, drawn as one."""
KIND_TEXT = {
    Kind.FORWARD: "forward",
    Kind.BACKWARD: "backward",
    Kind.INPUT: "backward, input gradient",
    Kind.WEIGHT: "backward, weight gradient",
}


def grid(facts: Facts) -> dict[str, Any]:
    """Pipeline ranks as columns, the ranks of a tensor, context or data group as rows, fastest axis innermost."""
    most = max((rank.parameters for rank in facts.ranks), default=0) or 1
    order = sorted(facts.ranks, key=lambda rank: (rank.dp, rank.cp, rank.tp, rank.pp))
    rows: list[dict[str, Any]] = []
    for (dp, _, _), group in groupby(order, key=lambda rank: (rank.dp, rank.cp, rank.tp)):
        ranks = list(group)
        rows.append({
            "dp": dp,
            "label": facts.coordinates(ranks[0], ("dp", "cp", "tp")),
            "cells": [{"rank": rank, "share": rank.parameters / most, "notes": _cell_notes(facts, rank),
                       "holds": "; ".join(chunk.text for chunk in rank.chunks)} for rank in ranks],
        })  # fmt: skip
    replicas = [list(group) for _, group in groupby(rows, key=lambda row: row["dp"])]
    shown = max(1, MOST_ROWS // max(len(replicas[0]), 1)) if len(rows) > MOST_ROWS else len(replicas)
    return {
        "columns": list(_columns(facts)),
        "compact": len(facts.ranks) > MOST_CARDS,
        "rows": [row for replica in replicas[:shown] for row in replica],
        "folded": [row for replica in replicas[shown:] for row in replica],
        "folded_text": f"{plural(len(replicas) - shown, 'more replica')} with the same parts "
        f"(dp {shown} to {len(replicas) - 1}, {len(rows) - sum(map(len, replicas[:shown]))} more rows)",
    }  # fmt: skip


def _columns(facts: Facts) -> Iterator[dict[str, Any]]:
    """A column a pipeline rank: which part of the model it holds, in words and as the lit blocks of a strip."""
    one_each = {rank.pp: rank for rank in reversed(facts.ranks)}
    stages = {chunk.stage: chunk for rank in one_each.values() for chunk in rank.chunks}
    blocks = [(stage, unit) for stage in sorted(stages) for unit in stages[stage].units]
    if len(blocks) > MOST_BLOCKS:
        blocks = [(stage, stages[stage].text) for stage in sorted(stages)]
    for pp in sorted(one_each):
        chunks = sorted(one_each[pp].chunks, key=lambda chunk: chunk.stage)
        mine = {chunk.stage: index for index, chunk in enumerate(chunks)}
        yield {
            "pp": pp,
            "stages": [{"stage": chunk.stage, "text": chunk.text} for chunk in chunks],
            "blocks": [{"chunk": mine.get(stage), "title": f"stage {stage}: {unit}"} for stage, unit in blocks],
        }


def _cell_notes(facts: Facts, rank: Rank) -> list[str]:
    layout = Layout.parse(facts.layout, where="facts.json")
    notes = [f"{count_text(rank.parameters)} parameters"]
    if layout.tp > 1:
        notes.append(f"slice {rank.tp + 1} of {layout.tp}")
    if layout.zero and layout.shard_ranks > 1:
        what = {1: "optimiser", 2: "gradients, optimiser", 3: "all state"}[layout.zero]
        notes.append(f"shard {rank.shard + 1} of {layout.shard_ranks}: {what}")
    return notes


def schedule(record: Record) -> dict[str, Any] | None:
    """The picture's cells in percent of its width, so that text keeps its size while cells follow the window."""
    shape = record.facts.schedule
    if shape is None:
        return None
    try:
        drawn = min(shape.micro_batches, max(2 * shape.pp, MOST_EVENTS // (3 * shape.pp * max(shape.vp, 1))))
        built = shape.build(drawn)
        costs = schedules.compute_costs()
        idle = schedules.bubble(built, costs)
    except ScheduleError as error:
        where = str(record.directory / "facts.json")
        raise InputError(str(error), where=where, key="schedule", fix="resume the run, which writes it anew") from None
    events = schedules.timeline(built, costs)
    span = max(event.end for event in events)
    kinds = [kind for kind in schedules.COMPUTE if any(event.kind == kind for event in events)]
    return {
        "name": shape.name,
        "pp": shape.pp,
        "vp": built.vp,
        "micro_batches": shape.micro_batches,
        "drawn": drawn,
        "groups": max(1, record.facts.world // shape.pp),
        "bubble": idle,
        "idle": idle / (1 + idle),
        "span": span,
        "kinds": [{"name": kind.value, "text": KIND_TEXT[kind]} for kind in kinds],
        "rows": list(_schedule_rows(built, events, span)),
        "text": schedules.picture(built, width=100),
    }


def _schedule_rows(schedule: Schedule, events: list[schedules.Event], span: float) -> Iterator[dict[str, Any]]:
    alive = schedules.peak_in_flight(schedule)
    for rank, group in groupby(events, key=lambda event: event.rank):
        stages = [schedule.stage_of(rank, chunk) for chunk in range(schedule.vp)]
        cells = [
            {"kind": str(event.kind), "chunk": event.chunk, "micro_batch": event.micro_batch,
             "x": 100 * event.start / span, "width": 100 * (event.end - event.start) / span,
             "title": f"pp {rank}, {KIND_TEXT[Kind(event.kind)]}, micro-batch {event.micro_batch}"
             + (f", chunk {event.chunk} (stage {stages[event.chunk]})" if schedule.vp > 1 else "")
             + f", time {event.start:g} to {event.end:g}"}
            for event in group
        ]  # fmt: skip
        yield {"pp": rank, "stages": stages, "alive": alive[rank], "cells": cells}


def memory(record: Record) -> dict[str, Any] | None:
    """Bars of bytes by category; many ranks fold into each stage's worst."""
    facts = record.facts
    measured = [row.memory_bytes for row in record.latest if row.memory_bytes]
    peaks = [max(column) for column in zip(*measured, strict=False)] if measured else []
    if len(peaks) != len(facts.ranks):
        peaks = [0] * len(facts.ranks)
    bars: list[dict[str, Any]] = []
    for rank, peak in zip(facts.ranks, peaks, strict=True):
        held = {category: rank.bytes.get(category, 0) for category in STATE}
        held["activations"] = sum(rank.bytes.get(category, 0) for category in TRANSIENT)
        held["rest"] = max(0, peak - sum(held.values()))
        bars.append({"rank": rank.rank, "pp": rank.pp, "label": f"rank {rank.rank}", "peak": peak,
                     "note": facts.coordinates(rank), "held": held, "total": sum(held.values())})  # fmt: skip
    widest = max((bar["total"] for bar in bars), default=0)
    if not widest:
        return None
    return {
        "bars": list(_worst(bars)) if len(bars) > MOST_BARS else bars,
        "all": bars,
        "widest": widest,
        "measured": any(peaks),
        "categories": CATEGORIES,
        "cpu": facts.machine.get("kind") == "cpu",
    }


def _worst(bars: list[dict[str, Any]]) -> Iterator[dict[str, Any]]:
    """Of each pipeline rank's."""
    for pp in sorted({bar["pp"] for bar in bars}):
        group = [bar for bar in bars if bar["pp"] == pp]
        bar = max(group, key=lambda bar: bar["total"])
        yield bar | {"label": f"pp {pp}", "note": f"{bar['label']}, worst of {len(group)}"}
