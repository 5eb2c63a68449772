"""What an answer has to be, as the text that ranks understand (llguidance's): a JSON schema, a regular expression, a grammar."""

from __future__ import annotations

from typing import Any, Literal

import msgspec


def compile_grammar(kind: Literal["json", "regex", "lark"], source: Any) -> str:
    """Raises ValueError for what is none, and where the extra `grammar` is not installed."""
    try:
        from llguidance import LLMatcher
    except ImportError:
        raise ValueError("constrained answers need the extra: pip install 'fiveply[grammar]'") from None
    try:
        if kind == "json":
            # Without free spaces: an answer could go on with them for ever.
            schema = msgspec.json.encode(source).decode()
            grammar = LLMatcher.grammar_from_json_schema(schema, overrides={"whitespace_flexible": False})
        else:
            grammar = LLMatcher.grammar_from_regex(source) if kind == "regex" else LLMatcher.grammar_from_lark(source)
    except ValueError as error:
        raise ValueError(f"can't be read: {error}") from None
    if problem := LLMatcher.validate_grammar(grammar):
        raise ValueError(f"can't be used: {' '.join(problem.split())}")
    return grammar
