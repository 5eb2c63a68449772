"""The work of preparing a corpus: documents -> tokenizer, splits, files of tokens, and the index that describes them.

Runs in an interpreter of its own (see `fiveply.corpus.prepare`, which decides whether, where to and for whom), shows a
progress bar on standard error, and reports a user's mistake as JSON on standard output. It knows nothing of what is
in the target folder already, nor of who opens it later.
"""

from __future__ import annotations

import contextlib
import itertools
import re
import sys
from array import array
from collections.abc import Iterator
from pathlib import Path

import msgspec
import numpy as np
from rich.console import Console
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeRemainingColumn

from fiveply.corpus.documents import find_files, is_data_set, read_documents
from fiveply.corpus.tokenizer import Tokenizer
from fiveply.spec.errors import InputError

FORMAT = 1
_PIECE = 1 << 18  # characters encoded as one text; longer documents are cut at a line's end, which tokens hardly show
_CHUNK = 1 << 21  # characters encoded at a time: bounds memory
_TRAINING_CHARACTERS = 100_000_000  # what a tokenizer is trained on at most; more changes few merges


class Source(msgspec.Struct, frozen=True):
    """`path`: see `fiveply.corpus.documents`. `weight`: its share of the training samples, relative to the others'."""

    path: str
    weight: float = 1.0


class SplitCount(msgspec.Struct, frozen=True):
    """One source's share of a split, in files `name`.bin and `name`.documents.npy. `tokens` counts end-of-text tokens;
    `characters` and `bytes` (UTF-8) are the text's alone."""

    name: str
    tokens: int
    documents: int
    characters: int
    bytes: int


class SourceIndex(msgspec.Struct, frozen=True):
    path: str
    weight: float
    train: SplitCount
    held_out: SplitCount


class Index(msgspec.Struct, frozen=True):
    """`index.json`. `fingerprint` covers the inputs and settings, `tokenizer_hash` what the tokenizer does."""

    format: int
    fingerprint: str
    tokenizer: str
    tokenizer_hash: str
    vocabulary: int
    end: int
    dtype: str
    held_out: float
    seed: int
    sources: list[SourceIndex]


class Job(msgspec.Struct, frozen=True):
    """What to do. `vocabulary` is what to train a tokenizer to, or None to load `tokenizer`; `folder` is empty."""

    sources: list[Source]
    tokenizer: str
    vocabulary: int | None
    folder: str
    held_out: float
    seed: int
    progress: bool
    fingerprint: str


def main() -> None:
    """A Job on standard input -> files in its folder; on exit code 2 the fields of an InputError on standard output,
    on 1 one line or nothing."""
    try:
        with contextlib.redirect_stdout(sys.stderr):
            tokenise(msgspec.json.decode(sys.stdin.buffer.read(), type=Job))
    except InputError as error:
        fields = {"problem": error.problem, "where": error.where, "key": error.key, "fix": error.fix}
        sys.stdout.buffer.write(msgspec.json.encode(fields))
        sys.exit(2)
    except OSError as error:
        sys.stdout.write(error.strerror or str(error))
        sys.exit(1)
    except KeyboardInterrupt:  # the parent was interrupted too, and says so
        sys.exit(130)


def tokenise(job: Job) -> None:
    """Do a Job. Raises InputError for input that is no text, OSError where writing fails."""
    folder = Path(job.folder)
    columns = [TextColumn("{task.description}"), BarColumn(), TaskProgressColumn()]
    columns.append(TimeRemainingColumn(elapsed_when_finished=True))
    with Progress(*columns, console=Console(stderr=True), disable=not job.progress) as bars:
        if job.vocabulary is None:
            tokenizer = Tokenizer.load(job.tokenizer)
        else:
            tokenizer = Tokenizer.train(_training_texts(job, bars), job.vocabulary)
        tokenizer.save(folder)
        # uint16 has no room for an id past 65,535; half the bytes of uint32 is half the disk and page cache.
        dtype = "<u2" if tokenizer.vocabulary < 65536 else "<u4"
        sources: list[SourceIndex] = []
        for number, source in enumerate(job.sources):
            name = f"{number}-{re.sub(r'[^A-Za-z0-9_]+', '-', Path(source.path).stem)[:40]}"
            writers = [_Writer(folder, f"{name}.{split}", dtype, tokenizer.end) for split in ("train", "held_out")]
            watch = _Watch(bars, source.path, "tokens of")
            _write_source(_split_documents(source.path, job), writers, tokenizer, watch)
            train, held_out = (writer.close() for writer in writers)
            if not train.tokens:
                raise InputError("holds no text", where=source.path, fix="give a corpus with text in it")
            sources.append(SourceIndex(source.path, source.weight, train, held_out))
    index = Index(
        FORMAT, job.fingerprint, job.tokenizer, tokenizer.fingerprint, tokenizer.vocabulary, tokenizer.end, dtype,
        job.held_out, job.seed, sources,
    )  # fmt: skip
    write_index(folder, index)


def write_index(folder: Path, index: Index) -> None:
    """Write or replace `index.json`, never half."""
    aside = folder / "index.json.partial"
    aside.write_bytes(msgspec.json.format(msgspec.json.encode(index)) + b"\n")
    aside.replace(folder / "index.json")


class _Watch:
    """A source's progress bar, in characters of about as many bytes."""

    def __init__(self, bars: Progress, path: str, title: str) -> None:
        # What a data set holds is not known before it is read: such a bar only moves.
        self._total = None if is_data_set(path) else sum(file.stat().st_size for file in find_files(path))
        # A long path would leave no room for the bar.
        self._bars, self._task = bars, bars.add_task(f"{title} {Path(path).name[:24]}", total=self._total)

    def advance(self, characters: int) -> None:
        self._bars.advance(self._task, characters)

    def finish(self) -> None:
        self._bars.update(self._task, total=self._total or 1, completed=self._total or 1)


def _split_documents(path: str, job: Job) -> Iterator[tuple[str, str]]:
    """Each document's (training, held-out) text, one of them mostly empty. Which is which follows from the seed and the
    document's number. Of few long documents, all of the last ones would be no fair sample of the text: there, each
    gives its tail."""
    share = job.held_out
    many = share > 0 and _at_least(read_documents(path), round(10 / share))
    # Multiples of the golden ratio, modulo 1, fill the interval evenly: the share holds over every stretch of documents.
    step, first = (5**0.5 - 1) / 2, int(np.random.SeedSequence(job.seed % 2**64).generate_state(1)[0]) / 2**32
    for number, text in enumerate(read_documents(path)):
        if share == 0:
            yield text, ""
        elif many:
            yield ("", text) if (first + number * step) % 1 < share else (text, "")
        else:
            place = max(1, round(len(text) * (1 - share)))
            place = text.rfind("\n", max(0, place - 2000), place) + 1 or place
            yield text[:place], text[place:]


def _at_least(documents: Iterator[str], count: int) -> bool:
    return next(itertools.islice(documents, count - 1, None), None) is not None


def _training_texts(job: Job, bars: Progress) -> Iterator[str]:
    """The training split of each source, as far as the tokenizer's share of characters goes."""
    limit = _TRAINING_CHARACTERS // len(job.sources)
    for source in job.sources:
        watch, left = _Watch(bars, source.path, "tokenizer from"), limit
        for text, _ in _split_documents(source.path, job):
            yield text[:left]
            watch.advance(len(text))
            left -= len(text)
            if left <= 0:
                break
        watch.finish()


class _Writer:
    """One split of one source, being written."""

    def __init__(self, folder: Path, name: str, dtype: str, end: int) -> None:
        self._folder, self._name, self._dtype = folder, name, dtype
        self._end = np.array([end], dtype=dtype).tobytes()
        self._file = (folder / f"{name}.bin").open("wb")
        self._tokens = self._characters = self._bytes = 0
        self._documents = array("q", [0])

    def add(self, text: str, ids: np.ndarray, closes: bool) -> None:
        """A piece of a document; `closes` marks its last."""
        self._file.write(ids.astype(self._dtype).tobytes())
        self._tokens += len(ids)
        self._characters += len(text)
        self._bytes += len(text.encode())
        if closes:
            self._file.write(self._end)
            self._tokens += 1
            self._documents.append(self._tokens)

    def close(self) -> SplitCount:
        self._file.close()
        np.save(self._folder / f"{self._name}.documents.npy", np.array(self._documents, dtype=np.int64))
        return SplitCount(self._name, self._tokens, len(self._documents) - 1, self._characters, self._bytes)


def _write_source(
    documents: Iterator[tuple[str, str]], writers: list[_Writer], tokenizer: Tokenizer, watch: _Watch
) -> None:
    pending: list[tuple[_Writer, str, bool]] = []

    def write_pending() -> None:
        for (writer, text, closes), ids in zip(pending, tokenizer.encode_batch([p[1] for p in pending]), strict=True):
            writer.add(text, ids, closes)
            watch.advance(len(text))
        pending.clear()

    size = 0
    for texts in documents:
        for writer, text in zip(writers, texts, strict=True):
            pieces = _cut(text)
            pending += [(writer, piece, place == len(pieces)) for place, piece in enumerate(pieces, start=1)]
            size += len(text)
        if size >= _CHUNK:
            write_pending()
            size = 0
    write_pending()
    watch.finish()


def _cut(text: str) -> list[str]:
    """A text in pieces of at most _PIECE characters, after the end of a line where there is one; "" has none."""
    pieces: list[str] = []
    start = 0
    while start < len(text):
        stop = start + _PIECE
        if stop < len(text):
            stop = text.rfind("\n", start, stop) + 1 or stop
        pieces.append(text[start:stop])
        start = stop
    return pieces
