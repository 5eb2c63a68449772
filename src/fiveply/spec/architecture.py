"""ModelSpec: a decoder's architecture as data, read from a Hugging Face `config.json`, a directory, or a named preset.

One definition covers all families by fields; `families.py` fills them from each family's configuration, and
`model/decoder.py` reads them and asks for no family. Experts, latent attention, sinks and multi-token prediction are
counted by the planner and not computed yet (`legality.check_runnable`). Sizes are counts, not bytes.
"""

from __future__ import annotations

import math
import re
from importlib import resources
from pathlib import Path
from typing import Any, Literal

import msgspec

from fiveply.spec.errors import InputError


class Rope(msgspec.Struct, frozen=True):
    """Rotary positions and their scaling (`kind`), with Hugging Face's parameter names."""

    theta: float = 10000.0
    kind: Literal["default", "linear", "llama3", "yarn"] = "default"
    factor: float = 1.0
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    original_positions: int = 0
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    attention_factor: float | None = None
    mscale: float | None = None
    mscale_all_dim: float | None = None
    truncate: bool = True


class Latent(msgspec.Struct, frozen=True):
    """Latent attention (DeepSeek-V2): queries and keys-values through low ranks; sizes of one head in `*_dim`."""

    q_rank: int
    """0: queries are projected directly."""
    kv_rank: int
    nope_dim: int
    """The part of a query's and key's head that is not rotated."""
    rope_dim: int
    """The rotated part; the key's is shared by all heads."""
    value_dim: int

    def check(self, where: str) -> None:
        if min(self.kv_rank, self.nope_dim, self.rope_dim, self.value_dim) < 1 or self.q_rank < 0 or self.rope_dim % 2:
            raise InputError(
                f"ranks {self.q_rank} and {self.kv_rank} with heads of {self.nope_dim} + {self.rope_dim} and {self.value_dim}",
                where=where, key="kv_lora_rank", fix="give sizes from 1, the rotated part of a head even",
            )  # fmt: skip


class Experts(msgspec.Struct, frozen=True):
    """Routed experts of the layers that have them (`layers`); the others have a plain MLP of `ModelSpec.ffn`."""

    count: int
    per_token: int
    ffn: int
    """One expert's inner size."""
    layers: tuple[int, ...]
    shared_ffn: int = 0
    """Inner size of the MLP that every token passes beside its experts; 0 for none."""
    shared_gate: bool = False
    """A learnt gate scales the shared MLP's output (Qwen2-MoE)."""
    bias: bool = False
    """Biases in the experts and the router."""

    def check(self, where: str) -> None:
        if self.ffn < 1 or self.shared_ffn < 0:
            raise InputError(f"{self.ffn} and {self.shared_ffn} are not sizes of experts", where=where,
                             key="moe_intermediate_size", fix="give a whole number from 1")  # fmt: skip
        if not 1 <= self.per_token <= self.count:
            raise InputError(f"{self.per_token} of {self.count} experts cannot be chosen", where=where,
                             key="num_experts_per_tok", fix="give from 1 to the number of experts")  # fmt: skip


class ModelSpec(msgspec.Struct, frozen=True, cache_hash=True):
    """A decoder: sizes and the choices that distinguish the families."""

    family: str
    vocabulary: int
    hidden: int
    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    ffn: int
    positions: int
    """Longest sequence."""
    norm: Literal["rms", "layer"] = "rms"
    norm_eps: float = 1e-5
    qk_norm: bool = False
    qkv_bias: bool = False
    out_bias: bool = False
    """Bias of the attention's output projection."""
    mlp_bias: bool = False
    gated_mlp: bool = True
    activation: Literal["silu", "gelu", "gelu_tanh"] = "silu"
    rope: Rope | None = Rope()
    """None: learned positions."""
    window: int = 0
    """Sliding window in tokens, 0 for none; `window_layers` says which layers have it."""
    window_layers: tuple[int, ...] = ()
    experts: Experts | None = None
    latent: Latent | None = None
    sinks: bool = False
    """A learnt logit per head that attention's softmax counts besides the keys."""
    predicted: int = 1
    """Tokens predicted at each position; beyond the first each has one more layer (multi-token prediction)."""
    tied: bool = False
    """The head shares the embedding's matrix."""
    dropout: float = 0.0
    """After the embedding, the attention and the MLP."""
    attention_dropout: float = 0.0
    init_std: float = 0.02
    config: dict[str, Any] = {}
    """The `config.json` as it was read, written back beside checkpoints."""

    def __hash__(self) -> int:
        """Of the sizes: `config` has no hash, and equality looks at all fields."""
        return hash((self.family, self.vocabulary, self.hidden, self.layers, self.heads, self.ffn, self.positions))

    @property
    def q_size(self) -> int:
        return self.heads * self.head_dim

    @property
    def kv_size(self) -> int:
        return self.kv_heads * self.head_dim

    @property
    def embeds_at_end(self) -> bool:
        """Whether the last stage needs the embedding: as the head's matrix, or to predict further tokens."""
        return self.tied or self.predicted > 1

    @classmethod
    def load(cls, source: str | Path) -> ModelSpec:
        """From a preset's name, a `config.json`, or a directory that holds one; raises InputError."""
        name = str(source)
        preset = resources.files("fiveply.spec").joinpath(f"presets/{name}.json")
        if re.fullmatch(r"[\w.-]+", name) and preset.is_file():
            return cls.from_config(_decode(preset.read_bytes(), name), where=f"preset {name}")
        path = Path(source)
        if path.is_dir():
            path = path / "config.json"
        if not path.is_file():
            raise InputError("no such preset, config.json or directory", where=name,
                             fix=f"presets are {', '.join(presets())}; else give a Hugging Face directory")  # fmt: skip
        return cls.from_config(_decode(path.read_bytes(), str(path)), where=str(path))

    @classmethod
    def from_config(cls, config: dict[str, Any], where: str = "config.json") -> ModelSpec:
        """Translate a Hugging Face configuration; raises InputError for what this decoder does not compute."""
        from fiveply.spec import families  # it builds ModelSpecs, and so stands above this file

        spec = families.read(config, where)
        spec.check(where)
        return spec

    def check(self, where: str = "model") -> None:
        def refuse(key: str, problem: str, fix: str) -> None:
            raise InputError(problem, where=where, key=key, fix=fix)

        for key in ("vocabulary", "hidden", "layers", "heads", "kv_heads", "head_dim", "ffn", "positions"):
            if getattr(self, key) < 1:
                refuse(key, f"{getattr(self, key)} is not a size", "give a whole number from 1")
        if self.heads % self.kv_heads:
            problem = f"{self.kv_heads} key-value heads do not divide {self.heads} heads"
            refuse("num_key_value_heads", problem, "make the heads a multiple of them")
        if rope := self.rope:
            if self.head_dim % 2:
                problem = f"rotary positions need an even head size, not {self.head_dim}"
                refuse("head_dim", problem, "make hidden_size / num_attention_heads even")
            if not (1 < rope.theta < math.inf and 0 < rope.factor < math.inf and rope.original_positions >= 0):
                problem = f"theta {rope.theta} with factor {rope.factor} rotates nothing"
                refuse("rope_parameters", problem, "give a theta above 1 and a factor above 0")
        if self.experts is not None:
            self.experts.check(where)
        if self.latent is not None:
            self.latent.check(where)
        if self.predicted < 1:
            problem = f"{self.predicted - 1} is not a number of layers"
            refuse("num_nextn_predict_layers", problem, "give a whole number from 0")
        for key in ("dropout", "attention_dropout"):
            if not 0 <= getattr(self, key) < 1:
                refuse(key, f"{getattr(self, key)} is not a rate", "give 0 or more and less than 1")


def presets() -> list[str]:
    """Names of the shipped presets, smallest first."""
    folder = resources.files("fiveply.spec").joinpath("presets")
    specs = {
        f.name.removesuffix(".json"): ModelSpec.from_config(_decode(f.read_bytes(), f.name), f.name)
        for f in folder.iterdir()
        if f.name.endswith(".json")
    }
    return sorted(specs, key=lambda name: (_block_size(specs[name]), name))


def _block_size(spec: ModelSpec) -> int:
    """About the parameters of the blocks, to sort by."""
    experts = spec.experts
    columns = spec.layers * spec.ffn + (
        len(experts.layers) * (experts.count * experts.ffn - spec.ffn) if experts else 0
    )
    return spec.hidden * (columns + spec.layers * spec.q_size)


def _decode(text: bytes, where: str) -> dict[str, Any]:
    try:
        return msgspec.json.decode(text, type=dict[str, Any])
    except (msgspec.MsgspecError, UnicodeDecodeError) as error:
        raise InputError(f"not a JSON object ({error})", where=where, fix="give a Hugging Face config.json") from None
