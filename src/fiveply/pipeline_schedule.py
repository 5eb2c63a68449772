"""A pipeline schedule as data: for each pipeline rank the list of actions that it carries out in one step.

The runtime executes this list, the planner simulates it, `check` proves it and `picture` draws it: one value, so what is
predicted, proven and drawn is what runs. Nothing here knows tensors, processes or models.

A schedule is made in two steps. A builder gives each rank's *compute order*: which forward or backward comes next. `_lower`
then adds, for every schedule alike, transfers, parameter gathers and gradient reductions. The orders are closed forms from:

- `gpipe`: Huang et al. 2019, GPipe. All forwards, then all backwards.
- `1f1b`: Narayanan et al. 2021, Memory-efficient pipeline-parallel DNN training (PipeDream-Flush). A backward as soon as
  there is one, so that only min(micro-batches, pp - rank) activations are alive.
- `interleaved`: Narayanan et al. 2021, Efficient large-scale language model training (Megatron-LM). vp chunks a rank.
- `zb`: Qi et al. 2024, Zero bubble pipeline parallelism, its ZB-H1. Backward split in input and weight gradient.
- `zbv`: the same paper's ZB-V: two chunks a rank, stages folded in a V, so that the last stage's rank is the first's.

Terms: a *stage* is one of the pp * vp consecutive parts of the model, a *chunk* is a stage's index on the rank that holds it.
At pp = 1 every schedule runs forward and backward of one micro-batch after the other: there is no bubble to trade memory for.
"""

from __future__ import annotations

import enum
from collections import defaultdict, deque
from collections.abc import Callable, Iterable, Mapping
from itertools import accumulate
from typing import NamedTuple, NoReturn

import msgspec

from fiveply.spec.layout import Layout
from fiveply.timeline import Event


class Kind(enum.StrEnum):
    FORWARD = "forward"
    BACKWARD = "backward"  # whole: input and weight gradient
    INPUT = "input"  # input gradient only
    WEIGHT = "weight"  # the weight gradient that an INPUT deferred
    SEND_FORWARD = "send_forward"  # activation to the next stage; never blocks
    RECEIVE_FORWARD = "receive_forward"  # activation from the previous stage; blocks
    SEND_BACKWARD = "send_backward"  # gradient to the previous stage; never blocks
    RECEIVE_BACKWARD = "receive_backward"  # gradient from the next stage; blocks
    GATHER = "gather"  # start gathering a chunk's parameters, one compute action ahead; they stay to the last gradient
    REDUCE = "reduce"  # start reducing a chunk's gradients
    FINISH = "finish"  # wait for all reductions


class Action(NamedTuple):
    """`chunk` is local to the rank, `peer` the pipeline rank at the other side; -1 where there is none.

    `micro_batch` is -1 where an action is about all of them: GATHER, FINISH, and REDUCE unless it stands after each.
    """

    kind: Kind
    chunk: int
    micro_batch: int
    peer: int = -1

    def __str__(self) -> str:
        numbers = zip(("chunk", "micro-batch", "peer"), self[1:], strict=True)
        return " ".join([self.kind, *(f"{name} {number}" for name, number in numbers if number >= 0)])


class ScheduleError(ValueError):
    """A schedule that is incomplete, out of order, mismatched or deadlocked: names rank, action and reason."""


class Schedule(msgspec.Struct, frozen=True):
    name: str
    pp: int
    vp: int
    micro_batches: int
    ranks: tuple[tuple[Action, ...], ...]
    gather: bool = False
    reduce_each: bool = False

    @property
    def stages(self) -> int:
        return self.pp * self.vp

    def stage_of(self, rank: int, chunk: int) -> int:
        """Global stage of a rank's chunk: round-robin, or folded in a V for zbv."""
        return 2 * self.pp - 1 - rank if self.name == "zbv" and chunk == 1 else chunk * self.pp + rank

    def rank_of(self, stage: int) -> tuple[int, int]:
        """(rank, chunk) that holds a global stage."""
        chunk, rank = divmod(stage, self.pp)
        return (self.pp - 1 - rank if self.name == "zbv" and chunk == 1 else rank), chunk

    def adjacent(self, rank: int, chunk: int, step: int) -> tuple[int, int] | None:
        """(rank, chunk) of the next (`step` 1) or previous (-1) stage; None beyond the model's ends."""
        stage = self.stage_of(rank, chunk) + step
        return self.rank_of(stage) if 0 <= stage < self.stages else None


COMPUTE = (Kind.FORWARD, Kind.BACKWARD, Kind.INPUT, Kind.WEIGHT)
Costs = Mapping[Kind, float] | Callable[[int, Action], float]

# What a compute action hands on: the direction in stages, the kind that sends it, the kind that receives it.
_HANDS_ON = {
    Kind.FORWARD: (1, Kind.SEND_FORWARD, Kind.RECEIVE_FORWARD),
    Kind.BACKWARD: (-1, Kind.SEND_BACKWARD, Kind.RECEIVE_BACKWARD),
    Kind.INPUT: (-1, Kind.SEND_BACKWARD, Kind.RECEIVE_BACKWARD),
}
_SENDS = {send: (step, receive) for step, send, receive in _HANDS_ON.values()}
_RECEIVES = (Kind.RECEIVE_FORWARD, Kind.RECEIVE_BACKWARD)
_COMPLETES_GRADIENT = (Kind.BACKWARD, Kind.WEIGHT)
_FINISH = Action(Kind.FINISH, -1, -1)


def build(
    name: str, pp: int, micro_batches: int, vp: int = 1, *, gather: bool = False, reduce_each: bool = False,
    transfers: bool = True,
) -> Schedule:  # fmt: skip
    """The schedule `name` for `pp` ranks of `vp` chunks; any number of micro-batches from 1.

    `gather` adds a GATHER for every chunk (zero 3); `reduce_each` puts a REDUCE after every micro-batch's gradient instead
    of after the chunk's last one (zero 2 and 3). Without `transfers` it is no schedule to execute, but enough where who needs
    what is known. Raises ScheduleError where the numbers don't fit the name.
    """
    if name not in _ORDERS:
        raise ScheduleError(f"unknown schedule '{name}'; choose one of {', '.join(_ORDERS)}")
    if pp < 1 or micro_batches < 1:
        raise ScheduleError(f"{name}: pp={pp} and micro_batches={micro_batches} must be 1 or more")
    if not (vp >= 2 if name == "interleaved" else vp == (2 if name == "zbv" else 1)):
        raise ScheduleError(f"{name} does not run {vp} chunks a rank: interleaved takes 2 or more, zbv 2, others 1")
    if pp == 1:
        chunks = range(vp)
        steps = [(Kind.FORWARD, chunk) for chunk in chunks] + [(Kind.BACKWARD, chunk) for chunk in reversed(chunks)]
        orders = [_number(steps * micro_batches, micro_batches)]
    else:
        orders = [_ORDERS[name](rank, pp, micro_batches, vp) for rank in range(pp)]
    return _lower(Schedule(name, pp, vp, micro_batches, (), gather, reduce_each), orders, transfers)


def of_layout(layout: Layout, micro_batches: int) -> Schedule:
    """As the ranks of `layout` run it: zero 3 gathers, zero 2 and 3 reduce every micro-batch."""
    return build(
        layout.schedule, layout.pp, micro_batches, layout.chunks, gather=layout.zero == 3, reduce_each=layout.zero >= 2
    )


_F, _B, _I, _W = ((kind, 0) for kind in COMPUTE)
_F1, _I1, _W1 = ((kind, 1) for kind in (Kind.FORWARD, Kind.INPUT, Kind.WEIGHT))


def _number(steps: Iterable[tuple[Kind, int]], micro_batches: int) -> list[Action]:
    """Give each (kind, chunk) its next micro-batch, and drop those beyond the last: so builders need no special ends."""
    count: dict[tuple[Kind, int], int] = {}
    order: list[Action] = []
    for step in steps:
        number = count.get(step, 0)
        if number < micro_batches:
            order.append(Action(*step, number))
        count[step] = number + 1
    return order


def _gpipe(rank: int, pp: int, micro_batches: int, vp: int) -> list[Action]:
    return _number([_F] * micro_batches + [_B] * micro_batches, micro_batches)


def _one_f_one_b(rank: int, pp: int, micro_batches: int, vp: int) -> list[Action]:
    return _number([_F] * (pp - 1 - rank) + [_F, _B] * micro_batches, micro_batches)


def _interleaved(rank: int, pp: int, micro_batches: int, vp: int) -> list[Action]:
    """Micro-batches go in rounds: a round passes through all chunks before the next begins.

    Megatron's rounds have pp micro-batches, so pp must divide their number. A round shorter than pp waits for itself at
    each wrap from the last rank to the first (and can deadlock), a longer one only holds more activations. So there are
    floor(micro_batches / pp) rounds, equal within one, longest first because it sets the warm-up: the bubble is Megatron's
    (pp - 1) / (vp * micro_batches) for every number from pp on.
    """
    rounds = max(1, micro_batches // pp)
    sizes = [micro_batches // rounds + (index < micro_batches % rounds) for index in range(rounds)]
    forwards: list[Action] = []
    backwards: list[Action] = []
    first = 0
    for size in sizes:
        members = range(first, first + size)
        forwards += [Action(Kind.FORWARD, chunk, member) for chunk in range(vp) for member in members]
        backwards += [Action(Kind.BACKWARD, chunk, member) for chunk in reversed(range(vp)) for member in members]
        first += size
    warmup = min(len(forwards), 2 * (pp - 1 - rank) + (vp - 1) * sizes[0])
    order = forwards[:warmup]
    for index, backward in enumerate(backwards):
        order += forwards[warmup + index : warmup + index + 1]
        order.append(backward)
    return order


def _zb(rank: int, pp: int, micro_batches: int, vp: int) -> list[Action]:
    """1F1B whose weight gradients lag `rank` micro-batches behind: pp - rank activations as in 1F1B, and `rank` more that
    wait for their weight gradient, so pp on every rank; what lags fills the drain, where 1F1B idles."""
    lagging = min(rank, micro_batches)
    steps = [_F] * (pp - 1 - rank) + [_F, _I] * lagging + [_F, _I, _W] * (micro_batches - lagging) + [_W] * lagging
    return _number(steps, micro_batches)


def _zbv(rank: int, pp: int, micro_batches: int, vp: int) -> list[Action]:
    """Fill the V down and up, run steadily, drain, then the weight gradients left. At most 2 * pp chunk activations.

    The phases need 2 * pp - 1 micro-batches to meet; with fewer, those beyond the last are left out.
    """
    down, up = [_F, _I, _W], [_F1, _I1, _W1]
    steady = max(micro_batches, 2 * pp - 1) - pp
    steps = [_F] * (2 * (pp - rank) - 1) + [_F1, _F] * rank + up * (pp - rank)
    steps += (down + up) * steady
    steps += [_I, _I1] * rank + [_I, _W] * (pp - rank) + [_W1] * rank + [_W] * rank
    return _number(steps, micro_batches)


_ORDERS = {"gpipe": _gpipe, "1f1b": _one_f_one_b, "interleaved": _interleaved, "zb": _zb, "zbv": _zbv}


def _send_after(shape: Schedule, rank: int, compute: Action) -> Action | None:
    """The send that follows a compute action; none at the model's ends, and none where the adjacent stage is on the same
    rank (the turn of the V): there the runtime hands over locally."""
    if compute.kind not in _HANDS_ON:
        return None
    step, send, _ = _HANDS_ON[compute.kind]
    to = shape.adjacent(rank, compute.chunk, step)
    return Action(send, compute.chunk, compute.micro_batch, to[0]) if to and to[0] != rank else None


def _receive_of(shape: Schedule, rank: int, send: Action) -> Action:
    """The receive on rank `send.peer` that takes what `rank` sends."""
    step, receive = _SENDS[send.kind]
    return Action(receive, shape.rank_of(shape.stage_of(rank, send.chunk) + step)[1], send.micro_batch, rank)


def _needed_by(shape: Schedule, rank: int, compute: Action) -> Action | None:
    """What a compute action takes over from the adjacent stage: a receive, or a compute action of an own chunk."""
    if compute.kind not in _HANDS_ON:
        return None
    step, _, receive = _HANDS_ON[compute.kind]
    source = shape.adjacent(rank, compute.chunk, -step)
    if source and source[0] == rank:
        return Action(compute.kind, source[1], compute.micro_batch)
    return Action(receive, compute.chunk, compute.micro_batch, source[0]) if source else None


def _lower(shape: Schedule, orders: list[list[Action]], transfers: bool) -> Schedule:
    """Add to the compute orders all that surrounds them.

    SEND stands directly after the compute action that produces, RECEIVE directly before the one that needs. One exception
    keeps both ends of every ordered pair of ranks in one order, as a backend that matches by order demands: what the peer
    sends ahead of the thing needed now is received ahead of it too. That costs no wait, since it was sent earlier.
    """
    incoming: dict[tuple[int, int], list[Action]] = defaultdict(list)  # (source, destination) -> receives, as sent
    for rank, order in enumerate(orders if transfers else ()):
        for compute in order:
            if send := _send_after(shape, rank, compute):
                incoming[rank, send.peer].append(_receive_of(shape, rank, send))

    ranks: list[tuple[Action, ...]] = []
    for rank, order in enumerate(orders):
        queues = {source: iter(receives) for (source, to), receives in incoming.items() if to == rank}
        placed: set[Action] = set()  # gathers and receives
        gradients_left = [shape.micro_batches] * shape.vp
        actions: list[Action] = []
        for index, compute in enumerate(order):
            for soon in order[index : index + 2] if shape.gather else ():
                if (gather := Action(Kind.GATHER, soon.chunk, -1)) not in placed:
                    actions.append(gather)
                    placed.add(gather)
            needed = _needed_by(shape, rank, compute) if transfers else None
            while needed and needed.peer >= 0 and needed not in placed:
                actions.append(next(queues[needed.peer]))
                placed.add(actions[-1])
            actions.append(compute)
            if transfers and (send := _send_after(shape, rank, compute)):
                actions.append(send)
            if compute.kind in _COMPLETES_GRADIENT:
                gradients_left[compute.chunk] -= 1
                if shape.reduce_each or gradients_left[compute.chunk] == 0:
                    micro_batch = compute.micro_batch if shape.reduce_each else -1
                    actions.append(Action(Kind.REDUCE, compute.chunk, micro_batch))
        ranks.append((*actions, _FINISH))
    return msgspec.structs.replace(shape, ranks=tuple(ranks))


def check(schedule: Schedule) -> None:
    """Prove a schedule, whoever made it; raises ScheduleError naming rank, action and reason.

    Complete: each rank has exactly the actions that its stages need, each once. In order: nothing before what it needs, each
    SEND directly after its producer, REDUCE after the gradients it covers, FINISH last. Matched: for each ordered pair of
    ranks the receives are in the order of the sends (hence also of each kind alone). Deadlock-free: run with sends that
    never block and receives that do, it ends.
    """
    if len(schedule.ranks) != schedule.pp:
        raise ScheduleError(f"{len(schedule.ranks)} ranks have actions, pp is {schedule.pp}")
    for rank in range(schedule.pp):
        _check_rank(schedule, rank)
    sent: dict[tuple[int, int], deque[Action]] = defaultdict(deque)
    for rank, actions in enumerate(schedule.ranks):
        for send in actions:
            if send.kind in _SENDS:
                sent[rank, send.peer].append(_receive_of(schedule, rank, send))
    for rank, actions in enumerate(schedule.ranks):
        for index, action in enumerate(actions):
            queue = sent[action.peer, rank]
            if action.kind in _RECEIVES and (not queue or queue.popleft() != action):
                _fail(rank, index, action, f"rank {action.peer} sends something else, or nothing, at this point")
    timeline(schedule, {})


def _fail(rank: int, index: int, action: Action, reason: str) -> NoReturn:
    raise ScheduleError(f"rank {rank}, action {index} ({action}): {reason}")


def _check_rank(schedule: Schedule, rank: int) -> None:
    actions = schedule.ranks[rank]
    duties = _duties(schedule, rank)
    done: set[Action] = set()
    to_send: Action | None = None  # what must follow the previous action
    for index, action in enumerate(actions):
        if action in done:
            _fail(rank, index, action, "stands twice")
        if action != to_send and (to_send or action.kind in _SENDS):
            _fail(rank, index, action, f"expected {to_send}" if to_send else "a send must follow its producer directly")
        if action not in duties and action.kind not in _SENDS and action.kind not in _RECEIVES:
            _fail(rank, index, action, "does not belong here")
        for before in duties.get(action, ()):
            if before not in done:
                _fail(rank, index, action, f"{before} must come before it")
        done.add(action)
        to_send = _send_after(schedule, rank, action)
    if actions[-1:] != (_FINISH,):
        raise ScheduleError(f"rank {rank}, action {len(actions) - 1}: the last action is not {_FINISH}")


def _duties(schedule: Schedule, rank: int) -> dict[Action, list[Action]]:
    """What a rank must do, each with the rank's own actions that must stand before it; FINISH comes after all.

    Transfers are not listed: a receive is a duty of the action that needs it, a send follows its producer. Whether a
    backward is whole or split is taken from what is there.
    """
    present = set(schedule.ranks[rank])
    duties: dict[Action, list[Action]] = {}
    for chunk in range(schedule.vp):
        gather = [Action(Kind.GATHER, chunk, -1)] * schedule.gather
        duties.update((action, []) for action in gather)
        gradients: list[Action] = []
        for index in range(schedule.micro_batches):
            forward, whole, input_gradient, weight = (Action(kind, chunk, index) for kind in COMPUTE)
            duties[forward] = [*gather]
            if whole in present:
                duties[whole] = [forward]
            else:
                duties[input_gradient], duties[weight] = [forward], [input_gradient]
            gradients.append(whole if whole in present else weight)
            if schedule.reduce_each:
                duties[Action(Kind.REDUCE, chunk, index)] = gradients[-1:]
        if not schedule.reduce_each:
            duties[Action(Kind.REDUCE, chunk, -1)] = gradients
    for action, before in duties.items():
        if needed := _needed_by(schedule, rank, action):
            before.append(needed)
    return duties | {_FINISH: list(duties)}


def compute_costs(forward: float = 1, input_gradient: float = 1, weight: float = 1) -> dict[Kind, float]:
    """Costs of the compute kinds for one chunk and micro-batch; a whole backward is the sum of its two halves."""
    return dict(zip(COMPUTE, (forward, input_gradient + weight, input_gradient, weight), strict=True))


def timeline(schedule: Schedule, costs: Costs) -> list[Event]:
    """Execute the schedule event by event; each rank's events in its order, rank 0 first.

    `costs` gives an action's time by kind (0 where missing), or by rank and action. A RECEIVE waits until the matching SEND
    has ended and then takes its own time. Compute actions are listed always, others where they take time. Raises
    ScheduleError if the schedule deadlocks.
    """
    events: list[Event] = []
    clock = [0.0] * schedule.pp
    position = [0] * schedule.pp
    arrival: dict[tuple[int, Action], float] = {}  # (receiving rank, its action) -> when the send ended
    waiting: set[tuple[int, Action]] = set()
    runnable = list(range(schedule.pp))
    while runnable:
        rank = runnable.pop()
        for action in schedule.ranks[rank][position[rank] :]:
            if action.kind in _RECEIVES:
                if (rank, action) not in arrival:
                    waiting.add((rank, action))
                    break
                clock[rank] = max(clock[rank], arrival[rank, action])
            start = clock[rank]
            clock[rank] += costs(rank, action) if callable(costs) else costs.get(action.kind, 0.0)
            if action.kind in COMPUTE or clock[rank] > start:
                events.append(Event(rank, action.kind, action.chunk, action.micro_batch, start, clock[rank]))
            position[rank] += 1
            if action.kind in _SENDS:
                message = (action.peer, _receive_of(schedule, rank, action))
                arrival[message] = clock[rank]
                if message in waiting:
                    waiting.remove(message)
                    runnable.append(action.peer)
    for rank, action in sorted(waiting):
        _fail(rank, position[rank], action, "deadlock: what it waits for is never sent")
    return sorted(events, key=lambda event: event.rank)


def bubble(schedule: Schedule, costs: Costs) -> float:
    """Idle time over busy time, all ranks together: (pp - 1) / micro_batches for 1F1B of equal stages."""
    events = timeline(schedule, costs)
    busy = sum(event.end - event.start for event in events)
    return schedule.pp * max(event.end for event in events) / busy - 1


def peak_in_flight(schedule: Schedule) -> tuple[int, ...]:
    """Per rank, the most (chunk, micro-batch) activations alive at once.

    Alive from FORWARD to BACKWARD, or to WEIGHT: an INPUT frees only what the weight gradient doesn't need, so a split
    backward counts as alive until its second half.
    """

    def change(action: Action) -> int:
        return (action.kind is Kind.FORWARD) - (action.kind in _COMPLETES_GRADIENT)

    return tuple(max(accumulate(map(change, actions))) for actions in schedule.ranks)


def picture(schedule: Schedule, width: int = 120) -> str:
    """The schedule as text: a row per rank, a cell per unit of time of `compute_costs`, in bands of `width` columns."""
    marks = {Kind.FORWARD: "F", Kind.BACKWARD: "B", Kind.INPUT: "I", Kind.WEIGHT: "W"}
    costs = compute_costs()
    cell = 1 + len(str(schedule.micro_batches - 1))
    events = timeline(schedule, costs)
    slots = int(max(event.end for event in events))
    rows = [[".".ljust(cell)] * slots for _ in range(schedule.pp)]
    for event in events:
        rank, first, last = event.rank, int(event.start), int(event.end)
        mark = marks[Kind(event.kind)].lower() if event.chunk % 2 else marks[Kind(event.kind)]
        text = f"{mark}{event.micro_batch}".ljust(cell * (last - first), "-" if last - first > 1 else " ")
        rows[rank][first:last] = [text[index : index + cell] for index in range(0, len(text), cell)][: last - first]
    idle = bubble(schedule, costs)
    chunks = f" of {schedule.vp} chunks (lower case: odd chunks)" if schedule.vp > 1 else ""
    share = f"idle {idle / (1 + idle):.1%} of the time"
    lines = [f"{schedule.name}: {schedule.pp} ranks{chunks}, {schedule.micro_batches} micro-batches, {share}"]
    lines += ["F forward, B backward, I its input gradient, W its weight gradient, . idle"]
    label = len(f"rank {schedule.pp - 1}  ")
    band = max(1, (width - label) // cell)
    for begin in range(0, slots, band):
        lines += [""] * (begin > 0)
        lines += [f"rank {rank}".ljust(label) + "".join(row[begin : begin + band]) for rank, row in enumerate(rows)]
    return "\n".join(line.rstrip() for line in lines)
