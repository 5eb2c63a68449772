"""A short real run of `fiveply train` on a few lines of text, in this process's children."""

from __future__ import annotations

import random
from pathlib import Path

from fiveply.cli import main

WORDS = [
    "the",
    "ship",
    "king",
    "sails",
    "dreams",
    "of",
    "gold",
    "and",
    "sleep",
    "under",
    "stars",
    "cold",
    "grey",
    "water",
]
SETTINGS = {
    "model.preset": "tiny",
    "data.tokenizer": "train:300",
    "data.sequence": 16,
    "data.held_out": 0,
    "train.steps": 3,
    "train.global_batch": 8,
    "precision.parameters": "float32",
}


def corpus(folder: Path) -> Path:
    """About 20 kB of text, always the same."""
    draw = random.Random(0)
    path = folder / "words.txt"
    path.write_text("\n".join(" ".join(draw.choices(WORDS, k=9)) for _ in range(400)))
    return path


def arguments(folder: Path, layout: str, name: str, *flags: str, **settings: object) -> list[str]:
    """For `fiveply`; keys of `settings` with __ for the dot."""
    text = folder / "words.txt"
    values = SETTINGS | {"data.corpus": text if text.exists() else corpus(folder), "data.folder": folder / "prepared",
                         "folder": folder / "runs", "name": name}  # fmt: skip
    values |= {key.replace("__", "."): value for key, value in settings.items()}
    return ["train", "--model", "tiny", "--layout", layout, *flags,
            *(part for key, value in values.items() for part in ("--set", f"{key}={value}"))]  # fmt: skip


def train(folder: Path, layout: str, name: str, *flags: str, **settings: object) -> Path:
    """The run's directory."""
    main(arguments(folder, layout, name, *flags, **settings))
    return folder / "runs" / name
