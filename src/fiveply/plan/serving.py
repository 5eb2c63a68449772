"""The layout, the replicas and the requests of each that answer most within a bound on latency: what `fiveply plan --serve` says.

Every legal tp, pp and ep is tried with replicas on the devices; for each the most requests a replica that memory and the bound
allow, found by bisection since more requests never make a token quicker. Without a rate, all devices answer as many clients as
they can and the ranking is by tokens a second; with one, the fewest replicas that keep the bound, waiting included, and the
ranking is by devices.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterable
from typing import Any

import msgspec

from fiveply.plan import explain, inference
from fiveply.plan.inference import WIDTHS, Latency, Load, Served
from fiveply.plan.parts import ELEMENT_BYTES
from fiveply.plan.software import FIVEPLY
from fiveply.plan.space import Limits
from fiveply.spec.architecture import ModelSpec
from fiveply.spec.cluster import ClusterSpec
from fiveply.spec.errors import InputError
from fiveply.spec.layout import Layout, divisors
from fiveply.spec.legality import resolve, resolve_for_inference


class Bound(msgspec.Struct, frozen=True):
    """Seconds to the first token and per token after it; requests a second in all, or 0 for as many as can be."""

    ttft: float = math.inf
    tpot: float = math.inf
    rate: float = 0.0

    def kept(self, latency: Latency) -> bool:
        return latency.ttft <= self.ttft and latency.tpot <= self.tpot


class Choice(msgspec.Struct, frozen=True):
    """`layout` with its replicas as dp. `requests`: the most of one replica within bound and memory; `latency` has those that are
    in service. `memory_bytes`: of the fullest rank, weights and the cache of those requests. `limit`: what keeps it from more
    (ttft, tpot, memory, places); `bound_by`: the longest term of a token. `refusal`: "" or why fiveply can't serve so."""

    layout: Layout
    requests: int
    latency: Latency
    tokens_per_second: float
    memory_bytes: int
    capacity: int
    limit: str
    bound_by: str
    refusal: str
    devices: int
    """That it takes: where devices are cores, ranks share all of them."""

    @property
    def per_device(self) -> float:
        return self.tokens_per_second / self.devices


class Answer(msgspec.Struct, frozen=True):
    """`ranked` within the bound; `least`: of one request at a time, whatever the bound, by its time a token."""

    cluster: ClusterSpec
    load: Load
    bound: Bound
    precision: str
    ranked: tuple[Choice, ...]
    least: tuple[Choice, ...]


def answer(
    spec: ModelSpec, cluster: ClusterSpec, load: Load, bound: Bound, *, precision: str = "bf16",
    limits: Limits | None = None, places: int = inference.PLACES, runnable: bool = False,
) -> Answer:  # fmt: skip
    """`places`: most requests of a replica; `runnable`: only what fiveply serves. Raises InputError where nothing fits, or no
    layout is legal."""
    if min(load.prompt, load.output) < 1 or load.prompt + load.output > spec.positions:
        raise InputError(f"{load.prompt} + {load.output} tokens, the model has {spec.positions} positions",
                         where="--prompt", fix="give a prompt and an answer of 1 token or more that fit together")  # fmt: skip
    limits = limits or Limits()
    ranked: list[Choice] = []
    least: list[Choice] = []
    legal = 0
    for layout in _layouts(spec, cluster.count, limits):
        try:
            refusal, _ = "", resolve_for_inference(layout, spec)
        except InputError as error:
            refusal = error.problem
        if precision in WIDTHS:
            refusal = refusal or f"weights in {precision} cannot be served yet"
        if runnable and refusal:
            continue
        legal += 1
        for replicas in _replicas(cluster, layout.tp * layout.pp, bound, limits):
            served = served_on(spec, cluster, replicas * layout.world, precision)
            devices = cluster.count if explain.is_cpu(cluster) else replicas * layout.world
            weigh = functools.partial(_choice, served, layout, replicas, load, bound, refusal, devices)
            fits = inference.held_requests(served, layout, load)
            held = min(places, fits)
            if not held:
                continue
            least.append(weigh(inference.closed(served, layout, load, 1), 1, fits))
            most = _most(lambda n, s=served, o=layout: bound.kept(inference.closed(s, o, load, n)), held)
            found = _latency(served, layout, load, bound, replicas, most) if most else None
            if found is not None and bound.kept(found):
                ranked.append(weigh(found, most, fits))
                if bound.rate:
                    break  # the fewest replicas that do
    if not legal:
        raise InputError("no layout is legal", where="--serve", fix="loosen --fix and --max, or give more devices")
    if not least:
        raise InputError(f"the model does not fit on {cluster} at {precision}", where="--cluster",
                         fix="give more devices, or a narrower --precision")  # fmt: skip

    def order(one: Choice) -> tuple[float, ...]:
        return (one.devices if bound.rate else -one.tokens_per_second, one.latency.tpot)

    return Answer(
        cluster, load, bound, precision, tuple(sorted(ranked, key=order)),
        tuple(sorted(least, key=lambda one: one.latency.tpot)),
    )  # fmt: skip


def unmet(found: Answer) -> str:
    """Why nothing is within the bound: the least times that any layout reaches, and at what rate."""
    quick, first = found.least[0], min(found.least, key=lambda one: one.latency.ttft)
    least = (
        f"alone, a request takes at least {quick.latency.tpot * 1e3:.3g} ms a token ({plain(quick.layout)}, most of it "
        f"{quick.bound_by}) and {first.latency.ttft * 1e3:.3g} ms to the first ({plain(first.layout)})"
    )
    if found.bound.rate and any(found.bound.kept(one.latency) for one in found.least):
        return f"{found.bound.rate:g} requests a second are more than {found.cluster} answers within the bound; {least}"
    return least


def plain(layout: Layout) -> str:
    """Without what serving does not ask about."""
    return str(Layout(dp=layout.dp, tp=layout.tp, pp=layout.pp, ep=layout.ep, etp=layout.etp if layout.ep > 1 else 0))


def served_on(spec: ModelSpec, cluster: ClusterSpec, world: int, precision: str) -> Served:
    """fiveply's own engine on `world` ranks: cache and activations in the type that is computed in."""
    machine = explain.machine_of(cluster, world)
    return Served(spec, machine, FIVEPLY, precision, ELEMENT_BYTES[precision])


def _layouts(spec: ModelSpec, devices: int, limits: Limits) -> Iterable[Layout]:
    """One replica's; experts are split by number, by columns, or both, over its tensor ranks."""
    for tp in limits.choose("tp", range(1, devices + 1)):
        for pp in limits.choose("pp", range(1, min(spec.layers, devices // tp) + 1)):
            for ep in limits.choose("ep", divisors(tp) if spec.experts else (1,)):
                layout = Layout(tp=tp, pp=pp, ep=ep, etp=tp // ep if spec.experts else 0, sp=0 if tp > 1 else -1)
                try:
                    yield resolve(layout, spec, sequence=1, global_batch=1, runtime=False)
                except InputError:
                    continue


def _replicas(cluster: ClusterSpec, ranks: int, bound: Bound, limits: Limits) -> Iterable[int]:
    """All that the devices hold; where devices are cores, fewer are tried too, since their ranks have more cores each."""
    most = cluster.count // ranks
    allowed = limits.choose("dp", range(1, most + 1))
    return allowed if bound.rate or explain.is_cpu(cluster) else allowed[-1:]


def _most(good: Callable[[int], bool], limit: int) -> int:
    """The largest number up to `limit` that is good; 0 where 1 is not."""
    low, high = 0, limit
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if good(middle) else (low, middle - 1)
    return low


def _latency(served: Served, layout: Layout, load: Load, bound: Bound, replicas: int, places: int) -> Latency | None:
    if bound.rate:
        return inference.opened(served, layout, load, bound.rate / replicas, places)
    return inference.closed(served, layout, load, places)


def _choice(
    served: Served, layout: Layout, replicas: int, load: Load, bound: Bound, refusal: str, devices: int, latency: Latency,
    requests: int, fits: int,
) -> Choice:  # fmt: skip
    each = math.ceil((load.prompt + load.output) / inference.BLOCK) * inference.BLOCK
    memory = inference.weight_bytes(served, layout) + requests * each * inference.cache_bytes(served, layout)
    rate = bound.rate or replicas * latency.requests / (latency.ttft + load.output * latency.tpot)
    limit = "memory" if requests == fits else "places"
    if requests < fits and not bound.kept(more := inference.closed(served, layout, load, requests + 1)):
        limit = "tpot" if more.tpot > bound.tpot else "ttft"
    return Choice(
        msgspec.structs.replace(layout, dp=replicas), requests, latency, rate * load.output, round(memory),
        served.machine.memory_bytes, limit, max(latency.terms, key=lambda term: latency.terms[term]), refusal,
        devices,
    )  # fmt: skip


def values(found: Answer) -> dict[str, Any]:
    """What `--json` prints."""
    return {
        "prompt": found.load.prompt,
        "output": found.load.output,
        "plans": [
            {
                "layout": plain(one.layout),
                "replicas": one.layout.dp,
                "devices": one.devices,
                "requests": one.requests,
                "in_service": one.latency.requests,
                "ttft_seconds": one.latency.ttft,
                "waiting_seconds": one.latency.waiting,
                "tpot_seconds": one.latency.tpot,
                "tokens_per_second": one.tokens_per_second,
                "tokens_per_second_per_device": one.per_device,
                "memory_bytes": {"worst": one.memory_bytes, "capacity": one.capacity},
                "limit": one.limit,
                "bound_by": one.bound_by,
                "terms": one.latency.terms,
                "runnable": not one.refusal,
                "reason": one.refusal,
            }
            for one in found.ranked
        ],
    }
