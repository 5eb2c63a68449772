"""Tools in chat: calls read from text however it comes, grammars that leave nothing else, templates, and the usual client."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import llguidance
import openai
import pydantic
import pytest
from random_models import add_tokenizer, save_random
from serve_process import Process, serving
from tokenizers import AddedToken
from transformers.utils.chat_template_utils import render_jinja_template

from fiveply.corpus.chat import ChatTemplate
from fiveply.corpus.tokenizer import Tokenizer
from fiveply.serve.grammar import compile_grammar
from fiveply.serve.tools import CLOSE, OPEN, CallReader, Tool, grammar_of, speaks

CALL = """{{ '\\n<tool_call>\\n{"name": "' ~ call.function.name ~ '", "arguments": ' }}"""
TEMPLATE = (
    "{% if tools %}<system>Tools:{% for tool in tools %}\n{{ tool | tojson }}{% endfor %}\n{% endif %}"
    "{% for message in messages %}<{{ message.role }}>{{ message.content }}{% for call in message.tool_calls or [] %}"
    + CALL
    + "{{ call.function.arguments | tojson }}{{ '}\\n</tool_call>' }}{% endfor %}{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)
PLACE = {
    "type": "object", "properties": {"kind": {"$ref": "#/$defs/kind"}, "far": {"type": "boolean"}},
    "required": ["kind", "far"], "additionalProperties": False, "$defs": {"kind": {"enum": ["quay", "île"]}},
}  # fmt: skip
TOOLS: list[dict[str, Any]] = [
    {"type": "function", "function": {"name": "find", "description": "Finds a <place>.", "parameters": PLACE}},
    {"type": "function", "function": {"name": "wait", "parameters": {"type": "object", "additionalProperties": False}}},
]
CALLED = {"id": "c", "type": "function", "function": {"name": "f", "arguments": "["}}
NESTED = {"name": "f", "arguments": '{"a": ' + "[" * 5000 + "]" * 5000 + "}"}
ASKED: list[Any] = [{"role": "user", "content": "Where?"}]


def tokenizer_with(folder: Path, *tokens: str) -> Tokenizer:
    """Bytes, and tags as tokens of their own, as Qwen's has them: not special, so that answers show them."""
    tokenizer = add_tokenizer(folder)
    tokenizer._inner.add_tokens([AddedToken(token, special=False) for token in tokens])
    tokenizer.save(folder)
    return tokenizer


# --- text to calls --------------------------------------------------------------------------------------------------


def told(pieces: list[str]) -> tuple[str, list[tuple[str, str]]]:
    reader, text, calls = CallReader(True), "", []
    for index, piece in enumerate(pieces):
        said, found = reader.add(piece, last=index == len(pieces) - 1)
        text, calls = text + said, calls + found
    assert reader.calls == len(calls) == len({call["id"] for call in calls})
    return text, [(call["function"]["name"], call["function"]["arguments"]) for call in calls]


def test_calls_are_read_however_the_text_is_cut() -> None:
    text = (
        'I < you.\n\n<tool_call>\n{"name": "find", "arguments": {"a": [1.50, "<b>"]}}\n</tool_call>\n'
        '<tool_call>{"arguments": {}, "name": "wait"}</tool_call>\nSo <tool_call'
    )
    wanted = ("I < you.\nSo <tool_call", [("find", '{"a": [1.50, "<b>"]}'), ("wait", "{}")])
    assert told(list(text)) == wanted
    for first in range(len(text)):
        for second in range(first, len(text), 7):
            assert told([text[:first], text[first:second], text[second:]]) == wanted


@pytest.mark.parametrize(
    "text",
    [
        " Plain, and spaces at the end. \n",
        '<tool_call>\n{"name": "f"}\n</tool_call>',
        '<tool_call>{"name": "f", "arguments": "x"}</tool_call> or',
        '<tool_call>{"name": "f", "arguments": {"a": 1}',
        "a <tool_call>\n<tool_call> b </tool_call> ",
        f'<tool_call>{{"name": "f", "arguments": {{"a": {"[" * 5000 + "]" * 5000}}}}}</tool_call>',
        "</tool_call><tool_",
    ],
)
def test_what_is_no_call_stays_text(text: str) -> None:
    assert told([text]) == told(list(text)) == (text, [])


def test_an_end_stands_in_for_the_closing_tag() -> None:
    assert told(list('<tool_call>\n{"name": "f", "arguments": {"a": 1}}\n')) == ("", [("f", '{"a": 1}')])


# --- what an answer has to be ---------------------------------------------------------------------------------------

FIND = '<tool_call>\n{"name": "find", "arguments": {"kind": "île", "far": true}}\n</tool_call>'
WAIT = '<tool_call>\n{"name": "wait", "arguments": {}}\n</tool_call>'
OTHERS = [
    FIND.replace("find", "lost"),
    FIND.replace("île", "sea"),
    FIND.replace(": ", ":"),
    FIND.replace(', "far": true', ""),
]


@pytest.mark.parametrize("tags", [(), (OPEN, CLOSE)], ids=["spelled", "tokens"])
def test_a_grammar_lets_through_calls_alone(tmp_path: Path, tags: tuple[str, ...]) -> None:
    tokenizer = tokenizer_with(tmp_path, *tags)
    reader = llguidance.LLTokenizer((tmp_path / "tokenizer.json").read_text(), eos_token=0)

    def takes(said: str, text: bool, several: bool) -> bool:
        tools = [Tool(**{"function": _function(one)}) for one in TOOLS]
        source = grammar_of(tools, tokenizer, text=text, several=several)
        matcher = llguidance.LLMatcher(reader, compile_grammar("lark", source), log_level=0)
        return all(matcher.consume_token(token) for token in tokenizer.encode(said).tolist()) and matcher.is_accepting()

    for said, one, several, free in (
        (FIND, True, True, True),
        (WAIT, True, True, True),
        (f"{FIND}\n{WAIT}", False, True, True),
        (f"Well, <tool: {FIND} and {WAIT} then", False, False, True),
        ("No.", False, False, True),
        *((other, False, False, False) for other in OTHERS),
        (f"Well, {OTHERS[0]}", False, False, False),
    ):
        assert [takes(said, False, False), takes(said, False, True), takes(said, True, True)] == [one, several, free], (
            said
        )


def _function(tool: dict[str, Any]) -> Any:
    import msgspec

    return msgspec.convert(tool, Tool).function


# --- templates ------------------------------------------------------------------------------------------------------


def test_templates_render_tools_as_transformers_does() -> None:
    call = {"id": "c", "type": "function", "function": {"name": "find", "arguments": {"kind": "île", "far": False}}}
    messages = [
        *ASKED,
        {"role": "assistant", "content": "", "tool_calls": [call]},
        {"role": "tool", "content": "There."},
    ]
    for tools in (TOOLS, []):
        wanted, _ = render_jinja_template([messages], tools or None, None, TEMPLATE, add_generation_prompt=True)
        assert ChatTemplate(TEMPLATE, {}).render(messages, tools) == wanted[0]
    assert '{"kind": "île", "far": false}' in wanted[0]


@pytest.mark.parametrize(
    ("template", "good"),
    [
        (TEMPLATE, True),
        (TEMPLATE.replace("tools", "functions"), False),  # tells of none
        (TEMPLATE.replace("message.tool_calls", "nothing"), False),  # drops calls
        (TEMPLATE.replace("arguments", "parameters"), False),  # Llama 3.1's form
        (TEMPLATE.replace("<tool_call>", "[TOOL_CALLS]"), False),
        (TEMPLATE.replace("{% for message", "{% if messages[1:] %}{{ raise_exception('one') }}{% endif %}{% for message"), False),
    ],
)  # fmt: skip
def test_a_template_of_another_form_is_known(tmp_path: Path, template: str, good: bool) -> None:
    assert speaks(ChatTemplate(template, {}), add_tokenizer(tmp_path)) == good


def test_a_tokenizer_whose_answers_do_not_show_the_tags_is_known(tmp_path: Path) -> None:
    tokenizer = add_tokenizer(tmp_path)
    tokenizer._inner.add_special_tokens([OPEN])
    assert not speaks(ChatTemplate(TEMPLATE, {}), tokenizer)


def test_a_template_for_tools_beside_the_other(tmp_path: Path) -> None:
    named = [{"name": "default", "template": "plain"}, {"name": "tool_use", "template": "{{ tools[0].function.name }}"}]
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"chat_template": named}))
    template = ChatTemplate.load(tmp_path)
    assert template is not None
    assert (template.render(ASKED), template.render(ASKED, TOOLS)) == ("plain", "find")


# --- the usual client -----------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Process]:
    folder = tmp_path_factory.mktemp("calling") / "tiny-caller"
    save_random("llama", folder, vocab_size=260, num_hidden_layers=3, max_position_embeddings=2048)
    tokenizer_with(folder, OPEN, CLOSE)
    (folder / "chat_template.jinja").write_text(TEMPLATE)
    with serving(folder, "--layout", "pp=2") as one:
        yield one


@pytest.fixture
def client(server: Process) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0) as one:
        yield one


def rendered(messages: list[Any], tools: list[dict[str, Any]]) -> str:
    return ChatTemplate(TEMPLATE, {}).render(messages, tools)


@pytest.mark.parametrize("choice", ["required", {"type": "function", "function": {"name": "find"}}])
def test_calls_and_what_they_gave(client: openai.OpenAI, choice: Any) -> None:
    """A call by the schema, the same one streamed, and its result put back as clients do."""
    ask: dict[str, Any] = {
        "model": "tiny-caller", "messages": ASKED, "tools": TOOLS, "tool_choice": choice, "temperature": 1.2, "seed": 11,
        "max_tokens": 300, "logprobs": True,
    }  # fmt: skip
    (answer,) = client.chat.completions.create(**ask).choices
    calls = answer.message.tool_calls or []
    assert calls
    assert answer.finish_reason == "tool_calls"
    assert answer.message.content is None
    for call in calls:
        assert call.type == "function"
        given = json.loads(call.function.arguments)
        if call.function.name == "find":
            assert given["kind"] in ("quay", "île")
            assert given["far"] in (True, False)
        else:
            assert choice == "required"
            assert (call.function.name, given) == ("wait", {})

    with client.chat.completions.stream(**ask, stream_options={"include_usage": True}) as stream:
        events = list(stream)
        (streamed,) = stream.get_final_completion().choices
    assert streamed.finish_reason == "tool_calls"
    assert [one.function.to_dict() for one in streamed.message.tool_calls or []] == [
        one.function.to_dict() | {"parsed_arguments": None} for one in calls
    ]
    assert sum(event.type == "tool_calls.function.arguments.done" for event in events) == len(calls)
    assert streamed.logprobs is not None
    assert answer.logprobs is not None
    tokens, wanted = ([one.token for one in each.content or []] for each in (streamed.logprobs, answer.logprobs))
    assert tokens == wanted
    assert tokens[0] == OPEN

    told = [*ASKED, answer.message, *({"role": "tool", "tool_call_id": call.id, "content": "There."} for call in calls)]
    after = client.chat.completions.create(model="tiny-caller", messages=told, tools=TOOLS, temperature=0, max_tokens=9)  # type: ignore[arg-type]
    functions = [
        {"function": {"name": call.function.name, "arguments": json.loads(call.function.arguments)}} for call in calls
    ]
    written = [*ASKED, {"role": "assistant", "content": "", "tool_calls": functions}]
    written += [{"role": "tool", "content": "There."} for _ in calls]
    plain = client.completions.create(model="tiny-caller", prompt=rendered(written, TOOLS), temperature=0, max_tokens=9)
    assert after.choices[0].message.content == plain.choices[0].text
    assert after.usage is not None
    assert plain.usage is not None
    assert after.usage.prompt_tokens == plain.usage.prompt_tokens


def test_whether_to_call_is_the_models_choice(client: openai.OpenAI) -> None:
    """A random one calls nothing: its text comes as it is, told of tools or (none) not."""
    ask: dict[str, Any] = {
        "model": "tiny-caller",
        "messages": ASKED,
        "tools": TOOLS,
        "temperature": 0,
        "max_tokens": 40,
    }
    for choice, tools in (("auto", TOOLS), ("none", [])):
        plain = client.completions.create(
            model="tiny-caller", prompt=rendered(ASKED, tools), temperature=0, max_tokens=40
        )
        assert OPEN not in plain.choices[0].text
        answer = client.chat.completions.create(**ask, tool_choice=choice).choices[0]
        assert (answer.message.content, answer.message.tool_calls) == (plain.choices[0].text, None)
        assert answer.finish_reason == "length"
        pieces = list(client.chat.completions.create(**ask, tool_choice=choice, stream=True))
        assert "".join(piece.choices[0].delta.content or "" for piece in pieces) == plain.choices[0].text


class Find(pydantic.BaseModel):
    far: bool


def test_a_strict_tool_is_called_by_its_schema_or_not_at_all(client: openai.OpenAI) -> None:
    """The choice is the model's; a bias towards the tag's token makes a random one call."""
    tools = [openai.pydantic_function_tool(Find, name="find")]
    ask: dict[str, Any] = {
        "model": "tiny-caller",
        "messages": ASKED,
        "tools": tools,
        "temperature": 0,
        "max_tokens": 150,
    }
    (answer,) = client.chat.completions.create(**ask, logit_bias={"258": 100}).choices
    calls = answer.message.tool_calls or []
    assert len(calls) > 1
    assert answer.finish_reason == "length"
    for call in calls:
        assert call.type == "function"
        assert call.function.name == "find"
        Find.model_validate_json(call.function.arguments, strict=True)
    (plain,) = client.chat.completions.create(**ask, logit_bias={"258": -100}).choices
    assert plain.message.tool_calls is None
    assert plain.message.content


@pytest.mark.parametrize(
    ("changed", "param", "message"),
    [
        ({"tools": []}, "tools", "length >= 1"),
        ({"tools": [{"type": "custom", "custom": {"name": "f"}}]}, "tools", "Invalid value 'custom'"),
        ({"tools": [{"type": "function", "function": {"name": "a b"}}]}, "tools", "matching regex"),
        ({"tool_choice": "often"}, "tool_choice", "Invalid"),
        ({"tool_choice": {"type": "function", "function": {"name": "f"}}}, "tool_choice", "is not among the tools"),
        ({"tools": None, "tool_choice": "required"}, "tool_choice", "there are no tools"),
        ({"tool_choice": "required", "ignore_eos": True}, "ignore_eos", "after the call's end"),
        ({"response_format": {"type": "json_object"}}, "tools", "leaves no room for a call"),
        ({"parallel_tool_calls": False}, "parallel_tool_calls", "'parallel_tool_calls' is not supported"),
        (
            {"tools": [{"type": "function", "function": {"name": "f", "parameters": {"type": "sea"}}}], "tool_choice": "required"},
            "tool_choice",
            "can't be used",
        ),
        (
            {"messages": [{"role": "assistant", "tool_calls": [CALLED]}]},
            "messages",
            "arguments of call 'c' are no JSON object",
        ),
        (
            {"messages": [{"role": "assistant", "tool_calls": [CALLED | {"function": NESTED}]}]},
            "messages",
            "arguments of call 'c' are no JSON object",
        ),
    ],
)  # fmt: skip
def test_mistakes_are_named(server: Process, changed: dict[str, Any], param: str, message: str) -> None:
    answer = server.post("chat/completions", {"messages": ASKED, "tools": TOOLS, "max_tokens": 3} | changed)
    assert answer.status_code == 400
    error = answer.json()["error"]
    assert message in error["message"]
    assert (error["param"] or "").split("[")[0].split(".")[0] == param
