"""Constrained answers: always of the grammar, drawn wildly from a random model, at every layout, preempted or not."""

from __future__ import annotations

import asyncio
import json
import re
from pathlib import Path
from typing import Any

import pytest
from random_models import add_tokenizer, save_random

from fiveply import service
from fiveply.serve.driver import Driver, Settings
from fiveply.serve.grammar import compile_grammar
from fiveply.serve.messages import Sampling

SCHEMA = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 8},
        "kind": {"enum": ["ship", "port"]},
        "masts": {"type": "array", "items": {"type": "integer", "minimum": 0, "maximum": 99}, "maxItems": 3},
    },
    "required": ["name", "kind", "masts"],
    "additionalProperties": False,
}
JSON, REGEX = compile_grammar("json", SCHEMA), compile_grammar("regex", "(ship|port) [0-9]{2,4}!")
LARK = compile_grammar("lark", 'start: pair ("," pair)?\npair: /[a-c]+=/ "1".."9"')


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("constrained") / "hf"
    save_random("llama", folder, vocab_size=300, num_hidden_layers=3)  # more rows than the tokenizer has tokens
    add_tokenizer(folder)
    return folder


async def ask(driver: Driver, grammar: str, seed: int, most: int = 200) -> tuple[str, str]:
    sampling = Sampling(1.5 if seed else 0.0, seed=seed, grammar=grammar)
    generation = driver.submit([70, 71, 72], most, sampling, ends=driver.text.ends)
    pieces = [piece async for piece in generation.pieces()]
    return "".join(piece.text for piece in pieces), pieces[-1].finish


def fits(text: str) -> None:
    value: dict[str, Any] = json.loads(text)
    assert set(value) == {"name", "kind", "masts"}
    assert len(value["name"]) <= 8
    assert value["kind"] in ("ship", "port")
    assert all(0 <= one <= 99 for one in value["masts"])
    assert len(value["masts"]) <= 3


def test_answers_are_of_the_grammar_at_every_layout(folder: Path) -> None:
    async def work(driver: Driver) -> tuple[list[tuple[str, str]], int]:
        grammars = [JSON, REGEX, LARK, ""] * 3
        told = await asyncio.gather(*(ask(driver, grammar, seed, 60) for seed, grammar in enumerate(grammars)))
        return told, sum(replica.scheduler.preemptions for replica in driver.replicas if replica.scheduler)

    plain, _ = service.run(service.Served.load(folder, dtype="float64"), Settings(), work)
    for (text, finish), (kind, shape) in zip(
        plain,
        [("json", ""), ("regex", r"(ship|port) [0-9]{2,4}!"), ("lark", r"[a-c]+=[1-9](,[a-c]+=[1-9])?"), ("", "")] * 3,
        strict=True,
    ):
        if kind == "json" and finish == "stop":
            fits(text)
        elif kind == "regex" or (kind == "lark" and finish == "stop"):
            assert finish == "stop"
            assert re.fullmatch(shape, text)
    assert [finish for _, finish in plain].count("stop") >= 7
    split, preemptions = service.run(
        service.Served.load(folder, "tp=3,pp=2", "float64", cache_tokens=160), Settings(step_tokens=24), work
    )
    assert split == plain
    assert preemptions > 0


def test_what_is_no_grammar_is_refused() -> None:
    for kind, source, line in (
        ("json", {"type": "nope"}, "can't be (read|used): .*nope"),
        ("regex", "a(", "can't be used: .*unclosed group"),
        ("lark", "start: missing", "can't be used: .*unknown name"),
    ):
        with pytest.raises(ValueError, match=line):
            compile_grammar(kind, source)  # type: ignore[arg-type]


def test_a_grammar_that_can_not_go_on_is_told(folder: Path) -> None:
    """The tokens before the resumption do not fit: a broken rank, or a grammar that is too complex."""
    import torch

    from fiveply.engine.constrain import Constraint, Grammars

    constraint = Constraint(Grammars(folder, 300, [0], torch.device("cpu")), REGEX)
    assert constraint.problem == ""
    assert constraint.allowed().nonzero().flatten().tolist() == sorted(
        Grammars(folder, 300, [0], torch.device("cpu")).tokenizer.tokenize_str("sp")
    )
    constraint.hear([5])
    assert "doesn't satisfy the grammar" in constraint.problem
