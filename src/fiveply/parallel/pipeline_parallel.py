"""The executor of a schedule: one loop over a rank's actions, which are the very list that was proven, drawn and simulated.

At pp = 1 the same loop runs forward and backward of one micro-batch after the other. The executor owns what is in flight
(inputs, outputs, received tensors) and tells the reducer when a chunk's gradients are complete; it knows no model beyond
`Chunk` and no optimiser.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from fiveply.model.attention import RowsAttention
from fiveply.model.dropout import KeyedDropout
from fiveply.parallel.parallelize import Chunk, ParallelModel
from fiveply.parallel.tensor_parallel import begin_step, hidden_shape, token_indices
from fiveply.pipeline_schedule import Action, Kind, Schedule
from fiveply.world.collectives import Axis
from fiveply.world.recorder import Call, Span


@dataclass(frozen=True)
class MicroBatch:
    """Rows of one replica that flow through the pipeline together, packed: T = rows x sequence.

    targets_T: -100 where nothing is predicted. documents_T: the document of each token, or None to attend over whole rows.
    first_token: global index of the first token, for keyed dropout.
    """

    tokens_T: Tensor
    positions_T: Tensor
    targets_T: Tensor
    rows: int
    documents_T: Tensor | None = None
    first_token: int = 0


FORWARD_KINDS = (Kind.FORWARD, Kind.SEND_FORWARD, Kind.RECEIVE_FORWARD)


class Executor:
    """Runs the actions of this rank for one model; `schedule` is for the whole pipeline."""

    def __init__(self, model: ParallelModel, schedule: Schedule, *, seed: int = 0) -> None:
        self.model, self.schedule, self.seed = model, schedule, seed
        self.actions = schedule.ranks[model.mesh.at.pp]
        self.dtype = model.units[0].dtypes.compute
        self.device = model.units[0].grad.device
        self._places = {id(entry.parameter): (unit, entry) for unit in model.units for entry in unit.entries}
        last: dict[int, int] = {}
        for action in self.actions:
            if action.kind is Kind.BACKWARD:
                last[action.chunk] = action.micro_batch
        self._last_backward = last
        for chunk in model.chunks:
            names = list(chunk.decoder.model.layers)
            text = f"layers {names[0]} to {names[-1]}" if len(names) > 1 else f"layer {names[0]}" if names else ""
            model.mesh.recorder.stages[chunk.stage] = text

    def step(self, micro_batches: Sequence[MicroBatch], step: int) -> Tensor:
        """Forward and backward of all micro-batches. Gradients end as sums over the world; returns the sum of the loss over
        this rank's micro-batches: zero except on the rank of the last stage."""
        self._begin(micro_batches, step)
        for action in self.actions:
            with self._span(action):
                self._do(action)
        return self._end()

    @torch.no_grad()
    def evaluate(self, micro_batches: Sequence[MicroBatch]) -> Tensor:
        """The sum of the loss over this rank's micro-batches, by the forward actions of the same schedule."""
        self._begin(micro_batches, None)
        for action in self.actions:
            if action.kind in FORWARD_KINDS:
                with self._span(action):
                    self._do(action)
        return self._end()

    def _begin(self, micro_batches: Sequence[MicroBatch], step: int | None) -> None:
        assert len(micro_batches) == self.schedule.micro_batches
        self._micro_batches, self._step = micro_batches, step
        self._loss = torch.zeros(
            (), dtype=torch.float64 if self.dtype == torch.float64 else torch.float32, device=self.device
        )
        self._arrived: dict[Action, Tensor] = {}
        self._inputs: dict[tuple[int, int], Tensor] = {}
        self._outputs: dict[tuple[int, int], Tensor] = {}
        self._gradients: dict[tuple[int, int], Tensor] = {}
        self._sends: deque[tuple[Call, Tensor]] = deque()
        for chunk in self.model.chunks:
            begin_step(chunk.decoder, micro_batches[0].tokens_T.shape[0])
        self._post_receives()

    def _end(self) -> Tensor:
        while self._sends:
            self._sends.popleft()[0].wait()
        return self._loss

    def _span(self, action: Action) -> Span:
        mesh = self.model.mesh
        stage = self.model.chunks[action.chunk].stage if action.chunk >= 0 else -1
        peer = mesh.down.ranks[action.peer] if action.peer >= 0 and mesh.down is not None else -1
        return mesh.recorder.span(action.kind, action.chunk, action.micro_batch, stage, peer)

    def _do(self, action: Action) -> None:
        chunk = self.model.chunks[action.chunk] if action.chunk >= 0 else None
        key = (action.chunk, action.micro_batch)
        match action.kind:
            case Kind.FORWARD:
                assert chunk is not None
                self._forward(chunk, key)
            case Kind.BACKWARD | Kind.INPUT:
                assert chunk is not None
                self._backward(chunk, key, whole=action.kind is Kind.BACKWARD)
            case Kind.WEIGHT:
                assert chunk is not None
                self._weight(chunk)
            case Kind.SEND_FORWARD:
                self._send(self._outputs[key].detach(), self._lane(action), action.peer)
                if not torch.is_grad_enabled():
                    del self._outputs[key]
            case Kind.SEND_BACKWARD:
                self._send(self._gradients.pop(key), self._lane(action), action.peer)
            case Kind.RECEIVE_FORWARD:
                self._inputs[key] = self._receive(action).requires_grad_(torch.is_grad_enabled())
            case Kind.RECEIVE_BACKWARD:
                self._gradients[key] = self._receive(action)
            case Kind.GATHER:
                assert chunk is not None
                next(iter(chunk.units.values())).start_gather()
            case Kind.REDUCE:
                assert chunk is not None
                self.model.reducer.start(chunk.reduces)
            case Kind.FINISH:
                self.model.reducer.finish()

    def _forward(self, chunk: Chunk, key: tuple[int, int]) -> None:
        batch, decoder = self._micro_batches[key[1]], chunk.decoder
        source = batch.tokens_T if decoder.first else self._input(key)
        spec, training = decoder.spec, self._step is not None
        dropout = None
        if training and spec.dropout:
            assert self._step is not None
            indices_T = token_indices(decoder, batch.first_token, batch.tokens_T.shape[0], self.device)
            dropout = KeyedDropout(spec.dropout, self.seed, self._step, indices_T)
        attention = RowsAttention(batch.rows, batch.documents_T, spec.attention_dropout if training else 0.0)
        output = decoder(source, batch.positions_T, attention, dropout)
        if chunk.head is not None:
            unit = chunk.units["embed" if spec.tied else "head"]
            unit.wait_gather()
            output = chunk.head(output, batch.targets_T)
            unit.release()
            self._loss += output.detach()
        if torch.is_grad_enabled() or not chunk.last:
            self._outputs[key] = output
        if not torch.is_grad_enabled():
            self._inputs.pop(key, None)

    def _input(self, key: tuple[int, int]) -> Tensor:
        """What the previous stage handed on: received, or left by another chunk of this rank (the turn of a V)."""
        if key not in self._inputs:
            previous = self.schedule.adjacent(self.model.mesh.at.pp, key[0], -1)
            assert previous is not None
            handed = self._outputs[previous[1], key[1]]
            if not torch.is_grad_enabled():
                del self._outputs[previous[1], key[1]]
            self._inputs[key] = handed.detach().requires_grad_(torch.is_grad_enabled())
        return self._inputs[key]

    def _backward(self, chunk: Chunk, key: tuple[int, int], *, whole: bool) -> None:
        reducer = self.model.reducer
        if whole and (self.schedule.reduce_each or self._last_backward[key[0]] == key[1]):
            reducer.completes(chunk.reduces)
        output, received = self._outputs.pop(key), self._inputs.pop(key, None)
        if chunk.last:
            output.backward()
        else:
            torch.autograd.backward(output, self._gradients.pop(key))
        if chunk.weights is not None:
            chunk.weights.close_micro_batch()
        for unit in chunk.units.values():
            unit.release()
        if received is not None:
            assert received.grad is not None
            self._gradients[key] = received.grad
            previous = self.schedule.adjacent(self.model.mesh.at.pp, key[0], -1)
            assert previous is not None
            if previous[0] == self.model.mesh.at.pp:
                self._gradients[previous[1], key[1]] = self._gradients.pop(key)

    def _weight(self, chunk: Chunk) -> None:
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

    def _send(self, x: Tensor, lane: Axis, peer: int) -> None:
        x = x.contiguous()
        self._sends.append((lane.send(x, peer), x))
        while self._sends and self._sends[0][0].is_completed():
            self._sends.popleft()

    def _post_receives(self) -> None:
        """Receives are posted one ahead for each peer and lane, in the order of the schedule."""
        kinds = (Kind.RECEIVE_FORWARD,) if self._step is None else (Kind.RECEIVE_FORWARD, Kind.RECEIVE_BACKWARD)
        self._to_post: dict[int, deque[Action]] = {}
        self._posted: dict[Action, tuple[Call, Tensor]] = {}
        for action in self.actions:
            if action.kind in kinds:
                self._to_post.setdefault(action.peer, deque()).append(action)
        for peer in self._to_post:
            self._post_next(peer)

    def _post_next(self, peer: int) -> None:
        if self._to_post[peer]:
            action = self._to_post[peer].popleft()
            chunk = self.model.chunks[action.chunk]
            tokens = self._micro_batches[action.micro_batch].tokens_T.shape[0]
            buffer = torch.empty(
                hidden_shape(tokens, self.model.spec.hidden, chunk.decoder), dtype=self.dtype, device=self.device
            )
            self._posted[action] = (self._lane(action).receive(buffer, peer), buffer)

    def _receive(self, action: Action) -> Tensor:
        work, buffer = self._posted.pop(action)
        self._post_next(action.peer)
        work.wait()
        return buffer
