"""What an answer has to be, as the text that ranks understand (llguidance's): a JSON schema, a regular expression, a grammar."""

from __future__ import annotations

from collections.abc import Iterable
from contextlib import suppress
from typing import Any, Literal

import msgspec

from fiveply.corpus.tokenizer import Tokenizer

LLMatcher: Any = None
LLTokenizer: Any = None
with suppress(ImportError):  # here, not where it is used: threads use it, and an import beside a fork can wait for ever
    from llguidance import LLMatcher, LLTokenizer

_LONGEST = 500  # characters of what llguidance says, which may repeat all of a grammar


def compile_grammar(kind: Literal["json", "regex", "lark"], source: Any) -> str:
    """Raises ValueError for what is none, and where the extra `grammar` is not installed."""
    if LLMatcher is None:
        raise ValueError("constrained answers need the extra: pip install 'fiveply[grammar]'")
    try:
        if kind == "json":
            # Without free spaces: an answer could go on with them for ever.
            schema = msgspec.json.encode(source).decode()
            grammar = LLMatcher.grammar_from_json_schema(schema, overrides={"whitespace_flexible": False})
        else:
            grammar = LLMatcher.grammar_from_regex(source) if kind == "regex" else LLMatcher.grammar_from_lark(source)
    except ValueError as error:
        raise ValueError(f"can't be read: {error}") from None
    _refuse(LLMatcher.validate_grammar(grammar))
    return grammar


def token_reader(tokenizer: Tokenizer, ends: Iterable[int]) -> Any:
    """How llguidance spells tokens. `ends`: those that end an answer."""
    return LLTokenizer(tokenizer.to_json(), n_vocab=tokenizer.vocabulary, eos_token=sorted(ends))


def check_beginning(grammar: str, reader: Any) -> None:
    """Raises ValueError where no answer can begin, as ranks would find: nothing fits, it has no end, or it is too complex."""
    matcher = LLMatcher(reader, grammar, log_level=0)
    matcher.compute_bitmask()
    matcher.consume_tokens(matcher.compute_ff_tokens()[:1])  # fails where what has to follow goes on for ever
    if matcher.is_error():
        # What follows is the state of a parser.
        problem = matcher.get_error().partition("\n<state>")[0]
        _refuse("no answer can fit it" if problem.startswith("NoExtension") else problem)


def _refuse(problem: str) -> None:
    if problem:
        raise ValueError(f"can't be used: {' '.join(problem.split())[:_LONGEST]}")
