"""Seconds of an operation and of a collective on a machine: a roofline by shape, calibrated. Nothing here counts work.

Matrix products by tiles and waves, attention by sequence and head size, memory-bound operations by bytes, collectives by
latency, bandwidth and where their ranks stand; then what of a collective hides behind the computation beside it. Every
constant is a field of `Machine` (hardware/*.toml) or of `Software` (software/*.toml).
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable, Hashable, Iterable, Mapping
from functools import lru_cache
from typing import Any, NamedTuple

import msgspec

from fiveply.plan import machine as machines
from fiveply.plan.machine import Machine
from fiveply.plan.simulate import StageSeconds
from fiveply.plan.software import Software
from fiveply.plan.traffic import Collective
from fiveply.plan.workload import Operation, Work
from fiveply.spec.cluster import ClusterSpec
from fiveply.spec.errors import InputError
from fiveply.spec.layout import Layout
from fiveply.spec.plan import Interval

TILES = ((256, 128), (128, 256), (128, 128), (256, 64), (64, 256), (128, 64), (64, 128), (64, 64))
"""Rows and columns of the output that one processor computes at a time."""
_REUSE = 256 * 128 / (256 + 128)
BYTES = {"fp64": 8.0, "fp32": 4.0, "tf32": 4.0, "bf16": 2.0, "fp16": 2.0, "fp8": 1.0, "fp4": 0.5}
_FACTORS = {"all-reduce": 2.0, "all-gather": 1.0, "reduce-scatter": 1.0, "all-to-all": 1.0}
NETWORK = 0.8
"""Share of its network cards' bandwidth that a collective across hosts reaches."""
GROUPED = 0.85
"""Speed of grouped products relative to one product of a group's shape: uneven groups, permuted rows."""


def machine(cluster: ClusterSpec) -> Machine:
    """The devices of `cluster`: a kind that ships, changed by what was measured. Raises InputError for an unknown kind."""
    known = cluster.device in machines.names()
    if not known and not cluster.measured:
        return machines.load(cluster.device)
    base = msgspec.to_builtins(machines.load(cluster.device)) if known else {"name": cluster.device}
    try:
        found = msgspec.convert(base | cluster.measured, Machine)
    except msgspec.ValidationError as error:
        raise InputError(str(error), where="cluster", key="measured", fix="write it with fiveply probe") from None
    return msgspec.structs.replace(
        found,
        memory_bytes=cluster.memory_bytes or found.memory_bytes,
        devices_per_node=cluster.devices_per_node or found.devices_per_node,
    )


def used_by(software: Software, machine: Machine) -> Machine:
    """The machine as a system drives it: what its collectives reach of the network."""
    network = msgspec.structs.replace(machine.network, bandwidth=machine.network.bandwidth * software.network)
    return msgspec.structs.replace(machine, network=network)


# --- operations ---


def product_seconds(m: int, n: int, k: int, machine: Machine, precision: str, groups: int = 1) -> float:
    """One matrix product (m, k) x (k, n), or `groups` equal ones in one kernel, on an otherwise idle device."""
    speed = machine.product(precision)
    area = _waves(m, n, groups, machine.processors, speed.quantisation, speed.small_tile)
    computing = area * 2 * (k + speed.prologue) / (machine.flops(precision) * speed.efficiency)
    if n % 64 or k % 64:  # rows that don't start at 128 bytes: loads and stores are split
        computing *= 1.0 + MISALIGNED * (2 if n % 8 or k % 8 else 1)
    moving = groups * (BYTES[precision] * (m + n) * k + 2 * m * n) / (machine.bandwidth * speed.memory)
    return speed.launch + (computing**4 + moving**4) ** 0.25


@lru_cache(maxsize=1 << 16)
def _waves(m: int, n: int, groups: int, processors: int, quantisation: float, small_tile: float) -> float:
    """Output elements that the device's waves of tiles cover, idle processors counted, with the best tile; a tile of less
    operand reuse counts for more."""
    best = math.inf
    for rows, columns in TILES:
        waves = groups * math.ceil(m / rows) * math.ceil(n / columns) / processors
        waves = max(1.0, waves + quantisation * (math.ceil(waves) - waves))
        reuse = (rows * columns / (rows + columns) / _REUSE) ** small_tile
        best = min(best, waves * rows * columns / reuse)
    return best * processors


MISALIGNED = 0.15
"""Slowdown of products whose n or k is no multiple of 64 elements, twice that where it is none of 8: our estimate from the
published rows of GPT shapes (vocabulary 50,257, head size 96)."""


def attention_seconds(operation: Operation, machine: Machine, software: Software, precision: str) -> float:
    """Fused attention, or scores, softmax and two products where the system has no fused one; context-parallel parts of a
    row take the time of their share of its pairs."""
    _, _, keys, _, _, size, value, window = operation.shape
    backward = operation.phase == "input" and not operation.again
    if not software.flash:
        return _plain_attention(operation, machine, software, precision, backward)
    seen = min(window, keys) if window else keys
    head = (size + value) / 2
    speed = machine.attention
    reached = speed.efficiency * seen / (seen + speed.half_sequence) * head / (head + speed.half_head)
    reached *= speed.older.get(software.kernel, 1.0) * (speed.backward if backward else 1.0)
    return speed.launch + operation.flops / (machine.flops("bf16" if BYTES[precision] <= 2 else precision) * reached)


def _plain_attention(
    operation: Operation, machine: Machine, software: Software, precision: str, backward: bool
) -> float:
    """Scores and context as batched products of whole squares, softmax and dropout as kernels between them."""
    rows, queries, keys, heads, _, size, _, _ = operation.shape
    squares = rows * heads
    products = product_seconds(queries, keys, size, machine, precision, squares)
    products += product_seconds(queries, size, keys, machine, precision, squares)
    width = BYTES[precision]
    passes = (3 if backward else 2) * width  # softmax: read and write, in backward its output too
    if software.dropout:
        passes += 2 * width + software.mask_bytes
    moved = squares * queries * keys * passes
    kernels = 2 if software.dropout else 1
    return products * (2 if backward else 1) + moved / (machine.bandwidth * machine.stream) + kernels * machine.launch


def operation_seconds(operation: Operation, machine: Machine, software: Software, precision: str) -> float:
    """All `operation.count` calls, each as long as the device takes."""
    shape = operation.shape
    if operation.kind == "product":
        m, n, k = shape
        one = product_seconds(m, n, k, machine, precision) / (software.products * machine.clock)
        if operation.phase == "weight":  # added to the gradient so far: read and written
            one += _pass("weight", m * n * 2 * software.gradient_bytes, machine)
    elif operation.kind == "grouped":
        groups, m, n, k = shape
        one = product_seconds(max(1, m), n, k, machine, precision, max(1, groups))
        one /= software.products * machine.clock * GROUPED
    elif operation.kind == "attention":
        one = attention_seconds(operation, machine, software, precision) / machine.clock
    else:
        one = _pass(operation.phase, operation.bytes * software.memory_passes, machine)
    return one * operation.count


def _pass(phase: str, moved: float, machine: Machine) -> float:
    """Of one operation bound by memory."""
    if found := machine.passes.get(phase):
        return found.launch + moved / (machine.bandwidth * found.stream)
    return (machine.launch if phase in ("forward", "input") else 0.0) + moved / (machine.bandwidth * machine.stream)


def optimizer_seconds(parameters: int, machine: Machine, software: Software, *, on_host: bool = False) -> float:
    """One optimiser step of the `parameters` that a rank holds: gradient, master copy and moments read, all but the gradient
    written, and the parameter written; the gradients' norm reads them once more. `on_host`: gradients go there and parameters
    come back first and last, and the rest runs at the host's memory, of which a device's share is about its bus (estimate)."""
    moved = optimizer_bytes(parameters, software)
    if on_host:
        return (moved + parameters * (software.reduce_bytes + software.parameter_bytes)) / machine.host_bandwidth
    return _pass("step", moved, machine)


def copied_seconds(collective: Collective, machine: Machine, *, each: bool) -> float:
    """Adding a reduced part to the rank's gradients; and where they are reduced for `each` micro-batch, zeroing the flat buffer
    that they are copied into (the copy takes the place of adding them up). Only where such passes were measured."""
    if collective.phase != "weight" or collective.operation != "reduce-scatter" or "weight" not in machine.passes:
        return 0.0
    return _pass("weight", collective.bytes * (3 / collective.size + each), machine)


def sums_seconds(gradient_bytes: float, machine: Machine) -> float:
    """Zeroing a rank's gradients and taking their norm, and what else is done once a step, where that was measured."""
    return _pass("sums", 2 * gradient_bytes, machine) if "sums" in machine.passes else 0.0


def optimizer_bytes(parameters: int, software: Software) -> float:
    """That one optimiser step reads and writes."""
    return parameters * (2 * software.gradient_bytes + 2 * software.optimizer_bytes + software.parameter_bytes)


# --- collectives ---


def call_seconds(
    operation: str, size_bytes: int, ranks: int, machine: Machine, stride: int, *, copies: int = 1
) -> float:
    """One call over `ranks` ranks, `stride` apart, nothing hidden; `copies` as in `wire`."""
    if ranks < 2 and operation not in ("send", "receive"):
        return 0.0
    return wire(operation, ranks, stride, machine=machine, copies=copies).seconds(size_bytes)


class Wire(NamedTuple):
    """What a call costs by its bytes: seconds = start + v + sqrt(half x v), where v = bytes x each."""

    start: float
    each: float
    half: float = 0.0

    def seconds(self, size_bytes: Any) -> Any:
        """Of a number of bytes, or of an array of them."""
        moving = self.each * size_bytes
        return self.start + moving + (self.half * moving) ** 0.5


def wire(operation: str, ranks: int, stride: int, *, machine: Machine, copies: int = 1) -> Wire:
    """Inside a domain by its link; across, the ring's slowest hop: the network cards of the ranks that share a host. An
    exchange sends `copies` of each row to ranks drawn alike, and those for one host cross to it once."""
    network = machine.network
    if operation in ("send", "receive"):
        link = machine.link["send"] if stride < machine.joined else network
        return Wire(link.start, 1 / link.bandwidth)
    together = max(1, min(ranks, machine.joined // stride)) if stride < machine.joined else 1
    inner = machine.link[operation]
    share = _FACTORS[operation] * (ranks - 1) / ranks
    if together >= ranks:
        return Wire(inner.start + inner.hop * ranks, share / (inner.bandwidth * (1 - inner.loss / ranks)), inner.half)
    reached = network.bandwidth * NETWORK
    if operation == "all-to-all":  # each rank sends to every other; what leaves the domain leaves through its own card
        hosts = ranks / together
        # Other hosts that a row goes to, by its copies.
        outside = (hosts - 1) * (1 - (1 - 1 / hosts) ** copies) / copies / reached
        inside = (1.0 if copies > 1 else together / ranks) / inner.bandwidth
        each = max(outside, inside)
        return Wire(network.start + network.hop * hosts, each, network.half * outside / each)
    hosts = math.ceil(ranks / together)
    start = network.start + inner.hop * together + network.hop * hosts * (2 if operation == "all-reduce" else 1)
    if operation == "all-reduce":  # trees: latency grows with the logarithm
        start = min(start, network.start * (1 + math.log2(hosts)) + inner.hop * together)
    return Wire(start, share / min(reached * together, inner.bandwidth), network.half)


# --- parts ---


class Computed(msgspec.Struct, frozen=True):
    """The computation of one micro-batch of one part: seconds by phase, by term, and what the host launches by phase."""

    phases: dict[str, float]
    terms: dict[str, float]
    kernels: dict[str, float]
    stall: float
    """Seconds of each of forward and backward that the device waits for a router's counts."""
    kept: int
    """Bytes that forward leaves for backward."""

    def __add__(self, other: Computed) -> Computed:
        phases, terms, kernels = (
            summed((getattr(self, key), getattr(other, key))) for key in ("phases", "terms", "kernels")
        )
        return Computed(phases, terms, kernels, self.stall + other.stall, self.kept + other.kept)


def summed(found: Iterable[Mapping[str, float]]) -> dict[str, float]:
    """Name by name; names that are missing count 0, whoever adds to the result."""
    total: dict[str, float] = defaultdict(float)
    for terms in found:
        for name, value in terms.items():
            total[name] += value
    return total


def computed(
    work: Work, machine: Machine, software: Software, precision: str, known: dict[Hashable, float]
) -> Computed:
    """`known` remembers operations of the same shape across parts (of one machine, software and precision)."""
    phases: dict[str, float] = {"forward": 0.0, "input": 0.0, "weight": 0.0}
    terms: dict[str, float] = defaultdict(float)
    kernels: dict[str, float] = defaultdict(float)
    for operation in work.operations:
        phase = operation.phase
        key = (operation.shape, operation.flops, operation.bytes, operation.count, phase, operation.again)
        seconds = known.get(key)
        if seconds is None:
            seconds = known[key] = operation_seconds(operation, machine, software, precision)
        phases[phase] += seconds
        terms[_term(operation)] += seconds
        kernels[phase] += operation.count * software.kernels
    routed = any(operation.module == "router" for operation in work.operations)
    return Computed(phases, terms, kernels, software.experts_stall / 2 if routed else 0.0, work.kept_bytes)


def exchanged(
    part: Computed, calls: Iterable[tuple[Collective, float]], machine: Machine, software: Software, away: bool = False
) -> StageSeconds:
    """A part's computation with what collectives leave exposed, given the seconds of one call of each. `away`: what forward
    keeps goes to the host and comes back, beside the computation of the same phase.

    What may hide a collective is the computation of its own phase; the system's share of overlap says how much of it does, and
    what runs beside a collective slows down by the system's contention.
    """
    computing, phases, terms = part.phases, dict(part.phases), defaultdict(float, part.terms)
    for collective, once in calls:
        seconds = collective.count * (once + copied_seconds(collective, machine, each=True))
        share = overlap(collective.axis, collective.operation, software)
        seconds = exposed(seconds, computing[collective.phase], share, software.contention)
        phases[collective.phase] += seconds
        terms[AXES.get(collective.axis, collective.axis)] += seconds
    for phase in ("forward", "input"):
        if away:
            seconds = exposed(part.kept / machine.host_bandwidth, computing[phase], 1.0, software.contention)
            phases[phase] += seconds
            terms["offload"] += seconds
        if part.stall:
            phases[phase] += part.stall
            terms["experts"] += part.stall
    if not software.graphs:  # the device waits where the host launches more slowly than it computes and exchanges
        for phase, count in part.kernels.items():
            late = max(0.0, count * machine.host - phases[phase])
            phases[phase] += late
            terms["launch"] += late
    return StageSeconds(phases["forward"], phases["input"], phases["weight"], terms=dict(terms))


def exposed(seconds: Any, beside: Any, share: float, contention: float, least: Callable[[Any, Any], Any] = min) -> Any:
    """What of a collective is not hidden by `beside` seconds of computation, with what it slows that down by. Of arrays, whose
    `least` is numpy's."""
    hidden = least(seconds * share, beside / contention)
    return seconds - hidden + hidden * (contention - 1)


AXES = {"kv": "tp", "shard": "zero", "replica": "dp", "etp": "ep"}
"""Under which term an axis's exposed seconds stand, where not under its own name."""


def overlap(axis: str, operation: str, software: Software) -> float:
    """The share of a collective that may hide."""
    axis = AXES.get(axis, axis)
    if axis == "tp":
        return software.overlap_tensor
    if axis == "ep":
        return software.overlap_experts
    if axis in ("zero", "dp"):
        return software.overlap_parameters if operation == "all-gather" else software.overlap_gradients
    return 0.5 if axis == "cp" else 0.0


def _term(operation: Operation) -> str:
    if operation.again:
        return "recompute"
    if operation.module in ("experts", "router"):
        return "experts"
    return {"product": "products", "grouped": "experts", "attention": "attention", "memory": "elementwise"}[
        operation.kind
    ]


# --- what is left, and how sure one may be ---


def residual(seconds: float, machine: Machine, software: Software, layout: Layout) -> float:
    """Seconds of a step of `seconds` that no term explains: a share for each doubling of the hosts, since all wait for the
    slowest; and what is left once a step."""
    hosts = max(1.0, layout.world / machine.devices_per_node)
    return software.step_seconds + seconds * software.straggle * math.log2(hosts)


def interval(
    seconds: float, machine: Machine, software: Software, precision: str = "bf16", experts: bool = False
) -> Interval:
    """10, 50 and 90% of the step time: log-normal, of the errors seen on rows of systems and devices that the fit had left
    out, wider where there were few such rows or none."""
    unsure = {"fp8": 0.08, "fp4": 0.12}.get(precision, 0.0)
    spread = math.hypot(software.spread, machine.spread, unsure, 0.14 * experts)
    return Interval(seconds * math.exp(-NINETIETH * spread), seconds, seconds * math.exp(NINETIETH * spread))


NINETIETH = 1.2816
"""Standard deviations from the middle of a normal distribution to its 90% point."""
