"""Machine: devices of one kind and the wires between them, each figure from `hardware/NAME.toml` with source and date."""

from __future__ import annotations

from typing import Any, Literal

import msgspec

Precision = Literal["fp32", "tf32", "bf16", "fp8", "fp4"]


class Wire(msgspec.Struct, frozen=True):
    """One level of the topology: `alpha` seconds a hop's start, `bandwidth` bytes/s a device and direction that collectives
    reach (bus bandwidth), `ranks` devices that it joins (0: all)."""

    ranks: int
    bandwidth: float
    alpha: float
    half: float
    """Bytes at which half the bandwidth is reached."""


class Machine(msgspec.Struct, frozen=True):
    """Devices of one kind. Sizes in bytes and seconds; `peak` by precision in FLOP/s, dense."""

    name: str
    count: int
    node: int
    """Devices of one host."""
    memory_bytes: int
    peak: dict[str, float]
    bandwidth: float
    """Of device memory, bytes/s."""
    wires: tuple[Wire, ...]
    """Innermost first: NVLink domain, then network."""
    curves: dict[str, Any] = {}

    @classmethod
    def load(cls, name: str, count: int, node: int = 0) -> Machine:
        """`count` devices of kind `name`, `node` a host (the file's own by default); InputError for an unknown kind."""
        raise NotImplementedError
