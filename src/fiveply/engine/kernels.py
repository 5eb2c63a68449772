"""The compiled parts of inference on CPUs (`kernels.cpp`): how they are called, and whether there are any here."""

from __future__ import annotations

import ctypes
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch

from fiveply.world import compiled

_HEADERS = ("products.hpp", "paged_attention.hpp", "blocks.hpp")
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
    "parts": [ctypes.POINTER(Model), ctypes.POINTER(Block), _i64, _i64, ctypes.POINTER(Step), *[_pointer] * 5],
}


@lru_cache(maxsize=1)
def library() -> ctypes.CDLL | str:
    """All of them, or why there are none."""
    folder = Path(__file__).parent
    return compiled.library(folder / "kernels.cpp", ("-fopenmp",), [folder / name for name in _HEADERS])


def function(name: str, dtype: torch.dtype, device: torch.device) -> Any:
    """One of them, or None where there is none for this type and device; "product_int8" and "parts_int8" have 8-bit matrices."""
    loaded = library() if device.type == "cpu" else ""
    made = None if isinstance(loaded, str) else getattr(loaded, f"{name}_{str(dtype).removeprefix('torch.')}", None)
    if made is not None:
        made.restype, made.argtypes = None, _ARGUMENTS[name.removesuffix("_int8")]
    return made
