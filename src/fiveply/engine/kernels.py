"""The compiled parts of inference on CPUs (`attention.cpp`, `blocks.cpp`): how they are called, and whether there are any here."""

from __future__ import annotations

import ctypes
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch

from fiveply.world import compiled
from fiveply.world.shm import CompiledSum

_ATTENTION = ("vectors.hpp", "paged_attention.hpp")
_BLOCKS = ("products.hpp", "tiles.hpp", "blocks.hpp")
_NAMES = {torch.float32: "float", torch.float64: "double", torch.bfloat16: "bfloat16", torch.int8: "int8_t"}
_pointer, _i64 = ctypes.c_void_p, ctypes.c_int64


class Shape(ctypes.Structure):
    """Of attention; strides are numbers from token to token."""

    _fields_ = tuple(
        (name, _i64)
        for name in ("heads", "kv_heads", "head_dim", "padded", "window", "q_stride", "k_stride", "v_stride")
    )


class Step(ctypes.Structure):
    """A step's tokens and where their sequences lie in the cache; `PagedAttention.begin` holds what it points to."""

    _fields_ = (
        ("tokens", _i64), ("table_stride", _i64), ("tile_count", _i64), ("slots", _pointer), ("tables", _pointer),
        ("tiles", _pointer),
    )  # fmt: skip


class Model(ctypes.Structure):
    """Sizes of a block; heads and MLP columns are the rank's own."""

    _fields_ = (
        *((name, _i64) for name in ("hidden", "heads", "kv_heads", "head_dim", "padded", "ffn")),
        ("eps", ctypes.c_double),
    )


class Block(ctypes.Structure):
    """Where a block's weights and its cache lie, or null for what the model has not."""

    _fields_ = (
        *((name, _pointer) for name in ("attention_norm", "qkv", "qkv_bias", "q_norm", "k_norm", "o", "mlp_norm", "gate_up",
                                        "down", "keys", "values")),
        ("window", _i64),
    )  # fmt: skip


_ARGUMENTS: dict[str, list[Any]] = {
    "attend": [ctypes.POINTER(Shape), ctypes.POINTER(Step), *[_pointer] * 6],
    "pack": [_pointer, _pointer, _i64, _i64],
    "product": [_pointer, _pointer, _pointer, _i64, _i64, _i64, _i64],
    "parts": [ctypes.POINTER(Model), ctypes.POINTER(Block), _i64, _i64, ctypes.POINTER(Step), *[_pointer] * 5,
              ctypes.POINTER(CompiledSum)],
}  # fmt: skip


@lru_cache
def library(numbers: torch.dtype, weights: torch.dtype | None = None) -> ctypes.CDLL | str:
    """Of attention in one type, or of blocks with matrices in type `weights`: compiled for these alone, or why there is none."""
    if numbers not in _NAMES:
        return f"there is none for {numbers}"
    folder, flags = Path(__file__).parent, ("-fopenmp", f"-DNUMBER={_NAMES[numbers]}")
    if weights is None:
        return compiled.library(folder / "attention.cpp", flags, [folder / name for name in _ATTENTION])
    if numbers == torch.float64:
        return "blocks have sums in float32"
    flags = (*flags, f"-DWEIGHT={_NAMES[weights]}")
    return compiled.library(folder / "blocks.cpp", flags, [folder / name for name in (*_ATTENTION, *_BLOCKS)])


def prepare(numbers: torch.dtype, quantize: str) -> None:
    """Compile what ranks will ask for, so that not each of them does."""
    for weights in (None, torch.int8 if quantize == "int8" else numbers):
        library(numbers, weights)


def function(name: str, numbers: torch.dtype, device: torch.device, weights: torch.dtype | None = None) -> Any:
    """One of them, or None where there is none for these types and this device; all but "attend" have `weights`."""
    loaded = library(numbers, weights) if device.type == "cpu" else ""
    if isinstance(loaded, str):
        return None
    made = getattr(loaded, name)
    made.restype, made.argtypes = _i64 if name == "parts" else None, _ARGUMENTS[name]
    return made
