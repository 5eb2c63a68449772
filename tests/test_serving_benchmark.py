"""The pure parts of `benchmarks/serving.py`: what is asked, and what is made of the seconds."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest

FOLDER = Path(__file__).parents[1] / "benchmarks"


@pytest.fixture
def serving(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.syspath_prepend(str(FOLDER))
    monkeypatch.delitem(sys.modules, "serving", raising=False)
    import serving

    return serving


def test_prompts_are_new_each_round_and_lengths_are_not(serving: Any) -> None:
    first, second = serving.cases(500, 1), serving.cases(500, 2)
    assert [first[name].counts for name in first] == [second[name].counts for name in second]
    assert first["16 x 128"].counts == [128] * 16
    assert first["stream"].prompts != second["stream"].prompts
    assert list(map(len, first["stream"].prompts)) == list(map(len, second["stream"].prompts))
    assert all(3 <= token < 500 for case in first.values() for prompt in case.prompts for token in prompt)


def test_speed_of_decoding_leaves_the_first_token_out(serving: Any) -> None:
    seconds = {"1 x 1": [0.5, 1.0], "1 x 128": [1.5, 2.0], "16 x 1": [1.0, 1.0], "16 x 128": [5.0, 3.0]}
    assert serving.speeds(seconds) == {"batch 1": [127, 127], "batch 16": [508, 1016]}
    assert serving.ratios([2.0, 3.0, 8.0], [1.0, 1.0, 2.0]) == [2.0, 3.0, 4.0]


def test_who_takes_batches_answers_each_until_its_longest(serving: Any) -> None:
    from serving_peers import in_batches

    asked: list[list[int]] = []

    def answer(prompts: Any, counts: Any) -> list[list[int]]:
        asked.append(list(counts))
        return [[prompt[0]] * max(counts) for prompt in prompts]

    told = in_batches([[n] for n in range(20)], [1 + n % 3 for n in range(20)], answer)
    assert told == [[n] * (1 + n % 3) for n in range(20)]
    assert list(map(len, asked)) == [16, 4]


def test_a_peer_that_is_missing_is_said_so(serving: Any) -> None:
    speed = {"batch 1": [100.0], "batch 16": [900.0], "stream": [800.0]}
    rows = [
        {"who": "fiveply", "tokens_per_second": speed, "first_token_seconds": {"batch 1": 0.1}, "same_tokens": 1.0},
        {"who": "CTranslate2", "missing": "not installed (ctranslate2)"},
    ]
    lines = serving.table(
        [serving._compared(row, rows[0], "fiveply_is_faster_by") for row in rows], "peers"
    ).splitlines()
    assert "not installed (ctranslate2)" in lines[-1]
    assert len({line.count("|") for line in lines}) == 1
