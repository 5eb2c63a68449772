"""Plan: a layout chosen for a model, a cluster and a batch, as a file that every verb takes where it takes a layout.

{"layout": "dp=2,tp=4", "model": "1b", "cluster": {...}, "sequence": 4096, "global_batch": 512}
"""

from __future__ import annotations

from pathlib import Path

import msgspec

from fiveply.spec.cluster import ClusterSpec
from fiveply.spec.errors import InputError
from fiveply.spec.layout import Layout

SUFFIX = ".plan"


class Interval(msgspec.Struct, frozen=True):
    """Seconds within which the truth lies with 80% probability, and the middle."""

    p10: float
    p50: float
    p90: float


class Predicted(msgspec.Struct, frozen=True):
    """What the planner expects of the layout. `terms` add up to `seconds.p50`; `memory_bytes` by pipeline rank."""

    seconds: Interval
    terms: dict[str, float]
    memory_bytes: tuple[int, ...]


class Plan(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """What was planned, and for what; `model` is a preset's name or a path. `requests`: those that a replica serves together, of
    a plan for serving, whose `sequence` is prompt and answer."""

    layout: str
    model: str
    cluster: ClusterSpec
    sequence: int
    global_batch: int
    precision: str = "bf16"
    predicted: Predicted | None = None
    requests: int = 0

    def save(self, path: str | Path) -> None:
        Path(path).write_bytes(msgspec.json.format(msgspec.json.encode(self), indent=1))

    @classmethod
    def load(cls, path: str | Path) -> Plan:
        """Raises InputError for a missing or damaged file, or a layout in it that is none."""
        file = Path(path)
        if not file.is_file():
            raise InputError("no such plan", where=str(path), fix="give a layout such as dp=2,tp=2, or a .plan file")
        try:
            plan = msgspec.json.decode(file.read_bytes(), type=cls)
        except (msgspec.MsgspecError, UnicodeDecodeError) as error:
            raise InputError(f"not a plan ({error})", where=str(path), fix="write it anew") from None
        Layout.parse(plan.layout, f"{path}: layout")
        return plan


def layout_text(text: str) -> str:
    """A layout's text as it is, or the layout of the plan file that `text` names."""
    return Plan.load(text).layout if text.endswith(SUFFIX) else text
