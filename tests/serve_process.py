"""`fiveply serve` in a process of its own."""

from __future__ import annotations

import re
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx2


class Process:
    """`fiveply serve`, ready."""

    def __init__(self, folder: Path, *flags: str) -> None:
        command = [sys.executable, "-m", "fiveply.cli", "serve", str(folder), "--port", "0", "--dtype", "float32"]
        self.process = subprocess.Popen([*command, *flags], stderr=subprocess.PIPE, text=True)
        assert self.process.stderr is not None
        self.lines: list[str] = []
        for line in self.process.stderr:
            self.lines.append(line)
            if found := re.search(r"is ready at (http://\S+)", line):
                self.url = found[1]
                return
        raise AssertionError("".join(self.lines))

    def get(self, path: str) -> httpx2.Response:
        return httpx2.get(self.url + path, timeout=20)

    def post(self, path: str, body: Any, **more: Any) -> httpx2.Response:
        return httpx2.post(f"{self.url}/v1/{path}", json=body, timeout=60, **more)

    def metric(self, name: str) -> float:
        found = re.search(rf"^fiveply_{name} (\S+)", self.get("/metrics").text, re.MULTILINE)
        assert found is not None
        return float(found[1])

    def ranks(self) -> list[int]:
        """Process ids of the ranks, in order."""
        children = Path(f"/proc/{self.process.pid}/task/{self.process.pid}/children").read_text()
        return sorted(map(int, children.split()))

    def end(self) -> int:
        self.process.terminate()
        self.process.communicate(timeout=30)
        return self.process.returncode


@contextmanager
def serving(folder: Path, *flags: str) -> Iterator[Process]:
    server = Process(folder, *flags)
    try:
        yield server
    finally:
        server.process.kill()
        server.process.communicate()
