"""GGUF files to Hugging Face directories: weights dequantised to float32, config.json, tokenizer.json, chat template.

Covers the architectures llama (SmolLM among them), qwen2 and qwen3 with byte-level BPE tokenizers; whatever this decoder or
this tokenizer would compute otherwise is refused, not approximated. The `gguf` package knows the container and the block
formats; this file knows the names, llama.cpp's order of rotary rows, and how each vocabulary splits text.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import torch
from rich.console import Console
from rich.progress import track
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors
from torch import Tensor

from fiveply.checkpoint import huggingface
from fiveply.model import rotary
from fiveply.spec.architecture import ModelSpec, Rope
from fiveply.spec.errors import InputError
from fiveply.spec.families import FAMILIES

ARCHITECTURES = ("llama", "qwen2", "qwen3")
# Text is split before the merges by the pattern that the vocabulary was trained with (`tokenizer.ggml.pre`). Llama 3 and
# Qwen2 differ in the digits that stand together; the others use ByteLevel's own pattern, GPT-2's, SmolLM after its digits.
SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|DIGITS"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
SPLITS = {
    "llama-bpe": SPLIT.replace("DIGITS", r"\p{N}{1,3}"),
    "qwen2": SPLIT.replace("DIGITS", r"\p{N}"),
    "deepseek-r1-qwen": SPLIT.replace("DIGITS", r"\p{N}"),
}
BYTE_LEVEL = ("default", "gpt-2", "smollm")
CONTROL, USER_DEFINED = 3, 4  # token types


class _Metadata(dict[str, Any]):
    """The key-value pairs of a GGUF file: numbers, flags, texts, or lists of them."""

    def __init__(self, reader: Any, file: Path) -> None:
        self.file = file
        for key, field in reader.fields.items():
            if not field.data:  # an empty list
                continue
            kind = field.types[-1].name
            values = [bytes(field.parts[i]).decode() if kind == "STRING" else field.parts[i][0] for i in field.data]
            if kind == "FLOAT32":  # 1e-05, not its binary neighbour 9.999999747378752e-06
                values = [float(str(value)) for value in values]
            elif kind != "STRING":
                values = [value.item() for value in values]
            self[key] = values if field.types[0].name == "ARRAY" else values[0]

    def __missing__(self, key: str) -> Any:
        raise self.refuse(key, "is missing", "convert the model to GGUF again")

    def refuse(self, key: str, problem: str, fix: str = "use the model as a Hugging Face directory") -> InputError:
        return InputError(problem, where=str(self.file), key=key, fix=fix)


def convert(gguf_file: Path, folder: Path) -> None:
    """Write the model in `gguf_file` as a Hugging Face directory `folder`, which must be new or empty.

    Raises InputError for a file that is not GGUF, is damaged, or holds a model or tokenizer that is not supported.
    """
    gguf_file = Path(gguf_file)
    try:
        import gguf
    except ImportError:
        raise InputError("reading GGUF needs the package gguf", where=str(gguf_file),
                         fix="pip install 'fiveply[gguf]'") from None  # fmt: skip
    if not gguf_file.is_file():
        raise InputError("no such file", where=str(gguf_file), fix="give a .gguf file")
    try:
        with open(gguf_file, "rb") as handle:
            if handle.read(4) != b"GGUF":
                raise InputError("not a GGUF file", where=str(gguf_file), fix="give a .gguf file")
        reader = gguf.GGUFReader(gguf_file)
        metadata = _Metadata(reader, gguf_file)
    # What the package raises on a file cut short, and the system on one that may not be read.
    except (ValueError, IndexError, KeyError, OverflowError, OSError) as error:
        raise InputError(
            f"damaged or not readable ({error})", where=str(gguf_file), fix="fetch the file again"
        ) from None
    tensors = {tensor.name: tensor for tensor in reader.tensors}
    config = _config(metadata, tensors)
    spec = ModelSpec.from_config(config, where=str(gguf_file))
    extra_files = _tokenizer_files(metadata, spec.vocabulary)

    def dequantised() -> Iterator[tuple[str, Tensor]]:
        console = Console(stderr=True)
        for name in track(sorted(tensors), f"converting {gguf_file.name}", console=console, transient=True):
            hf_name = _hf_name(name)
            if hf_name is None:
                continue
            try:
                values = gguf.dequantize(tensors[name].data, tensors[name].tensor_type)
            except (NotImplementedError, ValueError) as error:
                raise metadata.refuse(name, f"cannot be dequantised ({error})", "use another quantisation") from None
            values = values.reshape(tuple(map(int, reversed(tensors[name].shape))))
            heads = {"attn_q": spec.heads, "attn_k": spec.kv_heads}.get(name.rpartition(".")[0].rpartition(".")[2])
            # llama.cpp rotates neighbouring rows of Llama, Hugging Face rows that stand half a head apart.
            if heads and spec.family == "llama":
                pairs = values.reshape(heads, -1, 2, *values.shape[1:])
                values = pairs.swapaxes(1, 2).reshape(values.shape)
            yield hf_name, torch.from_numpy(np.array(values, dtype=np.float32))

    huggingface.write(folder, spec, dequantised(), extra_files, source=str(gguf_file))


def _hf_name(name: str) -> str | None:
    """The Hugging Face name of a GGUF tensor; itself when unknown (and then refused as no part of the model)."""
    if name == "rope_freqs.weight":  # rotary scaling as a table: read into the config
        return None
    names = huggingface.NAMES["gguf"]
    match = re.fullmatch(r"(?:blk\.(\d+)\.)?(\w+)\.(weight|bias)", name)
    if match is None or match[2] not in names:
        return name
    prefix = f"model.layers.{match[1]}." if match[1] else ""
    return f"{prefix}{names[match[2]]}.{match[3]}"


def _config(metadata: _Metadata, tensors: dict[str, Any]) -> dict[str, Any]:
    """The `config.json` of the model."""
    family = metadata["general.architecture"]
    if family not in ARCHITECTURES or metadata.get(f"{family}.expert_count"):
        raise metadata.refuse("general.architecture", f"'{family}' with these keys is not supported",
                              f"supported: {', '.join(ARCHITECTURES)}, without experts")  # fmt: skip
    hidden, heads = (metadata[f"{family}.{key}"] for key in ("embedding_length", "attention.head_count"))
    if not isinstance(heads, int) or heads < 1:
        raise metadata.refuse(f"{family}.attention.head_count", "one number of heads for all layers is supported")
    head_dim = metadata.get(f"{family}.attention.key_length") or hidden // heads
    if metadata.get(f"{family}.rope.dimension_count", head_dim) != head_dim:
        raise metadata.refuse(f"{family}.rope.dimension_count", "partial rotary positions are not supported")
    if "token_embd.weight" not in tensors:
        raise metadata.refuse("token_embd.weight", "this tensor is missing", "fetch the file again")
    config = {
        "model_type": family,
        "architectures": [FAMILIES[family]],
        "vocab_size": int(tensors["token_embd.weight"].shape[1]),
        "hidden_size": hidden,
        "intermediate_size": metadata[f"{family}.feed_forward_length"],
        "num_hidden_layers": metadata[f"{family}.block_count"],
        "num_attention_heads": heads,
        "num_key_value_heads": metadata.get(f"{family}.attention.head_count_kv", heads),
        "head_dim": head_dim,
        "max_position_embeddings": metadata[f"{family}.context_length"],
        "rms_norm_eps": metadata[f"{family}.attention.layer_norm_rms_epsilon"],
        "hidden_act": "silu",
        "rope_theta": metadata.get(f"{family}.rope.freq_base", 10000.0),
        "tie_word_embeddings": "output.weight" not in tensors,
        "attention_bias": "blk.0.attn_q.bias" in tensors,
        "mlp_bias": "blk.0.ffn_up.bias" in tensors,
    }
    scaling = metadata.get(f"{family}.rope.scaling.type", "none")
    if scaling != "none":
        original = metadata.get(f"{family}.rope.scaling.original_context_length")
        config["rope_scaling"] = {
            "rope_type": scaling,
            "factor": metadata[f"{family}.rope.scaling.factor"],
            **({"original_max_position_embeddings": original} if original else {}),
        }
    elif "rope_freqs.weight" in tensors:
        config["rope_scaling"] = _llama3_scaling(metadata, tensors["rope_freqs.weight"].data, config)
    for name in ("bos", "eos"):
        config[f"{name}_token_id"] = metadata.get(f"tokenizer.ggml.{name}_token_id")
    config["pad_token_id"] = metadata.get("tokenizer.ggml.padding_token_id")
    return config


def _llama3_scaling(metadata: _Metadata, factors: Any, config: dict[str, Any]) -> dict[str, Any]:
    """Llama 3's scaling, which GGUF stores as a factor per frequency; refused unless its published constants give them."""
    factor, low, high, original = float(np.max(factors)), 1.0, 4.0, 8192
    ropes = Rope(config["rope_theta"]), Rope(config["rope_theta"], "llama3", factor, low, high, original)
    plain, scaled = (rotary.inverse_frequencies(rope, config["head_dim"])[0] for rope in ropes)
    if not np.allclose(plain / scaled, factors, rtol=1e-3):
        raise metadata.refuse("rope_freqs.weight", "an unknown rotary scaling")
    return {"rope_type": "llama3", "factor": factor, "low_freq_factor": low, "high_freq_factor": high,
            "original_max_position_embeddings": original}  # fmt: skip


def _tokenizer_files(metadata: _Metadata, vocabulary: int) -> dict[str, bytes]:
    """`tokenizer.json` and `tokenizer_config.json`; `vocabulary` is the number of embeddings."""
    kind = metadata["tokenizer.ggml.model"]
    if kind != "gpt2":
        raise metadata.refuse(
            "tokenizer.ggml.model", f"tokenizer '{kind}' is not supported (byte-level BPE, 'gpt2', is)"
        )
    pre = metadata.get("tokenizer.ggml.pre", "default")
    if pre not in (*SPLITS, *BYTE_LEVEL):
        raise metadata.refuse("tokenizer.ggml.pre", f"splitting '{pre}' is not supported")
    tokens: list[str] = metadata["tokenizer.ggml.tokens"]
    merges = [tuple(merge.split(" ", 1)) for merge in metadata["tokenizer.ggml.merges"]]
    if len(tokens) > vocabulary:
        raise metadata.refuse("tokenizer.ggml.tokens", f"{len(tokens)} tokens for {vocabulary} embeddings")
    try:  # Llama 3's vocabulary holds words that its merges don't reach
        bpe = models.BPE({token: i for i, token in enumerate(tokens)}, merges, ignore_merges=pre == "llama-bpe")
    except Exception as error:  # the package raises bare Exception, whatever is wrong
        raise metadata.refuse("tokenizer.ggml.merges", f"not a vocabulary with its merges ({error})") from None
    tokenizer = Tokenizer(bpe)
    tokenizer.decoder = decoders.ByteLevel()
    if pre == "qwen2":
        tokenizer.normalizer = normalizers.NFC()
    steps: list[Any] = [pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=pre not in SPLITS)]
    if pre in SPLITS:
        steps.insert(0, pre_tokenizers.Split(Regex(SPLITS[pre]), behavior="isolated"))
    elif pre == "smollm":
        steps.insert(0, pre_tokenizers.Digits(individual_digits=True))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(steps)
    types = metadata.get("tokenizer.ggml.token_type", [1] * len(tokens))
    # Control tokens are matched whole and left out of decoded text; user-defined ones are matched whole only.
    tokenizer.add_tokens(
        [
            AddedToken(token, special=type_ == CONTROL, normalized=False)
            for token, type_ in zip(tokens, types, strict=False)
            if type_ in (CONTROL, USER_DEFINED)
        ]
    )
    special: dict[str, Any] = {"tokenizer_class": "PreTrainedTokenizerFast", "clean_up_tokenization_spaces": False}
    for name, key in (("bos", "bos"), ("eos", "eos"), ("unk", "unknown"), ("pad", "padding")):
        index = metadata.get(f"tokenizer.ggml.{key}_token_id")
        if index is not None and index < len(tokens):
            special[f"{name}_token"] = tokens[index]
    if metadata.get("tokenizer.ggml.add_bos_token") and "bos_token" in special:
        bos = special["bos_token"]
        tokenizer.post_processor = processors.TemplateProcessing(
            single=f"{bos} $A", pair=f"{bos} $A {bos} $B", special_tokens=[(bos, tokens.index(bos))]
        )
    if template := metadata.get("tokenizer.chat_template"):
        special["chat_template"] = template
    return {
        "tokenizer.json": tokenizer.to_str(pretty=True).encode(),
        "tokenizer_config.json": msgspec.json.format(msgspec.json.encode(special), indent=2) + b"\n",
    }
