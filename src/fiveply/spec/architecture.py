"""ModelSpec: a decoder's architecture as data, read from a Hugging Face `config.json`, a directory, or a named preset.

One definition covers the dense families Llama (and SmolLM), Mistral, Qwen2, Qwen3 and GPT-2 by fields; `model/decoder.py`
reads the fields and asks for no family. Sizes are counts, not bytes.
"""

from __future__ import annotations

import math
from importlib import resources
from pathlib import Path
from typing import Any, Literal, cast

import msgspec

from fiveply.spec.errors import InputError

FAMILIES = {
    "llama": "LlamaForCausalLM",
    "mistral": "MistralForCausalLM",
    "qwen2": "Qwen2ForCausalLM",
    "qwen3": "Qwen3ForCausalLM",
    "gpt2": "GPT2LMHeadModel",
}
LAYER_TYPES = {"full_attention", "sliding_attention"}
ACTIVATIONS = {
    "silu": "silu",
    "swish": "silu",
    "gelu": "gelu",
    "gelu_new": "gelu_tanh",
    "gelu_pytorch_tanh": "gelu_tanh",
}
ROPE_SCALINGS: dict[str, tuple[str, ...]] = {
    "default": (),
    "linear": ("factor",),
    "llama3": ("factor", "low_freq_factor", "high_freq_factor"),
    "yarn": (),
}
"""The numbers that each needs; yarn's factor follows from the positions."""
LEFT_OUT: dict[str, dict[str, Any]] = {
    "llama": {"max_position_embeddings": 2048},
    "mistral": {"num_key_value_heads": 8, "max_position_embeddings": 131072, "sliding_window": 4096},
    "qwen2": {"num_key_value_heads": 32, "max_position_embeddings": 32768, "sliding_window": 4096, "max_window_layers": 28},
    "qwen3": {"num_key_value_heads": 32, "max_position_embeddings": 32768, "sliding_window": 4096, "max_window_layers": 28,
              "head_dim": 128},
}  # fmt: skip
"""What `transformers` takes for keys that a configuration leaves out, where it is not what follows from the others."""


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


class Experts(msgspec.Struct, frozen=True):
    """Routed experts of the layers that have them (`layers`); the others have a plain MLP of `ModelSpec.ffn`."""

    count: int
    per_token: int
    ffn: int
    """One expert's inner size."""
    layers: tuple[int, ...]
    shared_ffn: int = 0
    """Inner size of the MLP that every token passes beside its experts; 0 for none."""
    bias: bool = False
    """Biases in the experts and the router."""


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
            return cls.from_config(_decode(text.encode(), name), where=f"preset {name}")
        path = Path(source)
        if path.is_dir():
            path = path / "config.json"
        if not path.is_file():
            raise InputError(
                "no such preset, config.json or directory",
                where=name,
                fix=f"presets are {', '.join(presets())}; else give a Hugging Face directory",
            )
        return cls.from_config(_decode(path.read_bytes(), str(path)), where=str(path))

    @classmethod
    def from_config(cls, config: dict[str, Any], where: str = "config.json") -> ModelSpec:
        """Translate a Hugging Face configuration; raises InputError for what this decoder does not compute."""
        family = str(config.get("model_type", ""))
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
        if self.rope is not None and not (
            1 < self.rope.theta < math.inf and 0 < self.rope.factor < math.inf and self.rope.original_positions >= 0
        ):
            raise InputError(
                f"theta {self.rope.theta} with factor {self.rope.factor} rotates nothing",
                where=where,
                key="rope_parameters",
                fix="give a theta above 1 and a factor above 0",
            )
        for key in ("dropout", "attention_dropout"):
            if not 0 <= getattr(self, key) < 1:
                raise InputError(
                    f"{getattr(self, key)} is not a rate", where=where, key=key, fix="give 0 or more and less than 1"
                )


def presets() -> list[str]:
    """Names of the shipped presets, smallest first."""
    folder = resources.files("fiveply.spec").joinpath("presets")
    sized = [
        (_decode(f.read_bytes(), f.name), f.name.removesuffix(".json"))
        for f in folder.iterdir()
        if f.name.endswith(".json")
    ]
    return [
        name
        for _, name in sorted(sized, key=lambda item: (item[0]["hidden_size"] * item[0]["num_hidden_layers"], item[1]))
    ]


def _decode(text: bytes, where: str) -> dict[str, Any]:
    try:
        return msgspec.json.decode(text, type=dict[str, Any])
    except (msgspec.MsgspecError, UnicodeDecodeError) as error:
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


def _number(config: dict[str, Any], key: str, where: str, default: float) -> float:
    value = config.get(key)
    if value is None:
        return default
    if not isinstance(value, int | float) or isinstance(value, bool) or not 0 <= value < math.inf:
        raise InputError(f"{value!r} is not a number from 0", where=where, key=key, fix=f"give one, such as {default}")
    return float(value)


def _flag(config: dict[str, Any], key: str, where: str, default: bool = False) -> bool:
    value = config.get(key)
    if value is None:
        return default
    if not isinstance(value, bool):
        raise InputError(f"{value!r} is neither true nor false", where=where, key=key, fix="give true or false")
    return value


def _activation(config: dict[str, Any], key: str, where: str, default: str) -> Any:
    name = str(config.get(key) or default)
    if name not in ACTIVATIONS:
        raise InputError(
            f"activation '{name}' is not supported", where=where, key=key, fix=f"supported: {', '.join(ACTIVATIONS)}"
        )
    return ACTIVATIONS[name]


def _rope(config: dict[str, Any], where: str) -> Rope:
    # transformers 5 writes `rope_parameters`; before it, `rope_theta` stood alone beside `rope_scaling`.
    raw: dict[str, Any] = {}
    for key in ("rope_scaling", "rope_parameters"):
        value: Any = config.get(key) or {}
        if not isinstance(value, dict):
            raise InputError(f"{value!r} is not an object", where=where, key=key, fix="give rope_type and its numbers")
        raw |= cast(dict[str, Any], value)
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
        "original_positions": config.get("original_max_position_embeddings")
        or raw.get("original_max_position_embeddings")
        or config["max_position_embeddings"],
    }
    for key in ROPE_SCALINGS[kind]:
        if key not in fields:
            raise InputError(f"{kind} scaling needs {key}", where=where, key="rope_parameters", fix="add it")
    try:
        rope = msgspec.convert(fields, Rope)
        if kind == "yarn" and "factor" not in fields:
            rope = msgspec.structs.replace(rope, factor=config["max_position_embeddings"] / rope.original_positions)
        return rope
    except msgspec.ValidationError as error:
        raise InputError(str(error), where=where, key="rope_parameters", fix="give numbers") from None


def _llama_like(given: dict[str, Any], where: str) -> ModelSpec:
    family = given["model_type"]
    config = LEFT_OUT[family] | given
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
    positions = _take(config, "max_position_embeddings", where)
    biased = _flag(config, "attention_bias", where) and family in ("llama", "qwen3")
    window, windowed = _window(config, layers, where)
    return ModelSpec(
        family=family,
        vocabulary=_take(config, "vocab_size", where),
        hidden=hidden,
        layers=layers,
        heads=heads,
        kv_heads=_take(config, "num_key_value_heads", where, heads),
        head_dim=_take(config, "head_dim", where, hidden // heads),
        ffn=_take(config, "intermediate_size", where),
        positions=positions,
        norm_eps=_number(config, "rms_norm_eps", where, 1e-6),
        qk_norm=family == "qwen3",
        qkv_bias=biased or family == "qwen2",
        out_bias=biased,
        mlp_bias=_flag(config, "mlp_bias", where) and family == "llama",
        activation=_activation(config, "hidden_act", where, "silu"),
        rope=_rope(config, where),
        window=window,
        window_layers=windowed,
        tied=_flag(config, "tie_word_embeddings", where),
        attention_dropout=_number(config, "attention_dropout", where, 0.0),
        init_std=_number(config, "initializer_range", where, 0.02),
        config=given,
    )


def _window(config: dict[str, Any], layers: int, where: str) -> tuple[int, tuple[int, ...]]:
    """The sliding window and the layers that have it."""
    family = config["model_type"]
    window = _take(config, "sliding_window", where, 0)
    if family == "mistral":
        windowed = tuple(range(layers))
    elif family in ("qwen2", "qwen3") and _flag(config, "use_sliding_window", where):
        kinds: Any = config.get("layer_types")
        first = _take(config, "max_window_layers", where)
        if kinds is None:
            kinds = ["sliding_attention" if layer >= first else "full_attention" for layer in range(layers)]
        if (
            not isinstance(kinds, list)
            or len(kinds := cast(list[Any], kinds)) != layers
            or not set(map(str, kinds)) <= LAYER_TYPES
        ):
            raise InputError(
                f"does not say for each of {layers} layers which attention it has",
                where=where,
                key="layer_types",
                fix=f"list {layers} of {', '.join(sorted(LAYER_TYPES))}",
            )
        windowed = tuple(i for i, kind in enumerate(kinds) if kind == "sliding_attention")
    else:
        windowed = ()
    if window < 0:
        raise InputError(f"{window} is not a window", where=where, key="sliding_window", fix="give a number of tokens")
    return (window, windowed) if window and windowed else (0, ())


def _gpt2(config: dict[str, Any], where: str) -> ModelSpec:
    hidden, heads = _take(config, "n_embd", where, 768), _take(config, "n_head", where, 12)
    if heads < 1 or hidden % heads:
        raise InputError(
            f"{heads} heads do not divide hidden size {hidden}", where=where, key="n_head", fix="give sizes that divide"
        )
    for key in ("scale_attn_by_inverse_layer_idx", "add_cross_attention"):
        if _flag(config, key, where):
            raise InputError("is not supported", where=where, key=key, fix="set it to false")
    if config.get("scale_attn_weights") is False:
        raise InputError(
            "unscaled attention is not supported", where=where, key="scale_attn_weights", fix="set it to true"
        )
    rates = {_number(config, key, where, 0.1) for key in ("embd_pdrop", "resid_pdrop")}
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
        norm_eps=_number(config, "layer_norm_epsilon", where, 1e-5),
        qkv_bias=True,
        out_bias=True,
        mlp_bias=True,
        gated_mlp=False,
        activation=_activation(config, "activation_function", where, "gelu_new"),
        rope=None,
        tied=_flag(config, "tie_word_embeddings", where, True),
        dropout=rates.pop(),
        attention_dropout=_number(config, "attn_pdrop", where, 0.1),
        init_std=_number(config, "initializer_range", where, 0.02),
        config=config,
    )
