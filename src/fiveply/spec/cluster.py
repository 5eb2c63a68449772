"""ClusterSpec: the devices a job has, by kind and number."""

from __future__ import annotations

import msgspec


class ClusterSpec(msgspec.Struct, frozen=True):
    """Devices of one kind; `memory_bytes` is one device's."""

    device: str
    count: int
    devices_per_node: int
    memory_bytes: int
