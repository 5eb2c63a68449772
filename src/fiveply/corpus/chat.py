"""Conversations to the text that a chat model was trained on: the jinja template of its directory, in a sandbox."""

from __future__ import annotations

import datetime
import functools
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jinja2
from jinja2.sandbox import ImmutableSandboxedEnvironment

from fiveply.corpus.tokenizer import read_object
from fiveply.spec.errors import InputError


class ChatTemplate:
    """Renders messages, each with a `role` and a `content`."""

    def __init__(
        self, source: str, special_tokens: Mapping[str, str], where: str = "chat template", for_tools: str = ""
    ) -> None:
        """Raises InputError where `source` is no template. `special_tokens`: by name, as bos_token. `for_tools`: the template of
        conversations with tools, where it is another."""
        self._names = dict(special_tokens)
        environment = ImmutableSandboxedEnvironment(
            trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols"]
        )
        environment.globals |= {
            "raise_exception": _refuse,
            "strftime_now": lambda form: datetime.datetime.now().strftime(form),
        }
        # As `transformers` has it, spaces included: models have seen tools written so.
        environment.filters["tojson"] = functools.partial(json.dumps, ensure_ascii=False)
        try:
            self._template = environment.from_string(source)
            self._for_tools = environment.from_string(for_tools) if for_tools else self._template
        except jinja2.TemplateError as error:
            raise InputError(f"not a template ({error})", where=where, fix="mend or delete it") from None

    @classmethod
    def load(cls, folder: Path) -> ChatTemplate | None:
        """Of a Hugging Face directory or a checkpoint; None where it has none."""
        file = folder / "tokenizer_config.json"
        config = read_object(file)
        own = folder / "chat_template.jinja"
        source = own.read_text(encoding="utf-8") if own.is_file() else config.get("chat_template")
        for_tools = ""
        if isinstance(source, list):  # several, by name
            named = {one.get("name"): one.get("template") for one in source}
            source, for_tools = named.get("default"), named.get("tool_use") or ""
        if not isinstance(source, str):
            return None
        tokens = {key: value for key, value in config.items() if key.endswith("_token")}
        names = {key: value["content"] if isinstance(value, dict) else value for key, value in tokens.items()}
        special = {key: value for key, value in names.items() if isinstance(value, str)}
        return cls(source, special, str(own if own.is_file() else file), for_tools)

    def render(self, messages: Sequence[Mapping[str, Any]], tools: Sequence[Mapping[str, Any]] = ()) -> str:
        """The text up to where the model's answer begins. Raises ValueError with what the template says against it."""
        template = self._for_tools if tools else self._template
        try:
            return template.render(
                messages=list(messages), tools=list(tools) or None, add_generation_prompt=True, **self._names
            )
        except (jinja2.TemplateError, TypeError, RecursionError) as error:
            raise ValueError(f"the model's chat template refuses this conversation: {error}") from None


def _refuse(message: str) -> None:
    raise jinja2.TemplateError(message)
