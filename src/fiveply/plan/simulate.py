"""A pipeline's step by its own schedule: the actions that the runtime executes, with each stage's seconds.

Each rank has a lane that computes, in the order of its actions, and one that reduces and gathers meanwhile. A transfer
takes its seconds between the end of what it sends and the start of what needs it, and holds the sender up only where the
system sends synchronously (`blocking`).

`simulate` executes every action and says all that happened. `step_seconds` gives the same end of the step in milliseconds
for any number of micro-batches: with constant costs a schedule becomes periodic (a linear system over maximum and plus;
Baccelli et al. 1992, Synchronization and Linearity), so a short step and its increment by one round are enough.
"""

from __future__ import annotations

from collections.abc import Sequence

import msgspec

from fiveply.pipeline_schedule import Schedule
from fiveply.timeline import Event


class StageSeconds(msgspec.Struct, frozen=True):
    """Seconds of one stage. `forward`, `input`, `weight`: one micro-batch; a whole backward is `input + weight`."""

    forward: float
    input: float
    weight: float
    send: float = 0.0
    """From the end of a forward until the next stage has its output."""
    send_back: float = 0.0
    """From the end of a backward until the previous stage has its gradient."""
    gather: float = 0.0
    """Of the parameters that the first forward needs (zero 3)."""
    reduce: float = 0.0
    """Of its gradients, each time that the schedule says so."""
    reduce_early: float = 0.0
    """How long before the end of the last backward the first gradients are ready to be reduced."""
    reduce_tail: float = 0.0
    """Of the bucket that is ready last: it can't begin before the backward ends."""


class Simulated(msgspec.Struct, frozen=True):
    """A step. By pipeline rank: `busy` computing, `finish` of its last action, `exposed` waiting for the other lane."""

    seconds: float
    busy: tuple[float, ...]
    finish: tuple[float, ...]
    exposed: tuple[float, ...]
    events: tuple[Event, ...]

    @property
    def bubble(self) -> float:
        """Idle over busy time, all ranks together: (pp - 1) / micro-batches for 1F1B of equal stages."""
        return len(self.busy) * self.seconds / sum(self.busy) - 1


def simulate(schedule: Schedule, stages: Sequence[StageSeconds], *, blocking: bool = False) -> Simulated:
    """Execute the schedule event by event; `stages` by global stage. Raises ScheduleError if it deadlocks."""
    raise NotImplementedError


def step_seconds(name: str, pp: int, vp: int, micro_batches: int, stages: Sequence[StageSeconds], *,
                 blocking: bool = False, reduce_each: bool = False) -> float:  # fmt: skip
    """The end of the step as `simulate` would give it."""
    raise NotImplementedError


def memory(schedule: Schedule, simulated: Simulated, kept: Sequence[int]) -> list[list[tuple[float, int]]]:
    """By rank, (time, bytes alive from there on) of activations; `kept`: bytes of one micro-batch, by global stage."""
    raise NotImplementedError
