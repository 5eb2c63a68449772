"""The compiled part of shared memory under the thread sanitizer: on x86 a missing order of memory would go unnoticed."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest

from fiveply.world import shm

PROGRAM = Path(__file__).with_name("race_check.cpp")
RELEASE = "me().wrote.value.store(at + 1, std::memory_order_release)"


def checked(native: Path, out: Path) -> subprocess.CompletedProcess[str]:
    compiler = shutil.which("c++") or pytest.skip("no C++ compiler")
    flags = ("-std=c++17", "-O1", "-g", "-fsanitize=thread", "-fwrapv", "-pthread", "-w")
    made = subprocess.run(
        [compiler, *flags, f"-I{native}", str(PROGRAM), "-o", str(out)], capture_output=True, text=True, check=False
    )
    if "tsan" in made.stderr:
        pytest.skip("this compiler comes without the thread sanitizer")
    assert made.returncode == 0, made.stderr
    # Without randomised addresses, which some kernels spread further than the sanitizer can follow.
    return subprocess.run(["setarch", "-R", str(out)], capture_output=True, text=True, check=False, timeout=120)


def test_whatever_one_rank_reads_of_another_is_ordered(tmp_path: Path) -> None:
    done = checked(shm._NATIVE, tmp_path / "sound")
    assert (done.stdout, done.stderr, done.returncode) == ("ok\n", "", 0)


def test_a_missing_release_is_found(tmp_path: Path) -> None:
    """Else the test above could not fail."""
    native = shutil.copytree(shm._NATIVE, tmp_path / "native")
    source = (native / "collectives.hpp").read_text()
    assert RELEASE in source
    (native / "collectives.hpp").write_text(source.replace(RELEASE, RELEASE.replace("release", "relaxed")))
    assert "ThreadSanitizer: data race" in checked(native, tmp_path / "faulty").stderr
