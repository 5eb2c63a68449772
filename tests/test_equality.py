"""`fiveply.equality`: what verify measures, refuses and prints, and the command's exit codes."""

from __future__ import annotations

import json
import math
import subprocess
import sys
from pathlib import Path
from typing import Any

import msgspec
import pytest
import torch

from fiveply import cli
from fiveply.equality import ROWS, SEQUENCE, Trace, compare, table, verification_batches, verification_run, verify
from fiveply.spec.architecture import ModelSpec
from fiveply.spec.errors import InputError

CONFIGS = Path(__file__).parent / "configs"
KEYS = {"pass", "max_difference", "worst", "tolerance", "layout", "against"}
KINDS = {"initial_parameters", "loss", "gradients", "parameters"}
# Every family's config at a layout of its own; the tensor degree is one that its heads allow.
LAYOUTS = {
    "llama": "tp=3,pp=2,schedule=zb",
    "llama3-rope": "dp=2,tp=2,schedule=1f1b",
    "mistral": "tp=2,pp=2,schedule=zbv",
    "qwen2": "dp=2,zero=3,pp=2,schedule=interleaved",
    "qwen3": "tp=4,recompute=full",
    "gpt2": "dp=2,tp=2,zero=2,recompute=selective",
    "smollm": "dp=2,pp=2,schedule=gpipe,zero=1",
}


def trace(**changes: Any) -> Trace:
    """Two parameters over one step; `changes` replace whole fields."""
    start = {"a": torch.tensor([1.0, -2.0], dtype=torch.float64), "b": torch.zeros(3, dtype=torch.float64)}
    gradients = [{"a": torch.tensor([3.0, 4.0], dtype=torch.float64), "b": torch.zeros(3, dtype=torch.float64)}]
    fields = {"initial": start, "losses": [2.0], "gradients": gradients, "parameters": start} | changes
    return Trace(**fields)


# the measure


def test_equal_traces_pass_with_no_difference() -> None:
    result = compare(trace(), trace(), dtype="float64")
    assert result["pass"]
    assert set(result["max_difference"].values()) == {0.0}
    assert result["max_difference"].keys() == result["worst"].keys() == KINDS
    assert "PASS" in table(result | {"layout": "dp=2", "against": "dp=1"})


def test_the_difference_is_relative_to_the_tensors_largest_value() -> None:
    other = trace(gradients=[{"a": torch.tensor([3.0, 4.0 + 1e-6]).double(), "b": torch.zeros(3).double()}])
    other.gradients[0]["a"][1] = 4.0 + 1e-6
    result = compare(other, trace(), dtype="float64")
    assert result["max_difference"]["gradients"] == pytest.approx(1e-6 / 4, rel=1e-6)
    assert result["worst"]["gradients"] == "a"
    assert not result["pass"]
    assert compare(other, trace(), dtype="float32")["pass"]


def test_a_gradient_that_is_zero_in_truth_is_measured_against_the_rms_of_all() -> None:
    noise = torch.full((3,), 1e-15, dtype=torch.float64)
    other = trace(gradients=[trace().gradients[0] | {"b": noise}])
    result = compare(other, trace(), dtype="float64")
    assert result["worst"]["gradients"] == "b"
    assert result["max_difference"]["gradients"] == pytest.approx(1e-15 / (1e-3 * math.sqrt(25 / 5)))
    assert result["pass"]


@pytest.mark.parametrize("kind", ["initial", "parameters", "gradients"])
@pytest.mark.parametrize("fault", ["missing", "shape", "nan"])
def test_a_tensor_that_is_missing_misshapen_or_not_a_number_fails(kind: str, fault: str) -> None:
    tensors = {name: value.clone() for name, value in trace().initial.items()}
    if fault == "missing":
        del tensors["b"]
    else:
        tensors["b"] = torch.zeros(2).double() if fault == "shape" else torch.full((3,), math.nan).double()
    result = compare(trace(**{kind: [tensors] if kind == "gradients" else tensors}), trace(), dtype="float64")
    key = "initial_parameters" if kind == "initial" else kind
    assert not result["pass"]
    assert result["max_difference"][key] == math.inf
    assert result["worst"][key] == "b"
    assert "FAIL" in table(result | {"layout": "dp=2", "against": "dp=1"})


def test_initial_parameters_must_be_equal_bit_for_bit() -> None:
    bit = trace(initial={"a": torch.tensor([1.0 + 2**-52, -2.0]).double(), "b": torch.zeros(3).double()})
    bit.initial["a"][0] = 1.0 + 2**-52
    result = compare(bit, trace(), dtype="float64")
    assert not result["pass"]
    assert result["worst"]["initial_parameters"] == "a"


@pytest.mark.parametrize("losses", [[2.0 + 1e-8], [math.nan], [math.inf]])
def test_a_loss_that_differs_or_is_not_a_number_fails(losses: list[float]) -> None:
    result = compare(trace(losses=losses), trace(), dtype="float64")
    assert not result["pass"]
    assert result["worst"]["loss"] == "step 1"


def test_parameters_after_steps_are_judged_in_float64_alone() -> None:
    other = trace(parameters={"a": torch.tensor([1.1, -2.0]).double(), "b": torch.zeros(3).double()})
    assert not compare(other, trace(), dtype="float64")["pass"]
    result = compare(other, trace(), dtype="float32")
    assert result["pass"]
    assert "not judged" in table(result | {"layout": "dp=2", "against": "dp=1"})


def test_the_batches_hold_documents_of_unequal_length_and_repeat_by_seed() -> None:
    spec = ModelSpec.load("tiny")
    first, again, other = (verification_batches(spec, verification_run(ROWS, 2, seed)).batch(0) for seed in (0, 0, 1))
    assert (first.tokens == again.tokens).all()
    assert (first.tokens != other.tokens).any()
    assert first.tokens.shape == (ROWS, SEQUENCE)
    targets = (first.targets >= 0).sum(1)
    assert targets.min() < targets.max()
    assert first.tokens.max() < spec.vocabulary


# verify


@pytest.mark.parametrize("name", LAYOUTS)
def test_every_familys_config(name: str) -> None:
    result = verify(LAYOUTS[name], model=str(CONFIGS / f"{name}.json"))
    assert result["pass"], result
    assert result.keys() >= KEYS
    assert result["tolerance"] == 1e-9


def test_no_config_is_left_out() -> None:
    assert {path.stem for path in CONFIGS.glob("*.json")} == LAYOUTS.keys()


@pytest.mark.parametrize("seed", [-1, 2**70])
def test_any_whole_number_is_a_seed(seed: int) -> None:
    assert verify("dp=1,zero=1", seed=seed, steps=1)["pass"]


def test_dropout_inside_attention_is_drawn_again_on_one_rank_and_refused_on_more() -> None:
    spec = msgspec.structs.replace(ModelSpec.load(str(CONFIGS / "gpt2.json")), attention_dropout=0.1)
    result = verify("dp=1,zero=1", model=spec, seed=2**40)
    assert result["pass"]
    with pytest.raises(InputError, match=r"dropout inside attention \(0.1\) is not keyed by token"):
        verify("dp=2", model=spec)


def test_two_layouts_against_each_other_at_the_default_model() -> None:
    result = verify("dp=2,pp=2,schedule=zbv", "tp=4,sp=0", steps=1)
    assert result["pass"], result
    assert "schedule=zbv" in result["layout"]
    assert "tp=4" in result["against"]


def test_many_steps_at_a_model_whose_key_biases_have_no_gradient_in_truth() -> None:
    """AdamW makes steps of any gradient, rounding included."""
    result = verify("dp=2", model=str(CONFIGS / "gpt2.json"), steps=12)
    assert result["pass"], result


def test_float32() -> None:
    result = verify("dp=2,tp=2", dtype="float32")
    assert result["pass"], result
    assert result["tolerance"] == 1e-5
    assert result["max_difference"]["gradients"] > 1e-9, "it must really compute in float32"


def test_averaging_parameters_every_step() -> None:
    assert verify("dp=4", sync_every=1, steps=3)["pass"]


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        ({"sync_every": 2}, "another algorithm"),
        ({"sync_every": 1, "layout": "dp=2,zero=2"}, "set zero=0"),
        ({"steps": 0}, "give 1 or more"),
        ({"model": "nothing/here"}, "nothing/here: no such preset"),
        ({"layout": "tp=3"}, r"--layout: tp: tp=3 does not divide 8 heads; tp in \{1, 2, 4, 8\} does"),
        ({"against": "pp=9"}, "--against: pp: pp=9 x 1 chunks = 9 stages, the model has 8 layers"),
        ({"layout": "dp=2,zz=1"}, "--layout: unknown key 'zz'"),
        ({"layout": "cp=2"}, "cp=2 cannot be run yet"),
    ],
)
def test_refusals(arguments: dict[str, Any], reason: str) -> None:
    with pytest.raises(InputError, match=reason):
        verify(**({"layout": "dp=2"} | arguments))


# the command


def run(*args: str) -> int:
    """Exit code of `fiveply verify ...`, in this process."""
    try:
        cli.main(["verify", *args])
    except SystemExit as stop:
        return int(stop.code or 0)
    return 0


def test_the_command_prints_figures_and_passes(capfd: pytest.CaptureFixture[str]) -> None:
    assert run("--layout", "dp=2,pp=2,schedule=zb", "--against", "dp=1", "--dtype", "float64") == 0
    out, err = capfd.readouterr()
    assert out.rstrip().endswith("PASS")
    assert all(kind.replace("_", " ") in out for kind in KINDS)
    assert err == ""


def test_json_stands_on_standard_output_alone() -> None:
    command = [
        sys.executable,
        "-m",
        "fiveply.cli",
        "verify",
        "--layout",
        "tp=2",
        "--steps",
        "1",
        "--seed",
        "3",
        "--json",
    ]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout)
    assert result.keys() >= KEYS
    assert result["pass"] is True
    assert result["max_difference"].keys() == result["worst"].keys() == KINDS
    assert all(isinstance(value, float) for value in result["max_difference"].values())
    assert result["layout"].startswith("tp=2")
    assert "PASS" in done.stderr


def test_a_difference_is_exit_code_1(monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr("fiveply.corpus.batches.Batches.target_tokens", _uneven)
    assert run("--layout", "dp=2", "--json") == 1
    out, err = capfd.readouterr()
    assert json.loads(out)["pass"] is False
    assert "DIFFERS" in err
    assert "FAIL" in err


def _uneven(self: Any, start: int, count: int) -> int:
    """Another divisor in a world of two ranks."""
    return count * self.sequence - (torch.distributed.get_world_size() if torch.distributed.is_initialized() else 1)


@pytest.mark.parametrize(
    ("args", "said"),
    [
        (["--layout", "tp=3"], "tp=3 does not divide 8 heads"),
        (["--layout", "dp=2", "--model", "no/such/config.json"], "no/such/config.json"),
        (["--layout", "dp=2", "--sync-every", "4"], "another algorithm"),
        (["--layout", "dp=two"], "'two' is not a whole number"),
        (["--layout", "dp=2", "--steps", "0"], "steps"),
        (["--layout", "dp=2", "--steps", "many"], "many"),
        (["--layout", "dp=2", "--dtype", "float16"], "float16"),
        (["--against", "dp=2"], "--layout"),
        (["--layout", "dp=2", "--nonsense", "1"], "--nonsense"),
    ],
)
def test_bad_usage_is_exit_code_2_and_one_line(args: list[str], said: str, capfd: pytest.CaptureFixture[str]) -> None:
    assert run(*args, "--json") == 2
    out, err = capfd.readouterr()
    assert out == ""
    assert err.count("\n") == 1
    assert said in err
    assert err.startswith("fiveply: ")
