"""A run as one self-contained HTML file: curves, ranks, schedule, recorded steps, memory.

`write_report` reads the directory (`record.py`), turns it into what `page.html` shows, and fills that template with the
style and the script that stand beside it. The template draws ranks, schedule and memory (`figures.py`) as plain HTML and
SVG; `page.js` draws the curves and `timeline.js` the recorded steps (`timelines.py`), which follow the window's width. Nothing
is loaded from outside, and the page forbids it.
"""

from __future__ import annotations

import re
import shlex
from collections.abc import Callable
from itertools import groupby
from pathlib import Path
from statistics import fmean, median
from typing import Any

from markupsafe import Markup, escape

from fiveply.report import expected, figures, perfetto, timelines
from fiveply.report.record import Facts, Record, Row, load, smoothed
from fiveply.report.template import beside, embedded, filled
from fiveply.report.text import bytes_text, count_text, duration_text, plural
from fiveply.spec.errors import RunError
from fiveply.timeline import RecordedStep

CURVES = ("loss", "tokens_per_second", "grad_norm", "lr")
LAST_STEPS = 20  # whose mean is the final training loss
MOST_POINTS = 1500  # of a curve; beyond, neighbours are averaged
LOG_LINES = 40
TRACE = "timeline.perfetto.json"
"""Beside the run's other files, the recorded steps for ui.perfetto.dev."""


def write_report(run: Path, out: Path | None = None) -> Path:
    """Write the page of the run in directory `run`, by default to `run/report.html`; returns where. Steps that the run
    recorded are written as a trace too, to `run/TRACE`.

    Raises InputError for what is no run's directory, has no steps yet, or is damaged; RunError where it can't be written.
    """
    out = out or run / "report.html"
    record, steps = load(run), timelines.chosen(run)
    text = render(record, steps)
    if steps:
        perfetto.write(steps, run / TRACE)
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        out.write_text(text, encoding="utf-8")
    except OSError as error:
        raise RunError(f"{out}: {error.strerror}; give another place with --out") from None
    return out


def render(record: Record, steps: list[RecordedStep]) -> str:
    """The page's text; `steps`: those recorded, the first on top."""
    recorded = [timelines.drawn(step) | {"expected": expected.values(record.facts, step)} for step in steps]
    return filled(
        "page.html",
        {"bytes": bytes_text, "breakable": _breakable},
        style=Markup(beside("page.css")),
        script=Markup(beside("page.js")),
        data=embedded(_curves(record)),
        name=record.run.name,
        facts=record.facts,
        run=record.run,
        lead=_lead(record.facts),
        tiles=_tiles(record),
        about=_about(record),
        status=_status(record),
        segments=_segments(record),
        grid=figures.grid(record.facts),
        schedule=figures.schedule(record),
        memory=figures.memory(record),
        recorded=recorded,
        pictures=embedded([step["picture"] for step in recorded]),
        timeline_script=Markup(beside("timeline.js")),
        trace=record.directory / TRACE,
        log=_log_tail(record.directory / "logs" / "rank-00000.log"),
        resume=f"fiveply train {shlex.quote(str(record.directory / 'run.toml'))}",
        again=f"fiveply report {shlex.quote(str(record.directory))}",
    )


def _present(rows: list[Row], key: str) -> list[Any]:
    return [value for row in rows if (value := getattr(row, key)) is not None]


# header


def _lead(facts: Facts) -> str:
    """`2.31 M parameters on 4 ranks: 2-way data x 2-way pipeline parallel`."""
    size = facts.model.get("parameters")
    kinds = (("dp", "data"), ("cp", "context"), ("tp", "tensor"), ("pp", "pipeline"))
    ways = [f"{facts.degree(axis)}-way {kind}" for axis, kind in kinds if facts.degree(axis) > 1]
    text = f"{count_text(size)} parameters on " if size else ""
    text += plural(facts.world, "rank")
    return f"{text}: " + " \N{MULTIPLICATION SIGN} ".join(ways) + " parallel" if ways else text


def _breakable(text: str) -> Markup:
    """A layout's text may break after its commas."""
    return escape(text).replace(",", Markup(",<wbr>"))


def _tiles(record: Record) -> list[dict[str, str]]:
    """The final figures; those that the run did not measure say so."""
    rows, latest, facts = record.rows, record.latest, record.facts
    losses, unit = _present(rows, "loss")[-LAST_STEPS:], "as the module's" if facts.own_module else "nats per token"
    over = f", mean of {len(losses)} steps" if len(losses) > 1 else ""
    evaluated = [row for row in rows if row.held_out_loss is not None]
    held_out = "never evaluated"
    if evaluated:
        best = min(evaluated, key=lambda row: row.held_out_loss or 0.0)
        note = "the best so far" if best is evaluated[-1] else f"best {best.held_out_loss:.3f} at step {best.step}"
        held_out = f"{unit}, {note}"
    bits, speeds, shares = (
        _present(rows, "bits_per_character"),
        _present(latest, "tokens_per_second"),
        _present(latest, "mfu"),
    )
    peak, tokens = facts.machine.get("peak_flops"), rows[-1].step * facts.tokens_per_step
    of_peak = f"of {count_text(peak, 'kMGTPE')}FLOP/s" if peak else "of the machine's peak"
    done = f"{count_text(tokens)} tokens" if tokens else f"{rows[-1].step} steps"
    tiles: list[tuple[str, float | None, Callable[[float], str], str]] = [
        ("Training loss", fmean(losses) if losses else None, "{:.3f}".format, unit + over),
        ("Held-out loss", evaluated[-1].held_out_loss if evaluated else None, "{:.3f}".format, held_out),
        ("Bits per character", bits[-1] if bits else None, "{:.3f}".format, "held-out text"),
        ("Tokens per second", median(speeds) if speeds else None, count_text, f"median of {plural(len(speeds), 'step')}"),
        ("Model FLOPs utilisation", median(shares) if shares else None, "{:.1%}".format, of_peak),
        ("Time in steps", sum(_present(rows, "seconds")), duration_text, done),
    ]  # fmt: skip
    return [{"title": title, "value": "\N{EN DASH}" if value is None else form(value), "note": note}
            for title, value, form, note in tiles]  # fmt: skip


def _about(record: Record) -> list[tuple[str, str]]:
    facts, run = record.facts, record.run
    model, corpus, machine, precision = facts.model, facts.corpus, facts.machine, facts.precision

    def parts(table: dict[str, Any], *texts: tuple[str, str]) -> str:
        return ", ".join(text.format(table[key]) for key, text in texts if table.get(key) is not None)

    shape = parts(model, ("layers", "{} layers"), ("hidden", "hidden {}"), ("heads", "{} heads"),
                  ("kv_heads", "{} key-value heads"), ("ffn", "MLP {}"), ("vocabulary", "vocabulary {:,}"))  # fmt: skip
    sizes = {key: count_text(corpus[key]) for key in ("train_tokens", "held_out_tokens") if corpus.get(key)}
    text = parts(sizes, ("train_tokens", "{} training tokens"), ("held_out_tokens", "{} held out"))
    text += parts(corpus, ("characters_per_token", ", {:.2f} characters per token"))
    held = {**machine, "memory": bytes_text(machine["memory_bytes"]) if machine.get("memory_bytes") else None}
    gpus = machine.get("count") if machine.get("kind") != "cpu" else None
    words = parts(
        precision, ("parameters", "{} computation"), ("reduce", "{} reduction"), ("optimizer", "{} optimiser")
    )
    batch = f"{run.train.global_batch} rows{'' if facts.own_module else f' of {run.data.sequence} tokens'} a step"
    return [
        ("Model", f"{model.get('family', run.model.preset)}: {shape}" if shape else run.model.preset),
        ("Layout", f"{facts.layout} on {plural(facts.world, 'rank')}"),
        ("Corpus", f"{', '.join(map(str, corpus.get('sources', [])))}: {text}" if text else str(run.data.corpus)),
        ("Batch", batch + (f" ({facts.tokens_per_step:,} tokens)" if facts.tokens_per_step else "")),
        ("Machine", (f"{gpus} \N{MULTIPLICATION SIGN} " if gpus else "")
            + parts(held, ("name", "{}"), ("cores", "{} cores"), ("memory", "{} of memory")) or "unknown"),
        ("Precision", words or "unknown"),
    ]  # fmt: skip


def _status(record: Record) -> str:
    done, steps = record.rows[-1].step, record.run.train.steps
    if done >= steps or record.facts.own_module:
        return f"{plural(done if record.facts.own_module else steps, 'step')} done"
    return f"step {done} of {'at most ' if record.run.train.until == 'converged' else ''}{steps}"


def _segments(record: Record) -> list[dict[str, Any]]:
    """Starts and resumes, each with the steps that counted in the end."""
    segments, last = record.facts.segments, record.rows[-1].step
    ends = [*(segment.from_step for segment in segments), last][1:]
    return [
        {"from": segment.from_step + 1, "to": end, "layout": segment.layout, "world": segment.world, "at": segment.started}
        for segment, end in zip(segments, ends, strict=True)
    ]  # fmt: skip


def _log_tail(path: Path) -> str:
    if not path.is_file():
        return ""
    text = path.read_text(errors="replace")[-20_000:]
    return "\n".join(re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", text).splitlines()[-LOG_LINES:])


# curves


def _curves(record: Record) -> dict[str, Any]:
    """What page.js draws: columns of equal length, averaged down to MOST_POINTS, and the evaluations as they are."""
    rows = record.rows
    buckets = [
        rows[len(rows) * i // n : len(rows) * (i + 1) // n] for n in [min(len(rows), MOST_POINTS)] for i in range(n)
    ]
    starts = [segment.from_step for segment in record.facts.segments]
    columns: dict[str, list[Any]] = {"step": [bucket[-1].step for bucket in buckets]}
    for key in CURVES:
        values = [fmean(present) if (present := _present(bucket, key)) else None for bucket in buckets]
        columns[key] = _short(values)
        # Smoothed within a layout, not across a change of it.
        half = min(25, len(buckets) // 40)
        parts = groupby(
            zip(columns["step"], values, strict=True), lambda pair: sum(pair[0] > start for start in starts)
        )
        columns[f"{key}_smooth"] = _short([v for _, part in parts for v in smoothed([v for _, v in part], half)])
    evaluated = [row for row in rows if row.held_out_loss is not None]
    shaded = [
        {"from": members[0]["from"], "to": members[-1]["to"], "layout": layout, "world": members[0]["world"]}
        for layout, group in groupby(_segments(record), key=lambda segment: segment["layout"])
        for members in [list(group)]
    ]
    return {
        "columns": columns,
        "held_out": {
            "step": [row.step for row in evaluated],
            "loss": _short([row.held_out_loss for row in evaluated]),
            "bits": _short([row.bits_per_character for row in evaluated]),
        },
        "segments": shaded,
        "tokens_per_step": record.facts.tokens_per_step,
    }


def _short(values: list[float | None]) -> list[float | None]:
    return [None if value is None else float(f"{value:.5g}") for value in values]
