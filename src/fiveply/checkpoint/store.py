"""Checkpoints without a layout: a directory of safetensors files that hold slices at global offsets, and a JSON index.

    folder/step-00000100/index.json            what is where, each file's size and checksum, the state
                         rank-00000.safetensors  the slices that rank 0 handed in, and so on
                         config.json, tokenizer.json, ...

Saved by any ranks, read by any others: a reader asks for regions, and only the bytes of that region are read. Complete or
invisible: written in `step-....partial`, fsynced, checked (every tensor covered exactly once), renamed. Nothing is pickled
on disk. This file knows slices and names; which rank holds which slice of what is the caller's parameter table.

Checksums are CRC-32 (zlib): they guard against damage, not malice, and at 7 GB/s cost the least of what the standard
library has (measured beside blake2b 1.4, sha256 2.1).
"""

from __future__ import annotations

import math
import os
import re
import shutil
import zlib
from collections.abc import Callable, Iterable, Mapping
from functools import cached_property, lru_cache
from pathlib import Path
from typing import Any

import msgspec
import torch
import torch.distributed as dist
from safetensors import SafetensorError, safe_open
from torch import Tensor

from fiveply.checkpoint.huggingface import Shape, check_shapes, disk_region, write_tensors
from fiveply.checkpoint.slices import Slice, overlap, window
from fiveply.spec.architecture import ModelSpec
from fiveply.spec.errors import FiveplyError, InputError, RunError

FORMAT, VERSION = "fiveply-checkpoint", 1
INDEX, PARTIAL = "index.json", ".partial"
STEP = re.compile(r"step-\d{8,}")
EXPECTED = (OSError, SafetensorError, FiveplyError)
"""Failures that the surroundings cause; any other exception is a defect and keeps its traceback."""


class DamagedCheckpointError(RunError):
    """A file of a checkpoint is missing, cut short or altered."""


class _Stored(msgspec.Struct, frozen=True):
    file: str
    start: Shape
    size: Shape


class _Tensor(msgspec.Struct, frozen=True):
    dtype: str
    shape: Shape
    slices: list[_Stored]


class _File(msgspec.Struct, frozen=True):
    bytes: int
    crc32: int


class _Version(msgspec.Struct, frozen=True):
    format: str
    version: int


class _Index(msgspec.Struct, frozen=True):
    step: int
    state: dict[str, Any]
    files: dict[str, _File]
    tensors: dict[str, _Tensor]
    format: str = FORMAT
    version: int = VERSION


class _Sealed(msgspec.Struct, frozen=True):
    """The index file: its body and the body's own checksum."""

    crc32: int
    body: msgspec.Raw


class _Report(msgspec.Struct, frozen=True):
    """What one rank wrote, for rank 0."""

    problem: str = ""
    files: dict[str, _File] = {}
    tensors: dict[str, _Tensor] = {}


# --- saving ---------------------------------------------------------------------------------------------------------


def save(
    folder: Path,
    step: int,
    slices: Iterable[Slice],
    state: Mapping[str, Any],
    extra_files: Mapping[str, bytes] | None = None,
) -> Path:
    """Write `folder/step-XXXXXXXX`; collective over the default group, where there is one.

    Together the ranks hand in each tensor exactly once. Of `state` (JSON values; non-finite numbers become null) and
    `extra_files` rank 0's count. An existing checkpoint of the same step is replaced. Raises RunError on every rank, with
    one line naming file and reason, when any rank cannot write or a tensor is not covered exactly; nothing is left behind.
    """
    final = Path(folder) / f"step-{step:08d}"
    partial = final.with_name(final.name + PARTIAL)
    ranks = _Ranks()

    def begin() -> None:
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)

    ranks.on_first(begin, final)
    file, own_error = partial / f"rank-{ranks.rank:05d}.safetensors", None
    try:
        report = _write_slices(file, slices)
    except Exception as error:  # whatever happened here, the others wait for this rank's report
        report, own_error = _Report(problem=f"rank {ranks.rank}: {_reason(error, file)}"), error
    reports = ranks.gather(msgspec.json.encode(report))

    def finish() -> None:
        try:
            _complete(partial, final, step, reports, state, extra_files or {})
        except BaseException:
            shutil.rmtree(partial, ignore_errors=True)
            raise

    ranks.on_first(finish, final, own_error)
    return final


class _Ranks:
    """The ranks that save or open together: errors of one become errors of all, so that nobody waits in vain."""

    def __init__(self) -> None:
        active = dist.is_available() and dist.is_initialized()
        self.rank, self.world = (dist.get_rank(), dist.get_world_size()) if active else (0, 1)

    def gather(self, report: bytes) -> list[bytes]:
        """Everyone's report on rank 0, in rank order; nothing elsewhere."""
        if self.world == 1:
            return [report]
        reports: list[Any] | None = [None] * self.world if self.rank == 0 else None
        dist.gather_object(report, reports)
        return reports or []

    def share(self, value: Any) -> Any:
        """Rank 0's value (of JSON's kinds), on every rank."""
        box = [msgspec.json.encode(value)]
        if self.world > 1:
            dist.broadcast_object_list(box)
        return msgspec.json.decode(box[0])

    def on_first(self, action: Callable[[], None], path: Path, own_error: Exception | None = None) -> None:
        """Run `action` on rank 0; its failure is raised on every rank as RunError, on a rank with a defect as the defect."""
        problem = ""
        if self.rank == 0:
            try:
                action()
            except Exception as error:
                problem, own_error = _reason(error, path), own_error or error
        problem = self.share(problem)
        if problem:
            if own_error is not None and not isinstance(own_error, EXPECTED):
                raise own_error
            raise RunError(f"checkpoint not written: {problem}")


def _reason(error: Exception, path: Path) -> str:
    """One line with file and reason."""
    if isinstance(error, OSError):
        return f"{error.filename or path}: {error.strerror or error}"
    if system := re.search(r"\(os error (\d+)\)", str(error)):  # how safetensors words the system's refusals
        return f"{path}: {os.strerror(int(system[1]))}"
    return str(error) if isinstance(error, FiveplyError) else f"{path}: {str(error) or type(error).__name__}"


def _write_slices(file: Path, slices: Iterable[Slice]) -> _Report:
    """Write and fsync one rank's file; a rank without slices writes none."""
    blocks: dict[str, Tensor] = {}
    tensors: dict[str, _Tensor] = {}
    for piece in slices:
        size, dtype = tuple(piece.tensor.shape), str(piece.tensor.dtype).removeprefix("torch.")
        stored = tensors.setdefault(piece.name, _Tensor(dtype, tuple(piece.shape), []))
        if (stored.dtype, stored.shape) != (dtype, tuple(piece.shape)):
            raise RunError(f"{piece.name}: slices disagree on dtype or global shape")
        if piece.tensor.numel() == 0:
            continue
        key = _key(piece.name, tuple(piece.start), whole=size == stored.shape)
        if key in blocks:
            raise RunError(f"{piece.name}: the slice at {tuple(piece.start)} stands twice")
        blocks[key] = piece.tensor.detach().cpu().contiguous()
        stored.slices.append(_Stored(file.name, tuple(piece.start), size))
    if not blocks:
        return _Report(tensors=tensors)
    write_tensors(file, blocks)
    return _Report(files={file.name: _settle(file)}, tensors=tensors)


def _complete(
    partial: Path,
    final: Path,
    step: int,
    reports: list[bytes],
    state: Mapping[str, Any],
    extra_files: Mapping[str, bytes],
) -> None:
    """Rank 0, after all have written: check, write the index, fsync, and make the checkpoint visible."""
    files: dict[str, _File] = {}
    tensors: dict[str, _Tensor] = {}
    for report in (msgspec.json.decode(text, type=_Report) for text in reports):
        if report.problem:
            raise RunError(report.problem)
        files |= report.files
        for name, tensor in report.tensors.items():
            known = tensors.setdefault(name, _Tensor(tensor.dtype, tensor.shape, []))
            if (known.dtype, known.shape) != (tensor.dtype, tensor.shape):
                raise RunError(f"{name}: ranks disagree on dtype or global shape")
            known.slices.extend(tensor.slices)
    for name, tensor in tensors.items():
        _check_cover(name, tensor)
    for name, file in files.items():
        if not (partial / name).is_file() or (partial / name).stat().st_size != file.bytes:
            raise RunError(f"{partial / name}: rank 0 does not see it; all ranks must write to one shared file system")
    for name, content in extra_files.items():
        files[name] = _settle(partial / name, content)
    body = msgspec.json.encode(_Index(step, dict(state), files, tensors))
    _settle(partial / INDEX, msgspec.json.encode(_Sealed(zlib.crc32(body), msgspec.Raw(body))))
    _sync_directory(partial)
    aside = final.with_name(f"{final.name}.old{PARTIAL}")
    shutil.rmtree(aside, ignore_errors=True)
    if final.exists():
        final.rename(aside)
    partial.rename(final)
    _sync_directory(final.parent)
    shutil.rmtree(aside, ignore_errors=True)


def _check_cover(name: str, tensor: _Tensor) -> None:
    """Every element exactly once: the volumes add up, no two slices overlap, and all lie inside."""
    covered, active = 0, []
    for piece in sorted(tensor.slices, key=lambda stored: stored.start):
        if overlap((0,) * len(tensor.shape), tensor.shape, piece.start, piece.size) != (piece.start, piece.size):
            raise RunError(f"{name}: the slice at {piece.start} of {piece.size} reaches beyond {tensor.shape}")
        # In order of first rows, only slices that reach this one's first row can overlap it.
        active = [other for other in active if not piece.start or other.start[0] + other.size[0] > piece.start[0]]
        for other in active:
            if overlap(piece.start, piece.size, other.start, other.size):
                raise RunError(f"{name}: the slices at {other.start} and {piece.start} overlap")
        active.append(piece)
        covered += math.prod(piece.size)
    if covered != math.prod(tensor.shape):
        raise RunError(f"{name}: {covered} of {math.prod(tensor.shape)} elements were handed in; a slice is missing")


def _key(name: str, start: Shape, whole: bool) -> str:
    """A slice's name inside its file; a whole tensor keeps its plain name, so that other tools can read it."""
    return name if whole else f"{name}@{','.join(map(str, start))}"


def _settle(file: Path, content: bytes | None = None) -> _File:
    """Write `content`, if given; checksum what the file holds and make it durable."""
    try:
        if content is not None:
            file.write_bytes(content)
        with open(file, "r+b") as handle:
            settled = _File(os.fstat(handle.fileno()).st_size, _checksum(handle))
            os.fsync(handle.fileno())
    except OSError as error:  # a failed write does not say which file it was
        raise OSError(error.errno, error.strerror, str(file)) from None
    return settled


def _checksum(handle: Any) -> int:
    crc, buffer = 0, memoryview(bytearray(1 << 22))
    while count := handle.readinto(buffer):
        crc = zlib.crc32(buffer[:count], crc)
    return crc


def _sync_directory(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


# --- finding --------------------------------------------------------------------------------------------------------


def all_complete(folder: Path) -> list[Path]:
    """The complete checkpoints in `folder`, newest (highest step) first; none when there is no such folder."""
    found = [path for path in Path(folder).glob("step-*") if STEP.fullmatch(path.name) and (path / INDEX).is_file()]
    return sorted(found, key=lambda path: int(path.name.removeprefix("step-")), reverse=True)


def latest(folder: Path) -> Path | None:
    """The newest complete checkpoint in `folder`."""
    return next(iter(all_complete(folder)), None)


def prune(folder: Path, keep: int, protect: Iterable[Path] = ()) -> list[Path]:
    """Remove all but the newest `keep` checkpoints and those in `protect`, and what interrupted saves left; the removed.

    For one process (rank 0), while no save is under way in `folder`.
    """
    protected = {Path(path).name for path in protect}
    removed = [path for path in all_complete(folder)[keep:] if path.name not in protected]
    for path in removed:  # invisible first: an interrupted removal leaves no half of a checkpoint
        path.rename(path.with_name(f"{path.name}.old{PARTIAL}"))
    for leftover in Path(folder).glob(f"step-*{PARTIAL}"):
        shutil.rmtree(leftover, ignore_errors=True)
    return removed


def open_newest_intact(folder: Path) -> tuple[Checkpoint | None, list[str]]:
    """The newest checkpoint whose files are all whole, and a line for each damaged newer one; collective.

    The ranks share the checksumming and reach the same answer. None where the folder holds no intact checkpoint. Raises
    InputError for one of another format.
    """
    ranks, problems = _Ranks(), []
    for name in ranks.share([path.name for path in all_complete(folder)]):
        checkpoint, problem = None, ""
        try:
            checkpoint = Checkpoint.open(Path(folder) / name)
            checkpoint.verify(ranks.rank, ranks.world)
        except DamagedCheckpointError as error:
            problem = str(error)
        problem = ranks.share(next(filter(None, (text.decode() for text in ranks.gather(problem.encode()))), ""))
        if not problem:
            return checkpoint, problems
        problems.append(problem)
    return None, problems


# --- reading --------------------------------------------------------------------------------------------------------


class Checkpoint:
    """A complete checkpoint, read by regions. `read` speaks the decoder's names, `read_stored` the stored ones."""

    def __init__(self, path: Path, index: _Index) -> None:
        self.path, self.step, self.state = path, index.step, index.state
        self._files, self._tensors = index.files, index.tensors
        self._open = lru_cache(maxsize=64)(self._open_file)  # bounded: an open file is a memory map

    @classmethod
    def open(cls, path: str | Path) -> Checkpoint:
        """Open a checkpoint, or the newest of a folder of them; sizes are checked here, contents by `verify`.

        Raises InputError where there is none or it is of another format, DamagedCheckpointError naming the file.
        """
        path = Path(path)
        path = path if (path / INDEX).is_file() else latest(path) or path
        if not (path / INDEX).is_file() or path.name.endswith(PARTIAL):
            raise InputError(
                "no complete checkpoint", where=str(path), fix="give a step-XXXXXXXX directory or their folder"
            )
        try:
            text = (path / INDEX).read_bytes()
            sealed = msgspec.json.decode(text, type=_Sealed)
            version = msgspec.json.decode(sealed.body, type=_Version)
            if version.format != FORMAT or version.version > VERSION:
                raise InputError(f"its format is {version.format} version {version.version}", where=str(path / INDEX),
                                 fix=f"this fiveply reads {FORMAT} up to version {VERSION}")  # fmt: skip
            index = msgspec.json.decode(sealed.body, type=_Index)
        except (msgspec.MsgspecError, UnicodeDecodeError) as error:
            raise DamagedCheckpointError(f"{path / INDEX}: damaged ({error})") from None
        if zlib.crc32(sealed.body) != sealed.crc32:
            raise DamagedCheckpointError(f"{path / INDEX}: damaged (its checksum differs)")
        for name, file in index.files.items():
            if not (path / name).is_file():
                raise DamagedCheckpointError(f"{path / name}: missing")
            if (path / name).stat().st_size != file.bytes:
                raise DamagedCheckpointError(
                    f"{path / name}: {(path / name).stat().st_size} bytes, {file.bytes} were written"
                )
        return cls(path, index)

    @cached_property
    def spec(self) -> ModelSpec:
        """The model whose parameters these are; raises InputError for a checkpoint of a user's own module."""
        if "config.json" not in self._files:
            raise InputError("holds no config.json", where=str(self.path), fix="give a checkpoint of a fiveply decoder")
        return ModelSpec.load(self.path)

    @property
    def stored(self) -> dict[str, Shape]:
        """Stored name -> global shape, optimiser state included."""
        return {name: tensor.shape for name, tensor in self._tensors.items()}

    def check(self, spec: ModelSpec) -> None:
        """Raise InputError naming the first parameter that `spec` has otherwise."""
        check_shapes(self.stored, spec, str(self.path), "this is a checkpoint of another model; give its own config")

    def read(self, name: str, start: Shape, size: Shape, dtype: torch.dtype | None = None, prefix: str = "") -> Tensor:
        """The region [start, start + size) of decoder parameter `name`, contiguous; `prefix` as in `slices_of`.

        Raises InputError for a tensor or region that is not here, DamagedCheckpointError naming the file.
        """
        region = disk_region(self.spec, name, tuple(start), tuple(size))
        block = self.read_stored(prefix + region.name, region.start, region.size, dtype)
        return block.t().contiguous() if region.transposed else block

    def read_stored(self, name: str, start: Shape, size: Shape, dtype: torch.dtype | None = None) -> Tensor:
        """As `read`, by stored name and offsets."""
        tensor, start, size = self._tensors.get(name), tuple(start), tuple(size)
        if tensor is None:
            raise InputError("no such tensor in this checkpoint", where=str(self.path), key=name)
        inside = len(start) == len(size) == len(tensor.shape) and all(
            first >= 0 and first + count <= whole for first, count, whole in zip(start, size, tensor.shape, strict=True)
        )
        if not inside:
            raise InputError(f"{start} + {size} lies outside the stored shape {tensor.shape}", where=str(self.path),
                             key=name, fix="this is a checkpoint of another model")  # fmt: skip
        out = torch.empty(size, dtype=dtype or getattr(torch, tensor.dtype))
        for piece in tensor.slices:
            common = overlap(start, size, piece.start, piece.size)
            if common is not None:
                key = _key(name, piece.start, whole=piece.size == tensor.shape)
                out[window(*common, start)] = self._block(piece.file, key, window(*common, piece.start))
        return out

    def _block(self, file: str, key: str, window: tuple[slice, ...]) -> Tensor:
        try:
            handle = self._open(file)
            return handle.get_slice(key)[window] if window else handle.get_tensor(key)
        except (SafetensorError, OSError) as error:
            raise DamagedCheckpointError(f"{self.path / file}: damaged ({error})") from None

    def _open_file(self, file: str) -> Any:
        return safe_open(self.path / file, framework="pt")

    def verify(self, rank: int = 0, world: int = 1) -> None:
        """Checksum files number rank, rank + world, ...; raises DamagedCheckpointError naming the first altered."""
        for name in sorted(self._files)[rank::world]:
            try:
                with open(self.path / name, "rb") as handle:
                    intact = _checksum(handle) == self._files[name].crc32
            except OSError as error:
                raise DamagedCheckpointError(_reason(error, self.path / name)) from None
            if not intact:
                raise DamagedCheckpointError(f"{self.path / name}: damaged (its checksum differs)")

    def extra_files(self) -> dict[str, bytes]:
        """The files beside the slices (config.json, tokenizer.json, ...), name -> content."""
        names = [name for name in self._files if not name.endswith(".safetensors")]
        return {name: (self.path / name).read_bytes() for name in names}
