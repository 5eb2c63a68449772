"""The compiled parts are C++ for processors that this machine is not, too."""

from __future__ import annotations

import platform
import shutil
import subprocess
from pathlib import Path

import pytest

from fiveply.engine import kernels

SOURCES = Path(kernels.__file__).parent
COMPILER = shutil.which("g++") or shutil.which("c++") or ""
PAIRS = [("bfloat16", "bfloat16"), ("float", "int8_t")]


@pytest.mark.skipif(not COMPILER or platform.machine() != "x86_64", reason="needs a C++ compiler on x86-64")
@pytest.mark.parametrize("processor", ["x86-64", "haswell", "skylake-avx512", "sapphirerapids"])
def test_every_processor_has_code(processor: str) -> None:
    """Without vectors longer than 16 bytes, with AVX2, with AVX-512, with tiles."""
    wanted = [("blocks.cpp", f"-DNUMBER={number}", f"-DWEIGHT={weight}") for number, weight in PAIRS]
    wanted += [("attention.cpp", f"-DNUMBER={number}") for number in ("double", "bfloat16")]
    for source, *names in wanted:
        command = [
            COMPILER,
            "-std=c++17",
            "-fopenmp",
            "-fsyntax-only",
            f"-march={processor}",
            *names,
            str(SOURCES / source),
        ]
        done = subprocess.run(command, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr[:2000]
