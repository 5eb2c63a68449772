"""The server as its clients meet it: a process of its own over loopback, and where limits matter the application itself."""

from __future__ import annotations

import json
import os
import re
import signal
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx2
import numpy as np
import openai
import pytest
from serve_process import Process, serving


@pytest.fixture(scope="module")
def server(speaking: Path) -> Iterator[Process]:
    with serving(speaking, "--layout", "dp=2,pp=2") as one:
        yield one


@pytest.fixture
def client(server: Process) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0) as one:
        yield one


def eventually(true: Callable[[], bool], seconds: float = 30.0) -> None:
    end = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < end, "it did not come true"
        time.sleep(0.05)


# --- the usual client -----------------------------------------------------------------------------------------------


def test_a_completion_is_that_of_the_model(client: openai.OpenAI, speaking: Path) -> None:
    import torch
    import transformers

    model = transformers.AutoModelForCausalLM.from_pretrained(speaking)
    prompt = [ord("A") - 31, 70, 71]
    answer = client.completions.create(model="tiny-talker", prompt=prompt, max_tokens=9, temperature=0, logprobs=2)
    ids = torch.tensor([prompt])
    out = model.generate(ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=9, pad_token_id=0)
    with torch.no_grad():
        wanted = model(out).logits[0].log_softmax(-1)
    logprobs = answer.choices[0].logprobs
    assert logprobs is not None
    picked = [wanted[i - 1, out[0, i]].item() for i in range(3, 12)]
    np.testing.assert_allclose(np.array(logprobs.token_logprobs), picked, atol=2e-5)
    assert answer.usage is not None
    assert (answer.usage.prompt_tokens, answer.usage.completion_tokens) == (3, 9)
    assert answer.choices[0].finish_reason == "length"


def test_prompts_are_scored_as_lm_eval_asks(client: openai.OpenAI) -> None:
    """Token ids in a batch, echoed with log-probabilities, one token or none beyond."""
    prompts = [[5, 6, 7, 8] * 10, [9, 10]]
    answer = client.completions.create(
        model="tiny-talker", prompt=prompts, max_tokens=1, logprobs=1, echo=True, seed=1234
    )
    for prompt, choice in zip(prompts, answer.choices, strict=True):
        logprobs = choice.logprobs
        assert logprobs is not None
        assert logprobs.token_logprobs is not None
        assert logprobs.top_logprobs is not None
        assert len(logprobs.token_logprobs) == len(logprobs.tokens or []) == len(prompt) + 1
        assert logprobs.token_logprobs[0] is None
        for logprob, top in zip(logprobs.token_logprobs[1:], logprobs.top_logprobs[1:], strict=True):
            assert logprob <= max(top.values()) + 1e-5 < 1e-5
    bare = client.completions.create(model="tiny-talker", prompt=prompts[0], max_tokens=0, logprobs=1, echo=True)
    assert bare.choices[0].logprobs is not None
    first = answer.choices[0].logprobs
    assert first is not None
    np.testing.assert_allclose(
        (bare.choices[0].logprobs.token_logprobs or [])[1:], (first.token_logprobs or [])[1:-1], atol=1e-5
    )


def test_streams_say_what_answers_say(client: openai.OpenAI) -> None:
    ask: dict[str, Any] = {"model": "tiny-talker", "prompt": "Ahoy", "max_tokens": 20, "temperature": 0.8, "seed": 3}
    ask |= {"logprobs": 1}
    whole = client.completions.create(**ask, echo=True)
    pieces = list(client.completions.create(**ask, echo=True, stream=True, stream_options={"include_usage": True}))
    assert "".join(piece.choices[0].text for piece in pieces[:-1]) == whole.choices[0].text
    assert whole.choices[0].text.startswith("Ahoy")
    for name in ("tokens", "token_logprobs", "top_logprobs", "text_offset"):
        said = [one for piece in pieces[:-1] for one in getattr(piece.choices[0].logprobs, name)]
        assert said == getattr(whole.choices[0].logprobs, name)
    assert [piece.choices[0].finish_reason for piece in pieces[:-1]][-1] == "length"
    assert pieces[-1].usage == whole.usage
    assert pieces[-1].choices == []
    assert all(piece.usage is None for piece in pieces[:-1])
    counted = {"include_usage": True, "continuous_usage_stats": True}  # as load generators ask
    told = [piece.usage for piece in client.completions.create(**ask, stream=True, stream_options=counted)]
    assert told[-1] == whole.usage
    counts = [usage.completion_tokens for usage in told if usage]
    assert len(counts) == len(told)
    assert counts == sorted(counts)
    assert counts[0] < 20


def test_conversations(client: openai.OpenAI) -> None:
    messages: Any = [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": [{"type": "text", "text": "Hi"}]},
    ]
    ask: dict[str, Any] = {"model": "tiny-talker", "messages": messages, "temperature": 0, "max_completion_tokens": 12}
    answer = client.chat.completions.create(**ask, logprobs=True, top_logprobs=2)
    plain = client.completions.create(
        model="tiny-talker", prompt="<system>Be brief.<user>Hi<assistant>", max_tokens=12, temperature=0
    )
    assert answer.choices[0].message.content == plain.choices[0].text
    assert answer.choices[0].logprobs is not None
    content = answer.choices[0].logprobs.content or []
    assert len(content) == 12
    assert all(len(one.top_logprobs) == 2 and one.top_logprobs[0].token == one.token for one in content)
    assert all(one.bytes == (None if "�" in one.token else list(one.token.encode())) for one in content)
    pieces = list(client.chat.completions.create(**ask, stream=True))
    assert pieces[0].choices[0].delta.role == "assistant"
    assert "".join(piece.choices[0].delta.content or "" for piece in pieces) == plain.choices[0].text
    with pytest.raises(openai.BadRequestError, match="refuses this conversation: nothing to answer"):
        client.chat.completions.create(model="tiny-talker", messages=[{"role": "assistant", "content": "Hi"}])


def test_alternatives_and_seeds(client: openai.OpenAI, server: Process) -> None:
    ask: dict[str, Any] = {"model": "tiny-talker", "prompt": "Land ", "max_tokens": 24, "temperature": 1.5}
    alone = client.completions.create(**ask, seed=5).choices[0].text
    several = client.completions.create(**ask, seed=5, n=4)
    assert several.choices[0].text == alone
    assert len({choice.text for choice in several.choices}) == 4
    crowd = [client.completions.create(**ask | {"prompt": ["x" * n, "Land "]}, seed=5).choices[1].text for n in (1, 50)]
    assert crowd == [alone, alone]
    assert len({client.completions.create(**ask).choices[0].text for _ in range(2)}) == 2
    streamed: dict[int, str] = {}
    for piece in client.completions.create(**ask, seed=5, n=4, stream=True):
        streamed[piece.choices[0].index] = streamed.get(piece.choices[0].index, "") + piece.choices[0].text
    assert [streamed[index] for index in range(4)] == [choice.text for choice in several.choices]


def test_a_stop_string_is_not_shown(client: openai.OpenAI) -> None:
    ask: dict[str, Any] = {"model": "tiny-talker", "prompt": "Ahoy", "max_tokens": 40, "temperature": 0}
    whole = client.completions.create(**ask).choices[0].text
    stop = whole[10:13]
    answer = client.completions.create(**ask, stop=["never said", stop])
    assert answer.choices[0].text == whole[: whole.index(stop)]
    assert answer.choices[0].finish_reason == "stop"
    pieces = list(client.completions.create(**ask, stop=stop, stream=True))
    assert "".join(piece.choices[0].text for piece in pieces) == whole[: whole.index(stop)]


def test_answers_by_schema_and_grammar(client: openai.OpenAI) -> None:
    schema = {"type": "object", "properties": {"n": {"enum": [1, 2]}}, "required": ["n"], "additionalProperties": False}
    messages: Any = [{"role": "user", "content": "Hi"}]
    answer = client.chat.completions.create(
        model="tiny-talker", messages=messages, temperature=1.5, max_tokens=50,
        response_format={"type": "json_schema", "json_schema": {"name": "one", "schema": schema, "strict": True}},
    )  # fmt: skip
    assert json.loads(answer.choices[0].message.content or "")["n"] in (1, 2)
    assert answer.choices[0].finish_reason == "stop"
    plain = client.completions.create(
        model="tiny-talker", prompt="a", max_tokens=50, temperature=1.5, extra_body={"regex": "(yes|no){2}"}
    )
    assert plain.choices[0].text in ("yesyes", "yesno", "noyes", "nono")


def test_a_grammar_that_fails_on_the_way_is_the_client_s(server: Process) -> None:
    """One letter, then what has no end."""
    ask = {"prompt": "a", "max_tokens": 50, "grammar": 'start: /[ab]/ "x"{1000000000}'}
    error = server.post("completions", ask)
    assert error.status_code == 400
    assert error.json()["error"]["param"] == "grammar"
    assert "Too many items" in error.json()["error"]["message"]
    lines = [line for line in server.post("completions", ask | {"stream": True}).text.splitlines() if line]
    assert json.loads(lines[-2][6:]) == error.json()
    assert lines[-1] == "data: [DONE]"


def test_embeddings(client: openai.OpenAI) -> None:
    one = client.embeddings.create(model="tiny-talker", input="sea")
    both = client.embeddings.create(model="tiny-talker", input=["sea", "land"], encoding_format="float")
    assert len(one.data[0].embedding) == 72
    np.testing.assert_allclose(one.data[0].embedding, both.data[0].embedding, atol=1e-5)
    assert np.abs(np.subtract(both.data[0].embedding, both.data[1].embedding)).max() > 0.01


def test_models(client: openai.OpenAI) -> None:
    (model,) = client.models.list().data
    assert (model.id, model.owned_by) == ("tiny-talker", "fiveply")


# --- mistakes -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("path", "body", "status", "param", "message"),
    [
        ("completions", b"{", 400, None, "the body is not JSON"),
        ("completions", b"\xff\xfe", 400, None, "the body is not JSON"),
        ("completions", b"[1]", 400, None, "Expected `object`"),
        ("completions", b'{"prompt": "a", "best_of": 2}', 400, "best_of", "the parameter 'best_of' is not supported"),
        ("completions", b'{"prompt": "a", "stream_options": {"x": 1}}', 400, "x", "the parameter 'x' is not supported"),
        ("completions", b'{"prompt": "a", "max_tokens": "9"}', 400, "max_tokens", "Expected `int | null`, got `str`"),
        ("completions", b'{"prompt": "a", "temperature": -1}', 400, "temperature", "Expected `float` >= 0.0"),
        ("completions", b'{"prompt": "a", "max_tokens": 0}', 400, "max_tokens", "0 tokens without echo"),
        ("completions", b'{"prompt": []}', 400, "prompt", "is empty"),
        ("completions", b'{"prompt": ["a", 5]}', 400, "prompt", "mixes texts and token ids"),
        ("completions", b'{"prompt": [5, 258]}', 400, "prompt", "token 258 is none of the model's 258"),
        ("completions", b'{"prompt": "a", "max_tokens": 512}', 400, "max_tokens", "1 tokens + max_tokens 512 exceed"),
        ("completions", b'{"prompt": "a", "logit_bias": {"258": 1}}', 400, "logit_bias", "token '258' is none"),
        (
            "completions",
            b'{"prompt": "a", "logit_bias": {"%s": 1}}' % (b"9" * 5000),
            400,
            "logit_bias",
            "'9999999999' is",
        ),
        (
            "completions",
            b'{"prompt": "a", "stop": [%s""]}' % (b'"a",' * 64),
            400,
            "stop",
            "Expected `array` of length <= 64",
        ),
        ("completions", b'{"prompt": [%s""]}' % (b'"",' * 200), 400, "prompt", "201 answers in one request"),
        ("completions", b'{"prompt": ["a", "b"], "n": 65}', 400, "prompt", "130 answers in one request"),
        ("completions", b'{"prompt": "a", "model": "gpt-4"}', 404, "model", "the model 'gpt-4' is not served here"),
        ("chat/completions", b'{"prompt": "a"}', 400, "prompt", "the parameter 'prompt' is not supported"),
        ("chat/completions", b"{}", 400, "messages", "missing required field `messages`"),
        ("chat/completions", b'{"messages": []}', 400, "messages", "Expected `array` of length >= 1"),
        (
            "chat/completions",
            b'{"messages": [{"role": "user"}], "tools": [{"type": "function", "function": {"name": "f"}}]}',
            400,
            "tools",
            "the model's chat template has no tools",
        ),
        ("chat/completions", b'{"messages": [{"role": "tool"}]}', 400, "messages", "chat template has no tools"),
        (
            "chat/completions",
            b'{"messages": [{"role": "user"}], "functions": []}',
            400,
            "functions",
            "'functions' is not supported",
        ),
        ("completions", b'{"prompt": "a", "regex": "a("}', 400, "regex", "can't be used: "),
        ("completions", b'{"prompt": "a", "regex": "a", "grammar": "b"}', 400, "regex", "stands beside grammar"),
        ("completions", b'{"prompt": "a", "regex": "a", "ignore_eos": true}', 400, "ignore_eos", "would go on"),
        (
            "chat/completions",
            b'{"messages": [{"role": "user"}], "response_format": {"type": "xml"}}',
            400,
            "response_format.type",
            "Invalid value 'xml'",
        ),
        (
            "chat/completions",
            b'{"messages": [{"role": "user"}], "response_format": {"type": "json_schema", "json_schema":'
            b' {"schema": {"$defs": {"n": {"$ref": "#/$defs/n"}}, "$ref": "#/$defs/n"}}}}',
            400,
            "response_format",
            "can't be used: no answer can fit it",
        ),
        (
            "completions",
            b'{"prompt": "a", "stream": true, "response_format": {"type": "json_schema", "json_schema":'
            b' {"schema": {"type": "array", "items": {"$ref": "#"}, "minItems": 1}}}}',
            400,
            "response_format",
            "can't be used: parser error: Too many items",
        ),
        (
            "completions",
            b'{"prompt": "a", "response_format": {"type": "json_schema", "json_schema": {"schema": {"$ref": "#/a"}}}}',
            400,
            "response_format",
            "'/a' does not exist",
        ),
        ("completions", b'{"prompt": "a", "regex": "[^\\\\s\\\\S]"}', 400, "regex", "no answer can fit it"),
        ("completions", b'{"prompt": "a", "regex": "%s"}' % (b"(" * 5000), 400, "regex", "can't be used: "),
        ("completions", b'{"prompt": "a", "grammar": "start: <|a|>"}', 400, "grammar", "unknown special token"),
        ("embeddings", b'{"input": "a", "dimensions": 5}', 400, "dimensions", "'dimensions' is not supported"),
    ],
)
def test_mistakes_are_named(
    server: Process, path: str, body: bytes, status: int, param: str | None, message: str
) -> None:
    answer = httpx2.post(f"{server.url}/v1/{path}", content=body, timeout=20)
    assert answer.status_code == status
    error = answer.json()["error"]
    assert error["param"] == param
    assert message in error["message"]


def test_numbers_too_large_for_the_ranks_harm_nobody(server: Process) -> None:
    losses = server.metric("engine_losses_total")
    ask = {"prompt": "a", "max_tokens": 3, "seed": 2**80, "temperature": 1}
    answers = [server.post("completions", ask | {"top_k": k}).json()["choices"][0]["text"] for k in (0, 2**80)]
    assert answers[0] == answers[1]
    assert server.metric("engine_losses_total") == losses


def test_an_oversize_body_is_cut_off(server: Process) -> None:
    answer = httpx2.post(f"{server.url}/v1/completions", content=b"x" * (5 << 20), timeout=20)
    assert answer.status_code == 413
    assert server.get("/health").status_code == 200


def test_other_paths_and_methods(server: Process) -> None:
    assert server.get("/v1/nothing").status_code == 404
    assert server.get("/v1/completions").status_code == 405
    assert "<textarea" in server.get("/").text


def test_a_loopback_address_is_guarded_so(server: Process) -> None:
    answer = httpx2.get(f"{server.url}/v1/models", headers={"Host": "b.example"}, timeout=20)
    assert answer.status_code == 403
    assert "--origins http://b.example admits it" in answer.json()["error"]["message"]


# --- clients that leave, ranks that die, ends ------------------------------------------------------------------------


@pytest.mark.parametrize("stream", [True, False])
def test_nobody_works_for_a_client_that_has_left(server: Process, stream: bool) -> None:
    eventually(lambda: server.metric("running") == 0)
    cancelled = server.metric("requests_cancelled_total")
    body = {"prompt": "a", "max_tokens": 500, "ignore_eos": True, "stream": stream, "n": 2}
    if stream:
        with httpx2.stream("POST", f"{server.url}/v1/completions", json=body, timeout=20) as answer:
            next(answer.iter_lines())
    else:
        with pytest.raises(httpx2.ReadTimeout):
            httpx2.post(f"{server.url}/v1/completions", json=body, timeout=0.3)
    eventually(lambda: server.metric("running") == 0)
    assert server.metric("requests_cancelled_total") == cancelled + 2
    assert server.metric("cache_use") == 0


def test_a_killed_rank_is_told_replaced_and_not_noticed_by_answers(speaking: Path) -> None:
    with serving(speaking, "--layout", "pp=2") as server:
        body = {"prompt": "Ahoy", "max_tokens": 480, "temperature": 0.9, "seed": 4, "ignore_eos": True, "stream": True}
        with httpx2.stream("POST", f"{server.url}/v1/completions", json=body, timeout=60) as answer:
            told, killed, seen = "", False, set[int]()
            for line in answer.iter_lines():
                if not line.startswith("data: {"):
                    continue
                told += json.loads(line[6:])["choices"][0]["text"]
                if not killed and len(told) > 20:
                    killed = True
                    os.kill(server.ranks()[1], signal.SIGKILL)
                    eventually(lambda: server.get("/health").status_code == 503)
                    health = server.get("/health").json()
                    seen.add(server.get("/v1/models").status_code)
        assert killed
        assert seen == {503}
        assert health["status"] in ("lost", "starting")
        assert re.match(r"rank \d (closed its connection|was killed by signal 9)", health["problem"])
        eventually(lambda: server.get("/health").status_code == 200)
        again = server.post("completions", body | {"stream": False}).json()["choices"][0]["text"]
        assert told == again
        assert server.metric("engine_losses_total") == 1


def test_answers_are_finished_before_the_end(speaking: Path) -> None:
    with serving(speaking, "--layout", "pp=2") as server:
        body = {"prompt": "a", "max_tokens": 300, "ignore_eos": True, "stream": True}
        with httpx2.stream("POST", f"{server.url}/v1/completions", json=body, timeout=60) as answer:
            lines = answer.iter_lines()
            next(lines)
            server.process.terminate()
            eventually(lambda: server.get("/health").json()["status"] == "draining")
            refused = server.post("completions", {"prompt": "a"})
            assert refused.status_code == 503
            assert "shutting down" in refused.json()["error"]["message"]
            said = [line for line in lines if line]
        assert said[-1] == "data: [DONE]"
        assert json.loads(said[-2][6:])["choices"][0]["finish_reason"] == "length"
        assert server.process.wait(timeout=30) == 0


def test_a_second_interrupt_waits_for_no_answer(speaking: Path) -> None:
    with serving(speaking) as server:
        body = {"prompt": "a", "max_tokens": 500, "ignore_eos": True, "stream": True, "n": 128}
        with httpx2.stream("POST", f"{server.url}/v1/completions", json=body, timeout=60) as answer:
            lines = answer.iter_lines()
            next(lines)
            server.process.send_signal(signal.SIGINT)
            eventually(lambda: server.get("/health").json()["status"] == "draining")
            time.sleep(0.6)  # sooner it counts as the same one
            server.process.send_signal(signal.SIGINT)
            said = [line for line in lines if line]
        assert '"error"' in said[-2]
        assert server.process.wait(timeout=15) == 1  # answers would have 30 s
