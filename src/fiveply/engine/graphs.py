"""Steps in which every request brings one token, as one recorded call on static buffers: on GPUs a captured CUDA graph.

Notable: one torch operation after another leaves a GPU waiting at few rows. So rows and blocks of a table are padded to buckets
(powers of two), and what a bucket's step does depends on its shapes alone: a row without a request stands at position 0, and
writes to the cache's spare block. A bucket is recorded when it is met often enough, never before a first answer. Whether it is
follows from the steps, which all ranks see alike: tensor ranks record, and replay, their collectives together.

It knows the decoder and the cache, and no requests. How a step is recorded is its owner's choice: tests have other ways than CUDA.

Shape suffixes: R rows of a bucket, N blocks of a row's table, D hidden, T rows in use, h half a head.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence

import numpy as np
import torch
from torch import Tensor

from fiveply.engine.inputs import sent
from fiveply.engine.paged_attention import PagedAttention, Span
from fiveply.model import rotary
from fiveply.model.decoder import Decoder
from fiveply.serve.messages import BLOCK

MET = 3  # how often a bucket is met before it is recorded, that time included
FEWEST_BLOCKS = 8  # of a table
# Blocks of all tables together: beyond, attention takes longer than starting operations, and padding costs more.
LARGEST = 1 << 12
Step = Callable[[], Tensor]
Record = Callable[[Step], Step]
"""Makes of a step, which reads and writes tensors that stay where they are, one that does the same with what stands there then."""


class CudaGraphs:
    """A `Record` for GPUs. All graphs share their memory: one runs at a time, and its output is read before the next."""

    def __init__(self) -> None:
        self._pool = torch.cuda.graph_pool_handle()

    def __call__(self, step: Step) -> Step:
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            step()  # libraries choose, and allocate, at their first call; the cache is written as it will be again
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        # Threads of torch.distributed ask for events meanwhile.
        with torch.cuda.graph(graph, pool=self._pool, capture_error_mode="thread_local"):
            out_RD = step()

        def replay() -> Tensor:
            graph.replay()
            return out_RD

        return replay


class DecodeSteps:
    """This rank's stage for steps in which all decode."""

    def __init__(self, decoder: Decoder, attention: PagedAttention, record: Record) -> None:
        """`attention`: one without compiled kernels, whose operations can be recorded."""
        self.decoder, self._record = decoder, record
        assert attention.gathered is not None
        self.cache, spec = attention.gathered, decoder.spec
        self.frequencies = None
        if spec.rope is not None:
            inverse_h, factor = rotary.inverse_frequencies(spec.rope, spec.head_dim)
            self.frequencies = inverse_h.to(self.cache.device), factor
        self._met = Counter[tuple[int, int]]()
        self._buckets: dict[tuple[int, int], _Bucket] = {}

    def begin(self, spans: Sequence[Span]) -> Callable[[Tensor], Tensor] | None:
        """What makes hidden states (T, D) of the spans' tokens, or of another stage's hidden states, as the stage would.

        None where the step is not one of these, or its bucket has not been met often enough.
        """
        if any(span.count != 1 for span in spans):
            return None
        rows = _power_of_two(len(spans))
        blocks = max(FEWEST_BLOCKS, _power_of_two(1 + max(span.start for span in spans) // BLOCK))
        key = rows, blocks
        if rows * blocks > LARGEST:
            return None
        self._met[key] += 1
        if self._met[key] < MET:
            return None
        if key not in self._buckets:
            self._buckets[key] = _Bucket(self, rows, blocks)
        bucket = self._buckets[key]
        bucket.begin(spans)
        return lambda input_T: bucket.run(input_T, self._record)


class _Bucket:
    """One number of rows and blocks: its buffers and, from the first run on, the recorded step."""

    def __init__(self, steps: DecodeSteps, rows: int, blocks: int) -> None:
        self._decoder, self._cache, self._frequencies = steps.decoder, steps.cache, steps.frequencies
        self._shape = rows, 1 + blocks
        self._places = torch.empty(self._shape, dtype=torch.long, device=self._cache.device)
        """Of each row its position, and its table."""
        self._input: Tensor | None = None
        self._step: Step | None = None

    def begin(self, spans: Sequence[Span]) -> None:
        places = np.full(self._shape, self._cache.spare)
        places[:, 0] = 0
        for row, span in enumerate(spans):
            blocks = span.start // BLOCK + 1
            places[row, 0], places[row, 1 : 1 + blocks] = span.start, span.table[:blocks]
        self._places.copy_(sent(places, self._cache.device))

    def run(self, input_T: Tensor, record: Record) -> Tensor:
        if self._input is None:
            self._input = input_T.new_zeros(self._shape[0], *input_T.shape[1:])
        self._input[: len(input_T)] = input_T
        if self._step is None:
            self._step = record(self._forward)
        out_RD = self._step()
        return out_RD[: len(input_T)].clone()  # it may be on its way to the next stage when the buffer is written again

    def _forward(self) -> Tensor:
        """The decoder's, with frequencies that are on the device already. (R, D)"""
        decoder, positions_R = self._decoder, self._places[:, 0]
        assert self._input is not None
        self._cache.begin_decoding(positions_R, self._places[:, 1:])
        hidden_RD = decoder.embed(self._input, positions_R, None) if decoder.first else self._input
        tables = None
        if self._frequencies is not None:
            cos_R1h, sin_R1h = rotary.turned(*self._frequencies, positions_R)
            tables = cos_R1h.to(hidden_RD.dtype), sin_R1h.to(hidden_RD.dtype)
        for block in decoder.model.layers.values():
            hidden_RD = block(hidden_RD, tables, self._cache)
        return hidden_RD if decoder.model.norm is None else decoder.model.norm(hidden_RD)


def _power_of_two(least: int) -> int:
    return 1 << (least - 1).bit_length()
