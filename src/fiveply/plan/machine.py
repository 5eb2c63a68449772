"""Machine: devices of one kind and the wires between them, from `hardware/NAME.toml`: figures with source and date.

`fiveply probe` writes the same keys for the machine that it measured.
"""

from __future__ import annotations

import functools
from importlib import resources
from typing import Any, Literal

import msgspec

from fiveply.spec.errors import InputError

Precision = Literal["fp64", "fp32", "tf32", "bf16", "fp16", "fp8", "fp4"]


class Products(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Speed of matrix products (m, k) x (k, n) in one precision: the fastest of several tile shapes, in whole waves.

    seconds = launch + (waves x processors x tile x (k + prologue) x 2 / (peak x efficiency)) or, where longer, bytes /
    (bandwidth x memory).
    """

    efficiency: float
    """Of peak, in a full wave of the largest tile with k far above `prologue`."""
    prologue: float
    """Steps of k that filling and draining one tile costs."""
    quantisation: float
    """0: a part of a wave costs its part; 1: it costs a whole wave."""
    small_tile: float
    """Exponent by which a tile of less operand reuse than 256 x 128 loses efficiency."""
    launch: float
    """Seconds."""
    memory: float
    """Share of the memory bandwidth that operands stream at."""


class Attention(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Fused attention: forward at peak x efficiency x s / (s + half_sequence) x d / (d + half_head) for s keys and heads of d."""

    efficiency: float
    half_sequence: float
    half_head: float
    launch: float
    backward: float = 0.8
    """Speed of backward (2.5 times the FLOPs) relative to forward."""
    older: dict[str, float] = {}
    """Speed of older generations of kernels (`flash1`, `flash2`) relative to the best for the device, which the others are of."""


class Link(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Collectives over one level of the topology. For a call of `bytes` over n ranks with v = factor x bytes / (bandwidth x
    (1 - loss / n)): seconds = start + hop x n + v + sqrt(half x v), where factor is 2(n-1)/n for all-reduce, (n-1)/n else."""

    bandwidth: float
    """Bytes/s a device, one direction."""
    start: float
    hop: float
    loss: float = 0.0
    half: float = 0.0
    """Seconds: the longer, the larger a call must be to reach the bandwidth."""


class Passes(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Operations bound by memory: seconds = launch + bytes / (the machine's bandwidth x stream)."""

    launch: float
    stream: float


class Machine(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Devices of one kind. Bytes, seconds, FLOP/s (dense)."""

    name: str
    memory_bytes: int
    """What a process may allocate of one device."""
    bandwidth: float
    """Of device memory."""
    stream: float
    """Share of `bandwidth` that elementwise kernels reach."""
    peak: dict[str, float]
    """By precision."""
    processors: int
    """Streaming multiprocessors or compute units: what tiles are dealt to."""
    devices_per_node: int
    products: dict[str, Products]
    attention: Attention
    link: dict[str, Link]
    """By collective (`all-reduce`, `all-gather`, `reduce-scatter`, `all-to-all`, `send`) inside a domain."""
    network: Link
    """One device's share of its host's network cards."""
    domain: int = 0
    """Devices that the fast link joins; a host's where 0."""
    launch: float = 3e-6
    """Seconds that a memory-bound kernel takes at least."""
    passes: dict[str, Passes] = {}
    """By phase, where they were measured apart: of `forward` and `input`, of adding up gradients (`weight`), of the optimiser
    (`step`, one launch in all), of zeroing and norming gradients (`sums`, likewise, with all else that is done once a step).
    Elsewhere `launch` and `stream`, and no launch for `weight` and `step`; `sums` are not counted."""
    action: float = 0.0
    """Seconds of the host's around one micro-batch's forward, and around its backward."""
    host: float = 1e-5
    """Seconds of the host's time to launch one kernel."""
    host_bandwidth: float = 25e9
    """Bytes/s between a device and its host's memory, one direction: PCIe 4.0 x16 as reached."""
    experts: float = 1.0
    """Time of experts' products when few rows are decoded, relative to streaming the weights that were chosen."""
    clock: float = 1.0
    """Sustained over the speed of isolated kernels, under the power of a whole step."""
    workspace_bytes: int = 0
    """That libraries allocate on it beyond what they do on an A100."""
    spread: float = 0.08
    """Standard deviation of log(measured / predicted) that not knowing this kind better adds."""
    sources: dict[str, str] = {}
    """Where a figure is from, and when."""

    @property
    def joined(self) -> int:
        """Devices of one fast domain."""
        return self.domain or self.devices_per_node

    def with_threads(self, threads: float) -> Machine:
        """A rank that computes with `threads` devices (CPU cores), or with a part of one."""
        peak = {precision: flops * threads for precision, flops in self.peak.items()}
        memory = int(self.memory_bytes * threads)
        return msgspec.structs.replace(self, peak=peak, bandwidth=self.bandwidth * threads, memory_bytes=memory)

    def flops(self, precision: str) -> float:
        """Peak FLOP/s of `precision`; of the next wider one that the device has."""
        order = ("fp4", "fp8", "bf16", "tf32", "fp32", "fp64")
        start = order.index("bf16" if precision == "fp16" else precision)
        return next(self.peak[p] for p in order[start:] if p in self.peak)

    def product(self, precision: str) -> Products:
        wanted = "bf16" if precision == "fp16" else precision
        return self.products.get(wanted) or self.products.get("bf16") or next(iter(self.products.values()))


@functools.cache
def names() -> list[str]:
    """The kinds that ship."""
    folder = resources.files("fiveply.plan").joinpath("hardware")
    return sorted(f.name.removesuffix(".toml") for f in folder.iterdir() if f.name.endswith(".toml"))


@functools.cache
def load(name: str) -> Machine:
    """The kind `name`; a file may be `like` another and change some keys. Raises InputError for an unknown one."""
    if name not in names():
        raise InputError(
            f"no device '{name}'", where="cluster", fix=f"known: {', '.join(names())}, or a ClusterSpec file"
        )
    return msgspec.convert(_read(name) | {"name": name}, Machine)


def _read(name: str) -> dict[str, Any]:
    text = resources.files("fiveply.plan").joinpath(f"hardware/{name}.toml").read_bytes()
    values: dict[str, Any] = msgspec.toml.decode(text)
    like = values.pop("like", None)
    return _changed(_read(like), values) if like else values


def _changed(base: dict[str, Any], changes: dict[str, Any]) -> dict[str, Any]:
    """`base` with `changes`, table by table."""
    tables = [key for key, value in changes.items() if isinstance(value, dict) and key in base]
    return base | changes | {key: _changed(base[key], changes[key]) for key in tables}
