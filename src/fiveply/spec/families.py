"""What each family's Hugging Face `config.json` says, as ModelSpec's fields; one clear line for what the fields can't hold.

`transformers` is the oracle: the same parameters, and the same values for keys that a file leaves out (`LEFT_OUT`).
"""

from __future__ import annotations

import math
from typing import Any, cast

import msgspec

from fiveply.spec.architecture import Experts, Latent, ModelSpec, Rope
from fiveply.spec.errors import InputError

FAMILIES = {
    "llama": "LlamaForCausalLM",
    "mistral": "MistralForCausalLM",
    "qwen2": "Qwen2ForCausalLM",
    "qwen3": "Qwen3ForCausalLM",
    "gpt2": "GPT2LMHeadModel",
    "mixtral": "MixtralForCausalLM",
    "qwen2_moe": "Qwen2MoeForCausalLM",
    "qwen3_moe": "Qwen3MoeForCausalLM",
    "deepseek_v2": "DeepseekV2ForCausalLM",
    "deepseek_v3": "DeepseekV3ForCausalLM",
    "gpt_oss": "GptOssForCausalLM",
}
"""`model_type` and the class of `transformers` that it names."""
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
_DEEPSEEK = {
    "q_lora_rank": 1536,
    "kv_lora_rank": 512,
    "qk_nope_head_dim": 128,
    "qk_rope_head_dim": 64,
    "v_head_dim": 128,
}
LEFT_OUT: dict[str, dict[str, Any]] = {
    "llama": {"max_position_embeddings": 2048},
    "mistral": {"num_key_value_heads": 8, "max_position_embeddings": 131072, "sliding_window": 4096},
    "qwen2": {"num_key_value_heads": 32, "max_position_embeddings": 32768, "sliding_window": 4096, "max_window_layers": 28},
    "qwen3": {"num_key_value_heads": 32, "max_position_embeddings": 32768, "sliding_window": 4096, "max_window_layers": 28,
              "head_dim": 128},
    "mixtral": {"num_key_value_heads": 8, "max_position_embeddings": 131072, "rms_norm_eps": 1e-5, "rope_theta": 1e6,
                "num_local_experts": 8, "num_experts_per_tok": 2},
    "qwen2_moe": {"num_key_value_heads": 16, "max_position_embeddings": 32768, "sliding_window": 4096, "max_window_layers": 28,
                  "num_experts_per_tok": 4, "moe_intermediate_size": 1408,
                  "shared_expert_intermediate_size": 5632},
    "qwen3_moe": {"num_key_value_heads": 4, "max_position_embeddings": 32768, "sliding_window": 4096,
                  "num_experts_per_tok": 8, "moe_intermediate_size": 768},
    "deepseek_v2": _DEEPSEEK | {"max_position_embeddings": 2048, "n_routed_experts": 64, "n_shared_experts": 2,
                                "moe_intermediate_size": 1407, "first_k_dense_replace": 0},
    "deepseek_v3": _DEEPSEEK | {"max_position_embeddings": 4096, "n_routed_experts": 256, "n_shared_experts": 1,
                                "moe_intermediate_size": 2048, "first_k_dense_replace": 3, "num_experts_per_tok": 8},
    "gpt_oss": {"num_key_value_heads": 8, "head_dim": 64, "max_position_embeddings": 131072, "rms_norm_eps": 1e-5,
                "rope_theta": 150000.0, "sliding_window": 128, "num_local_experts": 128, "num_experts_per_tok": 4,
                "attention_bias": True},
}  # fmt: skip
"""What `transformers` takes for keys that a configuration leaves out, where it is not what follows from the others."""


def read(config: dict[str, Any], where: str) -> ModelSpec:
    """Translate a Hugging Face configuration; raises InputError for what the fields cannot hold."""
    family = str(config.get("model_type", ""))
    if family not in FAMILIES:
        raise InputError(
            f"model_type '{family}' is not supported",
            where=where,
            key="model_type",
            fix=f"supported: {', '.join(FAMILIES)}",
        )
    return _gpt2(config, where) if family == "gpt2" else _llama_like(config, where)


def _llama_like(given: dict[str, Any], where: str) -> ModelSpec:
    family = given["model_type"]
    config = LEFT_OUT[family] | given
    hidden, heads, layers = (
        _take(config, k, where) for k in ("hidden_size", "num_attention_heads", "num_hidden_layers")
    )
    latent = _latent(config, where) if family in ("deepseek_v2", "deepseek_v3") else None
    if heads < 1 or (not latent and config.get("head_dim") is None and hidden % heads):
        raise InputError(
            f"{heads} heads do not divide hidden size {hidden}",
            where=where,
            key="num_attention_heads",
            fix="give head_dim, or sizes that divide",
        )
    positions = _take(config, "max_position_embeddings", where)
    biased = _flag(config, "attention_bias", where) and family not in ("mistral", "mixtral", "qwen2", "qwen2_moe")
    window, windowed = _window(config, layers, where)
    return ModelSpec(
        family=family,
        vocabulary=_take(config, "vocab_size", where),
        hidden=hidden,
        layers=layers,
        heads=heads,
        kv_heads=heads if latent else _take(config, "num_key_value_heads", where, heads),
        head_dim=latent.nope_dim + latent.rope_dim if latent else _take(config, "head_dim", where, hidden // heads),
        ffn=_take(config, "intermediate_size", where),
        positions=positions,
        norm_eps=_number(config, "rms_norm_eps", where, 1e-6),
        qk_norm=family in ("qwen3", "qwen3_moe"),
        qkv_bias=biased or family == "qwen2" or (family == "qwen2_moe" and _flag(config, "qkv_bias", where, True)),
        out_bias=biased,
        mlp_bias=_flag(config, "mlp_bias", where) and family in ("llama", "deepseek_v2"),
        activation=_activation(config, "hidden_act", where, "silu"),
        rope=_rope(config, where),
        window=window,
        window_layers=windowed,
        experts=_experts(config, layers, where),
        latent=latent,
        sinks=family == "gpt_oss",
        predicted=1 + (_take(config, "num_nextn_predict_layers", where, 0) if family == "deepseek_v3" else 0),
        tied=_flag(config, "tie_word_embeddings", where),
        attention_dropout=_number(config, "attention_dropout", where, 0.0),
        init_std=_number(config, "initializer_range", where, 0.02),
        config=given,
    )


def _latent(config: dict[str, Any], where: str) -> Latent:
    return Latent(
        q_rank=0 if config["q_lora_rank"] is None else _take(config, "q_lora_rank", where),
        kv_rank=_take(config, "kv_lora_rank", where),
        nope_dim=_take(config, "qk_nope_head_dim", where),
        rope_dim=_take(config, "qk_rope_head_dim", where),
        value_dim=_take(config, "v_head_dim", where),
    )


def _experts(config: dict[str, Any], layers: int, where: str) -> Experts | None:
    family, every = config["model_type"], tuple(range(layers))
    if family in ("mixtral", "gpt_oss"):
        return Experts(
            count=_take(config, "num_local_experts", where),
            per_token=_take(config, "num_experts_per_tok", where),
            ffn=_take(config, "intermediate_size", where),
            layers=every,
            bias=family == "gpt_oss",
        )
    if family in ("qwen2_moe", "qwen3_moe"):
        step = _take(config, "decoder_sparse_step", where, 1)
        dense: Any = config.get("mlp_only_layers") or []
        if step < 1 or not isinstance(dense, list):
            key = "decoder_sparse_step" if step < 1 else "mlp_only_layers"
            raise InputError("does not say which layers have experts", where=where, key=key,
                             fix="give a step from 1 and a list of layers")  # fmt: skip
        renamed = "num_local_experts"  # as `transformers` 5 writes it
        shared = _take(config, "shared_expert_intermediate_size", where) if family == "qwen2_moe" else 0
        return Experts(
            count=_take(
                config, renamed if renamed in config else "num_experts", where, 60 if family == "qwen2_moe" else 128
            ),
            per_token=_take(config, "num_experts_per_tok", where),
            ffn=_take(config, "moe_intermediate_size", where),
            layers=tuple(i for i in every if i not in cast(list[Any], dense) and (i + 1) % step == 0),
            shared_ffn=shared,
            shared_gate=shared > 0,
        )
    if family in ("deepseek_v2", "deepseek_v3"):
        if _take(config, "moe_layer_freq", where, 1) != 1:
            raise InputError("only 1 is supported", where=where, key="moe_layer_freq", fix="leave it out")
        ffn = _take(config, "moe_intermediate_size", where)
        return Experts(
            count=_take(config, "n_routed_experts", where),
            per_token=_take(config, "num_experts_per_tok", where),
            ffn=ffn,
            layers=every[max(0, _take(config, "first_k_dense_replace", where)) :],
            shared_ffn=ffn * _take(config, "n_shared_experts", where),
        )
    return None


def _window(config: dict[str, Any], layers: int, where: str) -> tuple[int, tuple[int, ...]]:
    """The sliding window and the layers that have it."""
    family = config["model_type"]
    window = _take(config, "sliding_window", where, 0)
    switched = family in ("qwen2", "qwen3", "qwen2_moe", "qwen3_moe") and _flag(config, "use_sliding_window", where)
    if family in ("mistral", "mixtral") or (family == "qwen3_moe" and switched):
        windowed = tuple(range(layers))
    elif switched or family == "gpt_oss":
        kinds: Any = config.get("layer_types")
        if kinds is None:
            near = _window_layers(config, layers, where)
            kinds = ["sliding_attention" if layer in near else "full_attention" for layer in range(layers)]
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


def _window_layers(config: dict[str, Any], layers: int, where: str) -> range:
    """Which layers have the window where `layer_types` is left out."""
    if config["model_type"] == "gpt_oss":
        return range(0, layers, 2)
    first = _take(config, "max_window_layers", where)
    return range(0, min(first, layers), 2) if config["model_type"] == "qwen2_moe" else range(max(0, first), layers)


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
