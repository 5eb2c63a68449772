"""OpenAI's requests and answers as values: what is accepted, in which ranges, and how answers are written.

Notable: fields are those that are honoured. Any other is refused with its name, so that nothing is ignored in silence;
`user` alone says nothing that a server could act on.
"""

from __future__ import annotations

import base64
import re
import secrets
import time
from array import array
from collections.abc import Mapping, Sequence
from typing import Annotated, Any, Literal, cast

import msgspec
from msgspec import Meta

from fiveply.serve.grammar import check_beginning, compile_grammar
from fiveply.serve.messages import Sampling, Score
from fiveply.serve.text import Text
from fiveply.serve.tools import Call, Choice, Tool, grammar_of

Count = Annotated[int, Meta(ge=1, le=128)]
Penalty = Annotated[float, Meta(ge=-2, le=2)]
Prompts = str | list[str | int | list[int]]
"""A text, token ids, or several of either."""
Share = Annotated[float, Meta(ge=0, le=1)]
Stops = Annotated[list[str], Meta(max_length=64)]  # each token is searched for all of them, while others wait
Tokens = Annotated[int, Meta(ge=0)]
SEEDS = 2**64
_GOLDEN = 0x9E3779B97F4A7C15  # 2^64 / golden ratio: seeds of an answer's alternatives, far apart


class RequestError(Exception):
    """A client's mistake: HTTP status, what is wrong, and the parameter."""

    def __init__(
        self, message: str, param: str | None = None, status: int = 400, kind: str = "invalid_request_error"
    ) -> None:
        self.message, self.param, self.status, self.kind = message, param, status, kind
        super().__init__(message)

    def body(self) -> bytes:
        return msgspec.json.encode(
            {"error": {"message": self.message, "type": self.kind, "param": self.param, "code": None}}
        )


class StreamOptions(msgspec.Struct, forbid_unknown_fields=True):
    include_usage: bool = False
    continuous_usage_stats: bool = False
    """Not OpenAI's: the usage so far with every piece, as load generators ask."""


class TextFormat(msgspec.Struct, forbid_unknown_fields=True, tag_field="type", tag="text"):
    """Anything."""


class ObjectFormat(msgspec.Struct, forbid_unknown_fields=True, tag_field="type", tag="json_object"):
    """Any JSON object."""


class Schema(msgspec.Struct, forbid_unknown_fields=True):
    name: str = ""
    schema: dict[str, Any] = {}
    strict: bool | None = None
    description: str | None = None


class SchemaFormat(msgspec.Struct, forbid_unknown_fields=True, tag_field="type", tag="json_schema"):
    json_schema: Schema


class _Common(msgspec.Struct, forbid_unknown_fields=True, kw_only=True):
    """What completions and chat have in common. Not OpenAI's: top_k, min_p, repetition_penalty, ignore_eos, regex, grammar (Lark's
    form), and a response_format for completions."""

    model: str | None = None
    n: Count | None = None
    stop: str | Stops | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    temperature: Annotated[float, Meta(ge=0, le=100)] | None = None
    top_p: Annotated[float, Meta(gt=0, le=1)] | None = None
    seed: int | None = None
    frequency_penalty: Penalty | None = None
    presence_penalty: Penalty | None = None
    logit_bias: dict[str, Annotated[float, Meta(ge=-100, le=100)]] | None = None
    user: str | None = None
    top_k: Annotated[int, Meta(ge=-1)] | None = None
    min_p: Share | None = None
    repetition_penalty: Annotated[float, Meta(gt=0, le=100)] | None = None
    ignore_eos: bool = False
    response_format: TextFormat | ObjectFormat | SchemaFormat | None = None
    regex: str | None = None
    grammar: str | None = None

    @property
    def stops(self) -> list[str]:
        return [self.stop] if isinstance(self.stop, str) else self.stop or []

    @property
    def constraint(self) -> str:
        """The parameter that constrains the answer; empty where none does."""
        if isinstance(self.response_format, ObjectFormat | SchemaFormat):
            return "response_format"
        return "regex" if self.regex is not None else "grammar" if self.grammar is not None else ""

    def sampling(self, top_logprobs: int, vocabulary: int, text: Text) -> Sampling:
        """Of the first alternative. Raises RequestError for a biased token that the model lacks, and for a constraint that can't be
        kept: one that is too complex takes a second to be found so."""
        bias: dict[int, float] = {}
        for name, value in (self.logit_bias or {}).items():
            if not (name.isdecimal() and len(name) < 10 and int(name) < vocabulary):
                raise RequestError(f"token {name[:10]!r} is none of the model's {vocabulary}", "logit_bias")
            bias[int(name)] = value
        return Sampling(
            temperature=1.0 if self.temperature is None else self.temperature, top_k=min(max(0, self.top_k or 0), vocabulary),
            top_p=1.0 if self.top_p is None else self.top_p, min_p=self.min_p or 0.0,
            repetition_penalty=self.repetition_penalty or 1.0, frequency_penalty=self.frequency_penalty or 0.0,
            presence_penalty=self.presence_penalty or 0.0,
            seed=secrets.randbits(64) if self.seed is None else self.seed % SEEDS, logit_bias=bias,
            top_logprobs=top_logprobs, grammar=self._checked(text),
        )  # fmt: skip

    def _checked(self, text: Text) -> str:
        """What constrains the answer. Raises RequestError for more than one, and for what can't be used."""
        try:
            if grammar := self._grammar(text):
                check_beginning(grammar, text.reader)
        except (ValueError, RecursionError) as error:
            raise RequestError(str(error), self.constraint) from None
        return grammar

    def _grammar(self, text: Text) -> str:
        """Raises RequestError, and ValueError with what is wrong with `constraint`."""
        form = self.response_format
        schema = form.json_schema.schema if isinstance(form, SchemaFormat) else {"type": "object"}
        given: list[tuple[str, Literal["json", "regex", "lark"], Any]] = []
        if isinstance(form, ObjectFormat | SchemaFormat):
            given.append(("response_format", "json", schema))
        if self.regex is not None:
            given.append(("regex", "regex", self.regex))
        if self.grammar is not None:
            given.append(("grammar", "lark", self.grammar))
        if not given:
            return ""
        param, kind, source = given[0]
        if len(given) > 1:
            raise RequestError(f"stands beside {given[1][0]}: one can constrain an answer", param)
        if self.ignore_eos:
            raise RequestError("would go on after the grammar's end", "ignore_eos")
        return compile_grammar(kind, source)


class CompletionRequest(_Common, kw_only=True):
    prompt: Prompts = ""
    max_tokens: Tokens | None = None
    echo: bool = False
    logprobs: Annotated[int, Meta(ge=0, le=20)] | None = None


class TextPart(msgspec.Struct, forbid_unknown_fields=True):
    text: str
    type: Literal["text"] = "text"


class Message(msgspec.Struct, forbid_unknown_fields=True, omit_defaults=True):
    role: Literal["system", "developer", "user", "assistant", "tool"]
    content: str | list[TextPart] | None = None
    name: str | None = None
    tool_calls: list[Call] | None = None
    tool_call_id: str | None = None

    def plain(self) -> dict[str, Any]:
        """As templates take it. Raises ValueError for calls whose arguments are no JSON object."""
        content = self.content if isinstance(self.content, str) else "".join(part.text for part in self.content or [])
        more = {"name": self.name, "tool_call_id": self.tool_call_id,
                "tool_calls": [call.plain() for call in self.tool_calls or []]}  # fmt: skip
        return {"role": self.role, "content": content} | {key: value for key, value in more.items() if value}


class ChatRequest(_Common, kw_only=True):
    messages: Annotated[list[Message], Meta(min_length=1)]
    tools: Annotated[list[Tool], Meta(min_length=1)] | None = None
    tool_choice: Literal["none", "auto", "required"] | Choice | None = None
    max_tokens: Annotated[int, Meta(ge=1)] | None = None
    max_completion_tokens: Annotated[int, Meta(ge=1)] | None = None
    logprobs: bool | None = None
    top_logprobs: Annotated[int, Meta(ge=0, le=20)] | None = None

    def offered(self, text: Text) -> list[Tool]:
        """The tools that the model is told of. Raises RequestError where there is no template, or it has none."""
        if text.chat is None or text.tokenizer is None:
            raise RequestError("the model has no chat template; use /v1/completions", "messages")
        needed = (
            "tools"
            if self.tools
            else "messages"
            if any(m.tool_calls or m.role == "tool" for m in self.messages)
            else ""
        )
        if needed and not text.has_tools:
            raise RequestError("the model's chat template has no tools", needed)
        return (self.tools or []) if self.tool_choice != "none" else []

    def prompt(self, text: Text, tools: Sequence[Tool], aside: bool = False) -> list[int]:
        """The conversation's tokens, as `Text.converse`. Raises RequestError."""
        try:
            messages = [message.plain() for message in self.messages]
            return text.converse(messages, [one.plain() for one in tools], aside)
        except ValueError as error:
            raise RequestError(str(error), "messages") from None

    @property
    def _free(self) -> bool:
        """Whether the model may answer with text."""
        return self.tool_choice in (None, "auto")

    @property
    def constraint(self) -> str:
        if (own := super().constraint) or self.tool_choice == "none":
            return own
        strict = any(one.function.strict for one in self.tools or [])
        return "tool_choice" if not self._free else "tools" if strict else ""

    def _grammar(self, text: Text) -> str:
        """A constraint of its own, or what keeps the answer to calls, or its calls to their schemas."""
        if self.constraint in ("tools", "tool_choice"):
            return self._call_grammar(text)
        if self.constraint and self.tool_choice != "none" and (self.tools or not self._free):
            reason = "stands beside what constrains the answer, which leaves no room for a call"
            raise RequestError(reason, "tools" if self.tools else "tool_choice")
        return super()._grammar(text)

    def _call_grammar(self, text: Text) -> str:
        tools, choice = self.tools or [], self.tool_choice
        if isinstance(choice, Choice):
            tools = [one for one in tools if one.function.name == choice.function.name]
        if not tools or text.tokenizer is None:
            raise RequestError("is not among the tools" if self.tools else "there are no tools", "tool_choice")
        if self.ignore_eos:
            raise RequestError("would go on after the call's end", "ignore_eos")
        return compile_grammar("lark", grammar_of(tools, text.tokenizer, text=self._free, several=choice == "required"))


class EmbeddingRequest(msgspec.Struct, forbid_unknown_fields=True, kw_only=True):
    input: Prompts
    model: str | None = None
    encoding_format: Literal["float", "base64"] = "float"
    user: str | None = None


def read(body: bytes, kind: type[Any]) -> Any:
    """A request, or RequestError with the parameter's name."""
    try:
        return msgspec.json.decode(body, type=kind)
    except msgspec.ValidationError as error:
        text = str(error)
        if unknown := re.search(r"unknown field `([^`]+)`", text):
            raise RequestError(f"the parameter '{unknown[1]}' is not supported", unknown[1]) from None
        missing = re.search(r"required field `([^`]+)`", text)
        place = re.search(r"`\$\.?([^`]+)`$", text)
        raise RequestError(text, (missing or place or [None, None])[1]) from None
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise RequestError(f"the body is not JSON: {error}") from None


def separate(given: Prompts, param: str) -> list[str] | list[list[int]]:
    """The prompts of a request. Raises RequestError for none, and for a mixture."""
    if isinstance(given, str):
        return [given]
    kinds = {type(one) for one in given}
    if len(kinds) != 1:
        raise RequestError("mixes texts and token ids" if kinds else "is empty", param)
    return [cast(list[int], given)] if kinds == {int} else cast(list[str], given)


def prompts_of(given: Prompts, text: Text, vocabulary: int, param: str, aside: bool = False) -> list[list[int]]:
    """The token ids of one or several prompts, as `Text.encode`. Raises RequestError."""
    prompts: list[list[int]] = []
    for one in separate(given, param):
        try:
            tokens = text.encode(one, aside)
        except ValueError as error:
            raise RequestError(str(error), param) from None
        if outside := [token for token in tokens if not 0 <= token < vocabulary]:
            raise RequestError(f"token {outside[0]} is none of the model's {vocabulary}", param)
        prompts.append(tokens)
    return prompts


def alternative(sampling: Sampling, index: int) -> Sampling:
    """The settings of answer number `index` to the same prompt."""
    return msgspec.structs.replace(sampling, seed=(sampling.seed + index * _GOLDEN) % SEEDS) if index else sampling


# --- answers ---


def head(kind: str, model: str) -> dict[str, Any]:
    prefix = "chatcmpl" if kind.startswith("chat") else "cmpl"
    return {"id": f"{prefix}-{secrets.token_hex(12)}", "object": kind, "created": int(time.time()), "model": model}


def usage(prompt: int, completion: int, cached: int = 0) -> dict[str, Any]:
    return {"prompt_tokens": prompt, "completion_tokens": completion, "total_tokens": prompt + completion,
            "prompt_tokens_details": {"cached_tokens": cached}}  # fmt: skip


def completion_logprobs(
    text: Text, tokens: Sequence[int], scores: Sequence[Score | None], offset: int = 0
) -> dict[str, Any]:
    """OpenAI's older form. A token without a score (a prompt's first) has none."""
    names = [text.shown(token) for token in tokens]
    offsets: list[int] = []
    for name in names:
        offsets.append(offset)
        offset += len(name)
    return {
        "tokens": names,
        "token_logprobs": [score and _finite(score.logprob) for score in scores],
        "top_logprobs": [score and _by_name(text, score) for score in scores],
        "text_offset": offsets,
    }


def chat_logprobs(text: Text, tokens: Sequence[int], scores: Sequence[Score]) -> dict[str, Any]:
    def entry(token: int, logprob: float) -> dict[str, Any]:
        name = text.shown(token)
        part = "\ufffd" in name  # of a character: its own bytes are not known here
        return {"token": name, "logprob": _finite(logprob), "bytes": None if part else list(name.encode())}

    return {
        "content": [
            entry(token, score.logprob) | {"top_logprobs": [entry(*pair) for pair in score.top]}
            for token, score in zip(tokens, scores, strict=True)
        ]
    }


def embedding(vector: Sequence[float], form: str) -> list[float] | str:
    return list(vector) if form == "float" else base64.b64encode(array("f", vector).tobytes()).decode()


def event(value: Mapping[str, Any] | str) -> bytes:
    """One server-sent event."""
    return b"data: " + (value.encode() if isinstance(value, str) else msgspec.json.encode(value)) + b"\n\n"


def _by_name(text: Text, score: Score) -> dict[str, float]:
    """Two tokens can read alike: the likelier one stands."""
    named: dict[str, float] = {}
    for token, logprob in score.top:
        named.setdefault(text.shown(token), _finite(logprob))
    return named


def _finite(logprob: float) -> float:
    """JSON has no infinity."""
    return max(logprob, -1e9)
