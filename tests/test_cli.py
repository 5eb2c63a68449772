"""The command line: each mistake of a user's is one line on standard error and exit code 2."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

import fiveply
from fiveply.cli import main, verbs

WORDS = "It was the best of times, it was the worst of times, it was the age of wisdom, it was the age of foolishness. "
RUN = """
layout = "dp=1"
[model]
preset = "tiny"
[data]
corpus = "a.txt"
tokenizer = "train:300"
sequence = 16
[train]
steps = 1
global_batch = 4
evaluate_batches = 1
"""
PROGRESS = re.compile(r"[\d-]:[\d-]{2}:[\d-]{2}$")  # a bar of the corpus's preparation ends in a time


@pytest.fixture(autouse=True)
def here(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)
    Path("a.txt").write_text(WORDS * 60)
    Path("run.toml").write_text(RUN)


def fails(args: list[str], capfd: pytest.CaptureFixture[str], code: int = 2) -> str:
    """The one line that the command ends with."""
    with pytest.raises(SystemExit) as stop:
        main(args)
    out, err = capfd.readouterr()
    assert stop.value.code == code, err
    assert out == ""
    lines = [line for line in err.splitlines() if line.strip() and not PROGRESS.search(line)]
    assert err.splitlines()[-1].startswith("fiveply: ")
    assert len(lines) == 1, err
    assert "Traceback" not in err
    return lines[0]


def prepare(what: str) -> None:
    """Files that some of the mistakes need."""
    if what == "empty":
        Path("empty.txt").write_text("")
    if what == "blank":
        Path("blank.txt").write_text("  \n\n ")
    if what == "tiny":
        Path("short.txt").write_text("Few words.")
    if what == "binary":
        Path("binary.txt").write_bytes(bytes(range(256)) * 40)
    if what == "zeros":
        Path("zeros.txt").write_bytes(b"text\0text" * 500)
    if what == "jsonl":
        Path("bad.jsonl").write_text('{"text": "one"}\n{"words": "two"}\n')
    if what == "run":
        Path("runs/run/logs").mkdir(parents=True)
    if what == "config":
        Path("config.json").write_text('{"model_type": "llama"')
    if what == "file":
        Path("runs").write_text("in the way")


TRAIN = ["train", "run.toml"]
MISTAKES: dict[str, tuple[str, list[str], str]] = {
    "unknown key": ("", [*TRAIN, "--set", "train.stepz=3"], r"--set: train: .*stepz"),
    "unknown table": ("", [*TRAIN, "--set", "trian.steps=3"], r"--set: .*trian"),
    "wrong type": ("", [*TRAIN, "--set", "train.steps=many"], r"--set: train\.steps: .*int"),
    "number out of range": ("", [*TRAIN, "--set", "train.steps=0"], r"train\.steps: 0 is too small"),
    "not a number": ("", [*TRAIN, "--set", "optimizer.lr=nan"], r"optimizer\.lr: nan"),
    "not a choice": ("", [*TRAIN, "--set", "optimizer.name=lion"], r"optimizer\.name: .*lion"),
    "setting without a value": ("", [*TRAIN, "--set", "train.steps"], r"--set: 'train\.steps' has no value"),
    "setting into a value": ("", [*TRAIN, "--set", "name.x=3"], r"'name' is not a table|name: .*"),
    "missing run file": ("", ["train", "none.toml"], r"none\.toml: no such file"),
    "missing data file": ("", [*TRAIN, "--set", "data.corpus=none.txt"], r"none\.txt: no such file"),
    "missing data directory": ("", [*TRAIN, "--set", "data.corpus=none/"], r"none/: no such file or directory"),
    "unknown kind of data": ("", [*TRAIN, "--set", "data.corpus=run.toml"], r"run\.toml: unknown ending"),
    "empty corpus": ("empty", [*TRAIN, "--set", "data.corpus=empty.txt"], r"empty\.txt.*"),
    "blank corpus": ("blank", [*TRAIN, "--set", "data.corpus=blank.txt"], r"blank\.txt.*"),
    "tiny corpus": ("tiny", [*TRAIN, "--set", "data.corpus=short.txt"], r"short\.txt.*tokens, one sample needs 17"),
    "binary file as text": ("binary", [*TRAIN, "--set", "data.corpus=binary.txt"], r"binary\.txt: not UTF-8 .*offset"),
    "zeros in text": ("zeros", [*TRAIN, "--set", "data.corpus=zeros.txt"], r"zeros\.txt: not UTF-8 text: byte 0x00"),
    "line without text": ("jsonl", [*TRAIN, "--set", "data.corpus=bad.jsonl"], r"bad\.jsonl: line 2: "),
    "negative weight": ("", [*TRAIN, "--set", 'data.corpus=[{path="a.txt",weight=-1.0}]'], r"a\.txt: weight: -1\.0"),
    "batch not divisible": ("", [*TRAIN, "--layout", "dp=3"], r"--layout: .*4.*3|--layout: .*3.*4"),
    "micro-batch not divisible": ("", [*TRAIN, "--layout", "dp=2,micro_batch=3"], r"micro_batch"),
    "existing run": ("run", TRAIN, r"runs/run: this run exists already; add --resume"),
    "no run to resume": ("", [*TRAIN, "--resume"], r"runs/run: no such run"),
    "heads not divisible": ("", [*TRAIN, "--layout", "tp=3"], r"tp=3 does not divide 8 heads; .*\{1, 2, 4, 8\}"),
    "more stages than layers": ("", [*TRAIN, "--layout", "pp=16"], r"--layout: .*16.*8|--layout: .*8.*16"),
    "stages that do not add up": ("", [*TRAIN, "--layout", "pp=2,stages=3+4"], r"7.*8|8.*7"),
    "malformed layout": ("", [*TRAIN, "--layout", "dp=two"], r"--layout: .*dp"),
    "unknown layout key": ("", [*TRAIN, "--layout", "dpp=2"], r"--layout: .*dpp"),
    "sequence beyond positions": ("", [*TRAIN, "--set", "data.sequence=1024"], r"1024.*512"),
    "vocabulary mismatch": ("", [*TRAIN, "--set", "model.overrides.vocab_size=280"], r"data\.tokenizer: .*29\d tokens, the model 280"),
    "vocabulary too small to train": ("", [*TRAIN, "--set", "data.tokenizer=train:3"], r"train:3|3"),
    "no such tokenizer": ("", [*TRAIN, "--set", "data.tokenizer=none.json"], r"none\.json"),
    "unknown model": ("", [*TRAIN, "--set", "model.preset=17m"], r"17m"),
    "unknown override": ("", [*TRAIN, "--set", "model.overrides.layers=3"], r"model\.overrides: unknown key 'layers'"),
    "no weights to start from": ("", [*TRAIN, "--set", "model.init_from=none"], r"none"),
    "broken config": ("config", [*TRAIN, "--set", "model.preset=config.json"], r"config\.json: "),
    "a file where runs go": ("file", TRAIN, r"runs"),
    "nothing to train": ("", ["train"], r"nothing to train; give a RUN\.toml"),
    "unknown verb": ("", ["trian", "run.toml"], r"trian"),
    "unknown flag": ("", [*TRAIN, "--stepz", "3"], r"--stepz.*fiveply train --help"),
    "flag of a wrong type": ("", ["train", "--model", "tiny", "--steps", "many"], r"many|int"),
    "no layout to verify": ("", ["verify"], r"--layout.*fiveply verify --help"),
    "verify what does not fit": ("", ["verify", "--layout", "tp=3"], r"tp=3 does not divide 8 heads"),
    "verify another algorithm": ("", ["verify", "--layout", "dp=2", "--sync-every", "2"], r"another algorithm"),
    "verify nothing": ("", ["verify", "--layout", "dp=2", "--steps", "0"], r"compare nothing"),
    "no run to report": ("", ["report", "none"], r"none"),
    "nothing to convert": ("", ["convert", "none.gguf", "out"], r"none\.gguf"),
    "no model to generate from": ("", ["generate", "none", "--prompt", "x"], r"none"),
    "more likeliest tokens than a rank can count": ("", ["generate", "none", "--top-k", "9" * 30], r"top_k: 9+ is out of range"),
    "no model to serve": ("", ["serve", "none"], r"none"),
    "serve nobody": ("", ["serve", "none", "--most-running", "-1"], r"--most-running: -1 is too small; give 0 or more"),
    "refuse all": ("", ["serve", "none", "--most-waiting", "0"], r"--most-waiting: 0 is too small; give 1 or more"),
}  # fmt: skip


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_mistake_is_one_line_and_exit_2(mistake: str, capfd: pytest.CaptureFixture[str]) -> None:
    files, args, said = MISTAKES[mistake]
    prepare(files)
    line = fails(args, capfd)
    assert re.search(said, line), line
    assert not Path("runs/run/metrics.jsonl").exists()


FILES: dict[str, tuple[str, str]] = {
    "unknown key": ("[train]\nstepz = 3\n", r"bad\.toml: train: .*stepz"),
    "wrong type": ('[train]\nsteps = "many"\n', r"bad\.toml: train\.steps: "),
    "value for a table": ("train = 3\n", r"bad\.toml: train: "),
    "not TOML": ("[train\n", r"bad\.toml: not valid TOML"),
    "no share": ("[data]\nheld_out = 1.5\n", r"bad\.toml: data\.held_out: 1\.5 is not a share"),
}


@pytest.mark.parametrize("mistake", FILES)
def test_a_mistake_in_a_run_file_names_file_and_key(mistake: str, capfd: pytest.CaptureFixture[str]) -> None:
    content, said = FILES[mistake]
    Path("bad.toml").write_text(content)
    line = fails(["train", "bad.toml"], capfd)
    assert re.search(said, line), line


def test_a_run_file_that_is_binary_or_a_directory(capfd: pytest.CaptureFixture[str]) -> None:
    Path("binary.toml").write_bytes(b"\xff\xfe\0")
    assert "binary.toml: not valid TOML" in fails(["train", "binary.toml"], capfd)
    Path("folder.toml").mkdir()
    assert "folder.toml: " in fails(["train", "folder.toml"], capfd)


@pytest.mark.skipif(os.name != "posix" or os.geteuid() == 0, reason="root may write anywhere")
def test_a_folder_that_cannot_be_written(capfd: pytest.CaptureFixture[str]) -> None:
    Path("locked").mkdir(mode=0o500)
    assert "locked" in fails([*TRAIN, "--set", "folder=locked/in"], capfd)
    assert "locked" in fails([*TRAIN, "--set", "data.folder=locked/in"], capfd, code=1)


def test_a_folder_that_cannot_be_made(capfd: pytest.CaptureFixture[str]) -> None:
    assert "/proc/fiveply" in fails([*TRAIN, "--set", "folder=/proc/fiveply"], capfd)
    assert "/proc/fiveply" in fails([*TRAIN, "--set", "data.folder=/proc/fiveply"], capfd, code=1)


def test_a_checkpoint_of_another_model_is_not_resumed(capfd: pytest.CaptureFixture[str]) -> None:
    train = [*TRAIN, "--set", "train.evaluate_every=0"]
    main(train)
    capfd.readouterr()
    line = fails([*train, "--resume", "--set", "model.overrides.num_hidden_layers=4"], capfd)
    assert "it has 8 layers, the model 4; this is a checkpoint of another model" in line
    line = fails([*train, "--resume", "--set", "model.preset=2m"], capfd)
    assert "another model" in line
    assert "runs/run/checkpoints/step-00000001" in line


def shell(*args: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-m", "fiveply.cli", *args], capture_output=True, text=True, timeout=120)


@pytest.mark.parametrize(
    ("args", "code"), [(("--version",), 0), ((), 0), (("train", "none.toml"), 2), (("trian",), 2)], ids=str
)
def test_as_a_process(args: tuple[str, ...], code: int) -> None:
    done = shell(*args)
    assert done.returncode == code
    assert "Traceback" not in done.stderr
    if code:
        assert done.stdout == ""
        assert len(done.stderr.strip().splitlines()) == 1
    elif args:
        assert done.stdout == f"{fiveply.__version__}\n"
    else:
        assert all(verb in done.stdout for verb in verbs())


@pytest.mark.parametrize("verb", ["train", "verify", "generate", "serve", "convert", "report"])
def test_every_verb_has_help(verb: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        main([verb, "--help"])
    assert stop.value.code in (0, None)
    assert f"fiveply {verb}" in capsys.readouterr().out


def test_settings_may_stand_after_one_flag_or_several(capfd: pytest.CaptureFixture[str]) -> None:
    main([*TRAIN, "--set", "train.steps=2", "name=two", "--layout", "dp=2", "--set", "train.log_every=1", "--json"])
    result = json.loads(capfd.readouterr().out)
    assert (result["run"], result["step"]) == ("runs/two", 2)


def test_a_failed_check_is_exit_1(monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> None:
    from fiveply import equality

    result: dict[str, object] = {"pass": False}
    verify: Callable[..., dict[str, object]] = lambda *args, **kwargs: result  # noqa: E731
    monkeypatch.setattr(equality, "verify", verify)
    monkeypatch.setattr(equality, "table", lambda result: "FAIL")
    with pytest.raises(SystemExit) as stop:
        main(["verify", "--layout", "dp=2", "--json"])
    assert stop.value.code == 1
    out, err = capfd.readouterr()
    assert json.loads(out) == result
    assert err == "FAIL\n"
