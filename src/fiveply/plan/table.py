"""Tables of published measurements: CSV rows read as jobs, layouts, systems and devices, with what each row measured.

Columns are those of `published.csv`; missing ones count as empty. What a row leaves out and its source implies (whether a
model's MLP is gated, which system ran it and when) is settled by the rules here, which know no single row.
"""

from __future__ import annotations

import csv
import re
from pathlib import Path
from typing import Any

import msgspec

from fiveply.plan import software as systems
from fiveply.plan.software import Software
from fiveply.spec.architecture import Experts, Latent, ModelSpec, Rope
from fiveply.spec.errors import InputError
from fiveply.spec.layout import Layout, Recompute

NEEDED = ("source", "model", "gpu", "num_gpus", "layers", "hidden", "heads", "ffn", "vocab", "seq", "global_batch")
"""Columns without which a table is none."""
GATED = re.compile(
    r"llama|mistral|mixtral|qwen|deepseek|kimi|grok|gpt.?oss|gemma|yi-|olmo|phi|internlm|baichuan|glm", re.I
)
PLAIN = re.compile(r"gpt|mpt|nemotron|megatron|mt-nlg|turing|opt|bloom|bert|falcon|palm", re.I)
GIB = 1 << 30


class Row(msgspec.Struct, frozen=True):
    """One measurement. `number` counts from 1 without the header. Seconds and bytes are None where the row has none."""

    number: int
    source: str
    stratum: str
    spec: ModelSpec
    layout: Layout
    software: Software
    device: str
    devices: int
    node: int
    network: float
    """Bytes/s of one device's share of the network where the row says so, else 0."""
    sequence: int
    global_batch: int
    precision: str
    seconds: float | None
    bytes: float | None
    last_rank: bool
    reserved: bool
    sweep: tuple[str, ...]


class Skipped(msgspec.Struct, frozen=True):
    row: int
    reason: str


class RowError(Exception):
    """A row that can't be scored, and why."""


def read(path: str | Path) -> tuple[list[Row], list[Skipped]]:
    """Rows that can be predicted, and the others with the reason. Raises InputError where the file is no such table."""
    where = str(path)
    try:
        with open(path, newline="", encoding="utf-8-sig") as file:
            reader = csv.DictReader(file, strict=True)
            records, columns = list(reader), reader.fieldnames or []
    except OSError as error:
        raise InputError(f"cannot be read ({error.strerror})", where=where, fix="give a CSV file") from None
    except (csv.Error, UnicodeDecodeError) as error:
        raise InputError(f"not a CSV table ({error})", where=where, fix="write it as comma-separated UTF-8") from None
    if lost := [column for column in NEEDED if column not in columns]:
        raise InputError("a column is missing", where=where, key=lost[0], fix=f"needed are {', '.join(NEEDED)}")
    if not records:
        raise InputError("has no row", where=where, fix="add measurements")
    rows: list[Row] = []
    skipped: list[Skipped] = []
    for number, record in enumerate(records, 1):
        if None in record:
            skipped.append(Skipped(number, "has more cells than the header"))
            continue
        try:
            rows.append(_row(number, {key: (value or "").strip() for key, value in record.items()}))
        except RowError as error:
            skipped.append(Skipped(number, str(error)))
    return rows, skipped


def _number(record: dict[str, str], key: str) -> float | None:
    text = record.get(key, "").replace(",", "")
    if not text:
        return None
    try:
        value = float(text)
    except ValueError:
        raise RowError(f"{key}: '{text}' is not a number") from None
    if not 0 <= value < float("inf"):
        raise RowError(f"{key}: {text} is not a size")
    return value


def _whole(record: dict[str, str], key: str, default: int = 0) -> int:
    value = _number(record, key)
    if value is not None and value != int(value):
        raise RowError(f"{key}: {value} is not a whole number")
    return int(value) if value else default


def _row(number: int, record: dict[str, str]) -> Row:
    for key in ("layers", "hidden", "heads", "vocab", "seq", "global_batch", "num_gpus"):
        if not _whole(record, key):
            raise RowError(f"{key} is not given")
    for text, why in (("SFT", "fine-tuning on packed rows"), ("LoRA", "adapters"), ("not an iteration", "one layer")):
        if text in record.get("notes", ""):
            raise RowError(f"not a pretraining step ({why})")
    spec = architecture(record)
    software = system(record)
    layout = _layout(record, spec, software)
    sequence, batch, devices = (_whole(record, key) for key in ("seq", "global_batch", "num_gpus"))
    seconds = _number(record, "step_time_s") or _number(record, "derived_step_time_s")
    rate = _number(record, "tokens_per_s_per_gpu")
    if seconds is None and rate:
        seconds = batch * sequence / (rate * devices)
    gib = _number(record, "mem_gib")
    if not seconds and not gib:
        raise RowError("measures neither time nor memory")
    precision = _precision(record)
    network = re.search(r"(\d+) ?Gb/?p?s(?: per node| node)", record.get("notes", ""))
    node = _whole(record, "gpus_per_node", 8)
    return Row(
        number=number,
        source=record["source"],
        stratum=_stratum(record, spec, precision),
        spec=spec,
        layout=layout,
        software=software,
        device=device(record["gpu"]),
        devices=devices,
        node=min(node, devices) if device(record["gpu"]) not in ("gb200", "gb300") else 4,
        network=float(network[1]) * 1e9 / 8 / node if network else 0.0,
        sequence=sequence,
        global_batch=batch,
        precision=precision,
        seconds=seconds or None,
        bytes=gib * GIB if gib else None,
        last_rank=record.get("mem_rank", "") == "last",
        reserved=record.get("mem_kind", "") == "reserved" or "reserved" in record.get("notes", ""),
        sweep=tuple(record.get(key, "") for key in ("source", "model", "gpu", "num_gpus", "seq", "global_batch", "precision")),
    )  # fmt: skip


def _precision(record: dict[str, str]) -> str:
    text = record.get("precision", "").lower()
    for pattern, precision in (("fp4", "fp4"), ("fp8|float8", "fp8"), ("fp32|float32", "fp32"), ("tf32", "tf32")):
        if re.search(pattern, text):
            return precision
    if not text or re.search("bf16|bfloat16|fp16|float16|half|16-mixed", text):
        return "bf16"
    raise RowError(f"precision: '{text}' is unknown")


def _recompute(record: dict[str, str]) -> Recompute:
    text = record.get("recompute", "").lower()
    if text in ("", "none", "no", "false", "0", "off"):
        return "none"
    if text.startswith("selective"):
        return "selective"
    if re.match("full|yes|true|1$|all|block|layer|uniform", text):
        return "full"
    raise RowError(f"recompute: '{text}' is unknown")


def _zero(record: dict[str, str]) -> int:
    text = record.get("zero", "").lower()
    if "fsdp" in text:
        return 3
    found = re.search(r"[0-3]", text)
    if text and not found:
        raise RowError(f"zero: '{text}' is unknown")
    return int(found[0]) if found else 0


def _stratum(record: dict[str, str], spec: ModelSpec, precision: str) -> str:
    if precision != "bf16":
        return precision if precision in ("fp32", "tf32") else "float8"
    if not record.get("recompute") or not record.get("precision"):
        return "recompute-unknown"
    if not _whole(record, "micro_batch"):
        return "micro-batch-unknown"
    return "experts-16-bit" if spec.experts else "complete-16-bit"


def device(text: str) -> str:
    """The hardware file of a GPU as tables name it."""
    name = text.lower().replace("_", "-").replace(" ", "-")
    for kind in ("gb300", "gb200", "b300", "b200", "h200", "mi355x", "mi300x"):
        if kind in name:
            return kind
    if "h800" in name or "a800" in name:
        return "h800" if "h800" in name else "a800"
    if "h100" in name:
        return "h100-pcie" if "pcie" in name else "h100-96" if "96gb" in name else "h100"
    if "a100" in name:
        return "a100-40" if "40" in name else "a100-80"
    raise RowError(f"gpu: '{text}' is unknown")


def architecture(record: dict[str, str]) -> ModelSpec:
    """The model of a row; choices that have no column follow from its family, or from its count of parameters."""
    name = record["model"]
    layers, hidden, heads, vocabulary, sequence = (
        _whole(record, key) for key in ("layers", "hidden", "heads", "vocab", "seq")
    )
    ffn = _whole(record, "ffn", 4 * hidden)
    count = _whole(record, "experts")
    notes = record.get("notes", "")
    gated = "SwiGLU" in notes or bool(GATED.search(name)) or (not PLAIN.search(name) and ffn < 3.9 * hidden)
    head = next((size for family, size in (("qwen3", 128), ("gpt.?oss", 64)) if re.search(family, name, re.I)), 0)
    if not head and hidden % heads:
        raise RowError(f"{heads} heads do not divide hidden {hidden}")
    latent = None
    if re.search(r"deepseek.?v[23]|kimi", name, re.I):
        latent, head = Latent(q_rank=1536, kv_rank=512, nope_dim=128, rope_dim=64, value_dim=128), 192
    experts = None
    if count > 1:
        dense = 3 if re.search(r"deepseek", name, re.I) else 1 if re.search(r"kimi", name, re.I) else 0
        inner = 2048 if latent else ffn
        experts = Experts(
            count=count,
            per_token=_whole(record, "topk", 2),
            ffn=inner,
            layers=tuple(range(min(dense, layers), layers)),
            shared_ffn=inner if latent else 0,
            bias=bool(re.search("gpt.?oss", name, re.I)),
        )
    window = 128 if re.search("gpt.?oss", name, re.I) else 0
    kv = _whole(record, "kv_heads", heads)
    if heads % kv:
        raise RowError(f"{kv} key-value heads do not divide {heads} heads")
    older = not gated and not re.search("nemotron", name, re.I)
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
        qk_norm=bool(re.search("qwen3", name, re.I)),
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


def system(record: dict[str, str]) -> Software:
    """The training system of a row and its vintage, from what the source, the evidence and the notes say."""
    text = " ".join(record.get(key, "") for key in ("source", "notes", "fill_evidence"))
    sharded = _zero(record) == 3
    known = (
        ("torchtitan", "torchtitan"),
        ("maxtext", "maxtext"),
        ("llm-foundry|mosaic|composer", "llm-foundry"),
        ("primus", "primus"),
        ("megatron-deepspeed", "megatron-deepspeed"),
        ("deepspeed", "deepspeed" if sharded else "megatron-deepspeed"),
        ("Megatron-Bridge|NVIDIA/NeMo|dgxc|Nemotron-4", "nemo"),
        ("Megatron|Korthikanti|MT-NLG", "deepspeed" if sharded and _vintage(record) < "2022" else "megatron"),
    )
    name = next(
        (name for pattern, name in known if re.search(pattern, text, re.I)), "torchtitan" if sharded else "nemo"
    )
    found = systems.load(name, _vintage(record))
    changes: dict[str, Any] = {}
    if (overlap := record.get("tp_comm_overlap")) in ("0", "1"):
        changes["overlap_tensor"] = TENSOR_OVERLAP * (overlap == "1")
    if re.search(r"async.?tp", record.get("notes", ""), re.I):
        changes["overlap_tensor"] = TENSOR_OVERLAP
    if "full_iteration" in record.get("cuda_graph", "") and not record["cuda_graph"].startswith("none"):
        changes |= {"graphs": True, "experts_stall": 0.0}
    if record.get("precision", "").startswith(
        "amp"
    ):  # autocast over float32 parameters: gathered wide, cast at each use
        changes["gather_bytes"] = 4.0
    if "local transformer" in record.get("notes", ""):  # without Transformer Engine, and what it allocates
        changes["workspace_bytes"] = 0
    elif re.search(r"\bdeterministic\b", record.get("notes", "")):  # cuBLAS gets CUBLAS_WORKSPACE_CONFIG=:4096:8
        changes["workspace_bytes"] = DETERMINISTIC
    if "unfused attention" in record.get("notes", ""):
        changes |= {"flash": False}
    if "fused cross-entropy" in record.get("notes", ""):
        changes["loss"] = "plain"  # its fusion keeps more than it saves
    if re.search(r"\beager\b", record.get("notes", "")):
        changes["memory_passes"] = EAGER * found.memory_passes
    if record.get("recompute", "").startswith("selective:"):
        parts = record["recompute"].removeprefix("selective:").split("+")
        changes["selective"] = tuple(module for part in parts for module in MODULES.get(part, ()))
    return msgspec.structs.replace(found, **changes)


MODULES = {
    "core_attn": ("core",),
    "layernorm": ("norm",),
    "moe_act": ("activation",),
    "mlp": ("mlp", "activation"),
    "moe": ("router", "experts", "activation"),
    "mla_up_proj": ("latent",),
}
"""Megatron-LM's names of what is recomputed, as workload.Module."""
DETERMINISTIC = 70_000_000
"""Bytes that cuBLAS and Transformer Engine allocate in Megatron-LM's deterministic tests: measured, beside model state."""
TENSOR_OVERLAP = 0.4
"""Share of tensor-parallel collectives that userbuffers hide."""
EAGER = 1.8
"""Memory-bound kernels' bytes without torch.compile, relative to those with."""


def _vintage(record: dict[str, str]) -> str:
    """The month that a row was measured, by its container, release, paper or page."""
    source, notes = record.get("source", ""), record.get("notes", "")
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
    return {"a": "2023-06", "h": "2024-12"}.get(record["gpu"].lower()[0], "2026-01")


def _layout(record: dict[str, str], spec: ModelSpec, software: Software) -> Layout:
    tp, pp, cp, ep = (_whole(record, key, 1) for key in ("tp", "pp", "cp", "ep"))
    devices = _whole(record, "num_gpus")
    if devices % (tp * pp * cp):
        raise RowError(f"tp={tp} x pp={pp} x cp={cp} does not divide {devices} devices")
    dp = devices // (tp * pp * cp)
    zero, recompute = _zero(record), _recompute(record)
    schedule = record.get("schedule", "").lower()
    # A remark in brackets is of a whole table; else a schedule that interleaves without saying how many chunks has the fewest
    # that cut the layers evenly.
    chunks = 1
    if "interleaved" in schedule and "(" not in schedule:
        chunks = next((vp for vp in (2, 3, 4) if _stages(spec.layers, pp * vp)), 1)
    vp = _whole(record, "vp", chunks) if pp > 1 else 1
    kind = "zbv" if "zbv" in schedule else "zb" if "zb" in schedule or "zero-bubble" in schedule else "1f1b"
    sequence_parallel = record.get("seq_parallel", "")
    sp = (
        -1
        if tp == 1
        else int(sequence_parallel.lower() in ("1", "true", "yes") if sequence_parallel else software.sequence_parallel)
    )
    # FSDP2 under a pipeline keeps parameters gathered between micro-batches, and reduces once.
    kept = software.name == "torchtitan" and pp > 1 and zero == 3
    instances = re.search(
        r"(\d+) optimizer instances|optimizer_instances=(\d+)", record.get("notes", "") + record.get("fsdp", "")
    )
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
        micro_batch=_whole(record, "micro_batch"),
        recompute=recompute,
        sp=sp,
        etp=(_whole(record, "etp") or (1 if software.vintage >= "2025-05" else tp)) if spec.experts else 1,
    )


def _stages(layers: int, stages: int) -> tuple[int, ...]:
    """Equal stages, or equal where embedding and head count as layers, as Megatron-LM has them; else left to us."""
    if stages == 1:
        return ()
    if layers % stages == 0:
        return (layers // stages,) * stages
    if (layers + 2) % stages == 0:
        each = (layers + 2) // stages
        return (each - 1, *(each,) * (stages - 2), each - 1)
    if (layers + 1) % stages == 0:
        each = (layers + 1) // stages
        return (*(each,) * (stages - 1), each - 1)
    return ()
