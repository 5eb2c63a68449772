"""The executor of a schedule: one loop over a rank's actions, which are the very list that was proven, drawn and simulated.

At pp = 1 the same loop runs forward and backward of one micro-batch after the other. The executor owns what is in flight
(inputs, outputs, received tensors) and tells the reducer when a chunk's gradients are complete; it knows no model beyond
`Stage`, whatever a micro-batch is, and no optimiser.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from typing import Any, Protocol

import torch
from torch import Tensor

from fiveply.parallel.data_parallel import GradientReducer, Unit
from fiveply.parallel.split_backward import WeightQueue
from fiveply.pipeline_schedule import Action, Kind, Schedule
from fiveply.world.collectives import Axis
from fiveply.world.mesh import Mesh
from fiveply.world.recorder import Call, Span

Values = tuple[Tensor, ...]
"""What one stage hands to the next for one micro-batch."""


class Stage(Protocol):
    """One stage's part of a model on this rank."""

    stage: int
    last: bool
    units: dict[str, Unit]
    reduces: list[Unit]
    weights: WeightQueue | None

    @property
    def layers(self) -> tuple[int, int] | None:
        """The decoder's, first and last."""
        ...

    def begin(self, micro_batches: Sequence[Any]) -> None:
        """A step over these micro-batches begins."""
        ...

    def arriving(self, batch: Any) -> Values:
        """Empty tensors for what the stage before hands on."""
        ...

    def leaving(self, batch: Any) -> Values:
        """Empty tensors like what this stage hands on: its gradients come back in them."""
        ...

    def forward(self, received: Values, batch: Any, seed: int, step: int | None) -> Values:
        """What it hands on, or on the last stage the sum of the loss. `step` keys dropout; None evaluates."""
        ...


class Model(Protocol):
    """All stages of this rank."""

    mesh: Mesh
    reducer: GradientReducer

    @property
    def chunks(self) -> Sequence[Stage]: ...

    @property
    def units(self) -> Sequence[Unit]: ...

    @property
    def dtype(self) -> torch.dtype: ...

    @property
    def device(self) -> torch.device: ...


FORWARD_KINDS = (Kind.FORWARD, Kind.SEND_FORWARD, Kind.RECEIVE_FORWARD)


class Executor:
    """Runs the actions of this rank for one model; `schedule` is for the whole pipeline."""

    def __init__(self, model: Model, schedule: Schedule, *, seed: int = 0) -> None:
        self.model, self.schedule, self.seed = model, schedule, seed
        self.actions = schedule.ranks[model.mesh.at.pp]
        self.dtype, self.device = model.dtype, model.device
        self._places = {id(entry.parameter): (unit, entry) for unit in model.units for entry in unit.entries}
        self._last_backward = {a.chunk: a.micro_batch for a in self.actions if a.kind is Kind.BACKWARD}
        for index, chunk in enumerate(model.chunks):
            names = [name.removeprefix("layers.") for name in chunk.units if name.startswith("layers.")]
            text = f"layers {names[0]} to {names[-1]}" if len(names) > 1 else f"layer {names[0]}" if names else ""
            model.mesh.recorder.stages[schedule.stage_of(model.mesh.at.pp, index)] = text

    def step(self, micro_batches: Sequence[Any], step: int) -> Tensor:
        """Forward and backward of all micro-batches. Gradients end as sums over the world; returns the sum of the loss over
        this rank's micro-batches: zero except on the rank of the last stage."""
        return self._run(self.actions, micro_batches, step)

    @torch.no_grad()
    def evaluate(self, micro_batches: Sequence[Any]) -> Tensor:
        """The sum of the loss over this rank's micro-batches, by the forward actions of the same schedule."""
        return self._run([action for action in self.actions if action.kind in FORWARD_KINDS], micro_batches, None)

    def _run(self, actions: Sequence[Action], micro_batches: Sequence[Any], step: int | None) -> Tensor:
        assert len(micro_batches) == self.schedule.micro_batches
        self._micro_batches, self._step = micro_batches, step
        exact = torch.float64 if self.dtype == torch.float64 else torch.float32
        self._loss = torch.zeros((), dtype=exact, device=self.device)
        self._inputs: dict[tuple[int, int], Values] = {}
        self._outputs: dict[tuple[int, int], Values] = {}
        self._gradients: dict[tuple[int, int], Values] = {}
        self._sends: deque[tuple[Call, Tensor]] = deque()
        for chunk in self.model.chunks:
            chunk.begin(micro_batches)
        self._post_receives(actions)
        for action in actions:
            with self._span(action):
                self._do(action)
        while self._sends:
            self._sends.popleft()[0].wait()
        return self._loss

    def _span(self, action: Action) -> Span:
        mesh = self.model.mesh
        stage = self.schedule.stage_of(mesh.at.pp, action.chunk) if action.chunk >= 0 else -1
        peer = mesh.down.ranks[action.peer] if action.peer >= 0 and mesh.down is not None else -1
        return mesh.recorder.span(action.kind, action.chunk, action.micro_batch, stage, peer)

    def _do(self, action: Action) -> None:
        if action.kind is Kind.FINISH:
            self.model.reducer.finish()
            return
        chunk, key = self.model.chunks[action.chunk], (action.chunk, action.micro_batch)
        match action.kind:
            case Kind.FORWARD:
                self._forward(chunk, key)
            case Kind.BACKWARD | Kind.INPUT:
                self._backward(chunk, key, whole=action.kind is Kind.BACKWARD)
            case Kind.WEIGHT:
                self._weight(chunk)
            case Kind.SEND_FORWARD:
                self._send(self._outputs[key], self._lane(action), action.peer)
                if not torch.is_grad_enabled():
                    del self._outputs[key]
            case Kind.SEND_BACKWARD:
                self._send(self._gradients.pop(key), self._lane(action), action.peer)
            case Kind.RECEIVE_FORWARD:
                self._inputs[key] = _leaves(self._receive(action))
            case Kind.RECEIVE_BACKWARD:
                self._gradients[key] = self._receive(action)
            case Kind.GATHER:
                for unit in list(chunk.units.values())[:1]:
                    unit.start_gather()
            case Kind.REDUCE:
                self.model.reducer.start(chunk.reduces)

    def _forward(self, chunk: Stage, key: tuple[int, int]) -> None:
        outputs = chunk.forward(self._input(key), self._micro_batches[key[1]], self.seed, self._step)
        if chunk.last:
            self._loss += outputs[0].detach()
        if torch.is_grad_enabled() or not chunk.last:
            self._outputs[key] = outputs
        if not torch.is_grad_enabled():
            self._inputs.pop(key, None)

    def _input(self, key: tuple[int, int]) -> Values:
        """What the previous stage handed on: received, or left by another chunk of this rank (the turn of a V)."""
        previous = self.schedule.adjacent(self.model.mesh.at.pp, key[0], -1)
        if previous is None:
            return ()
        if key not in self._inputs:
            handed = self._outputs[previous[1], key[1]]
            if not torch.is_grad_enabled():
                del self._outputs[previous[1], key[1]]
            self._inputs[key] = _leaves(tuple(x.detach() for x in handed))
        return self._inputs[key]

    def _backward(self, chunk: Stage, key: tuple[int, int], *, whole: bool) -> None:
        reducer = self.model.reducer
        if whole and (self.schedule.reduce_each or self._last_backward[key[0]] == key[1]):
            reducer.completes(chunk.reduces)
        outputs, received = self._outputs.pop(key), self._inputs.pop(key, ())
        gradients = self._gradients.pop(key) if not chunk.last else (torch.ones_like(outputs[0]),)
        pairs = zip((x for x in outputs if x.is_floating_point()), gradients, strict=True)
        wanted = [(x, grad) for x, grad in pairs if x.requires_grad]
        if wanted:
            torch.autograd.backward([x for x, _ in wanted], [grad for _, grad in wanted])
        if chunk.weights is not None:
            chunk.weights.close_micro_batch()
        for unit in chunk.units.values():
            unit.release()
        previous = self.schedule.adjacent(self.model.mesh.at.pp, key[0], -1)
        if previous is not None:
            # What no output of this stage depends on has no gradient, but the other side waits for one.
            back = tuple(torch.zeros_like(x) if x.grad is None else x.grad for x in received if x.is_floating_point())
            self._gradients[key if previous[0] != self.model.mesh.at.pp else (previous[1], key[1])] = back

    def _weight(self, chunk: Stage) -> None:
        assert chunk.weights is not None
        chunk.weights.run(lambda weight, grad: self.model.reducer.add(*self._places[id(weight)], grad))

    # transfers

    def _lane(self, action: Action) -> Axis:
        """Transfers to a higher pipeline rank go one lane, those to a lower one the other."""
        mesh = self.model.mesh
        sending = action.kind in (Kind.SEND_FORWARD, Kind.SEND_BACKWARD)
        upwards = (action.peer > mesh.at.pp) == sending
        lane = mesh.down if upwards else mesh.up
        assert lane is not None
        return lane

    def _send(self, values: Values, lane: Axis, peer: int) -> None:
        for x in values:
            x = _sendable(x.detach().contiguous())
            self._sends.append((lane.send(x, peer), x))
        while self._sends and self._sends[0][0].is_completed():
            self._sends.popleft()

    def _post_receives(self, actions: Sequence[Action]) -> None:
        """Receives are posted one ahead for each peer and lane, in the order of the schedule."""
        self._to_post: dict[int, deque[Action]] = {}
        self._posted: dict[Action, tuple[list[Call], Values]] = {}
        for action in actions:
            if action.kind in (Kind.RECEIVE_FORWARD, Kind.RECEIVE_BACKWARD):
                self._to_post.setdefault(action.peer, deque()).append(action)
        for peer in self._to_post:
            self._post_next(peer)

    def _post_next(self, peer: int) -> None:
        if self._to_post[peer]:
            action = self._to_post[peer].popleft()
            chunk, batch = self.model.chunks[action.chunk], self._micro_batches[action.micro_batch]
            if action.kind is Kind.RECEIVE_FORWARD:
                buffers = chunk.arriving(batch)
            else:
                buffers = tuple(x for x in chunk.leaving(batch) if x.is_floating_point())
            lane = self._lane(action)
            self._posted[action] = ([lane.receive(_sendable(buffer), peer) for buffer in buffers], buffers)

    def _receive(self, action: Action) -> Values:
        works, buffers = self._posted.pop(action)
        self._post_next(action.peer)
        for work in works:
            work.wait()
        return buffers


def _leaves(values: Values) -> Values:
    """Received values as leaves of this stage's graph; whole numbers have no gradient."""
    return tuple(x.requires_grad_(torch.is_grad_enabled() and x.is_floating_point()) for x in values)


def _sendable(x: Tensor) -> Tensor:
    """gloo knows no truth values."""
    return x.view(torch.uint8) if x.dtype is torch.bool else x
