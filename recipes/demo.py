"""The main job, end to end: train a small decoder on real text over 4 local ranks, resume under another layout, generate,
serve for a moment, report.

Run by `make demo`. Four ranks on a machine of two cores are oversubscribed: this shows what the axes do, not how fast they
can be. An earlier runs/demo is replaced.
"""

from __future__ import annotations

import json
import math
import shutil
import subprocess
import sys
import tempfile
import time
import urllib.request
from pathlib import Path

RUN = Path("runs/demo")
FILE = Path(__file__).with_name("demo.toml")
FIVEPLY = [sys.executable, "-m", "fiveply.cli"]
LEAVE_OFF, RESUMED_LAYOUT, SERVED_LAYOUT = 240, "dp=2,tp=2,zero=1", "pp=2"
TRIED_STEPS = 12
"""Of the planner's pick."""


def main() -> None:
    begun = time.perf_counter()
    shutil.rmtree(RUN, ignore_errors=True)
    say(f"1. Train: {FILE.name}, data x pipeline parallel, up to step {LEAVE_OFF}")
    first = fiveply("train", str(FILE), "--set", f"train.stop_at={LEAVE_OFF}", "--json")
    say(f"2. Resume from the same checkpoint under another layout: {RESUMED_LAYOUT}")
    last = fiveply("train", str(FILE), "--resume", "--layout", RESUMED_LAYOUT, "--json")
    say("3. Generate from the checkpoint, on one process")
    answer = fiveply("generate", str(RUN), "--prompt", "ROMEO.\n", "--max-tokens", "120", "--temperature", "0.7", "--seed", "1",
                     "--json")  # fmt: skip
    print("ROMEO.\n" + answer["completions"][0]["text"])
    say(f"4. Serve it as {SERVED_LAYOUT} and ask one question over HTTP, as any client of OpenAI's API would")
    serve_one_question()
    say("5. Report, and the planner's own pick for this machine")
    report = fiveply("report", str(RUN), "--json")["report"]

    lines = planned([first, last])
    vocabulary = json.loads((RUN / "facts.json").read_text())["model"]["vocabulary"]
    print(f"loss            {math.log(vocabulary):.2f} nats per token at random, {first['loss']:.3f} at step {first['step']}, "
          f"{last['loss']:.3f} at step {last['step']}")  # fmt: skip
    print(
        f"held-out text   {last['held_out_loss']:.3f} nats per token, {last['bits_per_character']:.3f} bits per character"
    )
    print(f"layouts         {first['layout']} at {first['tokens_per_second']:,.0f} tokens/s, then")
    print(f"                {last['layout']} at {last['tokens_per_second']:,.0f} tokens/s")
    for number, line in enumerate(lines):
        print(f"{'' if number else 'planner':15} {line}")
    print(f"report          {report}")
    print(f"time            {time.perf_counter() - begun:.0f} s")


def planned(runs: list[dict[str, object]]) -> list[str]:
    """Lines: the planner's own pick for this machine and why; what it, and the layouts of `runs`, were expected to take and
    took."""
    from fiveply.spec.layout import Layout
    from fiveply.spec.run import RunSpec
    from fiveply.train import auto, setup

    run = RunSpec.load(FILE)
    spec, dtypes = run.model_spec(), setup.dtypes(run.precision)
    batch = {"sequence": run.data.sequence, "global_batch": run.train.global_batch}
    answer = auto.plan(spec, auto.cluster(), dtypes, **batch)
    lines = [auto.reason(answer)]
    for shown in [tried(str(answer.ranked[0].prediction.layout)), *runs]:
        expected = auto.predicted(spec, Layout.parse(shown["layout"]), dtypes, **batch)
        took = run.data.sequence * run.train.global_batch / shown["tokens_per_second"]
        if expected:
            lines.append(
                f"{shown['layout']}: {expected['seconds']['p50']:.2f} s a step expected, {took:.2f} s measured"
            )
    if not auto.MEASURED.is_file():
        lines.append("by what is known of any CPU: `fiveply probe` measures this one")
    return lines


def tried(layout: str) -> dict[str, object]:
    """A few steps under the planner's pick, in a run that is not kept."""
    with tempfile.TemporaryDirectory() as folder:
        settings = [f"folder={folder}", f"train.steps={TRIED_STEPS}", "train.evaluate_batches=1", "train.record=0"]
        return fiveply("train", str(FILE), "--layout", layout, "--json",
                       *(part for setting in settings for part in ("--set", setting)))  # fmt: skip


def fiveply(*args: str) -> dict[str, object]:
    """Run a verb with its progress on this terminal; its JSON result. A failure ends the demo with the verb's exit code."""
    shown = subprocess.run([*FIVEPLY, *args], stdout=subprocess.PIPE, text=True)
    if shown.returncode:
        raise SystemExit(shown.returncode)
    return json.loads(shown.stdout)


def serve_one_question() -> None:
    """Start the server at a free port, wait until it is ready, ask, and end it as Ctrl-C would."""
    command = [*FIVEPLY, "serve", str(RUN), "--layout", SERVED_LAYOUT, "--port", "0"]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as server:
        assert server.stderr is not None
        try:
            ready = next((line for line in server.stderr if " is ready at " in line), "")
            if not ready:
                raise SystemExit(server.wait() or 1)
            url = ready.split(" is ready at ")[1].split()[0]
            body = json.dumps({"prompt": "HAMLET.\n", "max_tokens": 40, "temperature": 0.7, "seed": 1}).encode()
            request = urllib.request.Request(f"{url}/v1/completions", body, {"Content-Type": "application/json"})
            begun = time.perf_counter()
            with urllib.request.urlopen(request, timeout=60) as answer:
                told = json.load(answer)
            print("HAMLET.\n" + told["choices"][0]["text"])
            tokens, seconds = told["usage"]["completion_tokens"], time.perf_counter() - begun
            print(f"\n{tokens} tokens from {url} in {seconds:.2f} s")
        finally:
            server.terminate()


def say(text: str) -> None:
    print(f"\n{text}\n", flush=True)


if __name__ == "__main__":
    main()
