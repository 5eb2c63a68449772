"""RunSpec: a training run as one TOML file; every key has a default, and an unknown or mistyped key is refused by name.

    name = "plays"
    layout = "dp=2,pp=2"
    [model]
    preset = "15m"
    [data]
    corpus = "shakespeare"
    [train]
    steps = 400

Keys are overridden on the command line by `--set train.steps=100`. It is data only; `train/trainer.py` gives it meaning.
"""

from __future__ import annotations

import math
import tomllib
from collections.abc import Sequence
from contextlib import suppress
from operator import attrgetter
from pathlib import Path
from typing import Any, Literal

import msgspec
import tomli_w

from fiveply.spec.architecture import ModelSpec
from fiveply.spec.errors import InputError

Values = dict[str, Any]


class Table(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Base of the run's tables."""


class Model(Table, frozen=True):
    preset: str = "2m"
    """A preset's name, or the path of a Hugging Face directory or `config.json`."""
    init_from: str = ""
    """A Hugging Face directory or a checkpoint whose weights training starts from; "" for fresh ones. Its config is used."""
    overrides: dict[str, Any] = {}
    """Keys of `config.json` to replace, such as `num_hidden_layers`."""


class Corpus(Table, frozen=True):
    path: str
    weight: float = 1.0


class Data(Table, frozen=True):
    corpus: str | list[Corpus] = "shakespeare"
    """`shakespeare` (the packaged plays), a `.txt`, a `.jsonl`, a directory, `datasets:NAME`, or a weighted list of these."""
    tokenizer: str = ""
    """`train:N`, or a `tokenizer.json` or its directory. Default: the model's own, else one trained to the model's vocabulary."""
    sequence: int = 256
    held_out: float = 0.05
    """Share of the text kept for evaluation."""
    respect_documents: bool = False
    """Attend within documents only, and predict nothing across their ends."""
    folder: str = "data"
    """Where prepared tokens are kept."""


class Train(Table, frozen=True):
    steps: int = 200
    until: Literal["steps", "converged"] = "steps"
    """`converged`: stop when the held-out loss has not improved for `patience` evaluations, within `steps`; the best is kept."""
    patience: int = 5
    global_batch: int = 16
    """Rows of `data.sequence` tokens a step, over all replicas."""
    sync_every: int = 0
    """0: gradients are averaged every step. H > 0: replicas step alone and parameters are averaged every H steps."""
    compile: bool = False
    evaluate_every: int = 50
    """Steps between evaluations on held-out text; 0 for the end alone."""
    evaluate_batches: int = 8
    checkpoint_every: int = 0
    """Steps between checkpoints; 0 for the end (and Ctrl-C) alone."""
    stop_at: int = 0
    """Leave off after this step with a checkpoint, to be resumed; 0 to go on to the end."""
    keep_checkpoints: int = 2
    log_every: int = 10
    record: int = 10
    """The step whose every action and collective is recorded on all ranks, for the report (the last step where there are
    fewer); a run resumed beyond it records as many steps after its start. 0 for none."""
    profile: str = ""
    """Steps that torch's profiler watches, as `10:12` (both included) or `10`."""
    memory_snapshot: bool = False
    """Write what each rank's memory holds, after the recorded step."""
    hang_timeout: float = 300.0
    """Seconds without any rank going on until the run is ended with a report of who waits for whom; 0 for never."""

    @property
    def profiled(self) -> tuple[int, int]:
        """First and last step under the profiler; (0, 0) for none. Raises ValueError for other text."""
        first, _, last = self.profile.partition(":")
        return (int(first), int(last or first)) if self.profile else (0, 0)


class Optimizer(Table, frozen=True):
    name: Literal["adamw", "sgd"] = "adamw"
    lr: float = 1e-3
    betas: tuple[float, float] = (0.9, 0.95)
    eps: float = 1e-8
    weight_decay: float = 0.1
    decay_all: bool = False
    """Decay norms, biases and embeddings too."""
    clip: float = 1.0
    """Largest global gradient norm; 0 for no clipping."""
    warmup: int = 20
    schedule: Literal["constant", "cosine", "wsd"] = "cosine"
    decay_share: float = 0.2
    """wsd: the share of the steps, at the end, over which the rate falls."""
    final_share: float = 0.1
    """The rate at the end over its peak."""


class Precision(Table, frozen=True):
    parameters: Literal["auto", "float32", "bfloat16", "float64"] = "auto"
    """Of the computation; auto: bfloat16 where the processor is fast at it, else float32."""
    reduce: Literal["auto", "float32", "bfloat16", "float64"] = "auto"
    """Of gradients, accumulated and reduced; auto: float32, or float64 with float64 parameters."""
    optimizer: Literal["auto", "float32", "float64"] = "auto"
    """Of what the optimiser updates and keeps; auto: as `reduce`'s auto."""


LEAST = {
    "train.steps": 1, "train.global_batch": 1, "train.patience": 1, "train.sync_every": 0, "train.evaluate_every": 0,
    "train.evaluate_batches": 1, "train.checkpoint_every": 0, "train.stop_at": 0, "train.keep_checkpoints": 1,
    "train.log_every": 1, "train.record": 0, "train.hang_timeout": 0, "data.sequence": 1, "optimizer.warmup": 0,
    "optimizer.lr": 0, "optimizer.clip": 0, "optimizer.eps": 0, "optimizer.weight_decay": 0,
}  # fmt: skip
"""What each number must be at the least."""


class RunSpec(Table, frozen=True):
    name: str = ""
    """Names the run's directory, `runs/NAME`; default: the file's name."""
    folder: str = "runs"
    seed: int = 0
    layout: str = "auto"
    """`auto`: the planner's pick for the devices found; a resumed run keeps its own."""
    model: Model = Model()
    data: Data = Data()
    train: Train = Train()
    optimizer: Optimizer = Optimizer()
    precision: Precision = Precision()

    @property
    def directory(self) -> Path:
        return Path(self.folder) / self.name

    @classmethod
    def load(cls, path: str | Path | None, settings: Sequence[str] = ()) -> RunSpec:
        """Read a TOML file (None: defaults alone) and apply `key=value` settings; raises InputError naming file and key."""
        values: Values = {}
        where = "command line" if path is None else str(path)
        if path is not None:
            file = Path(path)
            if not file.is_file():
                raise InputError("no such file", where=where, fix="give a run's TOML file, or --model and --data")
            try:
                values = tomllib.loads(file.read_text())
            except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
                raise InputError(f"not valid TOML ({error})", where=where, fix="mend that line") from None
            values.setdefault("name", file.stem)
            written = _converted(values, where)
            with suppress(InputError):
                written.check()
                where = "--set" if settings else where  # what is wrong from here on came with the settings
        for setting in settings:
            _apply(values, setting)
        run = _converted(values, where)
        run.check(where)
        return run

    def check(self, where: str = "run") -> None:
        """Raise InputError for values that no run can have."""

        def refuse(key: str, problem: str, fix: str) -> None:
            raise InputError(problem, where=where, key=key, fix=fix)

        if not self.name:
            refuse("name", "the run has no name", 'add name = "..."')
        for key, least in LEAST.items():
            value = attrgetter(key)(self)
            if not least <= value < math.inf:
                problem = "too small" if value < least else "not a finite number"
                refuse(key, f"{value} is {problem}", f"give {least} or more")
        betas = (("optimizer.betas", beta) for beta in self.optimizer.betas)
        for key, share in (("data.held_out", self.data.held_out), *betas):
            if not 0 <= share < 1:
                refuse(key, f"{share} is not a share", "give 0 or more and less than 1")
        for key in ("optimizer.decay_share", "optimizer.final_share"):
            if not 0 <= attrgetter(key)(self) <= 1:
                refuse(key, f"{attrgetter(key)(self)} is not a share", "give 0 to 1")
        try:
            first, last = self.train.profiled
        except ValueError:
            first, last = 1, 0
        if self.train.profile and not 1 <= first <= last:
            problem = f"'{self.train.profile}' is no range of steps"
            refuse("train.profile", problem, "write the first and the last, as 10:12")
        if self.train.until == "converged" and (self.train.evaluate_every == 0 or self.data.held_out == 0):
            problem = "convergence needs evaluations on held-out text"
            refuse("train.until", problem, "set train.evaluate_every and data.held_out")

    def toml(self) -> str:
        return tomli_w.dumps(msgspec.to_builtins(self))

    def model_spec(self) -> ModelSpec:
        """The model that the run trains, with `model.overrides` applied."""
        spec = ModelSpec.load(self.model.init_from or self.model.preset)
        if not self.model.overrides:
            return spec
        if unknown := [key for key in self.model.overrides if key not in spec.config]:
            raise InputError(f"unknown key '{unknown[0]}'", where="run", key="model.overrides",
                             fix=f"keys are {', '.join(sorted(spec.config))}")  # fmt: skip
        return ModelSpec.from_config(spec.config | self.model.overrides, where="model.overrides")


def _converted(values: Values, where: str) -> RunSpec:
    try:
        return msgspec.convert(values, RunSpec)
    except msgspec.ValidationError as error:
        problem, _, at = str(error).partition(" - at ")
        key = at.strip("`").removeprefix("$.").removeprefix("$")
        raise InputError(problem, where=where, key=key, fix="see `fiveply train --help` for the keys") from None


def _apply(values: dict[str, Any], setting: str) -> None:
    """Set `table.key=value` in place; the value is read as TOML where it is one, else as text."""
    key, equals, text = setting.partition("=")
    if not equals:
        raise InputError(f"'{setting}' has no value", where="--set", fix="write key=value, as in train.steps=100")
    try:
        value = tomllib.loads(f"value = {text}")["value"]
    except tomllib.TOMLDecodeError:
        value = text
    *tables, last = key.strip().split(".")
    for table in tables:
        inner = values.setdefault(table, {})
        if not isinstance(inner, dict):
            raise InputError(
                f"'{table}' is not a table", where="--set", key=key, fix="see `fiveply train --help` for the keys"
            )
        values = inner  # pyright: ignore[reportUnknownVariableType]
    values[last] = value
