"""Serving predicted: seconds a token and to the first one, requests that memory holds, and waiting, of one layout under one load.

The same counts as training's (`workload`, `units`) priced by the same curves (`cost`, `machine`): a step that decodes `rows`
requests is a forward pass of `rows` tokens, in which weights and cache stream from memory; a prompt is a forward pass as in
training. What a serving system adds stands in its file (`software.Serving`). Service and waiting are kept apart:

- closed: `requests` clients a replica, each asking again as soon as it is answered;
- open: requests arrive as a Poisson process. Those in service follow from Little's law; waiting for a place is the
  Allen-Cunneen approximation of M/G/c (Allen, Probability, Statistics, and Queueing Theory, 1990), exact for c = 1, with
  answers of equal length; waiting for other prompts is M/D/1 (Pollaczek-Khinchine).

Prefill and decode share the ranks: of each token's time, the prompts that arrive meanwhile take their part.
"""

from __future__ import annotations

import functools
import math
from collections import Counter, defaultdict

import msgspec

from fiveply.plan import cost, units, workload
from fiveply.plan.machine import Machine
from fiveply.plan.operations import Operation
from fiveply.plan.parts import ELEMENT_BYTES, Part, describe, kinds, parts
from fiveply.plan.software import Software
from fiveply.spec.architecture import ModelSpec
from fiveply.spec.layout import Layout
from fiveply.spec.placement import stage_units

BLOCK, CHUNK = 16, 512
"""Tokens of a block of the cache and of a step that takes a prompt in, as serve/ has them (`messages.BLOCK`, `Settings.step_tokens`)."""
HOST_SHARE, GPU_SHARE = 0.3, 0.85
"""What caches take where no size is given: of a host's memory all together, and of what the weights leave on a GPU."""
PLACES = 4096
"""Most requests of a replica that are considered."""
STEP_SECONDS, REQUEST_SECONDS = 1e-3, 1e-5
"""Host's time a step and a request of it, before a system's factors: orders of magnitude."""
WIDTHS = {"fp8": 1 + 1 / 128, "fp4": 1 / 2 + 1 / 16}
"""Bytes of a quantised weight with its share of the scales."""


class Served(msgspec.Struct, frozen=True):
    """A model on one kind of device under one serving system. `cache`: bytes of an element of keys and values."""

    spec: ModelSpec
    machine: Machine
    software: Software
    precision: str = "bf16"
    cache: float = 2

    def __hash__(self) -> int:
        """Of what tells most of them apart: a machine has no hash, and equality looks at all fields."""
        return hash((self.spec, self.machine.name, self.software, self.precision, self.cache))


class Load(msgspec.Struct, frozen=True):
    """Tokens of a prompt and of an answer."""

    prompt: int
    output: int

    @property
    def context(self) -> int:
        """Tokens before the one in the middle of an answer."""
        return self.prompt + self.output // 2


class Latency(msgspec.Struct, frozen=True):
    """`requests` in service on each replica; seconds. `waiting`: the part of `ttft` that is no service; `terms` add up to `tpot`."""

    requests: int
    ttft: float
    tpot: float
    waiting: float
    terms: dict[str, float]


# --- what a token takes ---


def precision_of(served: Served, operation: Operation) -> str:
    """Heads and routers stay in 16 bits; where experts are in 4 bits, so does all but them (gpt-oss's and NVIDIA's FP4 files)."""
    if served.precision not in WIDTHS:
        return served.precision
    if operation.module in ("head", "router"):
        return "bf16"
    spared = served.precision == "fp4" and served.spec.experts is not None and operation.kind != "grouped"
    return "bf16" if spared else served.precision


def decode(served: Served, layout: Layout, rows: int, context: int) -> dict[str, float]:
    """Seconds until each of `rows` requests of a replica has one more token, by term; each has `context` tokens.

    `layout` is resolved; its dp stands for ranks that share experts and not attention (1 for separate replicas). A pipeline
    has up to pp cohorts in flight, and a request's next token starts when its last one has left the last stage.
    """
    cohorts = max(1, min(layout.pp, rows))
    each = -(-rows // cohorts)
    stages: list[dict[str, float]] = [defaultdict(float) for _ in range(layout.pp)]
    for number, stage in enumerate(stages):
        for name, count in _parts(served.spec, layout.stages, number):
            for term, seconds in _decoded(served, _bare(layout), name, each, context).items():
                stage[term] += count * seconds
    terms = cost.summed(stages)
    if layout.pp > 1:
        size = each * served.spec.hidden * ELEMENT_BYTES[served.precision]
        hop = cost.call_seconds("send", size, 2, served.machine, layout.tp)
        terms["transfers"] += layout.pp * hop
        slowest = max(sum(stage.values()) for stage in stages) + hop
        terms["bubble"] += max(0.0, cohorts * slowest - sum(terms.values()))
    terms["host"] += served.software.serving.host * STEP_SECONDS
    terms["requests"] += served.software.serving.requests * REQUEST_SECONDS * rows
    return dict(terms)


@functools.lru_cache(maxsize=1 << 10)
def _parts(spec: ModelSpec, stages: tuple[int, ...], stage: int) -> list[tuple[str, int]]:
    """The first of each kind of parts that a stage has, with how many it has."""
    first = kinds(spec)
    return list(Counter(first[name] for name in parts(spec, stages, stage)).items())


def _bare(layout: Layout) -> Layout:
    """What decides a part's work, so that layouts share it."""
    return Layout(dp=layout.dp, tp=layout.tp, ep=layout.ep, etp=layout.expert_tensor, sp=0)


@functools.lru_cache(maxsize=1 << 14)
def _decoded(served: Served, layout: Layout, name: str, rows: int, context: int) -> dict[str, float]:
    machine, habits, part = served.machine, served.software.serving, describe(served.spec, name)
    terms: dict[str, float] = defaultdict(float)
    operations = _forward(served, layout, name, rows, 1)
    for operation in operations:
        if operation.kind == "attention":
            terms["attention"] += habits.attention * _cached(served, layout, part, rows, context)
        elif operation.kind in ("product", "grouped"):
            term, factor = "products", habits.products
            if operation.kind == "grouped":
                term, factor = "experts", habits.experts * machine.experts
            terms[term] += factor * _streamed(served, layout, part, operation, rows)
        else:
            terms["elementwise"] += operation.bytes / (machine.bandwidth * machine.stream)
    launch = machine.launch if served.software.graphs else max(machine.launch, machine.host)
    terms["launch"] += habits.launch * launch * sum(operation.count for operation in operations)
    terms["collectives"] += habits.collectives * _collectives(served, layout, part, rows)
    return dict(terms)


def _forward(served: Served, layout: Layout, name: str, rows: int, sequence: int) -> list[Operation]:
    system = msgspec.structs.replace(served.software, fused_products=True, loss="plain", flash=True)
    case = workload.Case(served.spec, sequence, system, served.precision)
    work = workload.work(case, msgspec.structs.replace(layout, micro_batch=rows), name)
    return [one for one in work.operations if one.phase == "forward" and one.module != "loss"]


def _streamed(served: Served, layout: Layout, part: Part, operation: Operation, rows: int) -> float:
    """A product of few rows: weights stream, all processors share them by cutting k too, in tiles of 64 rows. Of experts, those
    are read that any token of the replica chose, drawn alike."""
    machine, precision = served.machine, precision_of(served, operation)
    groups, (m, n, k) = 1.0, operation.shape[-3:]
    if operation.kind == "grouped" and part.experts is not None:
        chosen, count = rows * layout.dp * part.experts.per_token, part.experts.count
        share = 1 - (1 - part.experts.per_token / count) ** (rows * layout.dp)
        groups, m = max(1.0, operation.shape[0] * share), math.ceil(chosen / (count * share) - 1e-9)
    width = WIDTHS.get(precision, cost.BYTES[precision])
    speed = machine.product(precision)
    read = groups * (width * n * k + ELEMENT_BYTES[served.precision] * m * (n + k))
    moving = read / (machine.bandwidth * machine.product("bf16").memory)
    padded = m if machine.processors == 1 else -(-m // 64) * 64
    computing = groups * 2 * padded * n * k / (machine.flops(precision) * speed.efficiency)
    return operation.count * (computing**4 + moving**4) ** 0.25


def _cached(served: Served, layout: Layout, part: Part, rows: int, context: int) -> float:
    """Attention of one new token each over the cache: read once, by groups of queries; latent attention in its absorbed form,
    every tensor rank reading all of it (DeepSeek-V2, arXiv:2405.04434, 2.1)."""
    machine, heads = served.machine, max(1, part.spec.heads // layout.tp)
    seen = min(part.window, context) if part.window else context
    if part.spec.latent:
        width = part.spec.latent.kv_rank + part.spec.latent.rope_dim
        flops = 2 * heads * (width + part.spec.latent.kv_rank)
    else:
        width = 2 * max(1, part.spec.kv_heads // layout.tp) * part.spec.head_dim
        flops = 4 * heads * part.spec.head_dim
    moving = rows * seen * width * served.cache / (machine.bandwidth * machine.product("bf16").memory)
    peak = machine.flops("bf16" if served.precision in (*WIDTHS, "bf16", "fp16") else served.precision)
    computing = rows * seen * flops / (peak * machine.attention.efficiency)
    return (computing**4 + moving**4) ** 0.25


def _collectives(served: Served, layout: Layout, part: Part, rows: int) -> float:
    """After attention and after the MLP a sum over tensor ranks; of the head its logits are gathered. Ranks that share experts
    beyond them (dp > 1) gather all tokens and sum what comes back."""
    element, machine = ELEMENT_BYTES[served.precision], served.machine
    size, ranks = rows * part.spec.hidden * element, layout.tp * layout.dp

    def call(operation: str, size: float, over: int) -> float:
        return cost.call_seconds(operation, round(size), over, machine, 1)

    if part.what == "head":
        return call("all-gather", rows * part.spec.vocabulary * element, layout.tp)
    if part.what == "embed":
        return call("all-reduce", size, layout.tp)
    if part.what != "layer":
        return 0.0
    seconds = call("all-reduce", size, layout.tp)
    if part.experts is None or layout.dp == 1:
        return 2 * seconds
    whole = size * layout.dp
    return seconds + call("all-gather", whole, ranks) + call("reduce-scatter", whole, ranks)


# --- what a prompt takes ---


@functools.lru_cache(maxsize=1 << 12)
def prefill(served: Served, layout: Layout, prompt: int) -> float:
    """Seconds of one prompt through all stages; each of dp ranks that share experts takes a prompt of its own."""
    return served.software.serving.prefill * sum(
        count * _prompt(served, _bare(layout), name, prompt)
        for name, count in _parts(served.spec, (served.spec.layers,), 0)
    )


@functools.lru_cache(maxsize=1 << 12)
def _prompt(served: Served, layout: Layout, name: str, prompt: int) -> float:
    part = describe(served.spec, name)
    if part.what == "head":  # only the last token is asked about
        return sum(_streamed(served, layout, part, one, 1) for one in _forward(served, layout, name, 1, 1))
    machine = _prompted(served.machine)
    seconds = _collectives(served, layout, part, prompt)
    for operation in _forward(served, layout, name, 1, prompt):
        seconds += cost.operation_seconds(operation, machine, served.software, precision_of(served, operation))
    return seconds


def _prompted(machine: Machine) -> Machine:
    """Quantising inputs is part of a training product's launch; here it stands in the system's factors."""
    products = {
        name: msgspec.structs.replace(one, launch=min(one.launch, machine.launch))
        for name, one in machine.products.items()
    }
    return msgspec.structs.replace(machine, products=products)


# --- memory ---


def weight_bytes(served: Served, layout: Layout) -> int:
    """Of the rank that holds most."""
    spec = served.spec
    narrow = WIDTHS.get(served.precision, cost.BYTES[served.precision])
    wide = 2.0 if served.precision in WIDTHS else narrow
    dense = wide if served.precision == "fp4" and spec.experts else narrow

    def of(unit: str) -> float:
        held = units.held(spec, layout, unit)
        inner = unit.startswith("layers")
        return held.experts * narrow + (held.elements - held.experts) * (dense if inner else wide)

    return round(max(sum(map(of, stage_units(spec, layout.stages, stage))) for stage in range(layout.pp)))


def cache_bytes(served: Served, layout: Layout) -> float:
    """Of one token on the rank that keeps most layers."""
    spec = served.spec
    if spec.latent:
        width = spec.latent.kv_rank + spec.latent.rope_dim
    else:
        width = 2 * max(1, spec.kv_heads // layout.tp) * spec.head_dim
    return max(layout.stages) * width * served.cache


def held_requests(served: Served, layout: Layout, load: Load) -> int:
    """Requests of a replica whose every token has a place in the cache; 0 where the weights alone don't fit."""
    total, weights = served.machine.memory_bytes, weight_bytes(served, layout)
    room = total - served.machine.workspace_bytes - weights
    room = min(room, total * HOST_SHARE) if served.machine.processors == 1 else room * GPU_SHARE
    return max(0, int(room / (cache_bytes(served, layout) * BLOCK))) // -(-(load.prompt + load.output) // BLOCK)


# --- latency under a load ---


def closed(served: Served, layout: Layout, load: Load, requests: int) -> Latency:
    """`requests` clients of one replica, each asking again as soon as it is answered.

    Prompts of the other clients take (requests - 1) x prefill of each client's period T, whatever they interrupt; decoding gets
    the rest, so T = first + output x step / (1 - (requests - 1) x prefill / T), a quadratic equation.
    """
    terms = decode(served, layout, requests, load.context)
    step, prompt = sum(terms.values()), prefill(served, layout, load.prompt)
    service = prompt + -(-load.prompt // CHUNK) * step
    others = (requests - 1) * prompt
    whole = service + others + load.output * step
    period = (whole + math.sqrt(whole**2 - 4 * service * others)) / 2
    tpot = step / (1 - others / period)
    waiting = one_server((requests - 1) / period, prompt)
    return Latency(requests, service + waiting, tpot, waiting, terms | {"prefill": tpot - step})


def opened(served: Served, layout: Layout, load: Load, rate: float, places: int) -> Latency | None:
    """Requests arrive `rate` a second at one replica of `places`; None where they outrun it."""

    def seconds(requests: int) -> float:
        one = closed(served, layout, load, requests)
        return one.ttft - one.waiting + load.output * one.tpot

    if rate * seconds(places) >= places:
        return None
    low, high = 1, places  # the fewest in service that carry the rate (Little's law)
    while low < high:
        middle = (low + high) // 2
        low, high = (low, middle) if rate * seconds(middle) <= middle else (middle + 1, high)
    one = closed(served, layout, load, low)
    waiting = many_servers(rate, seconds(low), places) + one_server(rate, prefill(served, layout, load.prompt))
    return Latency(low, one.ttft - one.waiting + waiting, one.tpot, waiting, one.terms)


def one_server(rate: float, seconds: float) -> float:
    """Mean wait of M/D/1."""
    busy = rate * seconds
    return busy * seconds / (2 * (1 - busy)) if busy < 1 else math.inf


def many_servers(rate: float, seconds: float, servers: int, variation: float = 0.0) -> float:
    """Mean wait of M/G/c by Allen and Cunneen: M/M/c's (Erlang's C) times (1 + `variation`) / 2, where `variation` is the square
    of the service's coefficient of variation."""
    offered = rate * seconds
    if offered >= servers:
        return math.inf
    blocked = 1.0  # Erlang's B, by recursion
    for count in range(1, servers + 1):
        blocked = offered * blocked / (count + offered * blocked)
    waits = blocked / (1 - offered / servers * (1 - blocked))
    return waits * seconds / (servers - offered) * (1 + variation) / 2
