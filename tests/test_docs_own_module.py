"""docs/own-module.md says what is so: its code runs, its difference is the recipes', its output is what is printed."""

from __future__ import annotations

import difflib
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PAGE = (ROOT / "docs" / "own-module.md").read_text()


def blocks(kind: str) -> list[str]:
    found = re.findall(r"^```([^\n]*)\n(.*?)^```$", PAGE, re.DOTALL | re.MULTILINE)
    return [text for each, text in found if each == kind]


def run(*command: str | Path, cwd: Path) -> str:
    done = subprocess.run(command, cwd=cwd, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.parametrize("layout", ["", "dp=2,tp=2", "dp=2,pp=2"])
def test_the_page_runs_from_top_to_bottom(layout: str, tmp_path: Path) -> None:
    (tmp_path / "page.py").write_text(
        "\n".join(blocks("python")) + "\nassert loss < 1.5 and 0 <= share <= 1 and job.cursor\n"
    )
    if layout:
        run(sys.executable, "-m", "fiveply.cli", "train", "page.py", "--layout", layout, cwd=tmp_path)
    else:
        run(sys.executable, "page.py", cwd=tmp_path)
    # Two epochs of 7 batches, one pair, and an epoch of the loop of one's own, which pp leaves out.
    steps = 15 if "pp" in layout else 22
    assert [path.name for path in (tmp_path / "checkpoints").iterdir()] == [f"step-{steps:08d}"]


def test_verify_names_what_the_page_says(tmp_path: Path) -> None:
    (code,), (output,) = blocks("python verify"), blocks("")
    (tmp_path / "page.py").write_text(code)
    assert run(sys.executable, "page.py", cwd=tmp_path) == output


def test_the_commands_run(tmp_path: Path) -> None:
    shutil.copytree(ROOT / "recipes", tmp_path / "recipes")
    (commands,) = blocks("sh")
    printed = set()
    for command in commands.splitlines():
        words = command.split()
        program = [sys.executable] if words[0] == "python" else [sys.executable, "-m", "fiveply.cli"]
        printed.add(run(*program, *words[1:], cwd=tmp_path))
    assert len(printed) == 1


def test_the_difference_is_the_recipes() -> None:
    plain, changed = (
        (ROOT / "recipes" / name).read_text().split("def main():")[1].splitlines()
        for name in ("own_module_plain.py", "own_module.py")
    )
    difference = list(difflib.unified_diff(plain, changed, n=100, lineterm=""))[3:]
    (shown,) = blocks("diff")
    assert [line.rstrip() for line in shown.splitlines() if line.strip()] == [
        x.rstrip() for x in difference if x.strip()
    ]
