"""ClusterSpec: the devices a job has, by kind and number: `h100:64`, `cpu:4`, or a file that `fiveply probe` wrote."""

from __future__ import annotations

import tomllib
from pathlib import Path
from typing import Any

import msgspec
import tomli_w

from fiveply.spec.errors import InputError


class ClusterSpec(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Devices of one kind; `memory_bytes` is one device's. A size of 0 is as the hardware file of that device says."""

    device: str
    count: int
    devices_per_node: int = 0
    memory_bytes: int = 0
    measured: dict[str, Any] = {}
    """What `fiveply probe` measured, by the keys of a hardware file; empty for a device known by name."""
    shared: dict[str, dict[str, Any]] = {}
    """The same by number of ranks that share the cores of one host, where devices are cores: each rank has its part of them,
    and they slow each other down."""
    step_seconds: float = 0.0
    """What a step of fiveply's own takes beside computing and communicating: its data, sums, a row of the record."""

    @classmethod
    def parse(cls, text: str, where: str = "--cluster") -> ClusterSpec:
        """From `NAME:COUNT`, or the name of a file; raises InputError. Whether the name is known is the planner's affair."""
        if Path(text).is_file():
            return cls.load(text)
        name, colon, count = text.partition(":")
        if not colon:
            raise InputError(
                f"'{text}' is no cluster", where=where, fix="write NAME:COUNT, as h100:64, or a file's name"
            )
        if not count.isdecimal() or int(count) < 1:
            raise InputError(f"'{count}' is not a number of devices", where=where, fix=f"give 1 or more, as {name}:8")
        return cls(name.lower(), int(count))

    @classmethod
    def load(cls, path: str | Path) -> ClusterSpec:
        """From a TOML file; raises InputError naming file and key."""
        try:
            cluster = msgspec.toml.decode(Path(path).read_bytes(), type=cls)
        except (msgspec.MsgspecError, tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
            raise InputError(
                f"not a cluster ({error})", where=str(path), fix="write it anew with `fiveply probe`"
            ) from None
        cluster.check(str(path))
        return cluster

    def check(self, where: str) -> None:
        for key, least in (("count", 1), ("devices_per_node", 0), ("memory_bytes", 0)):
            if getattr(self, key) < least:
                raise InputError(
                    f"{getattr(self, key)} is too small", where=where, key=key, fix=f"give {least} or more"
                )

    def save(self, path: str | Path) -> None:
        Path(path).write_text(tomli_w.dumps(msgspec.to_builtins(self)))

    def __str__(self) -> str:
        return f"{self.device}:{self.count}"
