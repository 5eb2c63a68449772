"""ModelSpec: a decoder's architecture as data, read from a Hugging Face `config.json`, a directory, or a named preset.

One definition covers the dense families Llama (and SmolLM), Mistral, Qwen2, Qwen3 and GPT-2 by fields; `model/decoder.py`
reads the fields and asks for no family. Sizes are counts, not bytes.
"""

from __future__ import annotations

from importlib import resources
from pathlib import Path
from typing import Any, Literal

import msgspec

from fiveply.spec.errors import InputError

FAMILIES = {
    "llama": "LlamaForCausalLM",
    "mistral": "MistralForCausalLM",
    "qwen2": "Qwen2ForCausalLM",
    "qwen3": "Qwen3ForCausalLM",
    "gpt2": "GPT2LMHeadModel",
}
ACTIVATIONS = {
    "silu": "silu",
    "swish": "silu",
    "gelu": "gelu",
    "gelu_new": "gelu_tanh",
    "gelu_pytorch_tanh": "gelu_tanh",
}
ROPE_SCALINGS = ("default", "linear", "llama3", "yarn")


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


class ModelSpec(msgspec.Struct, frozen=True):
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
    tied: bool = False
    """The head shares the embedding's matrix."""
    dropout: float = 0.0
    """After the embedding, the attention and the MLP."""
    attention_dropout: float = 0.0
    init_std: float = 0.02
    config: dict[str, Any] = {}
    """The `config.json` as it was read, written back beside checkpoints."""

    @property
    def q_size(self) -> int:
        return self.heads * self.head_dim

    @property
    def kv_size(self) -> int:
        return self.kv_heads * self.head_dim

    @classmethod
    def load(cls, source: str | Path) -> ModelSpec:
        """From a preset's name, a `config.json`, or a directory that holds one; raises InputError."""
        name = str(source)
        if name in presets():
            text = resources.files("fiveply.spec").joinpath(f"presets/{name}.json").read_text()
            return cls.from_config(_decode(text, name), where=f"preset {name}")
        path = Path(source)
        if path.is_dir():
            path = path / "config.json"
        if not path.is_file():
            raise InputError(
                "no such preset, config.json or directory",
                where=name,
                fix=f"presets are {', '.join(presets())}; else give a Hugging Face directory",
            )
        return cls.from_config(_decode(path.read_text(), str(path)), where=str(path))

    @classmethod
    def from_config(cls, config: dict[str, Any], where: str = "config.json") -> ModelSpec:
        """Translate a Hugging Face configuration; raises InputError for what this decoder does not compute."""
        family = config.get("model_type", "")
        if family not in FAMILIES:
            raise InputError(
                f"model_type '{family}' is not supported",
                where=where,
                key="model_type",
                fix=f"supported: {', '.join(FAMILIES)}",
            )
        spec = _gpt2(config, where) if family == "gpt2" else _llama_like(config, where)
        spec.check(where)
        return spec

    def check(self, where: str = "model") -> None:
        for key in ("vocabulary", "hidden", "layers", "heads", "kv_heads", "head_dim", "ffn", "positions"):
            if getattr(self, key) < 1:
                raise InputError(
                    f"{getattr(self, key)} is not a size", where=where, key=key, fix="give a whole number from 1"
                )
        if self.heads % self.kv_heads:
            raise InputError(
                f"{self.kv_heads} key-value heads do not divide {self.heads} heads",
                where=where,
                key="num_key_value_heads",
                fix="make the heads a multiple of them",
            )
        if self.rope is not None and self.head_dim % 2:
            raise InputError(f"rotary positions need an even head size, not {self.head_dim}", where=where, key="head_dim",
                             fix="make hidden_size / num_attention_heads even")  # fmt: skip


def presets() -> list[str]:
    """Names of the shipped presets, smallest first."""
    folder = resources.files("fiveply.spec").joinpath("presets")
    sized = [
        (_decode(f.read_text(), f.name), f.name.removesuffix(".json"))
        for f in folder.iterdir()
        if f.name.endswith(".json")
    ]
    return [
        name
        for _, name in sorted(sized, key=lambda item: (item[0]["hidden_size"] * item[0]["num_hidden_layers"], item[1]))
    ]


def _decode(text: str, where: str) -> dict[str, Any]:
    try:
        return msgspec.json.decode(text, type=dict[str, Any])
    except msgspec.MsgspecError as error:
        raise InputError(f"not a JSON object ({error})", where=where, fix="give a Hugging Face config.json") from None


def _take(config: dict[str, Any], key: str, where: str, default: Any = None) -> Any:
    """A whole number of the configuration, or `default`; a missing or mistyped one is the user's error."""
    value = config.get(key)
    if value is None:
        value = default
    if value is None:
        raise InputError("is missing", where=where, key=key, fix="add it; every size must be given")
    if not isinstance(value, int) or isinstance(value, bool):
        raise InputError(f"{value!r} is not a whole number", where=where, key=key, fix="give a whole number")
    return value


def _activation(config: dict[str, Any], key: str, where: str, default: str) -> Any:
    name = config.get(key) or default
    if name not in ACTIVATIONS:
        raise InputError(
            f"activation '{name}' is not supported", where=where, key=key, fix=f"supported: {', '.join(ACTIVATIONS)}"
        )
    return ACTIVATIONS[name]


def _rope(config: dict[str, Any], where: str) -> Rope:
    # transformers 5 writes `rope_parameters`; before it, `rope_theta` stood alone beside `rope_scaling`.
    raw: dict[str, Any] = dict(config.get("rope_scaling") or {}) | dict(config.get("rope_parameters") or {})
    kind = raw.get("rope_type") or raw.get("type") or "default"
    if kind not in ROPE_SCALINGS:
        raise InputError(
            f"rotary scaling '{kind}' is not supported",
            where=where,
            key="rope_parameters",
            fix=f"supported: {', '.join(ROPE_SCALINGS)}",
        )
    if raw.get("partial_rotary_factor", config.get("partial_rotary_factor")) not in (None, 1, 1.0):
        raise InputError(
            "partial rotary positions are not supported",
            where=where,
            key="partial_rotary_factor",
            fix="use a model that rotates whole heads",
        )
    fields = {key: raw[key] for key in Rope.__struct_fields__ if raw.get(key) is not None} | {
        "theta": raw.get("rope_theta") or config.get("rope_theta") or 10000.0,
        "kind": kind,
        "original_positions": raw.get("original_max_position_embeddings")
        or config.get("original_max_position_embeddings")
        or config.get("max_position_embeddings")
        or 2048,
    }
    try:
        return msgspec.convert(fields, Rope)
    except msgspec.ValidationError as error:
        raise InputError(str(error), where=where, key="rope_parameters", fix="give numbers") from None


def _llama_like(config: dict[str, Any], where: str) -> ModelSpec:
    family = config["model_type"]
    hidden, heads, layers = (
        _take(config, k, where) for k in ("hidden_size", "num_attention_heads", "num_hidden_layers")
    )
    if heads < 1 or (config.get("head_dim") is None and hidden % heads):
        raise InputError(
            f"{heads} heads do not divide hidden size {hidden}",
            where=where,
            key="num_attention_heads",
            fix="give head_dim, or sizes that divide",
        )
    attention_bias = bool(config.get("attention_bias", False))
    window = config.get("sliding_window") or 0
    layer_types = config.get("layer_types")
    if family in ("qwen2", "qwen3"):
        window = window if config.get("use_sliding_window") else 0
        first = int(config.get("max_window_layers") or 0)
        windowed = tuple(i for i in range(layers) if i >= first)
    else:
        windowed = tuple(range(layers)) if family == "mistral" else ()
    if layer_types:
        windowed = tuple(i for i, kind in enumerate(layer_types) if kind == "sliding_attention")
    if not window or not windowed:
        window, windowed = 0, ()
    return ModelSpec(
        family=family,
        vocabulary=_take(config, "vocab_size", where),
        hidden=hidden,
        layers=layers,
        heads=heads,
        kv_heads=_take(config, "num_key_value_heads", where, heads),
        head_dim=_take(config, "head_dim", where, hidden // heads),
        ffn=_take(config, "intermediate_size", where),
        positions=_take(config, "max_position_embeddings", where, 2048),
        norm_eps=float(config.get("rms_norm_eps", 1e-6)),
        qk_norm=family == "qwen3",
        qkv_bias=True if family == "qwen2" else attention_bias,
        out_bias=attention_bias if family in ("llama", "qwen3") else False,
        mlp_bias=bool(config.get("mlp_bias", False)) if family == "llama" else False,
        activation=_activation(config, "hidden_act", where, "silu"),
        rope=_rope(config, where),
        window=int(window),
        window_layers=windowed,
        tied=bool(config.get("tie_word_embeddings", False)),
        attention_dropout=float(config.get("attention_dropout") or 0.0),
        init_std=float(config.get("initializer_range", 0.02)),
        config=config,
    )


def _gpt2(config: dict[str, Any], where: str) -> ModelSpec:
    hidden, heads = _take(config, "n_embd", where, 768), _take(config, "n_head", where, 12)
    if hidden % heads:
        raise InputError(
            f"{heads} heads do not divide hidden size {hidden}", where=where, key="n_head", fix="give sizes that divide"
        )
    for key in ("scale_attn_by_inverse_layer_idx", "add_cross_attention"):
        if config.get(key):
            raise InputError("is not supported", where=where, key=key, fix="set it to false")
    if config.get("scale_attn_weights") is False:
        raise InputError(
            "unscaled attention is not supported", where=where, key="scale_attn_weights", fix="set it to true"
        )
    rates = {float(config.get(key, 0.1) or 0.0) for key in ("embd_pdrop", "resid_pdrop")}
    if len(rates) > 1:
        raise InputError(
            f"embd_pdrop and resid_pdrop differ ({sorted(rates)})",
            where=where,
            key="resid_pdrop",
            fix="give both the same rate",
        )
    return ModelSpec(
        family="gpt2",
        vocabulary=_take(config, "vocab_size", where, 50257),
        hidden=hidden,
        layers=_take(config, "n_layer", where, 12),
        heads=heads,
        kv_heads=heads,
        head_dim=hidden // heads,
        ffn=_take(config, "n_inner", where, 4 * hidden),
        positions=_take(config, "n_positions", where, 1024),
        norm="layer",
        norm_eps=float(config.get("layer_norm_epsilon", 1e-5)),
        qkv_bias=True,
        out_bias=True,
        mlp_bias=True,
        gated_mlp=False,
        activation=_activation(config, "activation_function", where, "gelu_new"),
        rope=None,
        tied=bool(config.get("tie_word_embeddings", True)),
        dropout=rates.pop(),
        attention_dropout=float(config.get("attn_pdrop", 0.1) or 0.0),
        init_std=float(config.get("initializer_range", 0.02)),
        config=config,
    )
