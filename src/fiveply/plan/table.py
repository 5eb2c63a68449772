"""Tables of published measurements: CSV rows read as jobs, layouts, systems and devices, with what each row measured.

Columns are those of `published.csv`; missing ones count as empty. What a row leaves out and its source implies (whether a
model's MLP is gated, which system ran it and when) is settled by the rules here, which know no single row.
"""

from __future__ import annotations

import csv
import re
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from importlib import resources
from pathlib import Path
from typing import Any, TypeVar

import msgspec

from fiveply.plan import machine as machines
from fiveply.plan import software as systems
from fiveply.plan.machine import Machine
from fiveply.plan.predict import Job
from fiveply.plan.software import Software
from fiveply.spec.architecture import Experts, Latent, ModelSpec, Rope
from fiveply.spec.errors import InputError
from fiveply.spec.layout import Layout, Recompute

NEEDED = ("source", "model", "gpu", "num_gpus", "layers", "hidden", "heads", "ffn", "vocab", "seq", "global_batch")
"""Columns without which a table is none."""
GATED = "llama|mistral|mixtral|qwen|deepseek|kimi|grok|gpt.?oss|gemma|yi-|olmo|phi|internlm|baichuan|glm"
PLAIN = "gpt|mpt|nemotron|megatron|mt-nlg|turing|opt|bloom|bert|falcon|palm"
GIB = 1 << 30
EAGER = 1.8
"""Memory-bound kernels' bytes without torch.compile, relative to those with."""
T = TypeVar("T")
Record = Mapping[str, str]
"""A row's cells by column, "" where it has none."""


class Row(msgspec.Struct, frozen=True):
    """One measurement. `number` counts from 1 without the header. Seconds and bytes are None where the row has none."""

    number: int
    source: str
    stratum: str
    job: Job
    """What it computed, on the devices it names."""
    layout: Layout
    seconds: float | None
    bytes: float | None
    last_rank: bool
    reserved: bool
    sweep: tuple[str, ...]


class Habit(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Where `column` has what `says` is a pattern of, the row's system is set up so: keys of Software."""

    column: str
    says: str
    sets: dict[str, Any]


class Words(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """`published.toml`: what cells mean, by patterns of them."""

    devices: dict[str, str]
    precisions: dict[str, str]
    recomputes: dict[str, Recompute]
    zeros: dict[str, int]
    systems: dict[str, str]
    modules: dict[str, tuple[str, ...]]
    habits: tuple[Habit, ...]


class Skipped(msgspec.Struct, frozen=True):
    row: int
    reason: str


class RowError(Exception):
    """A row that can't be scored, and why."""


WORDS = msgspec.toml.decode(resources.files("fiveply.plan").joinpath("published.toml").read_bytes(), type=Words)


def read(path: str | Path) -> tuple[list[Row], list[Skipped]]:
    """Rows that can be predicted, and the others with the reason. Raises InputError where the file is no such table."""
    return rows_of(path, NEEDED, _row)


def rows_of(path: str | Path, needed: Sequence[str], row: Callable[[int, Record], T]) -> tuple[list[T], list[Skipped]]:
    """Of a CSV file with the columns `needed`, what `row` makes of each row's number and record; rows of which it raises RowError
    or InputError are skipped."""
    where = str(path)
    try:
        with open(path, newline="", encoding="utf-8-sig") as file:
            reader = csv.DictReader(file, strict=True)
            records, columns = list(reader), reader.fieldnames or []
    except OSError as error:
        raise InputError(f"cannot be read ({error.strerror})", where=where, fix="give a CSV file") from None
    except (csv.Error, UnicodeDecodeError) as error:
        raise InputError(f"not a CSV table ({error})", where=where, fix="write it as comma-separated UTF-8") from None
    if lost := [column for column in needed if column not in columns]:
        raise InputError("a column is missing", where=where, key=lost[0], fix=f"needed are {', '.join(needed)}")
    if not records:
        raise InputError("has no row", where=where, fix="add measurements")
    rows: list[T] = []
    skipped: list[Skipped] = []
    for number, record in enumerate(records, 1):
        try:
            if None in record:
                raise RowError("has more cells than the header")
            rows.append(row(number, defaultdict(str, {key: (value or "").strip() for key, value in record.items()})))
        except (RowError, InputError) as error:
            skipped.append(Skipped(number, str(error)))
    return rows, skipped


def number_in(record: Record, key: str) -> float | None:
    text = record[key].replace(",", "")
    if not text:
        return None
    try:
        value = float(text)
    except ValueError:
        raise RowError(f"{key}: '{text}' is not a number") from None
    if not 0 <= value < float("inf"):
        raise RowError(f"{key}: {text} is not a size")
    return value


def whole_in(record: Record, key: str, default: int = 0) -> int:
    value = number_in(record, key)
    if value is not None and value != int(value):
        raise RowError(f"{key}: {value} is not a whole number")
    return int(value) if value else default


def _meant(key: str, text: str, known: Mapping[str, T]) -> T:
    """By the first of the patterns that the text contains."""
    for pattern, meaning in known.items():
        if re.search(pattern, text, re.I):
            return meaning
    raise RowError(f"{key}: '{text}' is unknown")


def _row(number: int, record: Record) -> Row:
    for key in ("layers", "hidden", "heads", "vocab", "seq", "global_batch", "num_gpus"):
        if not whole_in(record, key):
            raise RowError(f"{key} is not given")
    for text, why in (("SFT", "fine-tuning on packed rows"), ("LoRA", "adapters"), ("not an iteration", "one layer")):
        if text in record["notes"]:
            raise RowError(f"not a pretraining step ({why})")
    spec = architecture(record)
    software = system(record)
    layout = _layout(record, spec, software)
    sequence, batch, devices = (whole_in(record, key) for key in ("seq", "global_batch", "num_gpus"))
    seconds = number_in(record, "step_time_s") or number_in(record, "derived_step_time_s")
    rate = number_in(record, "tokens_per_s_per_gpu")
    if seconds is None and rate:
        seconds = batch * sequence / (rate * devices)
    gib = number_in(record, "mem_gib")
    if not seconds and not gib:
        raise RowError("measures neither time nor memory")
    precision = _meant("precision", record["precision"], WORDS.precisions)
    return Row(
        number=number,
        source=record["source"],
        stratum=_stratum(record, spec, precision),
        job=Job(spec, sequence, software, precision, machine=_machine(record), global_batch=batch),
        layout=layout,
        seconds=seconds or None,
        bytes=gib * GIB if gib else None,
        last_rank=record["mem_rank"] == "last",
        reserved=record["mem_kind"] == "reserved" or "reserved" in record["notes"],
        sweep=tuple(record[key] for key in ("source", "model", "gpu", "num_gpus", "seq", "global_batch", "precision")),
    )  # fmt: skip


def _machine(record: Record) -> Machine:
    """The row's devices, and where it says so their hosts' network, of which each has its share."""
    found, node = machines.load(device(record["gpu"])), whole_in(record, "gpus_per_node", 8)
    network = found.network
    if said := re.search(r"(\d+) ?Gb/?p?s(?: per node| node)", record["notes"]):
        network = msgspec.structs.replace(network, bandwidth=float(said[1]) * 1e9 / 8 / node)
    node = 4 if found.name in ("gb200", "gb300") else min(node, whole_in(record, "num_gpus"))
    return msgspec.structs.replace(found, devices_per_node=node, network=network)


def _stratum(record: Record, spec: ModelSpec, precision: str) -> str:
    if precision != "bf16":
        return precision if precision in ("fp32", "tf32") else "float8"
    if not record["recompute"] or not record["precision"]:
        return "recompute-unknown"
    if not whole_in(record, "micro_batch"):
        return "micro-batch-unknown"
    return "experts-16-bit" if spec.experts else "complete-16-bit"


def device(text: str) -> str:
    """The hardware file of a GPU as tables name it."""
    return _meant("gpu", text, WORDS.devices)


def architecture(record: Record) -> ModelSpec:
    """The model of a row; choices that have no column follow from its family, or from its count of parameters."""
    name, notes = record["model"], record["notes"]

    def of(family: str) -> bool:
        return bool(re.search(family, name, re.I))

    layers, hidden, heads, vocabulary, sequence = (
        whole_in(record, key) for key in ("layers", "hidden", "heads", "vocab", "seq")
    )
    ffn = whole_in(record, "ffn", 4 * hidden)
    count = whole_in(record, "experts")
    gated = "SwiGLU" in notes or of(GATED) or (not of(PLAIN) and ffn < 3.9 * hidden)
    head = 128 if of("qwen3") else 64 if of("gpt.?oss") else 0
    if not head and hidden % heads:
        raise RowError(f"{heads} heads do not divide hidden {hidden}")
    latent = None
    if of("deepseek.?v[23]|kimi"):
        latent, head = Latent(q_rank=1536, kv_rank=512, nope_dim=128, rope_dim=64, value_dim=128), 192
    experts = None
    if count > 1:
        dense = 3 if of("deepseek") else 1 if of("kimi") else 0
        inner = 2048 if latent else ffn
        experts = Experts(
            count=count,
            per_token=whole_in(record, "topk", 2),
            ffn=inner,
            layers=tuple(range(min(dense, layers), layers)),
            shared_ffn=inner if latent else 0,
            bias=of("gpt.?oss"),
        )
    window = 128 if of("gpt.?oss") else 0
    kv = whole_in(record, "kv_heads", heads)
    if heads % kv:
        raise RowError(f"{kv} key-value heads do not divide {heads} heads")
    older = not gated and not of("nemotron")
    return ModelSpec(
        family="table",
        vocabulary=vocabulary,
        hidden=hidden,
        layers=layers,
        heads=heads,
        kv_heads=heads if latent else kv,
        head_dim=head or hidden // heads,
        ffn=ffn,
        positions=sequence,
        norm="layer" if not gated else "rms",
        qk_norm=of("qwen3"),
        qkv_bias=older,
        out_bias=older,
        mlp_bias=older,
        gated_mlp=gated,
        activation="silu" if gated else "gelu",
        rope=None if older else Rope(),
        window=window,
        window_layers=tuple(range(0, layers, 2)) if window else (),
        experts=experts,
        latent=latent,
        sinks=bool(window),
        tied=older and "untied" not in notes,
    )


def system(record: Record) -> Software:
    """The training system of a row and its vintage, from what the source, the evidence and the notes say."""
    text = " ".join(record[key] for key in ("source", "notes", "fill_evidence"))
    name = next((name for pattern, name in WORDS.systems.items() if re.search(pattern, text, re.I)), "")
    if _meant("zero", record["zero"], WORDS.zeros) != 3:
        name = {"deepspeed": "megatron-deepspeed", "": "nemo"}.get(name, name)
    elif not name:
        name = "torchtitan"
    elif name == "megatron" and _vintage(record) < "2022":
        name = "deepspeed"
    found = systems.load(name, _vintage(record))
    changes: dict[str, Any] = {}
    for habit in WORDS.habits:
        if re.search(habit.says, record[habit.column]):
            changes |= habit.sets
    if re.search(r"\beager\b", record["notes"]):
        changes["memory_passes"] = EAGER * found.memory_passes
    if record["recompute"].startswith("selective:"):
        parts = record["recompute"].removeprefix("selective:").split("+")
        changes["selective"] = tuple(module for part in parts for module in WORDS.modules.get(part, ()))
    return msgspec.structs.replace(found, **changes)


def _vintage(record: Record) -> str:
    """The month that a row was measured, by its container, release, paper or page."""
    source, notes = record["source"], record["notes"]
    for text, pattern in (
        (notes, r"\b(2\d)\.(\d\d(?:\.\d+)?) NeMo"),
        (source, r"@v(2\d)\.(\d\d)"),
        (source, r"\((2\d)\.(\d\d)\)"),
        (source, r"20(2\d)(\d\d)_"),
        (source, r"arXiv:(2\d)(\d\d)\."),
    ):
        if found := re.search(pattern, text):
            return f"20{found[1]}-{found[2]}".replace(".", "-")
    if found := re.search(r"\b20(2\d)\b", source):
        return f"20{found[1]}-06"
    if "SC21" in source:
        return "2021-04"
    return {"a": "2023-06", "h": "2024-12"}.get(record["gpu"].lower()[:1], "2026-01")


def _layout(record: Record, spec: ModelSpec, software: Software) -> Layout:
    tp, pp, cp, ep = (whole_in(record, key, 1) for key in ("tp", "pp", "cp", "ep"))
    devices = whole_in(record, "num_gpus")
    if devices % (tp * pp * cp):
        raise RowError(f"tp={tp} x pp={pp} x cp={cp} does not divide {devices} devices")
    dp = devices // (tp * pp * cp)
    zero = _meant("zero", record["zero"], WORDS.zeros)
    schedule = record["schedule"].lower()
    # A remark in brackets is of a whole table; else a schedule that interleaves without saying how many chunks has the fewest
    # that cut the layers evenly.
    chunks = 1
    if "interleaved" in schedule and "(" not in schedule:
        chunks = next((vp for vp in (2, 3, 4) if _stages(spec.layers, pp * vp)), 1)
    vp = whole_in(record, "vp", chunks) if pp > 1 else 1
    kind = "zbv" if "zbv" in schedule else "zb" if "zb" in schedule or "zero-bubble" in schedule else "1f1b"
    said = record["seq_parallel"].lower()
    sp = -1 if tp == 1 else int(said in ("1", "true", "yes") if said else software.sequence_parallel)
    # FSDP2 under a pipeline keeps parameters gathered between micro-batches, and reduces once.
    kept = software.name == "torchtitan" and pp > 1 and zero == 3
    instances = re.search(r"(\d+) optimizer instances|optimizer_instances=(\d+)", record["notes"] + record["fsdp"])
    copies = int(instances[1] or instances[2]) if instances else 1
    return Layout(
        dp=dp,
        dp_shard=dp // copies if copies > 1 and dp % copies == 0 else 0,
        tp=tp,
        pp=pp,
        cp=cp,
        ep=ep,
        zero=1 if kept else zero,
        schedule=kind if vp == 1 else "interleaved",
        vp=vp if vp > 1 else 0,
        stages=_stages(spec.layers, pp * (2 if kind == "zbv" and vp == 1 else vp)),
        micro_batch=whole_in(record, "micro_batch"),
        recompute=_meant("recompute", record["recompute"], WORDS.recomputes),
        sp=sp,
        etp=(whole_in(record, "etp") or (1 if software.vintage >= "2025-05" else tp)) if spec.experts else 1,
    )


def _stages(layers: int, stages: int) -> tuple[int, ...]:
    """Equal stages, or equal where embedding and head count as layers, as Megatron-LM has them; else left to us."""
    if stages == 1:
        return ()
    for first, last in ((0, 0), (1, 1), (0, 1)):
        each, left = divmod(layers + first + last, stages)
        if not left:
            return (each - first, *(each,) * (stages - 2), each - last)
    return ()
