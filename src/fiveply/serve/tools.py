"""Tools in chat: what a client offers, the calls that its model writes, and what an answer has to be to be one.

Notable: the form is Hermes' and Qwen's, `<tool_call>` around {"name": ..., "arguments": {...}}. Whether a model's template has it is
found by rendering a call and reading it back, so one with another form is refused and not misread. What is no call stays text.

It knows one answer at a time, and nothing of HTTP.
"""

from __future__ import annotations

import json
import re
import secrets
from collections.abc import Sequence
from typing import Annotated, Any

import msgspec

from fiveply.corpus.chat import ChatTemplate
from fiveply.corpus.tokenizer import Tokenizer

OPEN, CLOSE = "<tool_call>", "</tool_call>"
Name = Annotated[str, msgspec.Meta(pattern=r"^[\w-]{1,64}$")]
# Spaces as templates write JSON, which models have seen; no others, or an answer could go on with them for ever.
_FORM = {"whitespace_flexible": False, "item_separator": ", ", "key_separator": ": "}
_PREFIXES = sorted((OPEN[:length] for length in range(1, len(OPEN))), key=len, reverse=True)


class Function(msgspec.Struct, forbid_unknown_fields=True, omit_defaults=True):
    name: Name
    description: str | None = None
    parameters: dict[str, Any] | None = None
    """A JSON schema."""
    strict: bool | None = None
    """Calls keep to the schema."""


class Tool(msgspec.Struct, forbid_unknown_fields=True, tag_field="type", tag="function"):
    function: Function

    def plain(self) -> dict[str, Any]:
        """As templates take it."""
        return {
            "type": "function",
            "function": msgspec.to_builtins(msgspec.structs.replace(self.function, strict=None)),
        }


class Chosen(msgspec.Struct, forbid_unknown_fields=True):
    name: str


class Choice(msgspec.Struct, forbid_unknown_fields=True, tag_field="type", tag="function"):
    """This tool and no other."""

    function: Chosen


class Called(msgspec.Struct, forbid_unknown_fields=True):
    name: str
    arguments: str
    """A JSON object, as text."""


class Call(msgspec.Struct, forbid_unknown_fields=True, tag_field="type", tag="function"):
    id: str
    function: Called

    def plain(self) -> dict[str, Any]:
        """As templates take it: arguments as a value. Raises ValueError where they are no JSON object."""
        try:
            arguments = msgspec.json.decode(self.function.arguments, type=dict[str, Any])
        except (msgspec.MsgspecError, RecursionError) as error:
            raise ValueError(f"the arguments of call '{self.id}' are no JSON object: {error}") from None
        return {"id": self.id, "type": "function", "function": {"name": self.function.name, "arguments": arguments}}


class _Written(msgspec.Struct):
    name: str
    arguments: msgspec.Raw


def _read(text: str) -> Called | None:
    """What stands between the tags; None where it is no call."""
    try:
        written = msgspec.json.decode(text, type=_Written)
    except (msgspec.MsgspecError, RecursionError):
        return None
    arguments = bytes(written.arguments).decode()
    return Called(written.name, arguments) if arguments.startswith("{") else None


class CallReader:
    """One answer's text, as it comes, to text and calls: what may be the beginning of a call is held back. `reads`: whether there
    are tools to call; else all is text."""

    def __init__(self, reads: bool) -> None:
        self.calls = 0
        """So far."""
        self._reads, self._held = reads, ""

    def add(self, text: str, last: bool) -> tuple[str, list[dict[str, Any]]]:
        """The text that is certain, and the calls that are complete, in OpenAI's form."""
        if not self._reads:
            return text, []
        text, said, calls = self._held + text, "", list[dict[str, Any]]()
        while (at := text.find(OPEN)) >= 0:
            inner, closed, rest = text[at + len(OPEN) :].partition(CLOSE)
            if not (closed or last):
                break
            if called := _read(inner):  # the end may stand in for the closing tag
                calls.append(msgspec.to_builtins(Call(f"call_{secrets.token_hex(12)}", called)))
                said += text[:at].rstrip()
                text = rest
            else:
                end = len(text) - len(rest)
                said, text = said + text[:end], rest
        self.calls += len(calls)
        if at < 0:
            at = len(text) - max((len(one) for one in _PREFIXES if text.endswith(one)), default=0)
        certain = len(text) if last else len(text[:at].rstrip())  # a call's line break is no text
        said, self._held = said + text[:certain], text[certain:]
        return ("" if self.calls and not said.strip() else said), calls


def speaks(chat: ChatTemplate, tokenizer: Tokenizer) -> bool:
    """Whether tools and calls come out of template and tokenizer, calls in the form that is read here."""
    function = Function("look_up", "Looks a word up.")
    call = Call("call_0", Called(function.name, '{"word": "sea"}'))
    messages = [
        {"role": "user", "content": "Sea?"},
        {"role": "assistant", "content": "", "tool_calls": [call.plain()]},
        {"role": "tool", "content": "Water.", "tool_call_id": call.id},
    ]
    try:
        told = chat.render(messages, [Tool(function).plain()])
    except ValueError:
        return False
    told = tokenizer.decode(tokenizer.encode(told))  # without special tokens, as answers are
    read = [_read(inner) for inner in re.findall(f"{OPEN}(.*?){CLOSE}", told, re.DOTALL)]
    return "Looks a word up." in told and "Water." in told and call.function in read


def grammar_of(tools: Sequence[Tool], tokenizer: Tokenizer, *, text: bool, several: bool) -> str:
    """What an answer has to be, in Lark's form: calls of these tools by their schemas. `text`: or text, before and after them."""
    # Tags that are tokens of their own can't be spelled.
    first, last = (tag if len(tokenizer.encode(tag)) == 1 else json.dumps(tag) for tag in (OPEN, CLOSE))
    lead = f"lead: TEXT {first}" if first == OPEN else f"lead[lazy]: /(?s:.*){OPEN}/"
    start = "(lead call)* TEXT" if text else f'{first} call ("\\n" {first} call)*' if several else f"{first} call"
    heads = [json.dumps(f'{{"name": "{one.function.name}", "arguments": ') for one in tools]
    schemas = [{"type": "object"} | (one.function.parameters or {}) | {"x-guidance": _FORM} for one in tools]
    return "\n".join(
        [
            f"start: {start}",
            *([lead, f"TEXT: /(?s:.*)/ & ~/(?s:.*){OPEN}(?s:.*)/"] if text else []),
            rf'call: "\n" ({" | ".join(f"{head} schema_{n}" for n, head in enumerate(heads))}) "}}\n" {last}',
            *(f"schema_{n}: %json {json.dumps(schema)}" for n, schema in enumerate(schemas)),
        ]
    )
