"""The load generator: against fiveply's own server, and against one that misbehaves."""

from __future__ import annotations

import http.server
import json
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from random_models import add_tokenizer, save_random
from serve_process import serving

from fiveply.cli import main
from fiveply.load import Level, Load, Percentiles, knee, levels, measure
from fiveply.spec.errors import InputError, RunError


def test_against_the_server(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    save_random("llama", tmp_path / "m", vocab_size=258, num_hidden_layers=2, max_position_embeddings=4096)
    add_tokenizer(tmp_path / "m")
    told: list[int] = []
    with serving(tmp_path / "m", "--layout", "pp=2") as server:
        load = Load(
            url=server.url, model="m", concurrency=3, requests=9, prompt_words=10, output_tokens=12, ignore_end=True
        )
        level = measure(load, told.append)
        assert (level.requests, level.errors, level.output_tokens) == (9, 0, 108)
        assert level.prompt_tokens > 9 * 30
        assert level.ttft_ms is not None
        assert level.tpot_ms is not None
        assert 0 < level.ttft_ms.p50 <= level.ttft_ms.p99
        assert level.output_tokens_per_second == pytest.approx(108 / level.seconds)
        assert server.metric("generated_tokens_total") == 108
        flags = ["--url", server.url, "--model", "m", "--concurrency", "1,2", "--requests", "4", "--output-tokens", "5"]
        main(["bench", "serve", *flags, "--prompt-words", "5", "--json"])
        printed = json.loads(capsys.readouterr().out)
        assert {"requests", "errors", "output_tokens_per_second", "ttft_ms", "tpot_ms"} <= printed.keys()
        assert (printed["requests"], printed["errors"], set(printed["ttft_ms"])) == (4, 0, {"p50", "p99"})
        assert [one["concurrency"] for one in printed["levels"]] == [1, 2]
        main(["bench", "serve", *flags, "--prompt-words", "5"])
        assert "knee at concurrency" in capsys.readouterr().out
        with pytest.raises(RunError, match=r"no answer came: HTTP 404: .*the model 'other' is not served here"):
            measure(Load(url=server.url + "/v1", model="other"))
    assert sorted(told)[-1] == 9


class Odd(http.server.BaseHTTPRequestHandler):
    """Streams without usage, refuses every third request, breaks off every fourth."""

    protocol_version = "HTTP/1.1"
    seen = 0

    def do_POST(self) -> None:
        Odd.seen += 1
        number = Odd.seen
        asked: dict[str, Any] = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        if number % 3 == 0:
            self.send_response(429)
            self.send_header("Content-Length", "4")
            self.end_headers()
            self.wfile.write(b"busy")
            return
        self.send_response(200)
        self.send_header("Connection", "close")
        self.end_headers()
        for _ in range(asked["max_tokens"]):
            self.wfile.write(b'data: {"choices": [{"text": "a"}]}\n\n')
        self.wfile.write(b'data: {"error": "broke"}\n\n' if number % 4 == 0 else b"data: [DONE]\n\n")
        self.close_connection = True

    def log_message(self, format: str, *args: Any) -> None:
        pass


@pytest.fixture
def odd() -> Iterator[str]:
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Odd)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    server.server_close()


def test_errors_are_counted_and_pieces_where_usage_is_missing(odd: str) -> None:
    level = measure(Load(url=odd, model="m", requests=12, output_tokens=5, rate=500.0))
    assert (level.requests, level.errors) == (12, 4 + 2)  # every third, and of the others every fourth
    assert level.output_tokens == 6 * 5
    assert level.first_error == "HTTP 429: busy"


def test_nobody_there() -> None:
    with pytest.raises(RunError, match="no answer came: ConnectionRefusedError"):
        measure(Load(url="http://127.0.0.1:9", model="m"))


@pytest.mark.parametrize(
    ("changed", "line"),
    [
        ({"url": "localhost:8000"}, "bench serve: url: 'localhost:8000' is no address; as http://127.0.0.1:8000"),
        ({"concurrency": 0}, "bench serve: concurrency: 0 is out of range; give 1 or more"),
        ({"model": ""}, "bench serve: model: is missing; give the server's name for it: see /v1/models"),
        ({"requests": -1}, "bench serve: requests: is negative"),
    ],
)
def test_bad_input(changed: dict[str, Any], line: str) -> None:
    with pytest.raises(InputError) as caught:
        Load(**{"url": "http://a", "model": "m"} | changed)
    assert str(caught.value) == line


def test_levels_are_numbers() -> None:
    with pytest.raises(InputError, match="bench serve: concurrency: '1;2' is no number; as 8, or 1,4,16"):
        levels(url="http://a", model="m", concurrency="1;2")


def test_percentiles_and_the_knee() -> None:
    assert Percentiles.of([]) is None
    assert Percentiles.of([0.003]) == Percentiles(3.0, 3.0)
    assert Percentiles.of([i / 1000 for i in range(100)]) == Percentiles(50.0, 99.0)

    def level(concurrency: int, speed: float) -> Level:
        return Level(concurrency=concurrency, rate=0.0, requests=1, errors=0, seconds=1.0, prompt_tokens=1, output_tokens=1,
                     output_tokens_per_second=speed, ttft_ms=None, tpot_ms=None)  # fmt: skip

    assert knee([level(1, 50), level(4, 95), level(16, 100)]).concurrency == 4
