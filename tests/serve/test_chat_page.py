"""The chat page in a browser, wide and narrow: it streams, remembers the conversation, stops, and stays inside its window."""

from __future__ import annotations

import asyncio
import shutil
from pathlib import Path
from typing import Any

import httpx2
import pytest
import uvicorn
from random_models import add_tokenizer, save_random
from starlette.requests import Request
from starlette.responses import HTMLResponse, Response
from starlette.routing import Route

from fiveply import service
from fiveply.serve.driver import Driver, Settings
from fiveply.serve.http import Model, Server

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
FLAGS = [
    "--headless", "--no-sandbox", "--disable-gpu", "--no-first-run", "--disable-background-networking", "--disable-sync",
    "--disable-component-update", "--disable-extensions", "--disable-dev-shm-usage", "--hide-scrollbars",
]  # fmt: skip
WIDTHS = (1280, 390)
# A window is never narrower than 500 pixels; a frame is.
FRAMES = "".join(f'<iframe src="/probed" width="{width}" height="800" style="border:0"></iframe>' for width in WIDTHS)
# Says two things, notes how often the answer grew, then has a long one stopped.
PROBE = """
<script>
const until = async true_ => { while (!true_()) await new Promise(go => setTimeout(go, 20)); };
const shown = () => [...document.querySelectorAll(".turn")];
const say = text => { at("say").value = text; at("form").requestSubmit(); };
(async () => {
  const seen = { width: innerWidth, grew: 0 };
  await until(() => model);
  seen.model = document.querySelector("h1").innerText;
  at("temperature").value = 0;
  at("tokens").value = 60;
  new MutationObserver(() => seen.grew++).observe(at("talk"), { childList: true, subtree: true });
  say("Ahoy");
  seen.button = at("send").innerText;
  await until(() => !stopper && shown().length == 2);
  say("x".repeat(150));
  await until(() => !stopper && shown().length == 4);
  seen.turns = shown().map(turn => [turn.className, turn.textContent]);
  seen.note = document.querySelector(".note").innerText;
  at("tokens").value = 100;
  say("More");
  await until(() => shown().length == 6 && shown()[5].textContent.length > 3);
  at("form").requestSubmit();
  await until(() => !stopper);
  seen.stopped = shown()[5].textContent.length;
  seen.scroll = document.documentElement.scrollWidth;
  await fetch("/seen", { method: "POST", body: JSON.stringify(seen) });
})().catch(error => fetch("/seen", { method: "POST", body: JSON.stringify({ error: String(error), width: innerWidth }) }));
</script>
"""


@pytest.fixture(scope="module")
def browsed(tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[int, Any], list[str]]:
    """What the probe saw at each width, and what the server answers to the same conversation."""
    if CHROMIUM is None:
        pytest.skip("no chromium, chromium-browser or google-chrome in PATH")
    folder = tmp_path_factory.mktemp("page") / "tiny-talker"
    save_random("llama", folder, vocab_size=258, num_hidden_layers=2, max_position_embeddings=4096)
    add_tokenizer(folder)
    (folder / "chat_template.jinja").write_text("{% for m in messages %}[{{ m.content }}]{% endfor %}")
    served = service.Served.load(folder, "pp=2", "float32")
    return service.run(served, Settings(), lambda driver: browse(driver, folder.parent))


async def browse(driver: Driver, folder: Path) -> tuple[dict[int, Any], list[str]]:
    app = Server(driver, Model("tiny-talker", 258, 4096)).app
    seen: dict[int, Any] = {}
    complete = asyncio.Event()

    async def probed(request: Request) -> Response:
        page = await client.get("/")
        return HTMLResponse(page.text.replace("</html>", PROBE + "</html>"))

    async def note(request: Request) -> Response:
        told = await request.json()
        seen[told["width"]] = told
        if len(seen) == len(WIDTHS):
            complete.set()
        return Response()

    app.router.routes += [
        Route("/frames", lambda request: HTMLResponse(FRAMES)), Route("/probed", probed),
        Route("/seen", note, methods=["POST"]),
    ]  # fmt: skip
    server = uvicorn.Server(uvicorn.Config(app, port=0, log_level="warning", lifespan="off"))
    serving = asyncio.create_task(server.serve())
    while not server.started:
        await asyncio.sleep(0.02)
    url = f"http://127.0.0.1:{server.servers[0].sockets[0].getsockname()[1]}"
    async with httpx2.AsyncClient(base_url=url, timeout=60) as client:
        browser = await asyncio.create_subprocess_exec(
            str(CHROMIUM), *FLAGS, f"--user-data-dir={folder / 'profile'}", "--window-size=1400,1700",
            "--remote-debugging-port=0", f"{url}/frames",
            stdout=asyncio.subprocess.DEVNULL, stderr=asyncio.subprocess.DEVNULL,
        )  # fmt: skip
        try:
            await asyncio.wait_for(complete.wait(), 60)
        finally:
            browser.kill()
            await browser.wait()
        turns: list[dict[str, str]] = []
        answers: list[str] = []
        for said in ("Ahoy", "x" * 150):
            turns.append({"role": "user", "content": said})
            body = {"messages": turns, "temperature": 0, "max_tokens": 60}
            answer = (await client.post("/v1/chat/completions", json=body)).json()
            answers.append(answer["choices"][0]["message"]["content"])
            turns.append({"role": "assistant", "content": answers[-1]})
    server.should_exit = True
    await serving
    return seen, answers


@pytest.mark.parametrize("width", WIDTHS)
def test_in_a_browser(browsed: tuple[dict[int, Any], list[str]], width: int) -> None:
    seen, answers = browsed[0][width], browsed[1]
    assert seen.get("error") is None
    assert seen["model"] == "tiny-talker"
    assert seen["button"] == "Stop"
    assert seen["turns"] == [
        ["turn user", "Ahoy"], ["turn assistant", answers[0]], ["turn user", "x" * 150], ["turn assistant", answers[1]],
    ]  # fmt: skip
    assert seen["grew"] > 20
    assert "first after" in seen["note"]
    assert 3 < seen["stopped"] < 100
    assert seen["scroll"] <= width
