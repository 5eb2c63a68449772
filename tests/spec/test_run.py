"""RunSpec: TOML in and out, `--set` over it, and one clear line for every key that is unknown, mistyped or senseless."""

from __future__ import annotations

import json
import tomllib
from pathlib import Path
from typing import Any

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fiveply.spec.architecture import ModelSpec
from fiveply.spec.errors import InputError
from fiveply.spec.run import Corpus, RunSpec

FULL = """
name = "plays"
folder = "out"
seed = 7
layout = "dp=2,pp=2"
[model]
preset = "15m"
[model.overrides]
num_hidden_layers = 3
[data]
sequence = 128
held_out = 0.1
[[data.corpus]]
path = "a.txt"
[[data.corpus]]
path = "b.jsonl"
weight = 2.5
[train]
steps = 400
until = "converged"
[optimizer]
lr = 3e-4
betas = [0.9, 0.99]
[precision]
parameters = "float64"
"""


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "plays.toml"
    path.write_text(FULL)
    return path


def refused(path: Path | None, *settings: str) -> InputError:
    with pytest.raises(InputError) as caught:
        RunSpec.load(path, list(settings))
    assert "\n" not in str(caught.value)
    assert caught.value.fix
    return caught.value


def test_load(file: Path) -> None:
    run = RunSpec.load(file)
    assert (run.name, run.seed, run.layout, run.directory) == ("plays", 7, "dp=2,pp=2", Path("out/plays"))
    assert run.data.corpus == [Corpus("a.txt"), Corpus("b.jsonl", 2.5)]
    assert (run.train.steps, run.train.until, run.train.global_batch) == (400, "converged", 16)
    assert (run.optimizer.lr, run.optimizer.betas) == (3e-4, (0.9, 0.99))
    assert run.precision.parameters == "float64"
    spec = run.model_spec()
    assert (spec.layers, spec.hidden) == (3, ModelSpec.load("15m").hidden)


def test_toml_round_trip(file: Path, tmp_path: Path) -> None:
    for run in (RunSpec.load(file), RunSpec(name="x")):
        again = tmp_path / "again.toml"
        again.write_text(run.toml())
        assert RunSpec.load(again) == run


scalars = {
    "seed": st.integers(-(2**63), 2**63 - 1),
    "name": st.text(min_size=1, max_size=20),
    "train.steps": st.integers(1, 10**9),
    "train.compile": st.booleans(),
    "train.until": st.sampled_from(["steps", "converged"]),
    "data.tokenizer": st.text(max_size=20),
    "data.held_out": st.floats(0.01, 0.99),
    "optimizer.lr": st.floats(0, 1e9),
    "optimizer.betas": st.tuples(st.floats(0, 0.999), st.floats(0, 0.999)).map(list),
    "data.corpus": st.text(max_size=9) | st.lists(st.fixed_dictionaries({"path": st.text(max_size=9)}), min_size=1, max_size=3),
    "model.overrides": st.dictionaries(st.text(max_size=5), st.integers(-9, 9) | st.booleans() | st.text(max_size=5), max_size=3),
}  # fmt: skip


@settings(deadline=None)
@given(st.fixed_dictionaries({}, optional=scalars))
def test_any_run_survives_its_own_toml(values: dict[str, Any]) -> None:
    nested: dict[str, Any] = {"name": "run"}
    for key, value in values.items():
        table, _, last = key.rpartition(".")
        (nested.setdefault(table, {}) if table else nested)[last] = value
    run = msgspec.convert(nested, RunSpec)
    run.check()
    assert msgspec.convert(tomllib.loads(run.toml()), RunSpec) == run


def test_the_file_names_the_run(tmp_path: Path) -> None:
    path = tmp_path / "small.toml"
    path.write_text("")
    assert RunSpec.load(path) == RunSpec(name="small")
    assert RunSpec.load(path, ["name=given"]).name == "given"
    assert RunSpec.load(path).directory == Path("runs/small")


def test_without_a_file() -> None:
    assert RunSpec.load(None, ["train.steps=3", "name=x"]).train.steps == 3
    error = refused(None)
    assert (error.where, error.key, error.problem) == ("command line", "name", "the run has no name")


def test_settings_override_the_file(file: Path) -> None:
    run = RunSpec.load(file, ["train.steps=5", "seed=3", "seed=4", "train.patience=2"])
    assert (run.train.steps, run.train.patience, run.seed) == (5, 2, 4)
    assert run.data.sequence == 128
    assert RunSpec.load(file).train.steps == 400


@pytest.mark.parametrize(
    ("setting", "key", "value"),
    [
        ("train.steps=100", "train.steps", 100),
        (" train.steps = 100", "train.steps", 100),
        ("optimizer.lr=1e-4", "optimizer.lr", 1e-4),
        ("optimizer.lr=1", "optimizer.lr", 1.0),
        ("optimizer.betas=[0.8, 0.9]", "optimizer.betas", (0.8, 0.9)),
        ("train.compile=true", "train.compile", True),
        ("train.until=steps", "train.until", "steps"),
        ('train.until="steps"', "train.until", "steps"),
        ("layout=dp=2,tp=2,stages=3+4", "layout", "dp=2,tp=2,stages=3+4"),
        ("data.corpus=my text.txt", "data.corpus", "my text.txt"),
        ("data.corpus=datasets:wikitext", "data.corpus", "datasets:wikitext"),
        ('data.corpus=[{path = "x.txt", weight = 2.0}]', "data.corpus", [Corpus("x.txt", 2.0)]),
        ("data.tokenizer=", "data.tokenizer", ""),
        ("model.overrides.num_hidden_layers=2", "model.overrides", {"num_hidden_layers": 2}),
    ],
)
def test_set(tmp_path: Path, setting: str, key: str, value: Any) -> None:
    path = tmp_path / "run.toml"
    path.write_text("")
    found: Any = RunSpec.load(path, [setting])
    for name in key.split("."):
        found = getattr(found, name)
    assert found == value


WRONG = [  # settings, the key named, words of the line
    ("stepz=1", "", "unknown field `stepz`"),
    ("train.stepz=1", "train", "unknown field `stepz`"),
    ("trane.steps=1", "", "unknown field `trane`"),
    ('data.corpus=[{path = "x", wait = 1}]', "data.corpus[0]", "unknown field `wait`"),
    ("data.corpus=[{weight = 1.0}]", "data.corpus[0]", "missing required field `path`"),
    ("train.steps=many", "train.steps", "Expected `int`, got `str`"),
    ("train.steps=1.5", "train.steps", "Expected `int`, got `float`"),
    ("train.steps=true", "train.steps", "Expected `int`, got `bool`"),
    ("train.compile=1", "train.compile", "Expected `bool`, got `int`"),
    ("train.compile=True", "train.compile", "Expected `bool`, got `str`"),
    ("train.until=never", "train.until", "Invalid enum value 'never'"),
    ("optimizer.betas=[0.9]", "optimizer.betas", "length 2"),
    ("optimizer.name=lion", "optimizer.name", "Invalid enum value 'lion'"),
    ("precision.parameters=float16", "precision.parameters", "Invalid enum value 'float16'"),
    ("train=5", "train", "Expected `object`, got `int`"),
    ("seed=x", "seed", "Expected `int`, got `str`"),
    ("train.steps", "", "'train.steps' has no value; write key=value"),
    ("name=", "name", "the run has no name"),
    ("train.steps=0", "train.steps", "0 is too small; give 1 or more"),
    ("train.global_batch=0", "train.global_batch", "0 is too small"),
    ("train.patience=0", "train.patience", "0 is too small"),
    ("train.sync_every=-1", "train.sync_every", "-1 is too small; give 0 or more"),
    ("train.evaluate_every=-1", "train.evaluate_every", "-1 is too small"),
    ("train.evaluate_batches=0", "train.evaluate_batches", "0 is too small"),
    ("train.checkpoint_every=-5", "train.checkpoint_every", "-5 is too small"),
    ("train.keep_checkpoints=0", "train.keep_checkpoints", "0 is too small"),
    ("train.log_every=0", "train.log_every", "0 is too small"),
    ("data.sequence=0", "data.sequence", "0 is too small"),
    ("optimizer.warmup=-1", "optimizer.warmup", "-1 is too small"),
    ("optimizer.lr=-1e-3", "optimizer.lr", "-0.001 is too small"),
    ("optimizer.lr=nan", "optimizer.lr", "nan is not a finite number"),
    ("optimizer.lr=inf", "optimizer.lr", "inf is not a finite number"),
    ("optimizer.clip=-1", "optimizer.clip", "-1.0 is too small"),
    ("optimizer.eps=-1e-8", "optimizer.eps", "-1e-08 is too small"),
    ("optimizer.weight_decay=-0.1", "optimizer.weight_decay", "-0.1 is too small"),
    ("optimizer.betas=[0.9, 1.0]", "optimizer.betas", "1.0 is not a share; give 0 or more and less than 1"),
    ("optimizer.decay_share=1.5", "optimizer.decay_share", "1.5 is not a share; give 0 to 1"),
    ("optimizer.final_share=-1", "optimizer.final_share", "-1.0 is not a share"),
    ("data.held_out=1", "data.held_out", "1.0 is not a share"),
    ("data.held_out=nan", "data.held_out", "nan is not a share"),
    ("data.held_out=0", "train.until", "convergence needs evaluations on held-out text"),
    ("train.evaluate_every=0", "train.until", "convergence needs evaluations"),
]


@pytest.mark.parametrize(("setting", "key", "words"), WRONG)
def test_wrong_settings_get_one_line(file: Path, setting: str, key: str, words: str) -> None:
    error = refused(file, setting)
    assert error.key == key
    assert words in str(error)
    assert error.where == "--set"


def test_what_the_file_has_wrong_is_the_files(file: Path) -> None:
    file.write_text(FULL.replace("steps = 400", "steps = 0"))
    assert refused(file).where == refused(file, "seed=2").where == str(file)
    assert RunSpec.load(file, ["train.steps=1"]).train.steps == 1  # a setting may mend it
    file.write_text(FULL.replace("steps = 400", 'steps = "0"'))
    assert refused(file, "seed=2").where == str(file)
    assert refused(None, "train.steps=0").where == "command line"


def test_a_setting_under_a_value_is_refused(file: Path) -> None:
    error = refused(file, "seed.deep=1")
    assert (error.where, error.key, error.problem) == ("--set", "seed.deep", "'seed' is not a table")


@pytest.mark.parametrize(("setting", "key", "words"), [row for row in WRONG if row[0].count(".") == 1][:20])
def test_the_same_in_a_file(tmp_path: Path, setting: str, key: str, words: str) -> None:
    table, _, rest = setting.partition(".")
    name, _, value = rest.partition("=")
    try:
        tomllib.loads(f"x = {value}")
    except tomllib.TOMLDecodeError:
        value = f'"{value}"'
    path = tmp_path / "run.toml"
    path.write_text(f"[{table}]\n{name} = {value}\n")
    if not words.startswith(("'train.steps'", "convergence")):
        error = refused(path)
        assert (error.where, error.key) == (str(path), key)
        assert words in str(error)


def test_wrong_files(tmp_path: Path) -> None:
    path = tmp_path / "run.toml"
    assert refused(path).problem == "no such file"
    assert refused(tmp_path).problem == "no such file"
    for content in (b"steps = ", b"[train\n", b"\xff\xfe\x00\x01", b"a = 1\na = 2\n", b"\x00"):
        path.write_bytes(content)
        error = refused(path)
        assert error.where == str(path)
        assert error.problem.startswith("not valid TOML")


def test_model_overrides(tmp_path: Path) -> None:
    run = RunSpec.load(None, ["model.overrides.hidden_sise=3", "name=x"])
    with pytest.raises(InputError, match=r"unknown key 'hidden_sise'; keys are .*hidden_size") as caught:
        run.model_spec()
    assert caught.value.key == "model.overrides"
    run = RunSpec.load(None, ["model.overrides.num_attention_heads=5", "name=x"])
    with pytest.raises(InputError, match=r"4 key-value heads do not divide 5 heads|5 heads do not divide hidden size"):
        run.model_spec()
    config = json.loads((Path(__file__).parents[1] / "configs" / "qwen3.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config))
    run = RunSpec.load(None, [f"model.preset={tmp_path}", "model.overrides.tie_word_embeddings=false", "name=x"])
    assert (run.model_spec().family, run.model_spec().tied) == ("qwen3", False)
    assert run.model_spec().config["tie_word_embeddings"] is False


def test_init_from_brings_its_own_config(tmp_path: Path) -> None:
    config = json.loads((Path(__file__).parents[1] / "configs" / "gpt2.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config))
    run = RunSpec.load(None, ["model.preset=2m", f"model.init_from={tmp_path}", "name=x"])
    assert run.model_spec().family == "gpt2"
