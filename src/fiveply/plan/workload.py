"""What one rank computes and keeps, counted exactly: every operation and every kept tensor of a part of the model.

Counts are of one micro-batch on one rank under a resolved layout. Nothing here knows seconds: `cost.py` prices operations,
`traffic.py` counts what ranks exchange, `footprint.py` adds kept tensors up over a schedule.

For fiveply's own runtime (`software.FIVEPLY`) products, attention and kept tensors equal the dry run's. What the
runtime lacks is counted as it would compute it: context parallelism gathers keys and values (`gather`) or trades tokens for
heads (`ulysses`), latent attention is expanded to heads (DeepSeek-V2, arXiv:2405.04434), experts see equally many tokens.
"""

from __future__ import annotations

import functools
from collections.abc import Hashable
from typing import get_args

import msgspec

from fiveply.plan.operations import Kept, Module, Operation, OperationKind, Phase, Tally, Work
from fiveply.plan.parts import Case, Part, Split, describe, kinds, parts, seen
from fiveply.plan.software import FIVEPLY, Software
from fiveply.spec.architecture import Experts, ModelSpec
from fiveply.spec.layout import Layout
from fiveply.spec.placement import part as cut

__all__ = [
    "Case", "Kept", "Module", "Operation", "OperationKind", "Part", "Phase", "Split", "Work",
    "describe", "kinds", "model_flops", "parts", "pieces", "seen", "work",
]  # fmt: skip

INDEX_BYTES = 8
CHUNK_ELEMENTS = 1 << 22
"""Logits that the runtime forms at a time (`model/loss.py`)."""


def work(case: Case, layout: Layout, part: str, tp_rank: int = 0) -> Work:
    """One micro-batch through `part` on a rank of `layout` (resolved), whose tensor rank is `tp_rank`: rank 0 holds the largest
    part of every cut. Remembered by kind of part and what the layout changes of it."""
    return _count(describe(case.spec, part), case.split(layout, tp_rank), case.software)


def model_flops(spec: ModelSpec, sequence: int) -> int:
    """Forward and backward of one row of `sequence` tokens without recomputation, backward counted as twice forward: what
    model FLOPs utilisation divides by (Chowdhery et al. 2022)."""
    plain = Case(spec, sequence, msgspec.structs.replace(FIVEPLY, loss="plain"))
    return 3 * sum(work(plain, Layout(micro_batch=1), name).flops("forward") for name in parts(spec, (spec.layers,), 0))


@functools.cache
def _count(part: Part, split: Split, software: Software) -> Work:
    return _COUNTS[part.what](part, split, software)


def _embed(part: Part, split: Split, software: Software) -> Work:
    tally = Tally(split.element, frozenset(), software)
    hidden = part.spec.hidden
    tally.memory("embedding", "embed", 2 * split.tokens * hidden, 2 * split.tokens * hidden)
    if split.tp > 1:  # the tokens' rows in this rank's slice, and which lie elsewhere
        tally.keep("rows", "embed", split.tokens * (INDEX_BYTES + 1))
    if part.spec.rope:
        _dropout(tally, part, split, "embedding")
    # Its gradient is as long as the slice of the vocabulary, whatever tokens there were.
    return tally.work(0, (split.part(part.spec.vocabulary) + split.local) * hidden * split.element)


def _positions(part: Part, split: Split, software: Software) -> Work:
    tally = Tally(split.element, frozenset(), software)
    tally.memory("positions", "embed", 3 * split.local * part.spec.hidden, split.local * part.spec.hidden)
    if split.sequence_parallel and (split.tp_rank + 1) * split.local > split.tokens:
        tally.keep("rows", "embed", split.local * INDEX_BYTES)  # padded to the other ranks' length, hence a copy
    _dropout(tally, part, split, "embedding")
    return tally.work()


def _final_norm(part: Part, split: Split, software: Software) -> Work:
    tally = Tally(split.element, frozenset(), software)
    tally.keep("input", "residual", split.local * part.spec.hidden * split.element)
    _norm(tally, part, split.local, part.spec.hidden, "norm")
    elements, exact = split.local * part.spec.hidden, max(4, split.element)
    # Its output, which only the head reads; in backward the incoming gradient, and in the exact type its copy and three tensors.
    copied = exact if exact != split.element else 0
    return tally.work(elements * exact, elements * (split.element + copied + 3 * exact))


def _head(part: Part, split: Split, software: Software) -> Work:
    tally = Tally(split.element, frozenset(), software)
    return tally.work(*_vocabulary(tally, part, split))


def _layer(part: Part, split: Split, software: Software) -> Work:
    tally = Tally(split.element, _again(split, software), software)
    for half in _halves(part, split):
        tally.add(_half(*half, software))
    columns, weight = _inner(part, split)
    if software.alternate and split.recompute == "selective":
        tally.save_alternate()
    if part.predicts:
        _norm(tally, part, split.local, part.spec.hidden, "head_norm")
        _vocabulary(tally, part, split)
    return tally.work(*_working(part, split, columns, weight))


def _again(split: Split, software: Software) -> frozenset[str]:
    """Modules that backward computes again."""
    if split.recompute == "none":
        return frozenset()
    return frozenset(software.selective) if split.recompute == "selective" and not software.alternate else _EVERYTHING


def _halves(part: Part, split: Split) -> tuple[tuple[bool, Part, Split], ...]:
    """Attention, and what follows it, each with what it depends on: the one not on experts, the other on tokens alone."""
    return (
        (True, msgspec.structs.replace(part, experts=None), msgspec.structs.replace(split, ep=1, etp=1)),
        (False, part, msgspec.structs.replace(split, rows=1, sequence=split.tokens, cp=1, cp_kind="gather")),
    )


@functools.cache
def _half(attention: bool, part: Part, split: Split, software: Software) -> Tally:
    tally = Tally(split.element, _again(split, software), software)
    hidden, local, element = part.spec.hidden, split.local, split.element
    if attention:
        tally.keep("input", "residual", local * hidden * element, always=True)
        if part.predicts:
            _joining(tally, part, split)
        _norm(tally, part, local, hidden, "input_norm")
        (_latent_attention if part.spec.latent else _attention)(tally, part, split)
        _residual(tally, part, split, "attention")
        return tally
    tally.keep("middle", "residual", local * hidden * element)
    _norm(tally, part, local, hidden, "middle_norm")
    if part.experts is None:
        _mlp(tally, part, split, part.spec.ffn, "")
    else:
        _experts(tally, part, split, part.experts)
    _residual(tally, part, split, "mlp")
    return tally


def _inner(part: Part, split: Split) -> tuple[int, int]:
    """Elements of one inner tensor of the MLP, and of one of its matrices (of experts: of all of a projection's)."""
    experts = part.experts
    if experts is None:
        inner = split.part(part.spec.ffn)
        return split.tokens * inner, inner * part.spec.hidden
    inner = -(-experts.ffn // split.etp)
    return split.routed * experts.per_token * split.etp * inner, experts.count // split.ep * inner * part.spec.hidden


def pieces(case: Case, layout: Layout, part: str) -> tuple[tuple[Hashable, Work], ...]:
    """The operations and kept tensors of a part (as `work` has them) by pieces that layouts share, each with all that it depends
    on: a layer's two halves, or the whole."""
    split, described, software = case.split(layout), describe(case.spec, part), case.software
    if described.what != "layer" or described.predicts or software.alternate:
        return ((split, _count(described, split, software)),)
    halves = _halves(described, split)
    return tuple(((attention, one), _half(attention, half, one, software).work()) for attention, half, one in halves)


def _working(part: Part, split: Split, columns: int, weight: int) -> tuple[int, int, int]:
    """Bytes beyond the kept ones at the worst moments of a layer's forward, backward and weight gradients, all in its MLP:
    `columns` elements of one of its inner tensors, `weight` of one of its matrices.

    Forward ends with the product before the sum over ranks, and the new residual stream; recomputed in full it keeps nothing,
    so its inner tensors count. Backward starts with the gradient of the down product's input and weight; then come those of
    the activation, when the tensor after it is gone; then those of the first products, when all inner tensors are. Before, what
    is recomputed in full ends with the down product's output, once more.
    """
    inputs = 2 if part.spec.gated_mlp else 1
    stream, whole = split.local * part.spec.hidden, split.gathered * part.spec.hidden
    forward = (inputs + 1) * columns + 2 * whole + stream if split.recompute == "full" else whole + 2 * stream
    incoming = whole if split.sequence_parallel else 0
    backward = stream + max(
        incoming + columns + weight,
        incoming + (whole if split.recompute == "full" else 0),
        (3 if part.spec.gated_mlp else 1) * columns,
        whole + inputs * weight - columns,
    )
    return forward * split.element, backward * split.element, (inputs + 1) * weight * split.element


_EVERYTHING: frozenset[str] = frozenset(get_args(Module)) - {"head", "loss"}
_COUNTS = {"embed": _embed, "positions": _positions, "layer": _layer, "norm": _final_norm, "head": _head}


def _dropout(tally: Tally, part: Part, split: Split, site: str) -> None:
    """Masks are kept in the activation's type, or in `mask_bytes` of the software."""
    if max(part.spec.dropout, tally.software.dropout):
        size = split.local * part.spec.hidden
        tally.keep(f"{site} mask", "residual", size * (tally.software.mask_bytes or split.element))
        tally.memory(f"{site} dropout", "residual", 3 * size, 3 * size)


def _residual(tally: Tally, part: Part, split: Split, site: str) -> None:
    size = split.local * part.spec.hidden
    _dropout(tally, part, split, site)
    tally.memory(f"{site} residual", "residual", 3 * size, 2 * size)


def _norm(tally: Tally, part: Part, rows: int, size: int, name: str) -> None:
    """Its input is kept by whoever made it; a number a row beside it, two for a layer norm."""
    numbers = 1 if part.spec.norm == "rms" else 2
    tally.keep(f"{name} scale", "norm", rows * numbers * max(4, tally.element))
    tally.memory(name, "norm", 2 * rows * size, 3 * rows * size)


def _entered(tally: Tally, split: Split, hidden: int, name: str) -> None:
    """The normed input of a block's products."""
    rows = split.gathered if tally.software.gathered_input else split.local
    tally.keep(name, "norm", _read(tally, split, rows * hidden))


def _read(tally: Tally, split: Split, elements: int) -> int:
    """Bytes of a tensor that is kept for a product's weight gradient alone."""
    return round(elements * (split.quantised if tally.software.keeps_quantised else split.element))


def _attention(tally: Tally, part: Part, split: Split) -> None:
    tokens, size, element = split.tokens, part.spec.head_dim, split.element
    heads = part.spec.heads // split.tp
    kv_heads = max(1, part.spec.kv_heads // split.tp)
    _entered(tally, split, part.spec.hidden, "attention input")
    tally.products("attention", tokens, part.spec.hidden, q=heads * size, k=kv_heads * size, v=kv_heads * size)
    q, kv = tokens * heads * size, tokens * kv_heads * size
    if part.spec.qkv_bias:
        tally.memory("qkv bias", "attention", 2 * (q + 2 * kv), q + 2 * kv)
    if part.spec.qk_norm:
        tally.keep("unnormed queries and keys", "attention", (q + kv) * element)
        _norm(tally, part, tokens * heads, size, "q_norm")
        _norm(tally, part, tokens * kv_heads, size, "k_norm")
    if part.spec.rope:
        tally.memory("rotary", "attention", 2 * (q + kv), 2 * (q + kv))
    tally.keep("queries", "attention", q * element)
    tally.keep("keys and values", "attention", 2 * kv * element)
    _core(tally, part, split, heads, kv_heads, size, size)
    tally.products("attention", tokens, heads * size, o=part.spec.hidden)
    tally.deferred += element * (2 * split.gathered * part.spec.hidden + 2 * q + 2 * kv)


def _latent_attention(tally: Tally, part: Part, split: Split) -> None:
    """The products to the low ranks are whole on every tensor rank and read its own tokens; those from them are split by heads
    and read all, so that what is gathered is the low ranks (traffic.py)."""
    latent = part.spec.latent
    assert latent is not None
    tokens, local, element = split.tokens, split.local, split.element
    heads, size, value = part.spec.heads // split.tp, latent.nope_dim + latent.rope_dim, latent.value_dim
    tally.keep("attention input", "norm", _read(tally, split, local * part.spec.hidden))
    if latent.q_rank:
        tally.products("attention", local, part.spec.hidden, q_a=latent.q_rank, kv_a=latent.kv_rank + latent.rope_dim)
        tally.keep("query rank", "attention", local * latent.q_rank * element)
        _norm(tally, part, local, latent.q_rank, "q_a_norm")
        tally.keep("normed query rank", "norm", _read(tally, split, split.gathered * latent.q_rank))
        tally.products("latent", tokens, latent.q_rank, q_b=heads * size)
    else:
        tally.products("attention", local, part.spec.hidden, kv_a=latent.kv_rank + latent.rope_dim)
        tally.products("attention", tokens, part.spec.hidden, q=heads * size)
    tally.keep("key-value rank", "attention", local * (latent.kv_rank + latent.rope_dim) * element)
    _norm(tally, part, local, latent.kv_rank, "kv_a_norm")
    tally.keep("normed key-value rank", "norm", _read(tally, split, split.gathered * latent.kv_rank))
    tally.products("latent", tokens, latent.kv_rank, kv_b=heads * (latent.nope_dim + value))
    turned = tokens * (heads + 1) * latent.rope_dim
    tally.memory("rotary", "latent", 2 * turned, 2 * turned)
    tally.keep("queries", "latent", tokens * heads * size * element)
    tally.keep("keys", "latent", tokens * heads * size * element)
    tally.keep("values", "latent", tokens * heads * value * element)
    _core(tally, part, split, heads, heads, size, value)
    tally.products("attention", tokens, heads * value, o=part.spec.hidden)
    ranks = 2 * (latent.q_rank + latent.kv_rank) + latent.rope_dim
    expanded = heads * (size + latent.nope_dim + 2 * value)
    tally.deferred += element * (
        local * part.spec.hidden + split.gathered * (part.spec.hidden + ranks) + tokens * expanded
    )


def _core(tally: Tally, part: Part, split: Split, heads: int, kv_heads: int, size: int, value: int) -> None:
    """Scores, softmax and their product with the values. Context parallelism shares the pairs of a row equally."""
    cp, sequence = split.cp, split.sequence
    pairs = split.rows * seen(sequence, part.window)
    queries = -(-sequence // cp)
    if cp > 1 and split.cp_kind == "ulysses":
        queries, heads, kv_heads = sequence, max(1, heads // cp), max(1, kv_heads // cp)
    else:
        pairs = pairs // cp
    window = part.window if part.window < sequence else 0
    tally.attention((split.rows, queries, sequence, heads, kv_heads, size, value, window), pairs)
    numbers = split.rows * queries * heads
    if window and tally.software.window_masks:
        tally.keep("mask", "core", sequence * sequence * split.element)
    if tally.software.flash:
        tally.keep("log-sum", "core", numbers * max(4, split.element))
    else:
        tally.keep("softmax", "core", numbers * sequence * split.element)
        if tally.software.dropout:
            tally.keep("dropped softmax and mask", "core", numbers * sequence * (split.element + 1))
    output = split.rows * queries * heads * value
    tally.keep("attention output", "attention", output * split.element)
    if tally.software.keeps_quantised and split.quantised < split.element:  # what the next product reads is a copy
        tally.keep("quantised attention output", "attention", _read(tally, split, output))


def _mlp(tally: Tally, part: Part, split: Split, ffn: int, name: str) -> None:
    tokens, inner = split.tokens, split.part(ffn)
    _entered(tally, split, part.spec.hidden, f"{name}mlp input")
    columns = {f"{name}gate": inner, f"{name}up": inner} if part.spec.gated_mlp else {f"{name}up": inner}
    tally.products("mlp", tokens, part.spec.hidden, **columns)
    _activation(tally, part, split, tokens * inner, name, "mlp")
    tally.products("mlp", tokens, inner, **{f"{name}down": part.spec.hidden})
    tally.deferred += split.element * (2 * split.gathered * part.spec.hidden + (1 + len(columns)) * tokens * inner)


def _activation(tally: Tally, part: Part, split: Split, elements: int, name: str, module: Module) -> None:
    inputs = 2 if part.spec.gated_mlp else 1
    tally.memory(f"{name}activation", "activation", (inputs + 1) * elements, (2 * inputs + 1) * elements)
    tally.keep(f"{name}activation input", module, inputs * elements * tally.element)
    if tally.software.activation_input:
        tally.keep(f"{name}activation output", "activation", _read(tally, split, elements))


def _experts(tally: Tally, part: Part, split: Split, experts: Experts) -> None:
    """Router, dispatch, grouped products, combination; and the MLP that every token passes. Tensor ranks route their own
    tokens each; where they split experts too, each sees the tokens of all of them."""
    tokens, element = split.routed, split.element
    chosen = tokens * experts.per_token
    rows = chosen * split.etp
    count, inner = experts.count // split.ep, -(-experts.ffn // split.etp)
    hidden = part.spec.hidden
    if not experts.shared_ffn or (split.sequence_parallel and tally.software.gathered_input):
        tally.keep("router input", "norm", tokens * hidden * element)  # else the shared MLP's input is the same tensor
    tally.products("router", tokens, hidden, router=experts.count)
    tally.memory("choice", "router", 4 * tokens * experts.count, 4 * tokens * experts.count)
    tally.keep("chances", "router", tokens * experts.count * 4)
    tally.keep("chosen", "router", chosen * (INDEX_BYTES + 4))
    tally.memory("dispatch", "experts", 2 * chosen * hidden, 2 * chosen * hidden)
    tally.keep("expert input", "experts", _read(tally, split, rows * hidden))
    columns = {"expert gate": inner, "expert up": inner} if part.spec.gated_mlp else {"expert up": inner}
    tally.products("experts", rows, hidden, groups=count, **columns)
    _activation(tally, part, split, rows * inner, "expert ", "experts")
    # The chances' gradients need what the chances scaled; a gated unit that scales as it multiplies has all of that kept.
    if tally.software.scales == "output":
        tally.keep("expert output", "experts", chosen * hidden * element)
    elif not part.spec.gated_mlp:
        tally.keep("unscaled activation", "activation", rows * inner * element)
    tally.products("experts", rows, inner, groups=count, **{"expert down": hidden})
    tally.memory("combine", "experts", (1 + experts.per_token) * tokens * hidden, 2 * chosen * hidden)
    if experts.shared_ffn:
        _mlp(tally, part, split, experts.shared_ffn, "shared ")
    if experts.shared_gate:
        tally.products("mlp", split.tokens, hidden, shared_gate=1)
    tally.deferred += element * (2 * rows * hidden + (1 + len(columns)) * rows * inner)


def _joining(tally: Tally, part: Part, split: Split) -> None:
    """What a predicting layer does first: two norms, and a product of both side by side (DeepSeek-V3, arXiv:2412.19437)."""
    local, hidden = split.local, part.spec.hidden
    tally.keep("embedded", "residual", local * hidden * split.element)
    tally.keep("joined", "norm", 2 * local * hidden * split.element)
    for name in ("enorm", "hnorm"):
        _norm(tally, part, local, hidden, name)
    tally.products("mlp", local, 2 * hidden, eh=hidden)


def _vocabulary(tally: Tally, part: Part, split: Split) -> tuple[int, int]:
    """Head and cross-entropy; returns what they need beyond what is kept, in forward and in backward.

    The runtime forms chunks of logits, and both gradients beside the loss in forward: those alone are kept, as are three
    products a chunk then. Others keep logits.
    """
    tokens, hidden, element = split.tokens, part.spec.hidden, split.element
    own, exact = split.part(part.spec.vocabulary), max(4, element)
    logits, gathered = tokens * own, split.gathered * hidden * element if split.sequence_parallel else 0
    tally.memory("cross-entropy", "loss", 4 * logits, 2 * logits)
    if tally.software.loss != "chunked":
        tally.products("head", tokens, hidden, logits=own)
        whole = tally.software.gathered_input
        tally.keep("head input", "head", (split.gathered if whole else split.local) * hidden * element)
        tally.keep("softmax", "loss", logits * (element if tally.software.loss == "fused" else 4))
        more = element + 4 if tally.software.loss == "plain" else element  # the others change logits in place
        return logits * more, logits * more + own * hidden * element
    chunk = chunk_rows(part.spec.vocabulary, split.tp)
    for rows, count in ((chunk, tokens // chunk), (tokens % chunk, 1)):
        if rows and count:
            tally.head_chunk(rows, own, hidden, count)
    tally.keep("hidden gradient", "loss", tokens * hidden * element)
    tally.keep("head gradient", "loss", own * hidden * element)
    tally.keep("loss", "loss", exact)
    # A chunk's logits and chances in the exact type, beside the chances of the chunk before and their copy in the activation's;
    # then its own copy, and the gradients of its hidden states with and without rows that have no target.
    formed, rows = exact + (element if element != exact else 0), min(chunk, tokens)
    softmax = rows * own * (2 * exact + (formed if tokens > chunk else 0))
    product = rows * (own * formed + 2 * hidden * element)
    output = split.local * hidden * element
    return output + gathered + max(softmax, product), output


def chunk_rows(vocabulary: int, tp: int) -> int:
    """Tokens whose logits the runtime forms at a time, alike on all tensor ranks."""
    return max(1, CHUNK_ELEMENTS // cut(vocabulary, tp, 0)[1])
