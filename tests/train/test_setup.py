"""What is known before any rank starts: the resolved layout, where the corpus stands, the precision, notes and refusals."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from short_run import arguments

from fiveply.spec.errors import InputError
from fiveply.spec.run import Corpus, Data, Model, Precision, RunSpec, Train
from fiveply.train import setup
from fiveply.world.device import find

WORDS = "It was the best of times, it was the worst of times, it was the age of wisdom, it was the age of foolishness. "


@pytest.fixture(autouse=True)
def texts(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)
    Path("a.txt").write_text(WORDS * 60)
    Path("b.txt").write_text(WORDS[::-1] * 60)


def run(
    layout: str = "dp=1", model: dict[str, Any] | None = None, train: dict[str, Any] | None = None, **data: Any
) -> RunSpec:
    return RunSpec(
        name="x", layout=layout, model=Model(**{"preset": "tiny", **(model or {})}),
        data=Data(**{"corpus": "a.txt", "tokenizer": "train:300", "sequence": 16, "held_out": 0.1, **data}),
        train=Train(**{"global_batch": 4, **(train or {})}),
    )  # fmt: skip


def refusal(spec: RunSpec, **keys: Any) -> InputError:
    with pytest.raises(InputError) as caught:
        setup.ready(spec, progress=False, **keys)
    assert "\n" not in str(caught.value)
    assert caught.value.fix
    return caught.value


def test_ready_resolves_the_layout_and_prepares_the_corpus() -> None:
    made = setup.ready(run("dp=2,pp=2"), progress=False)
    assert (made.layout.dp, made.layout.pp, made.layout.world) == (2, 2, 4)
    assert (made.layout.micro_batch, made.layout.schedule) == (1, "1f1b")
    assert sum(made.layout.stages) == made.spec.layers == 8
    assert (made.corpus / "tokenizer.json").is_file()
    assert made.resume is None
    assert not Path("runs").exists()


def test_a_layout_on_the_command_line_stands_over_the_files() -> None:
    assert setup.ready(run("dp=2"), layout="tp=2", progress=False).layout.tp == 2


def test_more_ranks_than_cores_are_said() -> None:
    many = 8 * find().count
    spec = run(f"dp={many}", train={"global_batch": many})
    if find().kind == "cpu":
        assert f"{many} ranks share {find().count} cores" in setup.ready(spec, progress=False).notes[0]
    else:
        assert refusal(spec).key == "layout"


def test_corpora_are_kept_apart_by_text_tokenizer_and_share_and_shared_otherwise() -> None:
    base = run()
    spec = base.model_spec()
    place = setup.corpus_folder(base, spec)
    assert place.parent == Path("data")
    assert place.name.startswith("a-")
    assert setup.corpus_folder(run(sequence=8, respect_documents=True), spec) == place
    others = [run(corpus="b.txt"), run(tokenizer="train:301"), run(held_out=0.2), run(tokenizer="")]
    folders = {setup.corpus_folder(other, spec) for other in others}
    assert len(folders) == 4
    assert place not in folders


def test_sources_are_one_text_or_a_weighted_list() -> None:
    assert [(s.path, s.weight) for s in setup.sources(run())] == [("a.txt", 1.0)]
    mixed = run(corpus=[Corpus("a.txt", 2.0), Corpus("b.txt")])
    assert [(s.path, s.weight) for s in setup.sources(mixed)] == [("a.txt", 2.0), ("b.txt", 1.0)]


def test_the_tokenizer_is_the_runs_else_the_models_else_trained_to_its_vocabulary() -> None:
    spec = run().model_spec()
    assert setup.tokenizer_choice(run(), spec) == "train:300"
    assert setup.tokenizer_choice(run(tokenizer=""), spec) == "train:512"
    corpus = setup.ready(run(), progress=False).corpus
    Path("weights").mkdir()
    Path("weights/tokenizer.json").write_bytes((corpus / "tokenizer.json").read_bytes())
    beside = run(tokenizer="", model={"preset": "weights"})
    assert Path(setup.tokenizer_choice(beside, spec)) == Path("weights/tokenizer.json")
    Path("bare").mkdir()
    with pytest.raises(InputError, match=r"no tokenizer\.json"):
        setup.tokenizer_choice(run(tokenizer="", model={"init_from": "bare"}), spec)


def test_an_evaluation_takes_no_more_batches_than_there_are() -> None:
    spec = run(train={"evaluate_batches": 1000})
    prepared = setup.Prepared.open(setup.ready(spec, progress=False).corpus)
    held_out = setup.batches(spec, prepared.held_out, shuffle=False)
    count = setup.evaluation_count(spec, held_out)
    assert 1 <= count < 1000
    assert (count - 1) * 4 < len(held_out) <= count * 4
    assert setup.evaluation_count(run(train={"evaluate_batches": 1}), held_out) == 1


@pytest.mark.parametrize(
    ("keys", "expected"),
    [
        ({"parameters": "float32"}, ("float32", "float32", "float32")),
        ({"parameters": "bfloat16"}, ("bfloat16", "float32", "float32")),
        ({"parameters": "float64"}, ("float64", "float64", "float64")),
        ({"parameters": "bfloat16", "reduce": "bfloat16"}, ("bfloat16", "bfloat16", "float32")),
        ({"parameters": "float32", "optimizer": "float64"}, ("float32", "float32", "float64")),
    ],
)
def test_precision(keys: dict[str, Any], expected: tuple[str, str, str]) -> None:
    assert tuple(setup.describe(setup.dtypes(Precision(**keys))).values()) == expected


@pytest.mark.parametrize("fast", [False, True])
def test_bfloat16_is_chosen_only_where_it_is_fast(fast: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(setup.device, "find", lambda: type("Found", (), {"fast_bf16": fast}))
    assert setup.dtypes(Precision()).compute == (torch.bfloat16 if fast else torch.float32)


@pytest.mark.parametrize(
    ("spec", "key", "said"),
    [
        (run("dp=2,zero=1", train={"sync_every": 2}), "train.sync_every", "zero=1"),
        (run("pp=2,schedule=zb", train={"compile": True}), "train.compile", "zero-bubble"),
        (run(model={"overrides": {"attention_dropout": 0.1}}), "", ""),
        (run(tokenizer="train:512", model={"overrides": {"vocab_size": 100}}), "data.tokenizer", "the model 100"),
    ],
)
def test_combinations_that_cannot_be(spec: RunSpec, key: str, said: str) -> None:
    if not key:
        spec = RunSpec(name="x", layout="dp=1,recompute=full", model=spec.model, data=spec.data, train=spec.train)
    error = refusal(spec)
    if key:
        assert error.key == key
    assert said in str(error)


def test_a_run_without_a_checkpoint_is_resumed_from_its_beginning() -> None:
    Path("runs/x/logs").mkdir(parents=True)
    assert "exists already" in str(refusal(run()))
    made = setup.ready(run(), resume=True, progress=False)
    assert made.resume is None
    assert any("no checkpoint yet" in note for note in made.notes)


def test_an_empty_run_directory_is_no_run() -> None:
    Path("runs/x").mkdir(parents=True)
    assert setup.ready(run(), progress=False).resume is None
    assert "no such run" in str(refusal(RunSpec(name="y"), resume=True))


LATE = """
import os, sys, time
from pathlib import Path
import torch.distributed as dist
from fiveply.cli import main

if os.environ["RANK"] == "0":
    meet = dist.init_process_group
    def waits(*args, **keys):
        Path("waits").touch()
        meet(*args, **keys)
    dist.init_process_group = waits
else:  # late: it begins when the first process has done all that it does without it
    while not Path("waits").exists():
        time.sleep(0.05)
main(sys.argv[1:])
"""


def test_a_late_process_of_torchrun_takes_the_first_ones_run_for_its_own(tmp_path: Path) -> None:
    (tmp_path / "late.py").write_text(LATE)
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "late.py"]
    keys = {"cwd": tmp_path, "capture_output": True, "text": True, "timeout": 120, "check": False}
    done = subprocess.run([*launcher, *arguments(tmp_path, "dp=2", "late", train__steps=1)], **keys)
    assert done.returncode == 0, done.stderr
    run = tmp_path / "runs" / "late"
    assert json.loads((run / "facts.json").read_text())["world"] == 2
    assert (run / "logs" / "rank-00001.log").is_file()
    (tmp_path / "waits").unlink()
    again = subprocess.run([*launcher, *arguments(tmp_path, "dp=2", "late", train__steps=1)], **keys)
    assert again.returncode == 1
    assert "this run exists already" in again.stderr
