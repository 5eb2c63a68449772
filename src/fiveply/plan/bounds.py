"""Before what a pipeline's step cannot end: of a given division of the layers, and of any.

A rank waits for its first input, computes, and passes its last gradient back. With one chunk a rank it has to wait for its
first gradient too: micro-batch 0 goes through all stages and back to rank r, which has done min(m, pp - r) forwards by then
and has all else of its m micro-batches to come. Seconds are of one micro-batch.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]


class Lanes(NamedTuple):
    """By pipeline rank, the last dimension, with any number of cases before it. `busy`: in all chunks, with what it sends if that
    holds it up. Of its first chunk: `forward`, `backward` (under split backwards the input gradient alone), and the transfers
    `send` to the rank behind and `send_back` to the one ahead."""

    busy: Array
    forward: Array
    backward: Array
    send: Array
    send_back: Array


def least_end(name: str, micro_batches: int, lanes: Lanes, *, blocking: bool) -> Array:
    """Of one division of the layers. `blocking`: whether a rank stands still while it sends."""
    busy, forward, backward, send, send_back = lanes
    m, held = micro_batches, float(blocking)
    pp: int = busy.shape[-1]
    there, back = forward + send, backward + send_back
    passing = there if name in ("zb", "zbv") else there + back  # a weight gradient put off may outlast the way back
    ends = m * busy + np.cumsum(passing, axis=-1) - passing
    if name not in ("zb", "zbv"):
        ends += (1 - held) * send_back
    if pp > 1 and name in ("1f1b", "gpipe", "zb"):
        slowest, slowest_back = forward + held * send, backward + held * send_back
        once = there.sum(axis=-1, keepdims=True)
        if name == "gpipe":
            rest = slowest.max(axis=-1, keepdims=True) + slowest_back.max(axis=-1, keepdims=True)
            waited = once + back.sum(axis=-1, keepdims=True) + (m - 1) * rest
        else:
            waited = once + m * busy - np.minimum(m, pp - np.arange(pp)) * slowest
            if name == "zb":
                waited += back.sum(axis=-1, keepdims=True) - np.cumsum(back, axis=-1)
            else:
                waited += back.sum(axis=-1, keepdims=True) - slowest_back
        ends = np.maximum(ends, waited)
    return ends.max(axis=-1)


class Model(NamedTuple):
    """All of a model, seconds of one micro-batch; numbers, or arrays that broadcast together."""

    opening: Any
    """What stands before the first layer."""
    closing: Any
    """What stands after the last one."""
    layers: Any
    """All of them."""
    through: Any
    """Of all parts, what one micro-batch waits for there and back: not the gradients of weights."""
    layer: Any
    """The least of one layer."""
    forward: Any
    """The least of one layer's forward."""
    most: Any
    """The largest share of forward in a layer."""
    least: Any

    @property
    def all(self) -> Any:
        return self.opening + self.layers + self.closing


def least_of_any(
    name: str, vp: Any, pp: Any, micro_batches: Any, busiest: Any, model: Model, send: Any, *, blocking: bool
) -> Any:
    """Over all divisions of the layers among `pp` ranks of `vp` chunks, each rank's layers dealt evenly to its chunks, that put at
    least `busiest` layers on some rank. Numbers, or arrays of one shape.

    Layers count as divisible at will but for the busiest rank's. Rank r ends at P(r) + m w(r) or later,
    where P is at least `share` of the work w of the ranks ahead; so X, the end of all, is least where every rank ends at X:
    w(r) = (X - P(r)) / m, a geometric series. Of 1F1B the wait for the first gradient gives one too.
    """
    m, all_of = micro_batches, model.all
    sent = (2 * (pp * vp - 1 - (name == "zbv")) * send) if blocking else 0.0
    pace = m * np.maximum((all_of + sent) / pp, model.layer * busiest)
    hops = 2 * (pp - 1) * send
    once = all_of + hops  # one micro-batch, there and back
    pace = np.maximum(pace, (model.through if name in ("zb", "zbv") else all_of) + hops)
    if name == "gpipe":
        return np.maximum(pace, once + (m - 1) * all_of / pp)
    held = all_of - model.opening  # the first rank's, which may pass on less of it than of layers
    if name == "1f1b":
        # The sum of 1 / (m - 1 - j x most) over j forwards that a rank may run ahead, by its integral.
        few, rest = np.minimum(pp, m), m - 1
        with np.errstate(divide="ignore", invalid="ignore"):
            shares = (pp - few) / (rest * (1 - model.most)) + np.log(rest / (rest - few * model.most)) / model.most
        waiting = np.where(rest > few * model.most, held / np.where(shares > 0, shares, np.inf), 0.0)
        return np.maximum(pace, once + waiting)
    if name == "zb":
        return np.maximum(pace, _series(model.least, pp, m, held))
    if name == "zbv":
        share, passed, sends = model.least / 2, model.forward, send
        held, late = held - model.closing, 0.0
    else:
        share, passed, sends = 1 / vp, model.layer, 2 * send
        late = send if blocking else 0.0  # a rank's last send back counts as its work
    # A first chunk has at least one layer, and at most this less than its share.
    lacking = np.maximum(0.0, passed * (1 - 1 / vp) - (0.0 if blocking else sends)) * pp / 2 + late
    return np.maximum(
        np.maximum(pace, m * (held + sent) / pp + (pp - 1) / 2 * (passed + sends) - late),
        _series(share, pp, m, held + sent - lacking * (pp - 1) / m),
    )


def _series(share: Any, pp: int, micro_batches: Any, work: Any) -> Any:
    return share * work / (1 - (1 - share / micro_batches) ** pp)
