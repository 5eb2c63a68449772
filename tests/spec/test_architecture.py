"""ModelSpec from config.json: every family as `transformers` reads it, and one clear line for what it can't be."""

from __future__ import annotations

import contextlib
import json
import math
from pathlib import Path
from typing import Any

import pytest
import transformers
from hypothesis import given, settings
from hypothesis import strategies as st

from fiveply.spec.architecture import ModelSpec, Rope, presets
from fiveply.spec.errors import InputError
from fiveply.spec.families import FAMILIES
from fiveply.spec.placement import declare

CONFIGS = {path.stem: json.loads(path.read_text()) for path in (Path(__file__).parents[1] / "configs").rglob("*.json")}


def parameters(spec: ModelSpec) -> int:
    return sum(math.prod(parameter.shape) for parameter in declare(spec))


def refused(config: Any) -> InputError:
    with pytest.raises(InputError) as caught:
        ModelSpec.from_config(config, where="model/config.json")
    error = caught.value
    assert error.where == "model/config.json"
    assert error.fix
    assert "\n" not in str(error)
    assert error.key in str(error)
    return error


def test_there_is_a_config_of_every_family() -> None:
    assert {config["model_type"] for config in CONFIGS.values()} == set(FAMILIES)


@pytest.mark.parametrize("name", CONFIGS)
def test_the_test_configs_are_odd(name: str) -> None:
    """What makes them worth testing: sizes that no tensor degree divides, and the trait that each is there for."""
    spec = ModelSpec.from_config(CONFIGS[name])
    assert spec.ffn % 2
    assert spec.vocabulary % 2
    assert spec.layers % 2
    assert spec.positions >= 512
    traits = {
        "llama": (spec.heads, spec.kv_heads, spec.vocabulary, spec.layers) == (9, 3, 1003, 7),
        "smollm": spec.tied and (spec.heads, spec.kv_heads) == (9, 3),
        "mistral": 0 < spec.window < 16 and len(spec.window_layers) == spec.layers,
        "qwen2": spec.qkv_bias and 0 < spec.window < 16 and spec.window_layers == (2, 3, 4),
        "qwen3": spec.qk_norm and spec.head_dim != spec.hidden // spec.heads,
        "gpt2": spec.rope is None
        and spec.tied
        and spec.out_bias
        and (spec.dropout, spec.attention_dropout) == (0.1, 0),
        "mixtral": spec.experts and spec.experts.layers == (0, 1, 2, 3, 4) and len(spec.window_layers) == spec.layers,
        "qwen2-moe": spec.experts
        and spec.experts.layers == (1, 3)
        and spec.experts.shared_gate
        and spec.window_layers == (0, 2),
        "qwen3-moe": spec.experts and spec.experts.layers == (0, 2, 3, 4) and spec.qk_norm,
        "deepseek-v2": spec.latent and not spec.latent.q_rank and spec.experts and spec.experts.shared_ffn == 3 * 37,
        "deepseek-v3": spec.latent
        and spec.latent.q_rank == 24
        and spec.experts
        and spec.experts.layers == (1, 2, 3, 4),
        "gpt-oss": spec.sinks
        and spec.out_bias
        and spec.experts
        and spec.experts.bias
        and spec.window_layers == (0, 2, 4),
        "llama3-rope": spec.rope is not None and spec.rope.kind == "llama3" and spec.rope.original_positions == 128,
    }
    assert traits[name]


OWN_PRESETS = ["tiny", "2m", "15m", "60m", "150m", "1b"]
PUBLISHED = {  # in billions, as each model's own card or paper gives it
    "llama-3.1-8b": 8.03,
    "qwen3-8b": 8.19,
    "mixtral-8x7b": 46.7,
    "llama-3.1-70b": 70.55,
    "gpt-oss-120b": 116.83,
    "gpt3-175b": 174.6,
    "qwen3-235b-a22b": 235.09,
    "llama-3.1-405b": 405.85,
    "deepseek-v3": 671.03 + 11.61,  # the main model; the layer of multi-token prediction without its shared matrices
}
ACTIVE = {"mixtral-8x7b": 12.9, "qwen3-235b-a22b": 22, "gpt-oss-120b": 5.1, "deepseek-v3": 37}


@pytest.mark.parametrize("name", OWN_PRESETS)
def test_presets_have_about_the_parameters_of_their_names(name: str) -> None:
    spec = ModelSpec.load(name)
    count = parameters(spec)
    if name != "tiny":
        named = int(name[:-1]) * {"m": 10**6, "b": 10**9}[name[-1]]
        assert 0.9 * named < count < 1.25 * named, count
    assert (count < 10**6) == (name == "tiny")
    assert spec.attention_dropout == 0  # so that every layout may run it


@pytest.mark.parametrize(("name", "billions"), PUBLISHED.items())
def test_public_models_have_their_published_parameters(name: str, billions: float) -> None:
    assert parameters(ModelSpec.load(name)) == pytest.approx(billions * 1e9, rel=1e-3)


@pytest.mark.parametrize(("name", "billions"), ACTIVE.items())
def test_a_token_passes_the_published_part_of_a_model_with_experts(name: str, billions: float) -> None:
    """Without the second copy of the vocabulary and the layer of multi-token prediction where the publisher leaves them out."""
    spec = ModelSpec.load(name)
    experts = spec.experts
    assert experts is not None
    ours = sum(
        math.prod(p.shape) * (experts.per_token / experts.count if ".experts." in p.name else 1)
        for p in declare(spec)
        if p.unit != f"layers.{spec.layers}"
    )
    embedding = spec.vocabulary * spec.hidden if name in ("gpt-oss-120b", "deepseek-v3") else 0
    assert ours - embedding == pytest.approx(billions * 1e9, rel=0.02)


def test_presets_come_smallest_first() -> None:
    assert presets() == [*OWN_PRESETS, *PUBLISHED]
    assert sorted(presets(), key=lambda name: parameters(ModelSpec.load(name))) == presets()
    tiny = ModelSpec.load("tiny")
    assert (tiny.layers, tiny.heads) == (8, 8)


@pytest.mark.parametrize("name", [*CONFIGS, *presets()])
def test_transformers_has_as_many_parameters(name: str) -> None:
    spec = ModelSpec.from_config(CONFIGS[name]) if name in CONFIGS else ModelSpec.load(name)
    import torch

    with torch.device("meta"):
        model = transformers.AutoModelForCausalLM.from_config(transformers.AutoConfig.for_model(**spec.config))
    predicting = sum(math.prod(p.shape) for p in declare(spec) if p.unit == f"layers.{spec.layers}")
    assert model.num_parameters() == parameters(spec) - predicting  # `transformers` leaves this layer on disk


@pytest.mark.parametrize("name", CONFIGS)
def test_what_transformers_writes_is_read_the_same(name: str, tmp_path: Path) -> None:
    """Old keys in (rope_theta, rope_scaling), new keys out (rope_parameters, layer_types)."""
    transformers.AutoConfig.for_model(**CONFIGS[name]).save_pretrained(tmp_path)
    written = ModelSpec.load(tmp_path)
    assert written.config != CONFIGS[name]
    given_spec = ModelSpec.from_config(CONFIGS[name])
    for field in ModelSpec.__struct_fields__:
        if field != "config":
            assert getattr(written, field) == getattr(given_spec, field), field


SIZES = {
    "hidden_size": 64,
    "num_hidden_layers": 30,
    "num_attention_heads": 32,
    "vocab_size": 99,
    "intermediate_size": 11,
}


@pytest.mark.parametrize("family", ["llama", "mistral", "qwen2", "qwen3", "mixtral"])
@pytest.mark.parametrize("more", [{}, {"use_sliding_window": True}, {"attention_bias": True}], ids=str)
def test_keys_left_out_mean_what_transformers_takes(family: str, more: dict[str, Any]) -> None:
    config = {"model_type": family} | SIZES | more
    theirs = transformers.AutoConfig.for_model(**config)
    ours = ModelSpec.from_config(config)
    assert ours.config == config
    assert ours.kv_heads == theirs.num_key_value_heads
    assert ours.head_dim == theirs.head_dim if family not in ("qwen2", "mixtral") else 2
    assert ours.positions == theirs.max_position_embeddings
    assert ours.norm_eps == theirs.rms_norm_eps
    assert ours.init_std == theirs.initializer_range
    assert ours.tied == theirs.tie_word_embeddings
    assert ours.rope is not None
    assert ours.rope.theta == theirs.rope_parameters["rope_theta"]
    kinds = (
        getattr(theirs, "layer_types", None) or ["sliding_attention" if family == "mistral" else "full_attention"] * 30
    )
    if family != "mixtral":  # no window unless given
        assert ours.window_layers == tuple(i for i, kind in enumerate(kinds) if kind == "sliding_attention")
    assert ours.window == (4096 if ours.window_layers else 0)
    dense = bool(more.get("attention_bias")) and family not in ("mistral", "mixtral")
    assert (ours.qkv_bias, ours.out_bias) == (family == "qwen2" or dense,
                                              bool(more.get("attention_bias")) and family in ("llama", "qwen3"))  # fmt: skip


def test_gpt2_keys_left_out() -> None:
    theirs, ours = transformers.GPT2Config(), ModelSpec.from_config({"model_type": "gpt2"})
    assert (ours.hidden, ours.layers, ours.heads, ours.positions, ours.vocabulary) == (
        theirs.n_embd, theirs.n_layer, theirs.n_head, theirs.n_positions, theirs.vocab_size
    )  # fmt: skip
    assert (ours.ffn, ours.norm_eps, ours.dropout, ours.attention_dropout) == (3072, 1e-5, 0.1, 0.1)
    assert ours.tied
    assert parameters(ours) == 124_439_808  # GPT-2's published "124M"


@pytest.mark.parametrize("kind", ["mamba", "gemma3", "", None, 3, ["llama"]])
def test_unsupported_model_types(kind: Any) -> None:
    error = refused(CONFIGS["llama"] | {"model_type": kind})
    assert error.key == "model_type"
    assert "llama, mistral, qwen2, qwen3, gpt2" in error.fix
    assert refused({}).key == "model_type"


@pytest.mark.parametrize("name", ["llama", "mistral", "qwen2", "qwen3"])
@pytest.mark.parametrize(
    "key", ["vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads"]
)
@pytest.mark.parametrize("value", ["absent", None, "72", 7.5, True, 0, -3], ids=str)
def test_sizes_are_whole_numbers_from_one(name: str, key: str, value: Any) -> None:
    config = CONFIGS[name] | {key: value}
    if value == "absent":
        del config[key]
    error = refused(config)
    if value in ("absent", None):
        assert (error.key, error.problem) == (key, "is missing")
    elif isinstance(value, int) and not isinstance(value, bool):
        assert str(value) in str(error)
    else:
        assert error.key == key
        assert f"{value!r} is not a whole number" in error.problem


WRONG: list[tuple[str, dict[str, Any], str, str]] = [  # config, keys changed, the key named, words of the line
    ("llama", {"num_attention_heads": 10}, "num_attention_heads", "10 heads do not divide hidden size 72"),
    ("llama", {"num_key_value_heads": 4}, "num_key_value_heads", "4 key-value heads do not divide 9 heads"),
    ("llama", {"num_key_value_heads": 0}, "kv_heads", "0 is not a size"),
    ("llama", {"max_position_embeddings": 0}, "positions", "0 is not a size"),
    ("llama", {"hidden_size": 63}, "head_dim", "rotary positions need an even head size, not 7"),
    ("llama", {"head_dim": 5}, "head_dim", "even head size, not 5"),
    ("llama", {"head_dim": 0}, "head_dim", "0 is not a size"),
    ("llama", {"hidden_act": "relu"}, "hidden_act", "activation 'relu' is not supported; supported: silu"),
    ("llama", {"hidden_act": ["silu"]}, "hidden_act", "is not supported"),
    ("llama", {"rms_norm_eps": "1e-5"}, "rms_norm_eps", "'1e-5' is not a number"),
    ("llama", {"rms_norm_eps": -1.0}, "rms_norm_eps", "-1.0 is not a number from 0"),
    ("llama", {"initializer_range": True}, "initializer_range", "True is not a number"),
    ("llama", {"attention_dropout": 1.0}, "attention_dropout", "1.0 is not a rate"),
    ("llama", {"attention_dropout": "none"}, "attention_dropout", "'none' is not a number"),
    ("llama", {"tie_word_embeddings": "false"}, "tie_word_embeddings", "'false' is neither true nor false"),
    ("llama", {"attention_bias": 1}, "attention_bias", "1 is neither true nor false"),
    ("llama", {"mlp_bias": "yes"}, "mlp_bias", "'yes' is neither true nor false"),
    ("llama", {"rope_theta": "big"}, "rope_parameters", "Expected `float`, got `str`"),
    ("llama", {"rope_theta": 1.0}, "rope_parameters", "theta 1.0"),
    ("llama", {"rope_scaling": "linear"}, "rope_scaling", "'linear' is not an object"),
    ("llama", {"rope_scaling": {"rope_type": "dynamic", "factor": 2.0}}, "rope_parameters",
     "rotary scaling 'dynamic' is not supported; supported: default, linear, llama3, yarn"),
    ("llama", {"rope_scaling": {"type": "longrope"}}, "rope_parameters", "'longrope' is not supported"),
    ("llama", {"rope_scaling": {"type": "linear"}}, "rope_parameters", "linear scaling needs factor"),
    ("llama", {"rope_scaling": {"type": "linear", "factor": 0}}, "rope_parameters", "factor 0.0"),
    ("llama3-rope", {"rope_scaling": {"type": "llama3", "factor": 8.0, "low_freq_factor": 1.0}}, "rope_parameters",
     "llama3 scaling needs high_freq_factor"),
    ("llama", {"rope_scaling": {"type": "yarn", "factor": [2]}}, "rope_parameters", "Expected `float`, got `array`"),
    ("llama", {"partial_rotary_factor": 0.5}, "partial_rotary_factor", "partial rotary positions are not supported"),
    ("mistral", {"sliding_window": "wide"}, "sliding_window", "'wide' is not a whole number"),
    ("mistral", {"sliding_window": -1}, "sliding_window", "-1 is not a window"),
    ("qwen2", {"use_sliding_window": "true"}, "use_sliding_window", "neither true nor false"),
    ("qwen2", {"max_window_layers": 2.5}, "max_window_layers", "2.5 is not a whole number"),
    ("qwen2", {"layer_types": ["full_attention"] * 4}, "layer_types", "for each of 5 layers"),
    ("qwen2", {"layer_types": ["chunked_attention"] * 5}, "layer_types", "full_attention, sliding_attention"),
    ("qwen2", {"layer_types": "sliding_attention"}, "layer_types", "for each of 5 layers"),
    ("mixtral", {"num_local_experts": 0}, "num_experts_per_tok", "3 of 0 experts cannot be chosen"),
    ("mixtral", {"num_experts_per_tok": 7}, "num_experts_per_tok", "7 of 6 experts cannot be chosen; give from 1"),
    ("qwen3-moe", {"moe_intermediate_size": 0}, "moe_intermediate_size", "0 and 0 are not sizes of experts"),
    ("qwen3-moe", {"decoder_sparse_step": 0}, "decoder_sparse_step", "does not say which layers have experts"),
    ("qwen3-moe", {"mlp_only_layers": 3}, "mlp_only_layers", "does not say which layers have experts"),
    ("qwen2-moe", {"num_experts": "six"}, "num_experts", "'six' is not a whole number"),
    ("deepseek-v3", {"kv_lora_rank": 0}, "kv_lora_rank", "ranks 24 and 0 with heads of 6 + 4 and 7"),
    ("deepseek-v3", {"qk_rope_head_dim": 3}, "head_dim", "even head size, not 9"),
    ("deepseek-v3", {"moe_layer_freq": 2}, "moe_layer_freq", "only 1 is supported"),
    ("deepseek-v3", {"num_nextn_predict_layers": -1}, "num_nextn_predict_layers", "-1 is not a number of layers"),
    ("gpt-oss", {"layer_types": ["full_attention"]}, "layer_types", "for each of 5 layers"),
    ("gpt2", {"n_head": 5}, "n_head", "5 heads do not divide hidden size 72"),
    ("gpt2", {"n_head": 0}, "n_head", "0 heads"),
    ("gpt2", {"n_inner": "big"}, "n_inner", "'big' is not a whole number"),
    ("gpt2", {"resid_pdrop": 0.2}, "resid_pdrop", "embd_pdrop and resid_pdrop differ ([0.1, 0.2])"),
    ("gpt2", {"resid_pdrop": 1.5, "embd_pdrop": 1.5}, "dropout", "1.5 is not a rate"),
    ("gpt2", {"scale_attn_by_inverse_layer_idx": True}, "scale_attn_by_inverse_layer_idx", "is not supported"),
    ("gpt2", {"add_cross_attention": True}, "add_cross_attention", "is not supported"),
    ("gpt2", {"scale_attn_weights": False}, "scale_attn_weights", "unscaled attention is not supported"),
    ("gpt2", {"activation_function": "tanh"}, "activation_function", "'tanh' is not supported"),
    ("gpt2", {"tie_word_embeddings": 0}, "tie_word_embeddings", "0 is neither true nor false"),
]  # fmt: skip


@pytest.mark.parametrize(("name", "changed", "key", "words"), WRONG)
def test_wrong_values_get_one_line(name: str, changed: dict[str, Any], key: str, words: str) -> None:
    error = refused(CONFIGS[name] | changed)
    assert error.key == key
    assert words in str(error)


rope_junk = st.dictionaries(st.sampled_from(["type", "factor"]), st.text(max_size=2) | st.integers(), max_size=2)
numbers = st.integers(-3, 3) | st.floats(allow_nan=False)
junk = st.none() | st.booleans() | numbers | st.text(max_size=3) | st.lists(st.integers(), max_size=2) | rope_junk


@settings(max_examples=400, deadline=None)
@given(st.data())
def test_any_value_under_any_key_is_read_or_refused(data: st.DataObject) -> None:
    config = dict(CONFIGS[data.draw(st.sampled_from(sorted(CONFIGS)))])
    more = [
        "mlp_only_layers",
        "layer_types",
        "head_dim",
        "attention_dropout",
        "mlp_bias",
        "rope_parameters",
        "n_layer",
        "attn_pdrop",
    ]
    for key in data.draw(st.lists(st.sampled_from([*config, *more]), min_size=1, max_size=3)):
        config[key] = data.draw(junk)
    with contextlib.suppress(InputError):
        ModelSpec.from_config(config).check()


def test_windows() -> None:
    def windows(name: str, **changed: Any) -> tuple[int, tuple[int, ...]]:
        spec = ModelSpec.from_config(CONFIGS[name] | changed)
        return spec.window, spec.window_layers

    assert windows("mistral", sliding_window=None) == (0, ())
    assert windows("mistral") == (7, (0, 1, 2, 3, 4))
    assert windows("qwen2", use_sliding_window=False) == (0, ())
    assert windows("qwen2", sliding_window=None) == (0, ())
    assert windows("qwen2", max_window_layers=5) == (0, ())
    assert windows("qwen2", max_window_layers=0) == (11, (0, 1, 2, 3, 4))
    full, near = "full_attention", "sliding_attention"
    assert windows("qwen2", layer_types=[near, full, full, near, full]) == (11, (0, 3))
    assert windows("llama", sliding_window=5) == (0, ())


def test_rope_forms() -> None:
    def rope(**changed: Any) -> Rope:
        found = ModelSpec.from_config(CONFIGS["llama"] | changed).rope
        assert found is not None
        return found

    yarn = {"type": "yarn", "factor": 4.0, "original_max_position_embeddings": 128, "beta_fast": 16}
    assert rope(rope_scaling=yarn) == rope(rope_theta=None, rope_parameters=yarn | {"rope_theta": 10000})
    assert rope(rope_scaling=yarn).original_positions == 128
    assert rope(rope_scaling=yarn).beta_fast == 16
    # The file's own key outranks the scaling's, and YaRN's factor follows from the positions: as `transformers` has it.
    assert rope(rope_scaling=yarn, original_max_position_embeddings=64).original_positions == 64
    assert rope(rope_scaling=yarn | {"factor": None}).factor == 512 / 128
    assert rope().kind == rope(rope_scaling=None).kind == "default"
    assert rope(rope_scaling=None, rope_theta=5e5).theta == 5e5
    assert rope(partial_rotary_factor=1.0) == rope()


def test_load(tmp_path: Path) -> None:
    folder = tmp_path / "hf"
    folder.mkdir()
    for source in (folder, tmp_path / "nothing.json", "3b"):
        with pytest.raises(
            InputError, match=r"no such preset, config\.json or directory; presets are tiny, 2m"
        ) as caught:
            ModelSpec.load(source)
        assert str(source) in caught.value.where
    file = folder / "config.json"
    file.write_text(json.dumps(CONFIGS["llama"]))
    assert ModelSpec.load(folder) == ModelSpec.load(str(file)) == ModelSpec.from_config(CONFIGS["llama"])
    for content in (
        b'{"model_type": ',
        b"[1]",
        b"",
        b"\xff\xfe\x00",
        b"GGUF\x03\x00\x00\x00",
        b'{"model_type": "\xff"}',
    ):
        file.write_bytes(content)
        with pytest.raises(InputError, match="not a JSON object") as caught:
            ModelSpec.load(folder)
        assert caught.value.where == str(file)
        assert "\n" not in str(caught.value)
    file.write_text(json.dumps(CONFIGS["llama"] | {"num_attention_heads": 10}))
    with pytest.raises(InputError, match="10 heads") as caught:
        ModelSpec.load(folder)
    assert caught.value.where == str(file)
