"""Text to token ids and back: any `tokenizer.json`, or a byte-level BPE trained on the spot.

Wraps the `tokenizers` package and adds the one thing that `tokenizer.json` does not say: which token ends a text. It
knows nothing of chat templates, corpora or models (a model's table of embeddings may be larger than `vocabulary`).
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import tokenizers
from tokenizers import decoders, models, pre_tokenizers, trainers

from fiveply.spec.errors import InputError

END_OF_TEXT = "<|endoftext|>"
SMALLEST_VOCABULARY = 257  # 256 bytes and the end-of-text token
# Tried in this order where no configuration names the token: GPT-2 and most since, Llama 1-2, Llama 3, ChatML, Gemma.
_COMMON_ENDS = (END_OF_TEXT, "</s>", "<|end_of_text|>", "<|im_end|>", "<eos>", "[EOS]")


class Tokenizer:
    """Token ids run from 0 to `vocabulary` - 1; `end` is the id of the end-of-text token."""

    def __init__(self, inner: tokenizers.Tokenizer, end: int) -> None:
        # A saved tokenizer may carry the cut-off length and padding of its last use; a corpus must lose nothing.
        inner.no_truncation()
        inner.no_padding()
        self._inner, self.end = inner, end

    @cached_property
    def vocabulary(self) -> int:
        """Highest id + 1, added tokens included (ids may have gaps)."""
        return max(self._inner.get_vocab(with_added_tokens=True).values()) + 1

    @cached_property
    def fingerprint(self) -> str:
        """Hash of all that decides how text becomes ids."""
        return hashlib.sha256(f"{self.end} {self._inner.to_str()}".encode()).hexdigest()[:32]

    def encode(self, text: str) -> np.ndarray:
        """Text -> int64 ids [T]. Nothing is added; a special token written out in the text becomes that token."""
        return np.asarray(self._inner.encode(text, add_special_tokens=False).ids, dtype=np.int64)

    def encode_aside(self, text: str) -> np.ndarray:
        """As `encode`, while other threads go on: the package's `encode` keeps the interpreter to itself until its end. Starts
        threads, as `encode_batch`, unless TOKENIZERS_PARALLELISM is false."""
        (ids,) = self.encode_batch([text])
        return ids

    def encode_batch(self, texts: Sequence[str]) -> list[np.ndarray]:
        """As `encode`, for many texts, on all cores: this starts threads, so do not fork a process that called it."""
        encodings = self._inner.encode_batch_fast(list(texts), add_special_tokens=False)
        return [np.asarray(encoding.ids, dtype=np.int64) for encoding in encodings]

    def decode(self, ids: Iterable[int], *, keep_special: bool = False) -> str:
        """Ids -> text; special tokens are left out unless `keep_special`."""
        return self._inner.decode([int(i) for i in ids], skip_special_tokens=not keep_special)

    def to_json(self) -> str:
        """What `tokenizer.json` holds."""
        return self._inner.to_str()

    def save(self, path: Path | str) -> None:
        """Write `tokenizer.json` (into a directory, or to a path that ends in .json) and, beside it, a
        `tokenizer_config.json` that names the end-of-text token, as Hugging Face directories do."""
        path = Path(path)
        file = path if path.suffix == ".json" else path / "tokenizer.json"
        file.parent.mkdir(parents=True, exist_ok=True)
        self._inner.save(str(file))
        config = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": self._inner.id_to_token(self.end)}
        file.with_name("tokenizer_config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")

    @classmethod
    def load(cls, path: Path | str) -> Tokenizer:
        """Read a `tokenizer.json`, or the one of a Hugging Face directory.

        Raises InputError where there is none, where the file is something else, and where no end-of-text token is found.
        """
        file = tokenizer_file(path)
        try:
            inner = tokenizers.Tokenizer.from_file(str(file))
        except Exception as error:  # the package raises bare Exception, whatever is wrong
            raise InputError(
                f"not a tokenizer ({error})", where=str(file), fix="give a tokenizer.json or train:4096"
            ) from None
        end = _configured_end(inner, file.parent) if file.name == "tokenizer.json" else None
        if end is None:
            end = next((i for i in map(inner.token_to_id, _COMMON_ENDS) if i is not None), None)
        if end is None:
            raise InputError(
                f"no end-of-text token known (tried {', '.join(_COMMON_ENDS)})",
                where=str(file),
                fix='name it as "eos_token" in a tokenizer_config.json beside it',
            )
        return cls(inner, end)

    @classmethod
    def train(cls, texts: Iterable[str], vocabulary: int) -> Tokenizer:
        """Byte-level BPE of at most `vocabulary` tokens (fewer where the text is too short to have more merges); any
        text can be encoded and comes back exactly. The end-of-text token has id 0. Starts threads, as `encode_batch`.
        """
        if vocabulary < SMALLEST_VOCABULARY:
            raise InputError(
                f"a vocabulary of {vocabulary} is too small: 256 bytes and end-of-text need {SMALLEST_VOCABULARY}",
                key="tokenizer",
                fix=f"train:{SMALLEST_VOCABULARY} or more",
            )
        inner = tokenizers.Tokenizer(models.BPE())
        inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        inner.decoder = decoders.ByteLevel()
        trainer = trainers.BpeTrainer(
            vocab_size=vocabulary,
            special_tokens=[END_OF_TEXT],
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
            show_progress=False,
        )
        inner.train_from_iterator(texts, trainer)
        return cls(inner, end=0)


def tokenizer_file(path: Path | str) -> Path:
    """The `tokenizer.json` that `path` (a file or a directory) means. Raises InputError where there is none."""
    path = Path(path)
    file = path / "tokenizer.json" if path.is_dir() else path
    if not file.is_file():
        raise InputError("no such tokenizer file", where=str(file), fix="give a tokenizer.json or train:4096")
    return file


def _configured_end(inner: tokenizers.Tokenizer, folder: Path) -> int | None:
    """The end-of-text id by the Hugging Face files beside a tokenizer, the tokenizer's own files before the model's."""
    for name in ("tokenizer_config.json", "special_tokens_map.json"):
        token = read_object(folder / name).get("eos_token")
        if isinstance(token, dict):
            token = token.get("content")
        if isinstance(token, str) and (found := inner.token_to_id(token)) is not None:
            return found
    for name in ("generation_config.json", "config.json"):
        ids = read_object(folder / name).get("eos_token_id")
        # A list holds all tokens that stop generation; the first ends a text.
        first = ids[0] if isinstance(ids, list) and ids else ids
        if isinstance(first, int) and inner.id_to_token(first) is not None:
            return first
    return None


def read_object(file: Path) -> dict[str, Any]:
    """A JSON object beside a tokenizer; empty where there is no such file. Raises InputError for anything else."""
    try:
        return msgspec.json.decode(file.read_bytes(), type=dict[str, Any]) if file.is_file() else {}
    except (msgspec.MsgspecError, UnicodeDecodeError) as error:
        raise InputError(f"not a JSON object ({error})", where=str(file), fix="mend or delete it") from None
