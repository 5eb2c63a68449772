"""Megatron-LM's arguments understood: which model, layout and batch they mean, by its own rules (`validate_args` in
megatron/training/arguments.py, `TransformerConfig` in megatron/core, at the commit that the table names)."""

from __future__ import annotations

import ast
import re
from collections.abc import Callable
from typing import Any, cast

import msgspec

from fiveply.plan.dialects import load, written
from fiveply.plan.dialects import read as read_flags
from fiveply.plan.dialects.facts import facts_of
from fiveply.spec.architecture import Experts, Latent, ModelSpec, Rope
from fiveply.spec.errors import InputError
from fiveply.spec.layout import Layout
from fiveply.spec.legality import resolve

WHERE = "--explain-megatron"
VOCABULARIES = {"GPT2BPETokenizer": 50257}
"""Of tokenizers whose size their name fixes."""
RING = "context parallelism by a ring (p2p) is counted as by gathering"


class Given(msgspec.Struct, frozen=True):
    """What a command line asks for; `layout` is resolved, `notes` say what of it was not considered or how it was taken."""

    spec: ModelSpec
    layout: Layout
    sequence: int
    global_batch: int
    precision: str
    order: str
    """Of ranks, fastest axis first."""
    notes: tuple[str, ...]


def read(flags: str, devices: int = 0) -> Given:
    """From arguments of pretrain_gpt.py, with or without the torchrun before them. `devices`: number of ranks where torchrun's
    own flags don't say it. Raises InputError for what is missing, contradictory, or not to be had."""
    dialect = load("megatron")
    facts, flags_given, unread, notes = read_flags(dialect, flags, WHERE)
    if not flags_given:
        raise InputError(
            f"'{flags}' is neither a file nor arguments", where=WHERE, fix="give --num-layers 32 and so on, quoted"
        )
    spec = _model(facts)
    layout, global_batch = _layout(facts, spec, devices)
    batch: dict[str, Any] = {"sequence": _needed(facts, "sequence", "--seq-length"), "global_batch": global_batch}
    layout = resolve(layout, spec, **batch, where=WHERE, runtime=False)
    usual = written(dialect, facts_of(layout, spec, **batch, precision=facts["precision"]))
    overlaps = [flag.key for flag, _ in usual if "overlap" in flag.key and flag.key not in flags_given]
    said = [
        *notes,
        *([RING] if facts["cp_kind"] == "ring" and layout.cp > 1 else []),
        *([f"counted as with {' '.join(overlaps)}"] if overlaps else []),
        *([f"not considered: {' '.join(unread)}"] if unread else []),
    ]
    return Given(spec, layout, **batch, precision=facts["precision"], order=facts["order"], notes=tuple(said))


def _needed(facts: dict[str, Any], fact: str, key: str) -> int:
    if facts[fact] < 1:
        raise InputError("is missing" if not facts[fact] else f"{facts[fact]} is not a size", where=WHERE, key=key,
                         fix="give a whole number from 1")  # fmt: skip
    return facts[fact]


def _model(facts: dict[str, Any]) -> ModelSpec:
    layers, hidden, heads = (
        _needed(facts, fact, key)
        for fact, key in (("layers", "--num-layers"), ("hidden", "--hidden-size"), ("heads", "--num-attention-heads"))
    )
    latent = Latent(*(facts[key] for key in Latent.__struct_fields__)) if facts["latent"] else None
    gated, all_biases = facts["gated"], facts["biases"] == "all"
    ffn = facts["ffn"] or (hidden * 8 // 3 // 64 * 64 if gated else 4 * hidden)
    vocabulary = facts["padded_vocabulary"] or facts["vocabulary"] or VOCABULARIES.get(facts["tokenizer"], 0)
    if not vocabulary:
        raise InputError("is missing", where=WHERE, key="--vocab-size", fix="add it; the tokenizer's file is not read")
    if not facts["head_dim"] and not latent and hidden % heads:
        raise InputError(f"{heads} heads do not divide hidden size {hidden}", where=WHERE, key="--num-attention-heads",
                         fix="give --kv-channels")  # fmt: skip
    left = re.fullmatch(r"\(?\s*(-?\d+)\s*,.*", facts["window"]) if facts["window"] else None
    window = int(left[1]) + 1 if left else 0
    experts = None
    if facts["experts"]:
        experts = Experts(
            count=facts["experts"],
            per_token=facts["experts_per_token"],
            ffn=facts["expert_ffn"] or ffn,
            layers=_chosen(facts["expert_layers"], layers, "--moe-layer-freq", lambda layer, n: layer % n == 0),
            shared_ffn=facts["shared_ffn"],
            bias=all_biases,
        )
    near = facts["window_layers"] or "1" if window > 0 else "0"
    spec = ModelSpec(
        family="megatron",
        vocabulary=vocabulary,
        hidden=hidden,
        layers=layers,
        heads=heads,
        kv_heads=facts["kv_heads"] or 1 if facts["grouped"] and not latent else heads,
        head_dim=latent.nope_dim + latent.rope_dim if latent else facts["head_dim"] or hidden // heads,
        ffn=ffn,
        positions=facts["positions"] or facts["sequence"],
        norm="rms" if facts["norm"] == "RMSNorm" else "layer",
        norm_eps=facts["norm_eps"],
        qk_norm=facts["qk_norm"],
        qkv_bias=facts["biases"] in ("all", "qkv"),
        out_bias=all_biases,
        mlp_bias=all_biases,
        gated_mlp=gated,
        activation="silu" if gated else "gelu",
        rope=Rope(theta=float(facts["rope_theta"]), original_positions=facts["positions"])
        if facts["position_kind"] == "rope"
        else None,
        window=max(0, window),
        window_layers=tuple(range(layers)) if near == "1" else () if near == "0" else
        _chosen(near, layers, "--window-attn-skip-freq", lambda layer, n: (layer + 1) % n != 0),
        experts=experts,
        latent=latent,
        sinks=facts["sinks"],
        predicted=1 + facts["predicted_more"],
        tied=facts["tied"],
        dropout=facts["dropout"],
        attention_dropout=facts["attention_dropout"],
    )  # fmt: skip
    spec.check(WHERE)
    return spec


def _chosen(text: str, layers: int, key: str, every: Callable[[int, int], bool]) -> tuple[int, ...]:
    """Layers that a frequency N or a list expression chooses."""
    if text.isdecimal() and int(text) > 0:
        return tuple(layer for layer in range(layers) if every(layer, int(text)))
    try:
        bits = _evaluate(ast.parse(text.strip("'\""), mode="eval").body)
    except (SyntaxError, TypeError, ValueError):
        bits = None
    if not isinstance(bits, list) or len(bits := cast(list[Any], bits)) != layers:
        raise InputError(f"'{text}' does not choose among {layers} layers", where=WHERE, key=key,
                         fix=f"give a number, or a list of {layers} zeros and ones such as ([0]*1+[1]*{layers - 1})")  # fmt: skip
    return tuple(layer for layer, bit in enumerate(bits) if bit)


def _evaluate(node: ast.expr) -> Any:
    """A list expression of whole numbers, `+` and `*`; raises ValueError for anything else."""
    match node:
        case ast.Constant(value=int()):
            return node.value
        case ast.List():
            return [_evaluate(item) for item in node.elts]
        case ast.BinOp(op=ast.Add()):
            return _evaluate(node.left) + _evaluate(node.right)
        case ast.BinOp(op=ast.Mult()):
            return _evaluate(node.left) * _evaluate(node.right)
        case _:
            raise ValueError


def _layout(facts: dict[str, Any], spec: ModelSpec, devices: int) -> tuple[Layout, int]:
    tp, pp, cp = facts["tp"], facts["pp"], facts["cp"]
    if facts["nodes"] or facts["per_node"]:
        devices = (facts["nodes"] or 1) * (facts["per_node"] or 1)
    if devices < 1:
        raise InputError("the number of ranks is not known", where=WHERE, key="--nproc-per-node",
                         fix="give --cluster NAME:COUNT, or torchrun's --nnodes and --nproc-per-node")  # fmt: skip
    if min(tp, pp, cp) < 1 or devices % (tp * pp * cp):
        raise InputError(
            f"tp x pp x cp = {tp} x {pp} x {cp} = {tp * pp * cp} does not divide {devices} ranks", where=WHERE,
            key="--tensor-model-parallel-size", fix="change a degree or the number of ranks",
        )  # fmt: skip
    dp = devices // (tp * pp * cp)
    micro_batch = _needed(facts, "micro_batch", "--micro-batch-size")
    stages = _stages(facts, spec.layers)
    interleaved = len(stages) > pp
    replicas = facts["replicas"]
    if dp % replicas:
        raise InputError(f"{replicas} does not divide dp={dp}", where=WHERE, key="--num-distributed-optimizer-instances",
                         fix="give a divisor")  # fmt: skip
    etp = facts["etp"]
    layout = Layout(
        dp=dp, tp=tp, pp=pp, cp=cp, ep=facts["ep"], zero=facts["zero"],
        dp_shard=dp // replicas if replicas > 1 and facts["zero"] else 0,
        schedule="interleaved" if interleaved else "1f1b",
        vp=len(stages) // pp if interleaved else 0,
        stages=tuple(stages), micro_batch=micro_batch, recompute=facts["recompute"], offload=facts["offload"],
        sp=-1 if tp == 1 or facts["sp"] else 0,
        cp_kind="ulysses" if facts["cp_kind"] == "ulysses" else "gather", etp=0 if etp in (0, tp) else etp,
    )  # fmt: skip
    return layout, facts["global_batch"] or micro_batch * dp


def _stages(facts: dict[str, Any], layers: int) -> list[int]:
    """Layers of each stage, chunk by chunk."""
    pp = facts["pp"]
    if facts["stage_layout"]:
        return _read_stage_layout(facts["stage_layout"], pp, layers)
    ends = [facts["first_layers"], *[0] * (pp - 2), facts["last_layers"]] if pp > 1 else [facts["first_layers"]]
    # A stage that counts the embedding or the loss as a layer has one layer fewer.
    less = [0] * pp
    less[0] += facts["embedding_counts"]
    less[-1] += facts["loss_counts"]
    free = [index for index, given in enumerate(ends) if not given]
    shared = layers + sum(less[index] for index in free) - sum(ends)
    if shared < 0 or (free and shared % len(free)) or (not free and shared):
        raise InputError(f"{shared} layers do not divide over {len(free)} pipeline ranks", where=WHERE,
                         key="--pipeline-model-parallel-size", fix="give --pipeline-model-parallel-layout")  # fmt: skip
    each = [given or shared // len(free) for given in ends]
    vp = facts["vp"]
    if facts["layers_a_chunk"]:
        vp = each[0] // facts["layers_a_chunk"] or 1
    if vp < 1 or any(count % vp for count in each):
        raise InputError(f"{vp} chunks do not divide {'+'.join(map(str, each))} layers", where=WHERE,
                         key="--num-virtual-stages-per-pipeline-rank", fix="give a divisor")  # fmt: skip
    stages = [count // vp for _ in range(vp) for count in each]
    stages[0] -= less[0] * (0 in free)
    stages[-1] -= less[-1] * (pp - 1 in free)
    return stages


def _read_stage_layout(text: str, pp: int, layers: int) -> list[int]:
    plain = re.sub(r"\(([^)]+)\)\*(\d+)", lambda m: m[1] * int(m[2]), text.replace(",", ""))
    plain = re.sub(r"(.)\*(\d+)", lambda m: m[1] * int(m[2]), plain)
    stages = plain.split("|")
    if set(plain) - set("EtmL|") or len(stages) % pp or plain.count("t") != layers:
        raise InputError(
            f"'{text}' has {plain.count('t')} layers on {len(stages)} stages, the model {layers} on {pp} ranks", where=WHERE,
            key="--pipeline-model-parallel-layout", fix="write E, t, m, L, and | between stages",
        )  # fmt: skip
    return [stage.count("t") for stage in stages]
