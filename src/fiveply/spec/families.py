"""What each family's Hugging Face `config.json` says, as ModelSpec's fields; one clear line for what the fields can't hold.

`transformers` is the oracle: the same parameters, and the same values for keys that a file leaves out (`families.toml`).
"""

from __future__ import annotations

import math
from importlib import resources
from typing import Any, cast

import msgspec

from fiveply.spec.architecture import Experts, Latent, ModelSpec, Rope
from fiveply.spec.errors import InputError

_TABLE = msgspec.toml.decode(
    resources.files("fiveply.spec").joinpath("families.toml").read_bytes(), type=dict[str, dict[str, Any]]
)
FAMILIES: dict[str, str] = {family: row["class"] for family, row in _TABLE.items()}
"""`model_type` and the class of `transformers` that it names."""
LAYER_TYPES = {"full_attention", "sliding_attention"}
ACTIVATIONS = {
    "silu": "silu", "swish": "silu", "gelu": "gelu", "gelu_new": "gelu_tanh", "gelu_pytorch_tanh": "gelu_tanh",
}  # fmt: skip
ROPE_SCALINGS: dict[str, tuple[str, ...]] = {
    "default": (),
    "linear": ("factor",),
    "llama3": ("factor", "low_freq_factor", "high_freq_factor"),
    "yarn": (),
}
"""The numbers that each needs; yarn's factor follows from the positions."""


class _Config(dict[str, Any]):
    """The keys of a configuration. Raises InputError, by file and key, for a value that is missing or of another type."""

    def __init__(self, values: dict[str, Any], where: str) -> None:
        super().__init__(values)
        self.where, self.family = where, str(values.get("model_type", ""))

    def refuse(self, key: str, problem: str, fix: str) -> InputError:
        return InputError(problem, where=self.where, key=key, fix=fix)

    def take(self, key: str, default: Any = None) -> Any:
        """A whole number."""
        value = default if self.get(key) is None else self[key]
        if value is None:
            raise self.refuse(key, "is missing", "add it; every size must be given")
        if not isinstance(value, int) or isinstance(value, bool):
            raise self.refuse(key, f"{value!r} is not a whole number", "give a whole number")
        return value

    def number(self, key: str, default: float) -> float:
        value = default if self.get(key) is None else self[key]
        if not isinstance(value, int | float) or isinstance(value, bool) or not 0 <= value < math.inf:
            raise self.refuse(key, f"{value!r} is not a number from 0", f"give one, such as {default}")
        return float(value)

    def flag(self, key: str, default: bool = False) -> bool:
        value = default if self.get(key) is None else self[key]
        if not isinstance(value, bool):
            raise self.refuse(key, f"{value!r} is neither true nor false", "give true or false")
        return value

    def activation(self, key: str, default: str) -> Any:
        name = str(self.get(key) or default)
        if name not in ACTIVATIONS:
            raise self.refuse(key, f"activation '{name}' is not supported", f"supported: {', '.join(ACTIVATIONS)}")
        return ACTIVATIONS[name]


def read(config: dict[str, Any], where: str) -> ModelSpec:
    """Translate a Hugging Face configuration; raises InputError for what the fields cannot hold."""
    given = _Config(config, where)
    if given.family not in FAMILIES:
        raise given.refuse("model_type", f"model_type '{given.family}' is not supported",
                           f"supported: {', '.join(FAMILIES)}")  # fmt: skip
    return _gpt2(given) if given.family == "gpt2" else _llama_like(given)


def _llama_like(given: _Config) -> ModelSpec:
    family = given.family
    config = _Config(_TABLE[family]["left_out"] | given, given.where)
    hidden, heads, layers = map(config.take, ("hidden_size", "num_attention_heads", "num_hidden_layers"))
    latent = _latent(config) if family in ("deepseek_v2", "deepseek_v3") else None
    if heads < 1 or (not latent and config.get("head_dim") is None and hidden % heads):
        raise config.refuse("num_attention_heads", f"{heads} heads do not divide hidden size {hidden}",
                            "give head_dim, or sizes that divide")  # fmt: skip
    biased = config.flag("attention_bias") and family not in ("mistral", "mixtral", "qwen2", "qwen2_moe")
    window, windowed = _window(config, layers)
    return ModelSpec(
        family=family,
        vocabulary=config.take("vocab_size"),
        hidden=hidden,
        layers=layers,
        heads=heads,
        kv_heads=heads if latent else config.take("num_key_value_heads", heads),
        head_dim=latent.nope_dim + latent.rope_dim if latent else config.take("head_dim", hidden // heads),
        ffn=config.take("intermediate_size"),
        positions=config.take("max_position_embeddings"),
        norm_eps=config.number("rms_norm_eps", 1e-6),
        qk_norm=family in ("qwen3", "qwen3_moe"),
        qkv_bias=biased or family == "qwen2" or (family == "qwen2_moe" and config.flag("qkv_bias", True)),
        out_bias=biased,
        mlp_bias=config.flag("mlp_bias") and family in ("llama", "deepseek_v2"),
        activation=config.activation("hidden_act", "silu"),
        rope=_rope(config),
        window=window,
        window_layers=windowed,
        experts=_experts(config, layers),
        latent=latent,
        sinks=family == "gpt_oss",
        predicted=1 + (config.take("num_nextn_predict_layers", 0) if family == "deepseek_v3" else 0),
        tied=config.flag("tie_word_embeddings"),
        attention_dropout=config.number("attention_dropout", 0.0),
        init_std=config.number("initializer_range", 0.02),
        config=dict(given),
    )


def _latent(config: _Config) -> Latent:
    return Latent(
        q_rank=0 if config["q_lora_rank"] is None else config.take("q_lora_rank"),
        kv_rank=config.take("kv_lora_rank"),
        nope_dim=config.take("qk_nope_head_dim"),
        rope_dim=config.take("qk_rope_head_dim"),
        value_dim=config.take("v_head_dim"),
    )


def _experts(config: _Config, layers: int) -> Experts | None:
    family, having, shared = config.family, range(layers), 0
    if family in ("mixtral", "gpt_oss"):
        count, ffn = config.take("num_local_experts"), config.take("intermediate_size")
    elif family in ("qwen2_moe", "qwen3_moe"):
        step = config.take("decoder_sparse_step", 1)
        dense: Any = config.get("mlp_only_layers") or []
        if step < 1 or not isinstance(dense, list):
            key = "decoder_sparse_step" if step < 1 else "mlp_only_layers"
            raise config.refuse(
                key, "does not say which layers have experts", "give a step from 1 and a list of layers"
            )
        # `transformers` 5 writes the first name.
        key = "num_local_experts" if "num_local_experts" in config else "num_experts"
        count, ffn = config.take(key, 60 if family == "qwen2_moe" else 128), config.take("moe_intermediate_size")
        having = [i for i in having if i not in cast(list[Any], dense) and (i + 1) % step == 0]
        shared = config.take("shared_expert_intermediate_size") if family == "qwen2_moe" else 0
    elif family in ("deepseek_v2", "deepseek_v3"):
        if config.take("moe_layer_freq", 1) != 1:
            raise config.refuse("moe_layer_freq", "only 1 is supported", "leave it out")
        count, ffn = config.take("n_routed_experts"), config.take("moe_intermediate_size")
        having, shared = having[max(0, config.take("first_k_dense_replace")) :], ffn * config.take("n_shared_experts")
    else:
        return None
    return Experts(
        count=count, per_token=config.take("num_experts_per_tok"), ffn=ffn, layers=tuple(having), shared_ffn=shared,
        shared_gate=family == "qwen2_moe" and shared > 0, bias=family == "gpt_oss",
    )  # fmt: skip


def _window(config: _Config, layers: int) -> tuple[int, tuple[int, ...]]:
    """The sliding window and the layers that have it."""
    family = config.family
    window = config.take("sliding_window", 0)
    switched = family in ("qwen2", "qwen3", "qwen2_moe", "qwen3_moe") and config.flag("use_sliding_window")
    windowed: tuple[int, ...] = ()
    if family in ("mistral", "mixtral") or (family == "qwen3_moe" and switched):
        windowed = tuple(range(layers))
    elif switched or family == "gpt_oss":
        kinds: Any = config.get("layer_types")
        if kinds is None:
            windowed = tuple(_window_layers(config, layers))
        elif (
            isinstance(kinds, list)
            and len(kinds := cast(list[Any], kinds)) == layers
            and set(map(str, kinds)) <= LAYER_TYPES
        ):
            windowed = tuple(i for i, kind in enumerate(kinds) if kind == "sliding_attention")
        else:
            raise config.refuse("layer_types", f"does not say for each of {layers} layers which attention it has",
                                f"list {layers} of {', '.join(sorted(LAYER_TYPES))}")  # fmt: skip
    if window < 0:
        raise config.refuse("sliding_window", f"{window} is not a window", "give a number of tokens")
    return (window, windowed) if window and windowed else (0, ())


def _window_layers(config: _Config, layers: int) -> range:
    """Which layers have the window where `layer_types` is left out."""
    if config.family == "gpt_oss":
        return range(0, layers, 2)
    first = config.take("max_window_layers")
    return range(0, min(first, layers), 2) if config.family == "qwen2_moe" else range(max(0, first), layers)


def _gpt2(config: _Config) -> ModelSpec:
    hidden, heads = config.take("n_embd", 768), config.take("n_head", 12)
    if heads < 1 or hidden % heads:
        raise config.refuse("n_head", f"{heads} heads do not divide hidden size {hidden}", "give sizes that divide")
    for key in ("scale_attn_by_inverse_layer_idx", "add_cross_attention"):
        if config.flag(key):
            raise config.refuse(key, "is not supported", "set it to false")
    if config.get("scale_attn_weights") is False:
        raise config.refuse("scale_attn_weights", "unscaled attention is not supported", "set it to true")
    rates = {config.number(key, 0.1) for key in ("embd_pdrop", "resid_pdrop")}
    if len(rates) > 1:
        raise config.refuse("resid_pdrop", f"embd_pdrop and resid_pdrop differ ({sorted(rates)})",
                            "give both the same rate")  # fmt: skip
    return ModelSpec(
        family="gpt2",
        vocabulary=config.take("vocab_size", 50257),
        hidden=hidden,
        layers=config.take("n_layer", 12),
        heads=heads,
        kv_heads=heads,
        head_dim=hidden // heads,
        ffn=config.take("n_inner", 4 * hidden),
        positions=config.take("n_positions", 1024),
        norm="layer",
        norm_eps=config.number("layer_norm_epsilon", 1e-5),
        qkv_bias=True,
        out_bias=True,
        mlp_bias=True,
        gated_mlp=False,
        activation=config.activation("activation_function", "gelu_new"),
        rope=None,
        tied=config.flag("tie_word_embeddings", True),
        dropout=rates.pop(),
        attention_dropout=config.number("attn_pdrop", 0.1),
        init_std=config.number("initializer_range", 0.02),
        config=dict(config),
    )


def _rope(config: _Config) -> Rope:
    # transformers 5 writes `rope_parameters`; before it, `rope_theta` stood alone beside `rope_scaling`.
    raw: dict[str, Any] = {}
    for key in ("rope_scaling", "rope_parameters"):
        value: Any = config.get(key) or {}
        if not isinstance(value, dict):
            raise config.refuse(key, f"{value!r} is not an object", "give rope_type and its numbers")
        raw |= cast(dict[str, Any], value)
    kind = raw.get("rope_type") or raw.get("type") or "default"
    if kind not in ROPE_SCALINGS:
        raise config.refuse("rope_parameters", f"rotary scaling '{kind}' is not supported",
                            f"supported: {', '.join(ROPE_SCALINGS)}")  # fmt: skip
    if raw.get("partial_rotary_factor", config.get("partial_rotary_factor")) not in (None, 1, 1.0):
        raise config.refuse("partial_rotary_factor", "partial rotary positions are not supported",
                            "use a model that rotates whole heads")  # fmt: skip
    fields = {key: raw[key] for key in Rope.__struct_fields__ if raw.get(key) is not None} | {
        "theta": raw.get("rope_theta") or config.get("rope_theta") or 10000.0,
        "kind": kind,
        "original_positions": config.get("original_max_position_embeddings")
        or raw.get("original_max_position_embeddings")
        or config["max_position_embeddings"],
    }
    for key in ROPE_SCALINGS[kind]:
        if key not in fields:
            raise config.refuse("rope_parameters", f"{kind} scaling needs {key}", "add it")
    try:
        rope = msgspec.convert(fields, Rope)
    except msgspec.ValidationError as error:
        raise config.refuse("rope_parameters", str(error), "give numbers") from None
    if kind == "yarn" and "factor" not in fields:
        rope = msgspec.structs.replace(rope, factor=config["max_position_embeddings"] / rope.original_positions)
    return rope
