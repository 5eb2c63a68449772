"""The verbs that predict and measure: plan, probe, bench."""

from __future__ import annotations

import functools
from typing import Annotated, Literal

import tyro
from tyro.conf import Positional, UseAppendAction, arg

from fiveply.command import Flag, app, command, finish
from fiveply.spec.errors import InputError, RunError

bench = tyro.extras.SubcommandApp()


@command
def plan(
    model: Annotated[Positional[str], arg(metavar="MODEL")] = "",
    /,
    *,
    cluster: str,
    seq: int = 0,
    batch_tokens: str = "",
    precision: Literal["fp32", "tf32", "bf16", "fp16", "fp8", "fp4"] = "bf16",
    objective: Literal["time", "cost", "devices"] = "time",
    fix: UseAppendAction[tuple[str, ...]] = (),
    max: UseAppendAction[tuple[str, ...]] = (),
    why: UseAppendAction[tuple[str, ...]] = (),
    emit: str = "",
    explain_megatron: str = "",
    out: str = "run.plan",
    html: str = "",
    serve: Flag = False,
    prompt: int = 0,
    output: int = 0,
    ttft: float = 0.0,
    tpot: float = 0.0,
    rate: float = 0.0,
    json: Flag = False,
) -> None:
    """Find the best layout of a model on a cluster: ranked, with its step time, memory, and the reasons.

    fiveply plan llama-3.1-8b --cluster h100:8 --seq 8192 --batch-tokens 4M

    fiveply plan path/to/config.json --cluster cluster.toml --seq 4096 --batch-tokens 1M --fix tp=8 --max pp=4 --why tp=2

    fiveply plan llama-3.1-70b --cluster h100:64 --seq 8192 --batch-tokens 4M --emit megatron

    fiveply plan llama-3.1-8b --cluster h100:8 --serve --prompt 1024 --output 256 --ttft 0.5 --tpot 0.03

    Args:
        model: A preset, a config.json, or a Hugging Face directory.
        cluster: Devices as NAME:COUNT (h100:64, cpu:4), or a file that fiveply probe wrote.
        seq: Tokens of a row.
        batch_tokens: Tokens of a global batch; 4M is 4 x 2^20.
        precision: Of the computation.
        objective: time of a step, cost (device-seconds) of a token, or the fewest devices that do.
        fix: Hold a key of the layout at a value, as tp=8; may be given several times.
        max: Hold a key of the layout at or below a value, as pp=4.
        why: Say why the plan is not so, as tp=2 or tp=2,pp=4.
        emit: Print the plan as another system's flags or configuration (megatron, torchtitan, deepspeed, accelerate, vllm).
        explain_megatron: Megatron-LM arguments, or a file of them: say their predicted time and memory, and what to change
            within --fix and --max.
        out: The plan file to write, which every verb takes where it takes a layout.
        html: A self-contained page to write.
        serve: Plan for serving: layout, replicas and requests together within a bound on latency.
        prompt: Tokens of a prompt, with --serve.
        output: Tokens of an answer, with --serve.
        ttft: Most seconds to the first token, waiting included, with --serve.
        tpot: Most seconds for each token after it, with --serve.
        rate: Requests that arrive each second, with --serve: the fewest devices that do; else all answer as many as they can.
        json: Print the result as one JSON object on standard output.
    """
    from fiveply import planning

    if explain_megatron:
        found = planning.megatron(explain_megatron, cluster, fix=fix, most=max)
        finish(found, json, found["text"])
        return
    asked = {"--prompt": prompt, "--output": output, "--ttft": ttft, "--tpot": tpot, "--rate": rate}
    trained = {"--seq": seq, "--batch-tokens": batch_tokens}
    strange = {**trained, "--emit": emit, "--html": html} if serve else asked
    for flag in (flag for flag, given in strange.items() if given):
        raise InputError(f"{flag} is not for plans {'of' if serve else 'without'} --serve", where="fiveply plan",
                         fix="leave one of them out")  # fmt: skip
    needed = {"--prompt": prompt, "--output": output} if serve else trained
    for flag, given in {"MODEL": model, **needed}.items():
        if not given:
            raise InputError(f"{flag} is missing", where="fiveply plan", fix="see fiveply plan --help")
    if serve:
        found = planning.serving(
            model, cluster, prompt=prompt, output=output, ttft=ttft, tpot=tpot, rate=rate, precision=precision, fix=fix,
            most=max, wishes=why, out=out, json=json,
        )  # fmt: skip
        finish(found, json)
        return
    values = planning.plan(
        model, cluster, sequence=seq, batch_tokens=batch_tokens, precision=precision, objective=objective, fix=fix,
        most=max, wishes=why, emit=emit, out=out, html=html, json=json,
    )  # fmt: skip
    finish(values, json)


@command
def probe(*, out: str = "cluster.toml", backend: Literal["auto", "shm", "gloo"] = "auto", json: Flag = False) -> None:
    """Measure this machine (products, attention, memory, collectives between its ranks), and write it as a cluster.

    fiveply probe

    fiveply plan 2m --cluster cluster.toml --seq 128 --batch-tokens 2k

    Args:
        out: The file to write; layout=auto reads cluster.toml where it stands.
        backend: What CPU ranks talk through; auto is shared memory between those of one host, and gloo else.
        json: Print the figures as one JSON object on standard output.
    """
    from fiveply import probe as probing

    found = probing.probe(out, transport=backend)
    finish(found, json, f"wrote {out} in {found['seconds']:.0f} s: {found['devices']} of {found['name']}")


@functools.partial(command, of=bench, name="plan")
def bench_plan(
    *,
    table: str = "",
    json: Flag = False,
) -> None:
    """Score the planner on a table of published measurements: step time, memory, ranking of layouts.

    fiveply bench plan --table measurements.csv

    Args:
        table: A CSV with the columns of the shipped table (src/fiveply/plan/published.csv), which is the default; or one of
            serving measurements, known by its tpot_ms: then the time per token is scored.
        json: Print the score, with one prediction a row, as one JSON object on standard output.
    """
    from rich.console import Console

    from fiveply import bench as benches
    from fiveply.plan import inference_score, score

    if table and inference_score.is_table(table):
        serving = inference_score.score(table)
        finish(serving, json, lambda: benches.show_serving(serving, Console()))
    else:
        training = score.score(table)
        finish(training, json, lambda: benches.show(training, Console()))


@functools.partial(command, of=bench, name="serve")
def bench_serve(
    *,
    url: str,
    model: str,
    concurrency: str = "",
    rate: str = "",
    prompt_tokens: int = 128,
    output_tokens: int = 128,
    requests: int = 0,
    api_key: str = "",
    timeout: float = 300.0,
    seed: int = 0,
    json: Flag = False,
) -> None:
    """Put load on a server of OpenAI's API: tokens a second, time to the first token and per token, errors, and the knee.

    fiveply bench serve --url http://127.0.0.1:8000 --model NAME --concurrency 1,4,16

    fiveply bench serve --url http://127.0.0.1:8000 --model NAME --rate 0.5,1,2,4 --json

    Args:
        url: The server's address; /v1 is added to one that names no path.
        model: What the server calls the model.
        concurrency: Clients that ask again as soon as they are answered, several numbers with commas between; 1 by default. With
            --rate, the most requests in flight.
        rate: Requests that arrive each second, by a Poisson process; several with commas between.
        prompt_tokens: Tokens of each prompt: random, each prompt its own.
        output_tokens: Tokens of each answer.
        requests: For each concurrency or rate; by default four for each client, or half a minute of arrivals.
        api_key: Sent as a bearer token.
        timeout: Seconds until a request is given up.
        seed: Of prompts and arrivals.
        json: Print one JSON object on standard output: the figures of the only point, or of the knee, and all points.
    """
    from rich.console import Console

    from fiveply import load_test

    points = load_test.measure(
        url, model, concurrencies=concurrency, rates=rate, requests=requests, prompt_tokens=prompt_tokens,
        output_tokens=output_tokens, key=api_key, timeout=timeout, seed=seed,
    )  # fmt: skip
    finish(load_test.as_json(points), json, lambda: load_test.show(points, Console()))
    if all(point.errors == point.requests for point in points):
        raise RunError("no request was answered")


app.command(bench, name="bench", help="Score the planner (bench plan), or measure a server under load (bench serve).")
