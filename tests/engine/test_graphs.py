"""Recorded decode steps against the decoder's own: in float64, padded rows and blocks, mixed with prompts, at several layouts.

On a CPU a step is recorded as torch.fx traces it: as in a CUDA graph, what is not an operation on tensors that stay where they are
is gone at the second run. Where there is a GPU, it is captured.
"""

from __future__ import annotations

import multiprocessing
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from greedy_service import greedy
from lone_stage import CPU, lone_stage
from random_models import greedy_by_transformers, ragged, same_where_clear, save_random
from torch import Tensor
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils._python_dispatch import TorchDispatchMode

from fiveply import service
from fiveply.engine import graphs, kernels, worker
from fiveply.engine.graphs import CudaGraphs, DecodeSteps, Record, Step
from fiveply.engine.paged_attention import Span
from fiveply.engine.runner import Runner
from fiveply.engine.stage import Stage
from fiveply.serve.messages import BLOCK

FAMILIES = ["llama", "qwen2", "qwen3", "mistral", "gpt2"]
TABLES = [[9, 2, 4], [0, 1], [7, 3], [5]]
LENGTHS = [30, 14, 3, 1]
"""Of the prompts: the first two cross borders of blocks while they are decoded."""


def traced(step: Step) -> Step:
    return make_fx(lambda: step())()


@pytest.fixture
def no_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    """As on a GPU."""
    monkeypatch.setattr(kernels, "library", lambda *types: "no compiler")


def plan(steps: int) -> Iterator[list[Span]]:
    """A prompt a step, then all decode, in two steps of three only some; in the middle the last sequence is begun anew."""
    done = [0] * len(TABLES)
    for step in range(steps):
        rows = {0: [0], 1: [1], 2: [0, 2], 3: [3]}.get(step, range(step % 3, 4))
        if step == steps // 2:
            done[3] = 0
        spans = [(row, 1 if done[row] else LENGTHS[row]) for row in rows]
        yield [Span(done[row], count, TABLES[row]) for row, count in spans]
        for row, count in spans:
            done[row] += count


def run(
    stage: Stage, record: Record | None, device: torch.device = CPU
) -> tuple[list[Tensor], dict[Any, Any], list[Tensor]]:
    """Hidden states of each step, the recorded buckets, and what requests' blocks hold in the end."""
    decoder, attention = stage.decoder, stage.attention
    steps = None if record is None else DecodeSteps(decoder, attention, record)
    generator, told = torch.Generator().manual_seed(1), []
    inner = attention.gathered
    assert inner is not None
    for x_XKd in (*inner.keys_XKd.values(), *inner.values_XKd.values()):
        x_XKd.fill_(torch.nan)  # what was never written must not be read
    for spans in plan(20):
        count = sum(span.count for span in spans)
        tokens = torch.randint(3, decoder.spec.vocabulary, (count,), generator=generator).to(device)
        with torch.inference_mode():
            decode = steps.begin(spans) if steps is not None else None
            told.append(stage(tokens, attention.begin(spans)) if decode is None else decode(tokens))
    blocks = [x_XKd[:-BLOCK].clone() for cache in (inner.keys_XKd, inner.values_XKd) for x_XKd in cache.values()]
    return told, {} if steps is None else steps._buckets, blocks


@pytest.mark.usefixtures("no_kernels")
@pytest.mark.parametrize("record", [lambda step: step, traced], ids=["eager", "traced"])
@pytest.mark.parametrize("family", FAMILIES)
def test_a_recorded_step_is_the_decoders(
    family: str, record: Record, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(graphs, "FEWEST_BLOCKS", 1)
    save_random(family, tmp_path / "hf")
    stage = lone_stage(tmp_path / "hf", torch.float64, blocks=10)
    wanted, _, held = run(stage, None)
    told, buckets, holds = run(stage, record)
    assert set(buckets) == {(2, 1), (4, 2), (4, 4)}
    for a, b in zip(told, wanted, strict=True):
        torch.testing.assert_close(a, b, atol=1e-11, rtol=1e-11)
    for a, b in zip(holds, held, strict=True):
        torch.testing.assert_close(a, b, atol=1e-11, rtol=1e-11, equal_nan=True)


class Copies(TorchDispatchMode):
    """Counts those from the host to the device."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        given = [arg for arg in args if isinstance(arg, Tensor)]
        if isinstance(out, Tensor) and out.is_meta and not all(arg.is_meta for arg in given):
            self.count += 1
        return out


@pytest.mark.parametrize("family", ["llama", "mistral", "gpt2"])
def test_steps_leave_the_device_alone(family: str, tmp_path: Path) -> None:
    """On a device without numbers nothing can be read back; and no step copies more than once to it, but for frequencies."""
    save_random(family, tmp_path / "hf")
    device = torch.device("meta")
    stage = lone_stage(tmp_path / "hf", torch.bfloat16, blocks=10, device=device)
    recorded = DecodeSteps(stage.decoder, stage.attention, lambda step: step)
    copies = list[tuple[int, int]]()
    for spans in [[Span(0, 30, TABLES[0]), Span(14, 1, TABLES[1])], *[[Span(30, 1, TABLES[0])]] * graphs.MET]:
        tokens = torch.empty(sum(span.count for span in spans), dtype=torch.long, device=device)
        with Copies() as counted, torch.inference_mode():
            decode = recorded.begin(spans)
            if decode is None:
                positions = stage.attention.begin(spans)
                begun = counted.count
                hidden = stage(tokens, positions)
            else:
                begun = counted.count
                hidden = decode(tokens)
        assert hidden.shape == (len(tokens), stage.decoder.spec.hidden)
        copies.append((begun, counted.count - begun))
    frequencies = int(family != "gpt2")
    assert copies == [(1, frequencies)] * graphs.MET + [(1, 0)]


@pytest.mark.usefixtures("no_kernels")
@pytest.mark.parametrize(("family", "layout"), [("llama", "dp=1"), ("llama", "tp=3,pp=2"), ("mistral", "tp=2")])
def test_a_served_model_answers_as_transformers(
    family: str, layout: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recorded = multiprocessing.Value("i", 0)

    def record(step: Step) -> Step:
        with recorded.get_lock():
            recorded.value += 1
        return step

    monkeypatch.setattr(worker, "Runner", partial(Runner, record=record))
    model = save_random(family, tmp_path / "hf")
    prompts = ragged(model.config.vocab_size)
    served = service.Served.load(model.name_or_path, layout, "float64")
    for prompt, told in zip(prompts, greedy(served, prompts, 12), strict=True):
        assert same_where_clear(told, greedy_by_transformers(model, prompt, 12), prompt, model)
    assert recorded.value >= served.layout.world


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU: no graph is captured")
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-9), (torch.float32, 1e-4), (torch.bfloat16, 3e-2)])
@pytest.mark.parametrize("family", FAMILIES)
def test_a_captured_step_is_the_decoders(family: str, dtype: torch.dtype, tolerance: float, tmp_path: Path) -> None:
    save_random(family, tmp_path / "hf")
    device = torch.device("cuda")
    stage = lone_stage(tmp_path / "hf", dtype, blocks=10, device=device)
    wanted, _, _ = run(stage, None, device)
    told, buckets, _ = run(stage, CudaGraphs(), device)
    assert set(buckets) == {(4, 8), (2, 8)}
    for a, b in zip(told, wanted, strict=True):
        assert (a - b).double().norm() < tolerance * b.double().norm()
