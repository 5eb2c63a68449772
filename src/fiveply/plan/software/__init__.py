"""What one training system keeps, overlaps and launches, as data: `NAME.toml` beside this file, a vintage a section."""

from __future__ import annotations

import functools
from importlib import resources
from typing import Any, Literal

import msgspec

from fiveply.spec.errors import InputError


class Serving(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """What a serving system makes of its kernels and its host: factors on the terms of `plan/inference.py`."""

    products: float = 1.0
    """Dense products of few rows, on their bytes and FLOPs."""
    experts: float = 1.0
    """The same of experts' products."""
    attention: float = 1.0
    """Attention over the cache."""
    launch: float = 1.0
    """Between kernels, for each operation of the count."""
    collectives: float = 1.0
    """Small collectives, relative to NCCL's: kernels of one's own are quicker."""
    host: float = 1.0
    """Once a step: scheduling, sampling (`inference.STEP_SECONDS`)."""
    requests: float = 1.0
    """For each request of a step (`inference.REQUEST_SECONDS`)."""
    prefill: float = 1.0
    """Prompts, relative to the planner's forward pass."""


class Software(msgspec.Struct, frozen=True, forbid_unknown_fields=True, cache_hash=True):
    """A training system's habits. The first group decides what is computed and kept, the second what state a parameter
    costs, the third what runs beside what, the last how fast kernels follow one another."""

    name: str
    vintage: str = ""
    """Release or month that these values describe."""

    # Computed and kept (workload, footprint).
    flash: bool = True
    """Attention keeps queries, keys, values, output and one float32 a row; else scores, softmax and its dropout mask."""
    dropout: float = 0.0
    """Rate that the system's recipes train with; above 0 a byte an element of mask is kept at each site."""
    gathered_input: bool = False
    """Under sequence parallel the gathered input of a product is kept; else its own part, and gathered again."""
    activation_input: bool = True
    """The MLP's pre-activation is kept as well as what the down product reads; else one is computed from the other."""
    loss: Literal["chunked", "fused", "parallel", "plain"] = "plain"
    """chunked: one chunk of logits at a time, logits never kept. fused: logits in the activation type, gradient in place.
    parallel: a float32 copy that becomes softmax and gradient in place (Megatron-LM's over a split vocabulary). plain: logits,
    a float32 copy, and the softmax beside it."""
    selective: tuple[str, ...] = ("core",)
    """Modules (workload.Module) that `recompute=selective` computes again; Korthikanti's is attention's core."""
    stops_early: bool = False
    """Recomputation stops at the last kept tensor (torch's non-reentrant checkpoint): a block's last collective is not run again."""
    window_masks: bool = False
    """A sliding window's mask stands as a tensor of the activation's type in each layer that has one."""
    alternate: bool = False
    """`recompute=selective` also computes every second product of a layer again (torchtitan's `op` mode)."""
    fused_products: bool = True
    """Queries, keys and values are one product, gate and up another."""
    keeps_quantised: bool = False
    """In 8 and 4 bits a product's input is kept as it is multiplied; else in 16 bits, and quantised again in backward."""
    scales: Literal["output", "activation"] = "output"
    """What a router's chances multiply: an expert's output, or what its down product reads."""
    mask_bytes: int = 1
    """Of one element of a dropout mask; 0: as wide as activations."""
    sequence_parallel: bool = True
    """Wherever tp > 1, unless the layout says otherwise."""

    # State of a parameter, bytes. Under ZeRO the sharded part is divided by the ranks that share it.
    parameter_bytes: float = 2
    """Of the parameters that are computed with."""
    gradient_bytes: float = 4
    optimizer_bytes: float = 12
    """Master copy and moments."""
    reduce_bytes: float = 4
    """Of one gradient element when it is reduced."""
    gather_bytes: float = 2
    """Of one parameter element when it is gathered."""
    separate_part: bool = False
    """At zero 1 the reduced part of the gradients stands beside the whole ones."""
    whole_batch: bool = False
    """All of a step's tokens lie on the device from the start."""
    workspace_bytes: int = 0
    """Allocated once, whatever the model: cuBLAS, fused kernels' scratch."""

    # Overlap: the share of a collective that may hide, where there is computation to hide it.
    overlap_gradients: float = 1.0
    overlap_parameters: float = 1.0
    overlap_tensor: float = 0.0
    overlap_pipeline: float = 0.0
    overlap_experts: float = 0.0
    dispatch_once: bool = False
    """A token goes to each host with experts that it chose once, and is copied there (DeepEP, HybridEP); else once an expert."""
    scatter_transfers: bool = False
    """Without sequence parallel, tensor ranks hand on a part each of a pipeline's boundary and gather it on arrival."""
    network: float = 1.0
    """Bandwidth between hosts that its collectives reach, relative to NCCL's own over all cards."""
    contention: float = 1.15
    """Kernels that run beside a collective slow down by this."""

    # Speed.
    memory_passes: float = 1.0
    """Bytes that memory-bound operations move, relative to perfectly fused ones."""
    kernels: float = 1.5
    """Kernels launched for one operation of the count: casts, copies and small pieces beside it."""
    experts_stall: float = 0.0
    """Seconds a micro-batch that a layer with experts waits for its router's counts on the host, forward and backward
    together; none where a whole step is one graph."""
    graphs: bool = False
    """Kernels are replayed from a graph: no host time each."""
    products: float = 1.0
    """Sustained over isolated speed of matrix products."""
    kernel: Literal["best", "flash2", "flash1"] = "best"
    """Generation of its fused attention: the device's best, FlashAttention-2, or FlashAttention-1 (Triton's is as fast)."""
    straggle: float = 0.002
    """Share of a step lost for each doubling of the hosts: all wait for the slowest."""
    step_seconds: float = 0.0
    """What is left once a step: data loading, logging, norms' synchronisation."""

    serving: Serving = Serving()

    # How sure one may be: standard deviations of log(measured / predicted) on rows that the fit did not see.
    spread: float = 0.08
    memory_spread: float = 0.03


@functools.cache
def names() -> list[str]:
    """The systems that ship."""
    return sorted(f.name.removesuffix(".toml") for f in resources.files(__name__).iterdir() if f.name.endswith(".toml"))


@functools.cache
def load(name: str, vintage: str = "") -> Software:
    """The system `name`, at the newest vintage at or before `vintage` ("YYYY-MM"; the newest by default).
    Raises InputError for an unknown one."""
    if name not in names():
        raise InputError(f"no system '{name}'", where="software", fix=f"known: {', '.join(names())}")
    return msgspec.convert(_read(name, vintage) | {"name": name}, Software)


def _read(name: str, vintage: str) -> dict[str, Any]:
    table = msgspec.toml.decode(resources.files(__name__).joinpath(f"{name}.toml").read_bytes())
    values: dict[str, Any] = _read(table["like"], vintage) if "like" in table else {}
    values |= table.get("always", {})
    sections: dict[str, Any] = table.get("vintage", {})
    for section in sorted(sections):
        if not vintage or section <= vintage or section == min(sections):
            values |= sections[section] | {"vintage": section}
    return values


FIVEPLY = load("fiveply")
