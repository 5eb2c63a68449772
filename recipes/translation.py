"""Translation: a small model trained on the spot on verses in two languages, then served.

    mkdir -p runs/sword && cd runs/sword && apt-get download sword-text-kjv sword-text-sparv    # Debian, Ubuntu
    for file in *.deb; do dpkg -x $file .; done && cd ../..
    python recipes/translation.py               # trains first; then --layout tp=2 serves what was trained

The King James Version (1769) and the Reina-Valera (1909) stand verse by verse in the same order. A document is an English verse,
a line break, and the Spanish one; each verse whose number ends the run of ten is held out. Quality is chrF (Popovic 2015)
against the held-out Spanish verse, beside that of another verse's Spanish, which is what verses have in common by chance.
After two minutes of training on 2 cores (held out 1.725 bits a character) it prints, before its speed:

    19,830 pairs trained on, 40 verses translated: chrF 17%; another verse: 15%
    In the beginning God created the heaven and the earth.
      -> Y el que se levantaron, y la tierra, y el que la tierra.
         (EN el principio crió Dios los cielos y la tierra.)
    And he made them a feast, and they did eat and drink.
      -> Y los que se levantaron, y se fué de su lugar, y se había hecho.
         (Entonces él les hizo banquete, y comieron y bebieron.)
    And Israel beheld Joseph’s sons, and said, Who are these?
      -> Y dijo: ¿Quién es qué, y dijo: ¿Quién, ¿Quién es qué, y dijo: ¿Quién, ¿quién es qué, y dijo: ¿Quién es qué, y á Israel, y dijo:
         (Y vió Israel los hijos de José, y dijo: ¿Quiénes son éstos?)

Quality: Spanish in the verses' manner, and hardly a translation yet: little above chance.
"""

from __future__ import annotations

import json
import re
import struct
import subprocess
import sys
import zlib
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import serving

SWORD = Path("runs/sword/usr/share/sword/modules/texts/ztext")
RUN, PAIRS = Path("runs/translation"), Path("runs/translation.jsonl")
LONGEST = 160  # characters of a verse in either language
SETTINGS = {
    "model.overrides.vocab_size": 4096, "data.sequence": 256, "data.respect_documents": "true", "data.held_out": 0.01,
    "train.global_batch": 8, "train.evaluate_every": 200, "optimizer.lr": "3e-3",
}  # fmt: skip
EACH, AT_ONCE, SHOWN = 10, 8, 3


def verses(folder: Path) -> Iterator[str]:
    """The verses of a module of SWORD's compressed kind, in the order of its versification, without their markup."""
    if not folder.is_dir():
        raise SystemExit(f"{folder} is missing: see the lines at the top of {__file__}")
    for part in ("ot", "nt"):
        packed = (folder / f"{part}.bzz").read_bytes()
        places = struct.iter_unpack(
            "<III", (folder / f"{part}.bzs").read_bytes()
        )  # a block: start, size, size unpacked
        blocks = [zlib.decompress(packed[start : start + size]) for start, size, _ in places]
        for block, start, size in struct.iter_unpack("<IIH", (folder / f"{part}.bzv").read_bytes()):
            text = blocks[block][start : start + size].decode() if size else ""
            text = re.sub(r"<(note|title)\b.*?</\1>|<[^>]*>", "", text, flags=re.DOTALL)
            yield " ".join(text.replace("¶", " ").split())


def pairs() -> tuple[list[tuple[str, str]], list[tuple[str, str]]]:
    """Short verses in English and Spanish: to train on, and held out."""
    both = zip(verses(SWORD / "engKJV2006eb"), verses(SWORD / "spaRV1909eb"), strict=True)
    found = [pair for pair in both if all(0 < len(text) <= LONGEST for text in pair)]
    return [one for n, one in enumerate(found) if n % EACH], found[::EACH]


def train(told: list[tuple[str, str]], steps: int) -> None:
    """`fiveply train` on the pairs, unless a run is there."""
    if RUN.exists():
        return
    PAIRS.parent.mkdir(exist_ok=True)
    PAIRS.write_text("".join(json.dumps({"text": f"{a}\n{b}"}) + "\n" for a, b in told), encoding="utf-8")
    flags = [part for key, value in SETTINGS.items() for part in ("--set", f"{key}={value}")]
    command = [
        *serving.FIVEPLY,
        "train",
        "--model",
        "2m",
        "--data",
        str(PAIRS),
        "--name",
        RUN.name,
        "--steps",
        str(steps),
    ]
    subprocess.run([*command, *flags], check=True, stdout=sys.stderr)


def chrf(told: str, wanted: str, most: int = 6, beta: float = 2.0) -> float:
    """Pieces of 1 to `most` characters that two texts share: precision and recall, averaged over lengths, as an F score in
    which recall counts `beta` times as much."""
    shares = []
    for size in range(1, most + 1):
        ours, theirs = (
            Counter(text[i : i + size] for i in range(len(text) - size + 1))
            for text in (told.replace(" ", ""), wanted.replace(" ", ""))
        )
        if ours and theirs:
            both = (ours & theirs).total()
            shares.append((both / ours.total(), both / theirs.total()))
    precision, recall = np.mean(shares, axis=0) if shares else (0.0, 0.0)
    return float((1 + beta**2) * precision * recall / max(beta**2 * precision + recall, 1e-9))


def translated(url: str, english: str) -> str:
    """What the served model goes on with after a verse and a line break."""
    told = serving.post(url, "completions", prompt=f"{english}\n", max_tokens=100, temperature=0, stop="\n")
    return told["choices"][0]["text"].strip()


def main() -> None:
    asked = serving.options(__doc__, steps=600, verses=40)
    known, held_out = pairs()
    train(known, asked.steps)
    chosen = held_out[:: max(1, len(held_out) // asked.verses)][: asked.verses]

    with serving.served(RUN, asked.layout) as url, ThreadPoolExecutor(AT_ONCE) as clients:
        clock = serving.Clock()
        told = list(clients.map(lambda pair: translated(url, pair[0]), chosen))
        rate = len(told) / clock.seconds
    wanted = [spanish for _, spanish in chosen]
    ours = np.mean([chrf(a, b) for a, b in zip(told, wanted, strict=True)])
    chance = np.mean([chrf(a, b) for a, b in zip(wanted[1:] + wanted[:1], wanted, strict=True)])
    print(
        f"{len(known):,} pairs trained on, {len(chosen)} verses translated: chrF {ours:.0%}; another verse: {chance:.0%}"
    )
    for (english, spanish), text in list(zip(chosen, told, strict=True))[:SHOWN]:
        print(f"{english}\n  -> {text}\n     ({spanish})")
    print(f"{asked.layout}: {rate:.1f} verses a second, {AT_ONCE} requests in flight")


if __name__ == "__main__":
    main()
