"""The chat page in a browser, wide and narrow: it streams, remembers the conversation, stops, and stays inside its window."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import chromium
import pytest
from random_models import add_tokenizer, save_random
from serve_process import Process, serving

# Says two things, notes how often the answer grew, then has a long one stopped.
TALK = """
(async () => {
  const until = async true_ => { while (!true_()) await new Promise(go => setTimeout(go, 20)); };
  const shown = () => [...document.querySelectorAll(".turn")];
  const put = text => { at("say").value = text; at("form").requestSubmit(); };
  const seen = { grew: 0 };
  await until(() => model);
  at("temperature").value = 0;
  at("tokens").value = 60;
  new MutationObserver(() => seen.grew++).observe(at("talk"), { childList: true, subtree: true });
  put("Ahoy");
  seen.button = at("send").innerText;
  await until(() => !stopper && shown().length == 2);
  put("x".repeat(150));
  await until(() => !stopper && shown().length == 4);
  seen.turns = shown().map(turn => [turn.className, turn.textContent]);
  seen.note = document.querySelector(".note").innerText;
  at("tokens").value = 1000;
  put("More");
  await until(() => shown().length == 6 && shown()[5].textContent.length > 3);
  at("form").requestSubmit();
  await until(() => !stopper);
  seen.stopped = shown()[5].textContent.length;
  seen.model = document.querySelector("h1").innerText;
  seen.scroll = document.documentElement.scrollWidth;
  at("new").click();
  seen.left = shown().length;
  return seen;
})()
"""


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Process]:
    if chromium.PROGRAM is None:
        pytest.skip("no chromium, chromium-browser or google-chrome in PATH")
    folder = tmp_path_factory.mktemp("page") / "tiny-talker"
    save_random("llama", folder, vocab_size=258, num_hidden_layers=2, max_position_embeddings=4096)
    add_tokenizer(folder)
    (folder / "chat_template.jinja").write_text("{% for m in messages %}[{{ m.content }}]{% endfor %}")
    with serving(folder, "--layout", "pp=2") as process:
        yield process


@pytest.fixture(scope="module")
def answers(server: Process) -> list[str]:
    """What the server says to the same conversation."""
    turns: list[dict[str, str]] = []
    for said in ("Ahoy", "x" * 150):
        turns.append({"role": "user", "content": said})
        answer = server.post("chat/completions", {"messages": turns, "temperature": 0, "max_tokens": 60}).json()
        turns.append(answer["choices"][0]["message"])
    return [turn["content"] for turn in turns[1::2]]


@pytest.mark.parametrize("width", [1280, 390])
def test_a_conversation(browser: chromium.Browser, server: Process, answers: list[str], width: int) -> None:
    seen = browser.open(f"{server.url}/", width, touch=width < 500).run(TALK)
    assert seen["model"] == "tiny-talker"
    assert seen["button"] == "Stop"
    assert seen["turns"] == [
        ["turn user", "Ahoy"], ["turn assistant", answers[0]], ["turn user", "x" * 150], ["turn assistant", answers[1]],
    ]  # fmt: skip
    assert seen["grew"] > 20
    assert "first after" in seen["note"]
    assert 3 < seen["stopped"] < 1000
    assert seen["left"] == 0
    assert seen["scroll"] <= width


def test_a_lost_server_is_told(browser: chromium.Browser) -> None:
    html = Path(__file__).parents[2] / "src/fiveply/serve/chat.html"
    page = browser.open(html, 390)
    told = page.run("new Promise(done => setTimeout(() => done(document.querySelector('.error').innerText), 500))")
    assert "trying again" in told
