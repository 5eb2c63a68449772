"""Hugging Face directories: read by slices, written, and the names that tensors have on disk.

Notable: `disk_region` is the one place that knows how a decoder parameter stands on disk. For the Llama family the names
are equal; for GPT-2 they are rows of a table, its products are stored transposed ([in, out], `Conv1D`), and q, k and v are
columns of one tensor. Checkpoints use the same names. This file does not know ranks, layouts or the decoder's modules:
it deals in names, global offsets and tensors. `transformers` is not needed.
"""

from __future__ import annotations

import re
import shutil
from collections.abc import Iterable, Mapping
from functools import lru_cache
from importlib import resources
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import msgspec
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from fiveply.spec.architecture import ModelSpec
from fiveply.spec.errors import InputError, RunError
from fiveply.spec.families import FAMILIES
from fiveply.spec.legality import check_runnable
from fiveply.spec.placement import Parameter, declare

if TYPE_CHECKING:
    from fiveply.checkpoint.store import Checkpoint

Shape = tuple[int, ...]

SHARD_BYTES = 5 * 10**9
"""Largest file of a written model, Hugging Face's own habit."""

NAMES: dict[str, dict[str, str]] = msgspec.toml.decode(
    resources.files("fiveply.checkpoint").joinpath("names.toml").read_bytes()
)
GPT2_FUSED = {"self_attn.q_proj": 0, "self_attn.k_proj": 1, "self_attn.v_proj": 2}
LAYER = re.compile(r"model\.layers\.(\d+)\.(.+)\.(weight|bias)")

# Buffers that old files carry beside the parameters: rotary frequencies, GPT-2's causal mask.
BUFFERS = re.compile(r"rotary_emb\.inv_freq$|\.attn\.(masked_)?bias$")


class DiskRegion(NamedTuple):
    """Where a region of a decoder parameter stands on disk: offsets and sizes are the disk tensor's own, after transposing."""

    name: str
    start: Shape
    size: Shape
    transposed: bool


class _DiskTensor(NamedTuple):
    name: str
    transposed: bool = False
    part: int = 0
    parts: int = 1
    """Fused parameters of equal rows: this one is number `part` of `parts`."""


def _locate(spec: ModelSpec, name: str) -> _DiskTensor:
    if spec.family != "gpt2":
        return _DiskTensor(name)
    names = NAMES["gpt2"]
    if match := LAYER.fullmatch(name):
        layer, module, kind = match.groups()
        # Embeddings and norms stand as they are; only the products are Conv1D.
        transposed = kind == "weight" and not module.endswith("layernorm")
        disk_name = f"transformer.h.{layer}.{names[module]}.{kind}"
        if module in GPT2_FUSED:
            return _DiskTensor(disk_name, transposed, GPT2_FUSED[module], 3)
        return _DiskTensor(disk_name, transposed)
    module, _, kind = name.rpartition(".")
    return _DiskTensor(f"{names.get(module, module)}.{kind}")


def disk_region(spec: ModelSpec, name: str, start: Shape, size: Shape) -> DiskRegion:
    """Map a region of decoder parameter `name` (global offset, shape) to the tensor on disk that holds it."""
    disk = _locate(spec, name)
    if disk.parts > 1:  # q, k and v of GPT-2 have `hidden` rows each
        start = (start[0] + disk.part * spec.hidden, *start[1:])
    if disk.transposed:
        start, size = start[::-1], size[::-1]
    return DiskRegion(disk.name, start, size, disk.transposed)


def disk_shape(spec: ModelSpec, parameter: Parameter) -> Shape:
    """Global shape of the disk tensor that holds `parameter`."""
    disk = _locate(spec, parameter.name)
    shape = (parameter.shape[0] * disk.parts, *parameter.shape[1:])
    return shape[::-1] if disk.transposed else shape


def disk_names(spec: ModelSpec) -> dict[str, Shape]:
    """All tensors of the model as they stand on disk, name -> global shape, in forward order; a tied head is not among them."""
    return {_locate(spec, parameter.name).name: disk_shape(spec, parameter) for parameter in declare(spec)}


def check_shapes(found: Mapping[str, Shape], spec: ModelSpec, where: str, fix: str) -> None:
    """Raise InputError naming the first tensor of the model that `found` lacks or holds in another shape."""
    for name, shape in disk_names(spec).items():
        if name not in found:
            raise InputError("this tensor is missing", where=where, key=name, fix=fix)
        if tuple(found[name]) != shape:
            raise InputError(f"shape {list(found[name])}, the model has {list(shape)}", where=where, key=name, fix=fix)


class HuggingFaceSource:
    """A Hugging Face directory (`config.json` with model.safetensors or its shards), read lazily by regions.

    Raises InputError, naming file and tensor, for a directory that is incomplete, damaged, or not the model of its config.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self.spec = ModelSpec.load(self.path)
        check_runnable(self.spec, str(self.path / "config.json"))
        if self.spec.config.get("quantization_config"):
            raise InputError("quantised weights can't be read", where=str(self.path / "config.json"),
                             key="quantization_config", fix="give the unquantised model")  # fmt: skip
        # Bounded, since every open file is a memory map; per instance, so that a replaced directory is read anew.
        self._open = lru_cache(maxsize=64)(self._open_file)
        self._files, shapes = self._scan()
        # Weights saved from the bare base model lack its prefix ("wte.weight" for "transformer.wte.weight").
        prefix = "transformer." if self.spec.family == "gpt2" else "model."
        self._absent_prefix = "" if any(name.startswith(prefix) for name in shapes) else prefix
        on_disk = {self._key(name): name for name in disk_names(self.spec)}
        fix = "give the config.json and the weights of one model"
        self.stored = {on_disk[key]: shape for key, shape in shapes.items() if key in on_disk}
        check_shapes(self.stored, self.spec, str(self.path), fix)
        for key in shapes:
            harmless = BUFFERS.search(key) or (key == "lm_head.weight" and self.spec.tied)
            if key not in on_disk and not harmless:
                raise InputError("the config's model has no such tensor", where=str(self.path / self._files[key]), key=key,
                                 fix=fix)  # fmt: skip

    def check(self, spec: ModelSpec) -> None:
        """Raise InputError naming the first tensor that model `spec` has otherwise."""
        check_shapes(self.stored, spec, str(self.path), "these are weights of another model; give its own config")

    def read(self, name: str, start: Shape, size: Shape, dtype: torch.dtype | None = None) -> Tensor:
        """The region [start, start + size) of parameter `name` (the decoder's), contiguous, in the stored dtype unless one is given."""
        region = disk_region(self.spec, name, tuple(start), tuple(size))
        key = self._key(region.name)
        file = self._files[key]
        window = tuple(slice(a, a + n) for a, n in zip(region.start, region.size, strict=True))
        try:
            block = self._open(file).get_slice(key)[window]
        except SafetensorError as error:
            raise InputError(f"cannot be read ({error})", where=str(self.path / file), key=key,
                             fix="fetch the file again") from None  # fmt: skip
        if tuple(block.shape) != region.size:
            raise InputError(f"{start} + {size} lies outside the stored shape", where=str(self.path / file), key=key,
                             fix="these are weights of another model")  # fmt: skip
        return (block.t() if region.transposed else block).to(dtype or block.dtype).contiguous()

    def _key(self, disk_name: str) -> str:
        return disk_name.removeprefix(self._absent_prefix)

    def _open_file(self, file: str) -> Any:
        try:
            return safe_open(self.path / file, framework="pt")
        except FileNotFoundError:
            raise InputError("no such file", where=str(self.path / file), fix="fetch the missing shard") from None
        except (SafetensorError, OSError) as error:
            raise InputError(f"not a whole safetensors file ({error})", where=str(self.path / file),
                             fix="fetch the file again") from None  # fmt: skip

    def _scan(self) -> tuple[dict[str, str], dict[str, Shape]]:
        """File and shape of each tensor; reads the files' headers only."""
        index = self.path / "model.safetensors.index.json"
        if (self.path / "model.safetensors").is_file():
            files = ["model.safetensors"]
        elif index.is_file():
            try:
                weight_map = msgspec.convert(msgspec.json.decode(index.read_bytes())["weight_map"], dict[str, str])
            except (msgspec.MsgspecError, KeyError, TypeError) as error:
                raise InputError(f"not an index of shards ({error!r})", where=str(index), key="weight_map",
                                 fix="fetch the file again") from None  # fmt: skip
            files = sorted(set(weight_map.values()))
        elif any(self.path.glob("pytorch_model*.bin")):
            raise InputError("its weights are pickled (.bin), which is never loaded here", where=str(self.path),
                             fix="save it once as safetensors: save_pretrained of transformers does")  # fmt: skip
        else:
            raise InputError("holds no model.safetensors", where=str(self.path), fix="give a directory with weights")
        where: dict[str, str] = {}
        shapes: dict[str, Shape] = {}
        for file in files:
            handle = self._open(file)
            for name in handle.keys():  # noqa: SIM118 - not a dict
                where[name], shapes[name] = file, tuple(handle.get_slice(name).get_shape())
        return where, shapes


def write(
    folder: Path,
    spec: ModelSpec,
    tensors: Iterable[tuple[str, Tensor]],
    extra_files: Mapping[str, bytes] | None = None,
    source: str = "",
) -> None:
    """Write a Hugging Face directory from (disk name, whole tensor) pairs, taken one by one; complete or invisible.

    `source` is what messages say the tensors came from. Raises InputError when `folder` exists and is not empty or the
    tensors are not the model's, RunError when the disk is full.
    """
    folder = Path(folder).resolve()  # "." has no name to put .partial behind
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise InputError("exists already", where=str(folder), fix="name a new directory, or remove this one")
    partial = folder.with_name(folder.name + ".partial")
    try:
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
        dtype = _write_shards(partial, spec, tensors, source or str(folder))
        for name, content in (extra_files or {}).items():
            (partial / name).write_bytes(content)
        config = spec.config | {"architectures": [FAMILIES[spec.family]], "dtype": dtype}
        config["tie_word_embeddings"] = spec.tied
        config.pop("torch_dtype", None)  # the key's old name
        (partial / "config.json").write_bytes(msgspec.json.format(msgspec.json.encode(config), indent=2) + b"\n")
        partial.rename(folder)
    except (OSError, SafetensorError) as error:
        raise RunError(f"{folder}: cannot be written: {error}") from None
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def write_tensors(file: Path, tensors: dict[str, Tensor]) -> None:
    """One safetensors file of contiguous CPU tensors, with the permissions that any new file of this user gets."""
    file.touch()
    mode = file.stat().st_mode
    save_file(tensors, file, metadata={"format": "pt"})  # it puts a private temporary file in place
    file.chmod(mode)


def _write_shards(folder: Path, spec: ModelSpec, tensors: Iterable[tuple[str, Tensor]], source: str) -> str:
    """Write the weights in files of at most SHARD_BYTES, with an index when there are several; the first tensor's dtype."""
    shards: list[list[str]] = []
    shapes: dict[str, Shape] = {}
    pending: dict[str, Tensor] = {}
    total, pending_bytes, dtype = 0, 0, ""

    def flush() -> None:
        write_tensors(folder / f"{len(shards)}.safetensors", pending)
        shards.append(list(pending))
        pending.clear()

    wanted, fix = disk_names(spec), "give all tensors of one model"
    for name, tensor in tensors:
        if name not in wanted:
            raise InputError("the model has no such tensor", where=source, key=name, fix=fix)
        if pending and pending_bytes + tensor.nbytes > SHARD_BYTES:
            flush()
            pending_bytes = 0
        pending[name] = tensor.detach().cpu().contiguous()
        shapes[name] = tuple(tensor.shape)
        dtype = dtype or str(tensor.dtype).removeprefix("torch.")
        total, pending_bytes = total + tensor.nbytes, pending_bytes + tensor.nbytes
    flush()
    check_shapes(shapes, spec, source, fix)
    if len(shards) == 1:
        (folder / "0.safetensors").rename(folder / "model.safetensors")
        return dtype
    weight_map: dict[str, str] = {}
    for index, names in enumerate(shards):
        file = f"model-{index + 1:05d}-of-{len(shards):05d}.safetensors"
        (folder / f"{index}.safetensors").rename(folder / file)
        weight_map |= dict.fromkeys(names, file)
    content = msgspec.json.encode({"metadata": {"total_size": total}, "weight_map": weight_map})
    (folder / "model.safetensors.index.json").write_bytes(content)
    return dtype


def export(checkpoint: Checkpoint, folder: Path) -> None:
    """Write a fiveply checkpoint as a Hugging Face directory, tokenizer files included; errors as `write`."""
    spec = checkpoint.spec
    shapes = disk_names(spec)
    checkpoint.check(spec)
    whole = ((name, checkpoint.read_stored(name, (0,) * len(shape), shape)) for name, shape in shapes.items())
    extra_files = {name: content for name, content in checkpoint.extra_files().items() if name != "config.json"}
    write(folder, spec, whole, extra_files)
