"""Answers that keep to a grammar: which tokens it allows next, as a mask over the vocabulary (llguidance).

Notable: a constraint hears the answer's tokens from the steps themselves, so every tensor rank of the last stage has the same one, and
a request that resumes gets it back. llguidance and not xgrammar, because it needs neither `transformers` nor triton.

It knows one request at a time; grammars are checked by `serve/grammar.py` before they come here.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fiveply.engine.inputs import sent


class Grammars:
    """Those of one model. `ends`: tokens that end an answer, allowed where the grammar is complete."""

    def __init__(self, folder: Path, vocabulary: int, ends: Sequence[int], device: torch.device) -> None:
        self.folder, self.vocabulary, self.ends, self.device = folder, vocabulary, list(ends), device

    @cached_property
    def tokenizer(self) -> Any:
        """Made with the first request that needs it."""
        from llguidance import LLTokenizer

        text = (self.folder / "tokenizer.json").read_text(encoding="utf-8")
        return LLTokenizer(text, n_vocab=self.vocabulary, eos_token=self.ends)


class Constraint:
    """A grammar, and how much of an answer it has heard."""

    def __init__(self, grammars: Grammars, grammar: str) -> None:
        import llguidance.numpy
        from llguidance import LLMatcher

        self._fill, self._grammars = llguidance.numpy.fill_next_token_bitmask, grammars
        self._matcher = LLMatcher(grammars.tokenizer, grammar, log_level=0)
        self._bits = llguidance.numpy.allocate_token_bitmask(1, grammars.vocabulary)

    def hear(self, tokens: Sequence[int]) -> None:
        for token in tokens:
            self._matcher.consume_token(token)

    @property
    def problem(self) -> str:
        """Why it can't go on, if it can't: too complex, or told what it does not allow."""
        return self._matcher.get_error().splitlines()[0] if self._matcher.is_error() else ""

    def allowed(self) -> Tensor:
        """(V,): true where a token may follow."""
        self._fill(self._matcher, self._bits, 0)
        bits = np.unpackbits(self._bits.view(np.uint8), bitorder="little", count=self._grammars.vocabulary)
        return sent(bits.astype(bool), self._grammars.device)
