"""The model that most tests of the server serve."""

from __future__ import annotations

from pathlib import Path

import pytest
from random_models import add_tokenizer, save_random

TEMPLATE = (
    "{% for message in messages %}<{{ message.role }}>{{ message.content }}{% endfor %}"
    "{% if messages[-1].role == 'assistant' %}{{ raise_exception('nothing to answer') }}{% endif %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)


@pytest.fixture(scope="session")
def speaking(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random Llama that reads and writes bytes, and holds conversations."""
    folder = tmp_path_factory.mktemp("speaking") / "tiny-talker"
    save_random("llama", folder, vocab_size=258, num_hidden_layers=3)
    add_tokenizer(folder)
    (folder / "chat_template.jinja").write_text(TEMPLATE)
    return folder
