"""C++ files compiled at their first use on this machine, and kept in the user's cache.

It knows a compiler and a cache; what the libraries do is told by those who load them.
"""

from __future__ import annotations

import ctypes
import hashlib
import os
import platform
import shutil
import subprocess
import tempfile
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

_FLAGS = ("-std=c++17", "-O3", "-march=native", "-shared", "-fPIC")


def library(source: Path, flags: tuple[str, ...], headers: Sequence[Path] = ()) -> ctypes.CDLL | str:
    """The library of one source file, or why there is none. `headers`: files beside it that it includes."""
    compiler = shutil.which("c++") or shutil.which("g++") or shutil.which("clang++")
    if compiler is None:
        return "no C++ compiler was found (c++, g++ or clang++)"
    name = file_name(source, flags, headers, compiler)
    path = Path.home() / ".cache" / "fiveply" / name
    with tempfile.TemporaryDirectory(prefix="fiveply-") as own, suppress(OSError):
        if not path.exists():
            made = Path(own) / name
            if problem := _compile([compiler, *_FLAGS, *flags, str(source), "-o", str(made)]):
                return problem
            path = _keep(made, path)
        return ctypes.CDLL(str(path))
    return "the compiled library could not be loaded"


def file_name(source: Path, flags: tuple[str, ...], headers: Sequence[Path], compiler: str) -> str:
    """By all that a library depends on; a home directory can be shared by machines whose processors differ."""
    sources = [path.read_bytes() for path in (source, *headers)]
    key = [*sources, " ".join((*_FLAGS, *flags)).encode(), compiler.encode(), _processor().encode()]
    return f"{source.stem}-{hashlib.sha256(b'|'.join(key)).hexdigest()[:16]}.so"


def _compile(command: list[str]) -> str:
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    except (OSError, subprocess.SubprocessError) as error:
        return f"{command[0]} failed: {error}"
    complaint = (done.stderr.strip().splitlines() or ["no message"])[0]
    return f"{command[0]} failed: {complaint[:200]}" if done.returncode else ""


def _keep(made: Path, path: Path) -> Path:
    """Move it into the cache whole or not at all: ranks may do so at the same time. Where that fails, it serves once."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        aside = path.with_name(f"{path.name}.{os.getpid()}")
        shutil.copy(made, aside)
        aside.replace(path)
        return path
    except OSError:
        return made


def _processor() -> str:
    with suppress(OSError):
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        wanted = ("model name", "flags", "Features", "CPU part")
        return platform.machine() + "".join(dict.fromkeys(line for line in lines if line.startswith(wanted)))
    return platform.platform()
