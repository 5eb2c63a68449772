"""Small random models of `transformers` in Hugging Face directories, and what `transformers` says to a prompt."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
import transformers
from tokenizers import Tokenizer as InnerTokenizer
from tokenizers import decoders, models, pre_tokenizers, processors
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from fiveply.corpus.tokenizer import END_OF_TEXT, Tokenizer

CONFIGS = Path(__file__).parent / "configs"
CHARACTERS = sorted(pre_tokenizers.ByteLevel.alphabet())
LENGTHS = [1, 37, 2, 64, 11, 23]
NEAR = 1e-3
"""Two largest logits closer than this may change places by rounding."""


def save_random(family: str, folder: Path, **changed: Any) -> Any:
    """A random model of `transformers` that generates without end, and its directory."""
    values = json.loads((CONFIGS / f"{family}.json").read_text()) | {"eos_token_id": None} | changed
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(transformers.AutoConfig.for_model(**values)).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            centre = float(name.endswith(("norm.weight", "ln_1.weight", "ln_2.weight", "ln_f.weight")))
            parameter.normal_(centre, 0.1)
    model.save_pretrained(folder)
    model.name_or_path = str(folder)
    return model


def add_tokenizer(folder: Path, *, beginning: bool = False) -> Tokenizer:
    """Bytes, an end and a beginning of text."""
    vocabulary = {END_OF_TEXT: 0, "<s>": 1} | {c: index for index, c in enumerate(CHARACTERS, 2)}
    inner = InnerTokenizer(models.BPE(vocabulary, []))
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    inner.decoder = decoders.ByteLevel()
    inner.add_special_tokens([END_OF_TEXT, "<s>"])
    if beginning:
        inner.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    tokenizer = Tokenizer(inner, 0)
    tokenizer.save(folder)
    return tokenizer


@torch.no_grad()
def with_rounded_weights(model: Any, rounded: Callable[[Tensor], Tensor]) -> Any:
    """Of its products; a tied embedding's rows stay as they are where they are looked up."""
    model.lm_head.weight = nn.Parameter(model.lm_head.weight.clone())
    for module in model.modules():
        if isinstance(module, nn.Linear | Conv1D):
            weight = module.weight if isinstance(module, nn.Linear) else module.weight.T
            weight.copy_(rounded(weight))
    return model


def ragged(vocabulary: int, lengths: list[int] = LENGTHS) -> list[list[int]]:
    generator = np.random.default_rng(5)
    return [generator.integers(3, vocabulary, length).tolist() for length in lengths]


class Flip(NamedTuple):
    """A token that is not the one with the largest logit there; `gap`: how much larger that is."""

    index: int
    ours: int
    theirs: int
    gap: float


@torch.no_grad()
def flips(ours: list[int], prompt: list[int], model: Any) -> list[Flip]:
    """Each token held against the logits after all that stands before it."""
    logits_TV = model(torch.tensor([prompt + ours])).logits[0, len(prompt) - 1 : -1]
    theirs = logits_TV.argmax(-1).tolist()
    return [
        Flip(index, a, b, float(logits_TV[index, b] - logits_TV[index, a]))
        for index, (a, b) in enumerate(zip(ours, theirs, strict=True))
        if a != b
    ]


def same_where_clear(ours: list[int], theirs: list[int], prompt: list[int], model: Any) -> bool:
    """Equal, or other only where the two largest logits nearly tie."""
    return ours == theirs or all(flip.gap <= NEAR for flip in flips(ours, prompt, model))


def greedy_by_transformers(model: Any, prompt: list[int], count: int) -> list[int]:
    ids = torch.tensor([prompt])
    mask = torch.ones_like(ids)
    out = model.generate(ids, attention_mask=mask, do_sample=False, max_new_tokens=count, pad_token_id=0)
    return out[0, len(prompt) :].tolist()
