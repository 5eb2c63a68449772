"""Between text and tokens, as they come: prompts in, pieces of text out, and the strings that stop an answer.

It knows one sequence at a time; tokenizers are `corpus/tokenizer.py`'s.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

from fiveply.corpus.chat import ChatTemplate
from fiveply.corpus.tokenizer import Tokenizer
from fiveply.serve import tools
from fiveply.serve.grammar import token_reader

_CONTEXT = 8  # tokens before the answer that its first piece is decoded with: some tokenizers drop a text's first space
_BROKEN = "�"  # what an unfinished character reads as


@dataclass(frozen=True)
class Text:
    """How a model's directory says that text becomes tokens."""

    tokenizer: Tokenizer | None = None
    ends: frozenset[int] = frozenset()
    """Tokens that stop an answer."""
    before: list[int] = field(default_factory=list)
    """What the model was trained to see before every text (Llama's <s>); not added to token ids."""
    beginning: list[int] = field(default_factory=list)
    """What an empty prompt becomes."""
    chat: ChatTemplate | None = None

    def encode(self, prompt: str | Sequence[int], aside: bool = False) -> list[int]:
        """`aside`: other threads go on meanwhile. Raises ValueError where there is nothing to read it with, or to begin with."""
        if not isinstance(prompt, str):
            tokens = list(prompt)
        elif self.tokenizer is None and prompt:
            raise ValueError("the model has no tokenizer.json to read text with; give token ids")
        else:
            tokens = self._tokens(self.tokenizer, prompt, aside) if self.tokenizer else []
            tokens = tokens if tokens[:1] == self.before else self.before + tokens
        if not (tokens or self.beginning):
            raise ValueError("is empty, and the model names no token to begin with; give a token")
        return list(tokens or self.beginning)

    def converse(
        self, messages: Sequence[Mapping[str, Any]], offered: Sequence[Mapping[str, Any]], aside: bool = False
    ) -> list[int]:
        """A conversation up to where the model's answer begins, `offered` its tools; `aside` as `encode`. Raises ValueError with what
        the template says against it. There must be one."""
        assert self.chat is not None
        assert self.tokenizer is not None
        return self._tokens(self.tokenizer, self.chat.render(messages, offered), aside)

    @staticmethod
    def _tokens(tokenizer: Tokenizer, text: str, aside: bool) -> list[int]:
        return (tokenizer.encode_aside(text) if aside else tokenizer.encode(text)).tolist()

    @cached_property
    def reader(self) -> Any:
        """The tokens as grammars need them. Raises ValueError where there are none, or none that ends an answer."""
        if self.tokenizer is None or not self.ends:
            raise ValueError("the model has no tokenizer, or no token that ends an answer")
        return token_reader(self.tokenizer, self.ends)

    @cached_property
    def has_tools(self) -> bool:
        """Whether conversations can have tools."""
        return self.chat is not None and self.tokenizer is not None and tools.speaks(self.chat, self.tokenizer)

    def whole(self, tokens: Sequence[int]) -> str:
        """A prompt that was given as token ids, as text."""
        return self.tokenizer.decode(tokens, keep_special=True) if self.tokenizer else ""

    def shown(self, token: int) -> str:
        """One token on its own, special ones by their names."""
        return self.tokenizer.decode([token], keep_special=True) if self.tokenizer else str(token)


class Detokeniser:
    """Tokens of one answer to pieces of text: a piece ends where a character does. Special tokens are left out."""

    def __init__(self, tokenizer: Tokenizer, prompt: Sequence[int]) -> None:
        self._tokenizer = tokenizer
        self._tokens = list(prompt[-_CONTEXT:])
        if tokenizer.decode(self._tokens).endswith(_BROKEN):
            self._tokens = []  # the prompt ends inside a character, and would read otherwise with its rest
        self._start, self._told = 0, len(self._tokens)

    def add(self, token: int) -> str:
        self._tokens.append(token)
        piece = self._untold()
        if not piece or piece.endswith(_BROKEN):
            return ""
        self._start, self._told = self._told, len(self._tokens)
        return piece

    def rest(self) -> str:
        """What an unfinished character reads as, at the end."""
        return self._untold()

    def _untold(self) -> str:
        before = self._tokenizer.decode(self._tokens[self._start : self._told])
        return self._tokenizer.decode(self._tokens[self._start :])[len(before) :]


class StopStrings:
    """Text up to the first of `stops`; what could be the beginning of one is held back."""

    def __init__(self, stops: Sequence[str]) -> None:
        self._stops = [stop for stop in stops if stop]
        self._held = ""

    def add(self, piece: str) -> tuple[str, bool]:
        """The text that is certain, and whether a stop was found."""
        text = self._held + piece
        if found := [at for stop in self._stops if (at := text.find(stop)) >= 0]:
            self._held = ""
            return text[: min(found)], True
        held = max((self._overlap(text, stop) for stop in self._stops), default=0)
        self._held = text[len(text) - held :]
        return text[: len(text) - held], False

    def rest(self) -> str:
        """What was held back for nothing."""
        held, self._held = self._held, ""
        return held

    @staticmethod
    def _overlap(text: str, stop: str) -> int:
        """The longest end of `text` that begins `stop`."""
        for length in range(min(len(stop) - 1, len(text)), 0, -1):
            if stop.startswith(text[-length:]):
                return length
        return 0
