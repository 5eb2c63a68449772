"""Operations counted by hand, and the file of a row a step."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from fiveply.spec.architecture import ModelSpec
from fiveply.train import metrics


def test_operations_per_token_of_tiny_by_hand() -> None:
    # 8 layers of hidden 64, 8 heads and 4 key-value heads of 8, feed-forward 176; a head of 512 of its own.
    layer = 64 * 64 + 2 * 64 * 32 + 64 * 64 + 3 * 64 * 176
    attention = 8 * 12 * 64 * (33 / 2)  # scores and values, forward and twice backward; a token sees 16.5 of 32 keys
    assert metrics.flops_per_token(ModelSpec.load("tiny"), 32) == 6 * (8 * layer + 64 * 512) + attention


def test_a_tied_head_is_a_matrix_product_and_an_embedding_is_none() -> None:
    spec = ModelSpec.load("tiny")
    tied = ModelSpec.from_config(spec.config | {"tie_word_embeddings": True}, where="tied")
    assert metrics.flops_per_token(tied, 32) == metrics.flops_per_token(spec, 32)
    assert metrics.parameter_count(spec) - metrics.parameter_count(tied) == 512 * 64


def test_longer_sequences_cost_more_by_attention_alone() -> None:
    spec = ModelSpec.load("tiny")
    more = metrics.flops_per_token(spec, 64) - metrics.flops_per_token(spec, 32)
    assert more == 8 * 12 * 64 * (64 - 32) / 2


def test_a_window_bounds_what_a_token_sees() -> None:
    config = json.loads((Path(__file__).parents[1] / "configs" / "mistral.json").read_text())
    spec = ModelSpec.from_config(config | {"sliding_window": 8}, where="mistral")
    # All but a row's first tokens see 8 keys: the sum over a row grows by that alone.
    rows = [metrics.flops_per_token(spec, length) * length for length in (512, 1024, 1536)]
    assert rows[2] - rows[1] == pytest.approx(rows[1] - rows[0], rel=1e-12)


def test_parameters_of_tiny_by_hand() -> None:
    layer = 64 * 64 + 2 * 64 * 32 + 64 * 64 + 3 * 64 * 176 + 2 * 64
    assert metrics.parameter_count(ModelSpec.load("tiny")) == 8 * layer + 2 * 64 * 512 + 64


def test_peaks_are_positive() -> None:
    cpu = torch.device("cpu")
    assert metrics.peak_flops(torch.float32, cpu, seconds=0.01) > 1e8
    assert metrics.peak_memory(cpu) > 1e6
    metrics.forget_peak_memory()
    assert metrics.peak_memory(cpu) > 1e6


def write(path: Path, steps: range, after: int) -> None:
    file = metrics.MetricsFile(path, after)
    for step in steps:
        file.write({"step": step, "loss": 1 / step})


def steps_in(path: Path) -> list[int]:
    return [json.loads(line)["step"] for line in path.read_text().splitlines()]


def test_rows_after_the_checkpoint_are_dropped_on_resume(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    write(path, range(1, 8), 0)
    write(path, range(4, 6), 3)
    assert steps_in(path) == [1, 2, 3, 4, 5]


def test_a_new_run_starts_an_empty_file(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    write(path, range(1, 4), 0)
    write(path, range(1, 2), 0)
    assert steps_in(path) == [1]


@pytest.mark.parametrize("torn", ['{"step": 4, "lo', "{", "\0\0\0", '{"loss": 2.0}', "7", "[4]", "null"])
def test_a_row_that_a_crash_cut_short_is_dropped(tmp_path: Path, torn: str) -> None:
    path = tmp_path / "metrics.jsonl"
    write(path, range(1, 4), 0)
    path.write_text(path.read_text() + torn)
    write(path, range(4, 6), 3)
    assert steps_in(path) == [1, 2, 3, 4, 5]


def test_a_row_is_on_disk_as_soon_as_it_is_written(tmp_path: Path) -> None:
    file = metrics.MetricsFile(tmp_path / "metrics.jsonl", 0)
    file.write({"step": 1})
    assert steps_in(tmp_path / "metrics.jsonl") == [1]
