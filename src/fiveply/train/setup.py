"""Everything about a run that can be known, checked and prepared before any rank starts.

`ready` runs in the launching process, or in the first one of a world that was started from outside: it resolves the layout
against model and batch, finds the checkpoint to resume from, refuses an existing run directory, and prepares the corpus.
What is wrong with the user's input is said here, once.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgspec
import torch

from fiveply.checkpoint import store
from fiveply.checkpoint.huggingface import HuggingFaceSource
from fiveply.corpus.batches import Batches, TokenFile
from fiveply.corpus.prepare import Prepared, Source, prepare
from fiveply.corpus.tokenizer import tokenizer_file
from fiveply.parallel.data_parallel import Dtypes
from fiveply.spec.architecture import ModelSpec, presets
from fiveply.spec.errors import InputError
from fiveply.spec.layout import Layout
from fiveply.spec.legality import resolve
from fiveply.spec.plan import layout_text
from fiveply.spec.run import Precision, RunSpec
from fiveply.train import auto
from fiveply.world import device
from fiveply.world.launch import by_first
from fiveply.world.mesh import Transport
from fiveply.world.process import place as own_place


@dataclass(frozen=True)
class Ready:
    """A run whose input is checked: all that a rank needs to start."""

    run: RunSpec
    spec: ModelSpec
    layout: Layout
    corpus: Path
    resume: Path | None
    """The checkpoint to go on from."""
    notes: tuple[str, ...] = ()
    """Lines for the user before training starts."""
    transport: Transport = "auto"


def ready(run: RunSpec, *, resume: bool = False, layout: str | None = None, progress: bool = True,
          transport: Transport = "auto") -> Ready:  # fmt: skip
    """Check and prepare; raises InputError. A resumed run takes the recorded layout unless one is given."""
    # Of several processes a slower one would find the run's directory made by a faster one.
    return by_first(lambda: _ready(run, resume, layout, progress, transport), call_seconds(run))


def _ready(run: RunSpec, resume: bool, layout: str | None, progress: bool, transport: Transport) -> Ready:
    notes: list[str] = []
    spec = run.model_spec()
    checkpoint = _checkpoint_to_resume(run, resume, notes)
    if checkpoint is not None:
        checkpoint.check(spec)  # before its recorded layout is held against the model
        if checkpoint.spec.layers != spec.layers:  # every parameter of a shallower model is there too
            raise InputError(
                f"it has {checkpoint.spec.layers} layers, the model {spec.layers}", where=str(checkpoint.path),
                fix="this is a checkpoint of another model; give its own config",
            )  # fmt: skip
    elif run.model.init_from:
        open_source(run.model.init_from).check(spec)
    text = layout_text(layout or (checkpoint.state["layout"] if checkpoint else run.layout))
    where = "--layout" if layout else "layout"
    if text == auto.AUTO:
        text = planned(run, spec, notes)
    resolved = resolve(
        Layout.parse(text, where), spec, sequence=run.data.sequence, global_batch=run.train.global_batch, where=where
    )
    _check_run(run, resolved)
    found = device.find()
    if found.kind == "cuda" and transport != "auto":
        problem = f"{transport} is for ranks on CPUs, and this machine has GPUs"
        raise InputError(problem, where="--backend", fix="leave it out")
    if resolved.world > found.count:
        if found.kind == "cuda":
            fix = f"lower the degrees to {found.count} ranks"
            raise InputError(f"{resolved.world} ranks, {found.count} GPUs here", where=where, fix=fix)
        shared = f"{resolved.world} ranks share {found.count} cores"
        notes.append(f"{shared}: this shows that it works, not how fast it can be")
    corpus = corpus_folder(run, spec)
    prepared = prepare_corpus(run, spec, corpus, progress=progress)
    _check_corpus(run, spec, prepared)
    return Ready(run, spec, resolved, corpus, checkpoint.path if checkpoint else None, tuple(notes), transport)


def call_seconds(run: RunSpec) -> float:
    """Time-out of a collective: longer than it takes to notice and explain a hang."""
    return max(600.0, 2 * run.train.hang_timeout)


def planned(run: RunSpec, spec: ModelSpec, notes: list[str]) -> str:
    """The planner's pick for the devices found, or for the ranks that were started."""
    place = own_place()
    answer = auto.plan(
        spec, auto.cluster(ranks=place.ranks if place else 0), dtypes(run.precision), sequence=run.data.sequence,
        global_batch=run.train.global_batch, ranks=place.ranks if place else 0, compiled=run.train.compile,
        alone=run.train.sync_every > 0,
    )  # fmt: skip
    notes.append(auto.reason(answer))
    return str(answer.ranked[0].prediction.layout)


def _checkpoint_to_resume(run: RunSpec, resume: bool, notes: list[str]) -> store.Checkpoint | None:
    directory = run.directory
    if not resume:
        if directory.exists() and any(directory.iterdir()):
            raise InputError(
                "this run exists already", where=str(directory), fix="add --resume, choose another name, or remove it"
            )
        return None
    if not directory.is_dir():
        raise InputError(
            "no such run to resume", where=str(directory), fix="leave --resume out, or give the run's own file"
        )
    checkpoint, problems = store.open_newest_intact(directory / "checkpoints")
    notes += [f"{problem}: an older checkpoint is used" if checkpoint else problem for problem in problems]
    if checkpoint is None:
        notes.append("the run has no checkpoint yet: it starts from step 0")
    return checkpoint


def _check_run(run: RunSpec, layout: Layout) -> None:
    if run.train.sync_every and layout.zero:
        raise InputError(f"replicas that step alone hold all their state, so zero={layout.zero} has nothing to share",
                         where="run", key="train.sync_every", fix="set zero=0")  # fmt: skip
    if run.train.compile and layout.schedule in ("zb", "zbv") and layout.pp > 1:
        raise InputError("a compiled block has one fused backward, which zero-bubble schedules split", where="run",
                         key="train.compile", fix="set schedule=1f1b, or compile=false")  # fmt: skip


def _check_corpus(run: RunSpec, spec: ModelSpec, prepared: Prepared) -> None:
    if prepared.vocabulary > spec.vocabulary:
        raise InputError(
            f"the tokenizer has {prepared.vocabulary} tokens, the model {spec.vocabulary}", where="run", key="data.tokenizer",
            fix="give the model's own tokenizer, train:N with N at most that, or model.overrides.vocab_size",
        )  # fmt: skip
    batches(run, prepared.train)
    if prepared.held_out:
        batches(run, prepared.held_out)


def corpus_folder(run: RunSpec, spec: ModelSpec) -> Path:
    """Where this corpus under this tokenizer is prepared: runs that share both share it."""
    key = msgspec.json.encode([sources(run), tokenizer_choice(run, spec), run.data.held_out])
    first = Path(sources(run)[0].path).stem.replace(":", "-") or "corpus"
    return Path(run.data.folder) / f"{first}-{hashlib.sha256(key).hexdigest()[:10]}"


def sources(run: RunSpec) -> list[Source]:
    if isinstance(run.data.corpus, str):
        return [Source(run.data.corpus)]
    return [Source(part.path, part.weight) for part in run.data.corpus]


def tokenizer_choice(run: RunSpec, spec: ModelSpec) -> str:
    """The run's, else the one beside the model's weights or configuration, else one trained to the model's vocabulary."""
    if run.data.tokenizer:
        return run.data.tokenizer
    origin = run.model.init_from or run.model.preset
    if origin not in presets():
        folder = Path(origin) if Path(origin).is_dir() else Path(origin).parent
        if (folder / "tokenizer.json").is_file():
            return str(tokenizer_file(folder))
        if run.model.init_from:
            raise InputError("no tokenizer.json beside the weights", where=origin, fix="set data.tokenizer")
    return f"train:{spec.vocabulary}"


def prepare_corpus(run: RunSpec, spec: ModelSpec, folder: Path, *, progress: bool) -> Prepared:
    return prepare(
        sources(run), tokenizer_choice(run, spec), folder, held_out=run.data.held_out, seed=run.seed, progress=progress
    )


def batches(run: RunSpec, files: Sequence[TokenFile], *, shuffle: bool = True) -> Batches:
    """Of the run's rows; held-out text is read in order, without `shuffle`."""
    return Batches(
        files, sequence=run.data.sequence, global_batch=run.train.global_batch, seed=run.seed,
        respect_documents=run.data.respect_documents, shuffle=shuffle,
    )  # fmt: skip


def evaluation_count(run: RunSpec, held_out: Batches) -> int:
    """Global batches of one evaluation: as asked, or all that there are (a last partial one wraps around)."""
    return min(run.train.evaluate_batches, max(1, math.ceil(len(held_out) / run.train.global_batch)))


def open_source(path: str) -> store.Checkpoint | HuggingFaceSource:
    """Weights from a Hugging Face directory or a checkpoint."""
    is_checkpoint = (Path(path) / store.INDEX).is_file() or store.latest(Path(path)) is not None
    return store.Checkpoint.open(path) if is_checkpoint else HuggingFaceSource(path)


def dtypes(precision: Precision) -> Dtypes:
    """The precision in force; `auto` computes in bfloat16 only where this machine is fast at it."""
    compute = precision.parameters
    if compute == "auto":
        compute = "bfloat16" if device.find().fast_bf16 else "float32"
    exact = "float64" if compute == "float64" else "float32"
    others = (exact if name == "auto" else name for name in (precision.reduce, precision.optimizer))
    return Dtypes(*(getattr(torch, name) for name in (compute, *others)))


def describe(dtypes: Dtypes) -> dict[str, Any]:
    return {key: str(getattr(dtypes, part)).removeprefix("torch.") for key, part in
            (("parameters", "compute"), ("reduce", "reduce"), ("optimizer", "optimizer"))}  # fmt: skip
