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

from fiveply.spec.architecture import FAMILIES, ModelSpec, Rope, presets
from fiveply.spec.errors import InputError
from fiveply.spec.placement import declare

CONFIGS = {path.stem: json.loads(path.read_text()) for path in (Path(__file__).parents[1] / "configs").glob("*.json")}


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
        "llama3-rope": spec.rope is not None and spec.rope.kind == "llama3" and spec.rope.original_positions == 128,
    }
    assert traits[name]


@pytest.mark.parametrize("name", presets())
def test_presets_have_about_the_parameters_of_their_names(name: str) -> None:
    spec = ModelSpec.load(name)
    count = parameters(spec)
    if name != "tiny":
        named = int(name[:-1]) * {"m": 10**6, "b": 10**9}[name[-1]]
        assert 0.9 * named < count < 1.25 * named, count
    assert (count < 10**6) == (name == "tiny")
    assert spec.attention_dropout == 0  # so that every layout may run it


def test_presets_come_smallest_first() -> None:
    assert presets() == ["tiny", "2m", "15m", "60m", "150m", "1b"]
    assert sorted(presets(), key=lambda name: parameters(ModelSpec.load(name))) == presets()
    tiny = ModelSpec.load("tiny")
    assert (tiny.layers, tiny.heads) == (8, 8)


@pytest.mark.parametrize("name", [*CONFIGS, *presets()])
def test_transformers_has_as_many_parameters(name: str) -> None:
    spec = ModelSpec.from_config(CONFIGS[name]) if name in CONFIGS else ModelSpec.load(name)
    import torch

    with torch.device("meta"):
        model = transformers.AutoModelForCausalLM.from_config(transformers.AutoConfig.for_model(**spec.config))
    assert model.num_parameters() == parameters(spec)


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


@pytest.mark.parametrize("family", ["llama", "mistral", "qwen2", "qwen3"])
@pytest.mark.parametrize("more", [{}, {"use_sliding_window": True}, {"attention_bias": True}], ids=str)
def test_keys_left_out_mean_what_transformers_takes(family: str, more: dict[str, Any]) -> None:
    config = {"model_type": family} | SIZES | more
    theirs = transformers.AutoConfig.for_model(**config)
    ours = ModelSpec.from_config(config)
    assert ours.config == config
    assert ours.kv_heads == theirs.num_key_value_heads
    assert ours.head_dim == theirs.head_dim if family != "qwen2" else 2
    assert ours.positions == theirs.max_position_embeddings
    assert ours.norm_eps == theirs.rms_norm_eps
    assert ours.init_std == theirs.initializer_range
    assert ours.tied == theirs.tie_word_embeddings
    assert ours.rope is not None
    assert ours.rope.theta == theirs.rope_parameters["rope_theta"]
    kinds = (
        getattr(theirs, "layer_types", None) or ["sliding_attention" if family == "mistral" else "full_attention"] * 30
    )
    assert ours.window_layers == tuple(i for i, kind in enumerate(kinds) if kind == "sliding_attention")
    assert ours.window == (4096 if ours.window_layers else 0)
    assert (ours.qkv_bias, ours.out_bias) == (family == "qwen2" or (bool(more.get("attention_bias")) and family != "mistral"),
                                              bool(more.get("attention_bias")) and family in ("llama", "qwen3"))  # fmt: skip


def test_gpt2_keys_left_out() -> None:
    theirs, ours = transformers.GPT2Config(), ModelSpec.from_config({"model_type": "gpt2"})
    assert (ours.hidden, ours.layers, ours.heads, ours.positions, ours.vocabulary) == (
        theirs.n_embd, theirs.n_layer, theirs.n_head, theirs.n_positions, theirs.vocab_size
    )  # fmt: skip
    assert (ours.ffn, ours.norm_eps, ours.dropout, ours.attention_dropout) == (3072, 1e-5, 0.1, 0.1)
    assert ours.tied
    assert parameters(ours) == 124_439_808  # GPT-2's published "124M"


@pytest.mark.parametrize("kind", ["mixtral", "gemma3", "", None, 3, ["llama"]])
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
    more = ["layer_types", "head_dim", "attention_dropout", "mlp_bias", "rope_parameters", "n_layer", "attn_pdrop"]
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
