"""The compiled blocks against the decoder: hidden states of prompts, chunks and decoding, mixed; and tokens of split models."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from greedy_service import greedy
from lone_stage import lone_stage
from random_models import greedy_by_transformers, ragged, same_where_clear, save_random

from fiveply import service
from fiveply.engine import kernels
from fiveply.engine.paged_attention import Span
from fiveply.world import shm

STEPS = ([(0, 37), (0, 3)], [(37, 1), (3, 20), (0, 16)], [(38, 1), (23, 1), (16, 1)])
"""(start, count) of each sequence in each step."""

MISSING = kernels.library(torch.float32, torch.float32)
needs_kernels = pytest.mark.skipif(isinstance(MISSING, str), reason=str(MISSING))


def hidden_states(path: str, dtype: torch.dtype, compiled: bool) -> list[torch.Tensor]:
    stage = lone_stage(Path(path), dtype, blocks=12)
    decoder, attention, spec = stage.decoder, stage.attention, stage.decoder.spec
    assert stage.compiled == (spec.norm == "rms")
    tables, told = [[9, 2, 4], [0, 1], [7, 3]], []
    generator = torch.Generator().manual_seed(1)
    for step in STEPS:
        spans = [Span(start, count, table) for (start, count), table in zip(step, tables, strict=False)]
        positions = attention.begin(spans)
        tokens = torch.randint(3, spec.vocabulary, positions.shape, generator=generator)
        with torch.inference_mode():
            told.append(stage(tokens, positions) if compiled else decoder(tokens, positions, attention))
    return told


@needs_kernels
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("family", ["llama", "qwen2", "qwen3", "mistral", "smollm", "gpt2"])
def test_compiled_blocks_compute_what_the_decoder_does(family: str, dtype: torch.dtype, tmp_path: Path) -> None:
    # 16-bit columns go in pairs.
    save_random(family, tmp_path / "hf", **({"intermediate_size": 132} if dtype == torch.bfloat16 else {}))
    ours, theirs = (hidden_states(str(tmp_path / "hf"), dtype, compiled) for compiled in (True, False))
    for a, b in zip(ours, theirs, strict=True):
        error = (a.double() - b.double()).norm() / b.double().norm()
        assert error < (1e-5 if dtype == torch.float32 else 3e-2)


@needs_kernels
@pytest.mark.parametrize(
    ("family", "layout", "patience"),
    [("llama", "tp=3,pp=2", 200_000_000), ("qwen2", "tp=2", 200_000_000), ("qwen3", "pp=2", 200_000_000), ("qwen2", "tp=2", 1)],
)  # fmt: skip
def test_a_split_model_answers_as_transformers(
    family: str, layout: str, patience: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """`patience`: nanoseconds until a sum within compiled blocks is left to Python."""
    monkeypatch.setattr(shm, "_SLICE_NS", patience)
    model = save_random(family, tmp_path / "hf")
    prompts = ragged(model.config.vocab_size)

    served = service.Served.load(model.name_or_path, layout, "float32")
    for prompt, told in zip(prompts, greedy(served, prompts, 10), strict=True):
        assert same_where_clear(told, greedy_by_transformers(model, prompt, 10), prompt, model)
