"""Sources of text -> a folder of memory-mapped tokens, prepared once and opened by every rank.

A prepared folder holds, for each source and split, `NAME.SPLIT.bin` (token ids, every document closed by end-of-text)
and `NAME.SPLIT.documents.npy` (where documents begin), with `tokenizer.json` and `index.json`. It is written aside and
renamed, so it is complete or absent; a second call with unchanged inputs opens it at once.

The work (`fiveply.corpus.tokenise`) runs in a process of its own, because the tokenizers' threads outlive it and a
launcher forks ranks afterwards. One process at a time may prepare a folder; any number may open it. Nothing here knows
of sequences or batches.
"""

from __future__ import annotations

import hashlib
import itertools
import math
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import msgspec
import numpy as np

from fiveply.corpus.batches import TokenFile
from fiveply.corpus.documents import find_files, is_data_set
from fiveply.corpus.tokenise import FORMAT, Index, Job, Source, SplitCount, write_index
from fiveply.corpus.tokenizer import tokenizer_file
from fiveply.spec.errors import InputError, RunError

__all__ = ["Prepared", "Source", "prepare"]

Split = Literal["train", "held_out"]

_OURS = re.compile(
    r"(index|tokenizer|tokenizer_config)\.json(\.partial)?|\d+-.*\.(train|held_out)\.(bin|documents\.npy)"
)


@dataclass(frozen=True)
class Prepared:
    """An opened folder: one memory-mapped TokenFile a source in `train`, and in `held_out` where any was held out."""

    folder: Path
    index: Index
    train: list[TokenFile]
    held_out: list[TokenFile]

    @classmethod
    def open(cls, folder: Path | str) -> Prepared:
        """Raises InputError where the folder is none of ours, incomplete, or of another format."""
        folder = Path(folder)
        file, again = folder / "index.json", "prepare it again"
        try:
            index = msgspec.json.decode(file.read_bytes(), type=Index)
        except FileNotFoundError:
            raise InputError("not a prepared corpus (it has no index.json)", where=str(folder), fix=again) from None
        except msgspec.DecodeError as error:
            raise InputError(str(error), where=str(file), fix=again) from None
        if index.format != FORMAT:
            raise InputError(f"format {index.format}, this version reads {FORMAT}", where=str(file), fix=again)
        files: dict[Split, list[TokenFile]] = {"train": [], "held_out": []}
        for source, (split, into) in itertools.product(index.sources, files.items()):
            count: SplitCount = getattr(source, split)
            if count.tokens:
                name = f"{source.path} ({split})"
                into.append(TokenFile(name, *_map(folder, count, index.dtype), weight=source.weight))
        return cls(folder, index, files["train"], files["held_out"])

    @property
    def vocabulary(self) -> int:
        """Highest token id + 1; a model's vocabulary must be at least this."""
        return self.index.vocabulary

    def characters_per_token(self, split: Split = "held_out") -> float:
        """Characters of text for each token, end-of-text tokens counted: nats per token / (ln 2 x this) = bits per
        character. Raises InputError for an empty split."""
        counts: list[SplitCount] = [getattr(source, split) for source in self.index.sources]
        if not (tokens := sum(count.tokens for count in counts)):
            raise InputError("nothing was held out", where=str(self.folder), key="held_out", fix="use a share above 0")
        return sum(count.characters for count in counts) / tokens


def prepare(
    sources: Sequence[Source],
    tokenizer: str,
    folder: Path | str,
    held_out: float = 0.05,
    seed: int = 0,
    progress: bool = True,
) -> Prepared:
    """Tokenise `sources` into `folder`, or open it where it already holds exactly that.

    tokenizer: "train:N" (on the training split) or a path to a tokenizer.json or its directory. held_out: the share of
    text kept from training: whole documents where there are at least 10 / held_out of them, else the tail of each.
    Raises InputError for bad input, RunError where writing fails. A folder with other things in it is never replaced.
    """
    folder = Path(folder)
    _check(sources, held_out)
    vocabulary = _training_vocabulary(tokenizer)
    fingerprint = _fingerprint(sources, tokenizer if vocabulary is None else vocabulary, held_out, seed)
    if (prepared := _reuse(folder, fingerprint, sources)) is not None:
        return prepared
    target = folder.absolute()
    aside = target.with_name(f".{target.name}.{os.getpid()}.partial")
    try:
        shutil.rmtree(aside, ignore_errors=True)
        aside.mkdir(parents=True)
        _run_apart(Job(list(sources), tokenizer, vocabulary, str(aside), held_out, seed, progress, fingerprint))
        shutil.rmtree(target, ignore_errors=True)
        aside.rename(target)
    except OSError as error:
        raise RunError(f"{folder}: can't be written ({error.strerror})") from None
    finally:
        shutil.rmtree(aside, ignore_errors=True)
    return Prepared.open(folder)


def _check(sources: Sequence[Source], held_out: float) -> None:
    if not sources:
        raise InputError("no source of text", key="sources", fix="name at least one, such as shakespeare")
    for source in sources:
        if not (math.isfinite(source.weight) and source.weight > 0):
            raise InputError(f"{source.weight} is no weight", where=source.path, key="weight", fix="use one above 0")
    if not 0 <= held_out < 1:
        raise InputError(f"{held_out} is no share", key="held_out", fix="use 0 to below 1, such as 0.05")


def _fingerprint(sources: Sequence[Source], tokenizer: str | int, held_out: float, seed: int) -> str:
    """Hash of settings and of every input file's path, size and time. Weights are left out: tokens don't depend on
    them. A data set of the hub counts by its name alone: delete the folder to read it anew."""
    files = [file for source in sources if not is_data_set(source.path) for file in find_files(source.path)]
    if isinstance(tokenizer, str):
        file = tokenizer_file(tokenizer)
        # The files beside it may name its end-of-text token.
        files += sorted(file.parent.glob("*.json")) if file.name == "tokenizer.json" else [file]
    stats = [(str(file.resolve()), (stat := file.stat()).st_size, stat.st_mtime_ns) for file in files]
    what = [FORMAT, [source.path for source in sources], tokenizer, held_out, seed, stats]
    return hashlib.sha256(msgspec.json.encode(what)).hexdigest()[:32]


def _training_vocabulary(tokenizer: str) -> int | None:
    """N of "train:N"; None for a path."""
    kind, _, number = tokenizer.partition(":")
    if kind != "train":
        return None
    if not number.isdecimal():
        raise InputError(f"{number!r} is no size of a vocabulary", key="tokenizer", fix="write train:4096")
    return int(number)


def _reuse(folder: Path, fingerprint: str, sources: Sequence[Source]) -> Prepared | None:
    """The folder as it is, with the weights of now, where it holds what is asked for; None where it may be replaced.
    Raises InputError where it may not."""
    if not folder.exists():
        return None
    names = {file.name for file in folder.iterdir()} if folder.is_dir() else {folder.name}
    if names and ("index.json" not in names or not all(map(_OURS.fullmatch, names))):
        raise InputError(
            "exists and holds other things than a prepared corpus", where=str(folder), fix="choose another folder"
        )
    try:
        prepared = Prepared.open(folder)
    except InputError:
        return None
    if prepared.index.fingerprint != fingerprint:
        return None
    weighted = [
        msgspec.structs.replace(kept, weight=source.weight)
        for kept, source in zip(prepared.index.sources, sources, strict=True)
    ]
    if weighted != prepared.index.sources:
        write_index(folder, msgspec.structs.replace(prepared.index, sources=weighted))
    return Prepared.open(folder)


def _run_apart(job: Job) -> None:
    """Do the job in a fresh interpreter that shares our standard error; its errors are raised here as ours."""
    command = [sys.executable, "-P", "-c", "from fiveply.corpus.tokenise import main; main()"]
    done = subprocess.run(command, input=msgspec.json.encode(job), stdout=subprocess.PIPE, check=False)
    if done.returncode == 2:
        raise InputError(**msgspec.json.decode(done.stdout, type=dict[str, str]))
    if done.returncode:
        reason = done.stdout.decode().strip() or f"its process stopped with exit code {done.returncode}"
        raise RunError(f"preparing a corpus in {Path(job.folder).parent}: {reason}")


def _map(folder: Path, count: SplitCount, dtype: str) -> tuple[np.ndarray, np.ndarray]:
    """Tokens [T] and documents [D+1], mapped read-only; pages are read when touched, and shared by all ranks of a host.
    Raises InputError where a file is missing or its size is not what the index says."""
    file, places = folder / f"{count.name}.bin", folder / f"{count.name}.documents.npy"
    try:
        size, expected = file.stat().st_size, count.tokens * np.dtype(dtype).itemsize
        if size != expected:
            raise ValueError(f"has {size} bytes, the index says {expected}")
        tokens, documents = np.memmap(file, dtype=dtype, mode="r"), np.load(places, mmap_mode="r")
        if documents.shape != (count.documents + 1,):
            raise ValueError(f"its documents are {len(documents) - 1}, the index says {count.documents}")
    except (OSError, ValueError) as error:
        raise InputError(f"damaged ({error})", where=str(file), fix="delete the folder and prepare it again") from None
    return np.asarray(tokens), np.asarray(documents)
