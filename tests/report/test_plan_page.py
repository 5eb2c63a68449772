"""The plan's page in a browser: at both widths nothing sticks out, the table sorts, and the row under the pointer is explained."""

from __future__ import annotations

import html
import json
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest

from fiveply.plan import explain
from fiveply.report import plan_page
from fiveply.spec.architecture import ModelSpec
from fiveply.spec.cluster import ClusterSpec

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
FLAGS = [
    "--headless", "--no-sandbox", "--disable-gpu", "--no-first-run", "--disable-background-networking", "--disable-sync",
    "--disable-extensions", "--disable-dev-shm-usage", "--hide-scrollbars", "--virtual-time-budget=3000",
]  # fmt: skip
FRAMES = """<!doctype html><body style="margin:0">{frames}<script>
const seen = {{}};
addEventListener("message", event => {{
  seen[event.data.name] = event.data.seen;
  document.body.dataset.seen = JSON.stringify(seen);
}});
</script></body>"""
PROBE = """<script>addEventListener("load", () => {
  const rows = () => [...document.querySelectorAll(".ranked tbody tr")];
  const seen = { scroll: document.documentElement.scrollWidth, width: innerWidth, rows: rows().length };
  rows()[2].dispatchEvent(new PointerEvent("pointerenter"));
  seen.chosen = document.getElementById("chosen").textContent.replaceAll("\\u200b", "");
  seen.falls = document.querySelectorAll("#waterfall .fall").length;
  seen.ranks = document.querySelectorAll("#memory .held").length;
  seen.boxes = document.querySelectorAll("#pipeline rect:not(.lane)").length;
  document.querySelectorAll(".ranked thead button")[2].click();
  document.querySelectorAll(".ranked thead button")[2].click();
  seen.slowest = rows()[0].dataset.plan;
  parent.postMessage({ name, seen }, "*");
});</script>"""
WIDTHS = (1280, 390)


@pytest.fixture(scope="module")
def answer() -> explain.Answer:
    return explain.answer(ModelSpec.load("1b"), ClusterSpec("h100", 8), sequence=2048, global_batch=64)


@pytest.fixture(scope="module")
def browsed(answer: explain.Answer, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    if CHROMIUM is None:
        pytest.skip("no chromium, chromium-browser or google-chrome in PATH")
    folder: Path = tmp_path_factory.mktemp("browser")
    text = plan_page.render(answer, "1b", [explain.why(answer, "tp=8")])
    (folder / "plan.html").write_text(text.replace("</body>", PROBE + "</body>"))
    frames = "".join(
        f'<iframe name="{width}" src="plan.html" width="{width}" height="900"></iframe>' for width in WIDTHS
    )
    (folder / "frames.html").write_text(FRAMES.format(frames=frames))
    command = [CHROMIUM, *FLAGS, f"--user-data-dir={folder / 'profile'}", "--window-size=1400,1000", "--dump-dom"]
    done = subprocess.run(
        [*command, (folder / "frames.html").as_uri()], capture_output=True, text=True, timeout=60, check=False
    )
    found = re.search(r'data-seen="([^"]*)"', done.stdout)
    assert found, f"no page's script came to its end: {done.stderr[-500:]}"
    return json.loads(html.unescape(found[1]))


@pytest.mark.parametrize("width", WIDTHS)
def test_in_a_browser(browsed: dict[str, Any], answer: explain.Answer, width: int) -> None:
    seen, third = browsed[str(width)], answer.ranked[2].prediction
    assert seen["scroll"] <= seen["width"] == width
    assert seen["rows"] == len(answer.ranked)
    assert seen["chosen"] == str(third.layout)
    assert seen["ranks"] == third.layout.pp
    assert seen["falls"] >= 3
    assert seen["boxes"] > 0
    assert int(seen["slowest"]) == len(answer.ranked) - 1, "sorted by time, the slowest first"
