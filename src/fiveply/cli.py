"""The command line: each verb is one function whose parameters are its flags, and one call into the library.

Exit codes: 0 done, 1 a check or a run failed, 2 bad usage or input, in one line on standard error. With `--json` one JSON
object goes to standard output and nothing else.
"""

from __future__ import annotations

import contextlib
import functools
import io
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any, Literal

from tyro.conf import Positional, UseAppendAction, arg

import fiveply
from fiveply import cli_measure  # noqa: F401  (registers plan, probe and bench)
from fiveply.command import Flag, app, command, finish
from fiveply.spec.errors import FiveplyError, InputError
from fiveply.world.allocator import keep_freed_memory


@command
def train(
    run: Annotated[Positional[str], arg(metavar="RUN.toml")] = "",
    /,
    *,
    layout: str = "",
    resume: Flag = False,
    set: UseAppendAction[tuple[str, ...]] = (),
    model: str = "",
    init_from: str = "",
    data: str = "",
    steps: int = 0,
    name: str = "",
    backend: Literal["auto", "shm", "gloo"] = "auto",
    record: int | None = None,
    profile: str = "",
    memory_snapshot: Flag = False,
    hang_timeout: float | None = None,
    dry_run: Flag = False,
    ranks: str = "",
    json: Flag = False,
) -> None:
    """Train a language model under a layout, from a run's TOML file or from flags alone; or start a script of your own.

    fiveply train run.toml --layout dp=2,pp=2

    fiveply train script.py --layout dp=2,tp=2,pp=2 [the script's arguments]

    fiveply train --model 15m --data my.txt --layout dp=2,tp=2 --steps 200

    fiveply train run.toml --resume --layout tp=2

    fiveply train run.toml --layout dp=128,tp=8,pp=16 --dry-run --ranks 0,16383

    Keys of the file, all with defaults: name, folder, seed, layout; [model] preset, init_from, overrides; [data] corpus,
    tokenizer, sequence, held_out, respect_documents, folder; [train] steps, until, patience, global_batch, sync_every,
    compile, evaluate_every, evaluate_batches, checkpoint_every, stop_at, keep_checkpoints,
    log_every, record, profile, memory_snapshot, hang_timeout; [optimizer] name, lr, betas,
    eps, weight_decay, decay_all, clip, warmup, schedule, decay_share, final_share; [precision] parameters, reduce, optimizer.

    Args:
        run: The run's TOML file; leave it out to train with the flags below. A .py file is started on each rank.
        layout: How to split, as dp=2,tp=2,pp=2 (keys: dp tp pp zero dp_shard schedule vp stages micro_batch recompute sp),
            or a .plan file.
        resume: Go on from the run's newest intact checkpoint, under its recorded layout unless --layout is given.
        set: Override a key of the file, as train.steps=100; may be given several times.
        model: A preset (tiny, 2m, 15m, 60m, 150m, 1b), a config.json, or a Hugging Face directory.
        init_from: A Hugging Face directory or a checkpoint whose model and weights training starts from.
        data: A .txt, a .jsonl, a directory, `shakespeare`, or datasets:NAME.
        steps: Optimiser steps.
        name: Names the run's directory, runs/NAME.
        backend: What CPU ranks talk through; auto is shared memory between those of one host, and gloo else.
        record: The step that is recorded on every rank, for the report's timeline; 10 by default, 0 for none.
        profile: Steps that torch's profiler watches, as 10:12; written to runs/NAME/profile.
        memory_snapshot: Write what each rank's memory holds to runs/NAME/memory, after the recorded step.
        hang_timeout: Seconds that no rank goes on until the run ends with a report of who waits for whom; 300 by default,
            0 for never.
        dry_run: Train nothing: go through one step of some ranks without values; print bytes, collectives and operations.
        ranks: Those of a dry run, as 0,17,16383; the first and the last by default.
        json: Print the result as one JSON object on standard output.
    """
    from fiveply.spec.run import RunSpec
    from fiveply.train import setup, trainer

    given: dict[str, Any] = {
        "model.preset": model,
        "model.init_from": init_from,
        "data.corpus": data,
        "train.steps": steps or None,
        "name": name,
        "layout": layout,
        "train.record": record,
        "train.profile": profile,
        "train.memory_snapshot": memory_snapshot or None,
        "train.hang_timeout": hang_timeout,
    }
    if not run and not (model or init_from or data):
        raise InputError("nothing to train", where="fiveply train", fix="give a RUN.toml, or --model and --data")
    settings = [*set, *(f"{key}={_toml(value)}" for key, value in given.items() if value not in (None, ""))]
    if not run:
        settings.insert(0, f'name="{Path(init_from or model or "2m").stem}-{Path(data or "shakespeare").stem}"')
    spec = RunSpec.load(run or None, settings)
    if dry_run:
        from fiveply.train import dry_run as dry

        found = dry.of_run(spec, layout, ranks)
        finish(found, json, lambda: dry.show(found))
        return
    ready = setup.ready(spec, resume=resume, layout=layout or None, progress=sys.stderr.isatty(), transport=backend)
    finish(trainer.train(ready), json)


@command
def verify(
    *,
    layout: str,
    against: str = "dp=1",
    model: str = "tiny",
    steps: int = 2,
    dtype: Literal["float64", "float32"] = "float64",
    seed: int = 0,
    sync_every: int = 0,
    backend: Literal["auto", "shm", "gloo"] = "auto",
    json: Flag = False,
) -> None:
    """Prove that a layout computes what another does: train both, compare initial parameters, loss, gradients, parameters.

    fiveply verify --layout dp=2,tp=2,pp=2,schedule=1f1b --against dp=1

    fiveply verify --layout tp=3 --model path/to/config.json

    Exit code 0 if every difference is within tolerance, else 1.

    Args:
        layout: The layout under test.
        against: The layout it must equal; one device by default.
        model: A preset, a config.json, or a Hugging Face directory.
        steps: Optimiser steps to compare.
        dtype: Precision of everything; parameters after steps are judged in float64 alone.
        seed: Of parameters, data and dropout.
        sync_every: Let replicas step alone and average parameters every so many steps (1, with plain gradient steps).
        backend: What ranks talk through; auto is shared memory between those of one host, and gloo else.
        json: Print the result as one JSON object on standard output.
    """
    from fiveply import equality

    result = equality.verify(
        layout, against, model=model, steps=steps, dtype=dtype, seed=seed, sync_every=sync_every, transport=backend
    )
    print(equality.table(result), file=sys.stderr if json else sys.stdout)
    finish(result, json)
    if not result["pass"]:
        raise SystemExit(1)


@command
def generate(
    model: Annotated[Positional[str], arg(metavar="MODEL")],
    /,
    *,
    prompt: str = "",
    prompts: str = "",
    max_tokens: int = 64,
    temperature: float = 0.0,
    top_k: int = 0,
    top_p: float = 1.0,
    seed: int = 0,
    layout: str = "dp=1",
    quantize: Literal["none", "int8", "int4"] = "none",
    out: str = "",
    json: Flag = False,
) -> None:
    """Continue text with a trained model; without a prompt, a conversation in the terminal.

    fiveply generate runs/demo --prompt "ROMEO:" --max-tokens 100 --temperature 0.8

    fiveply generate path/to/huggingface --prompts prompts.jsonl --layout dp=2 --out answers.jsonl

    Args:
        model: A run's directory, a checkpoint, or a Hugging Face directory.
        prompt: The text to continue.
        prompts: A .jsonl file with "prompt" (text) or "tokens" (ids) on each line.
        max_tokens: Most tokens to generate.
        temperature: 0 takes the likeliest token always.
        top_k: Sample among the k likeliest tokens; 0 for all.
        top_p: Sample among the likeliest tokens that together have this probability.
        seed: Of the sampling.
        layout: How to split, as dp=2,tp=2,pp=2: replicas, tensor ranks, stages; auto plans for the devices found.
        quantize: int8 keeps the matrices of products in 8 bits, a scale a row: a quarter of float32's bytes to hold and to read at
            each token; int4, for GPUs, in 4 and a little more. It is another model: logits move, in 4 bits more (docs/serving.md).
        out: A .jsonl file that completions are added to as they end; what it has already is not made again.
        json: Print the result as one JSON object on standard output.
    """
    from fiveply import generate as generation

    settings: dict[str, Any] = {
        "max_tokens": max_tokens, "temperature": temperature, "top_k": top_k, "top_p": top_p, "seed": seed, "layout": layout,
        "quantize": quantize,
    }  # fmt: skip
    if not (prompt or prompts or json) and sys.stdin.isatty():
        generation.converse(model, **settings)
        return
    result = generation.run(
        model,
        prompt=prompt or None,
        prompts=Path(prompts) if prompts else None,
        out=Path(out) if out else None,
        **settings,
    )
    texts = [f"{prompt}{completion['text']}" for completion in result["completions"]]
    finish(result, json, lambda: print(*texts, sep="\n"))


@command
def serve(
    model: Annotated[Positional[str], arg(metavar="MODEL")],
    /,
    *,
    layout: str = "",
    plan: str = "",
    port: int = 8000,
    host: str = "127.0.0.1",
    name: str = "",
    dtype: Literal["auto", "float32", "bfloat16", "float64"] = "auto",
    quantize: Literal["none", "int8", "int4"] = "none",
    cache_tokens: int = 0,
    most_running: int = 0,
    most_waiting: int = 256,
    step_tokens: int = 512,
    no_prefix_cache: Flag = False,
    guess: int = 0,
    api_keys: str = "",
    origins: str = "",
    backend: Literal["auto", "shm", "gloo"] = "auto",
) -> None:
    """Serve a model over HTTP, as OpenAI's API has it, with a chat page at /.

    fiveply serve path/to/huggingface --layout tp=2

    fiveply serve runs/demo --layout dp=2,pp=2 --port 8001

    Args:
        model: A run's directory, a checkpoint, or a Hugging Face directory.
        layout: How to split, as dp=2,tp=2,pp=2: replicas, tensor ranks, stages; auto plans for the devices found. One rank by
            default.
        plan: A file that fiveply plan --serve wrote: its layout, and its requests as --most-running.
        port: Where to listen; 0 takes a free one.
        host: Loopback by default: only this machine can reach it.
        name: What the API calls the model; its directory's name by default.
        dtype: Of weights and cache; auto is bfloat16 where this machine is fast at it, else float32.
        quantize: int8 keeps the matrices of products in 8 bits, a scale a row: a quarter of float32's bytes to hold and to read at
            each token; int4, for GPUs, in 4 and a little more. It is another model: logits move, in 4 bits more (docs/serving.md).
        cache_tokens: Tokens that each replica's key-value cache holds; by default what memory allows.
        most_running: Requests that a replica decodes together; the plan's, or 64.
        most_waiting: Requests beyond those; more are refused with 429.
        step_tokens: Most tokens in one step; longer prompts are taken in chunks.
        no_prefix_cache: Do not reuse the cache of prompts that begin alike.
        guess: Tokens guessed ahead for each answer, from what followed its latest tokens before: fewer steps where answers
            repeat their prompts, the same text in any case.
        api_keys: A file with a key on each line; requests must bring one.
        origins: Sites whose pages may ask from a browser, as https://a.example,https://b.example; the server's own may always.
        backend: What CPU ranks talk through; auto is shared memory between those of one host, and gloo else.
    """
    from fiveply import service
    from fiveply.serve.driver import Settings
    from fiveply.spec.plan import Plan

    if plan and layout:
        raise InputError("both --plan and --layout", where="serve", fix="give one of them")
    for flag, value, least in (
        ("--cache-tokens", cache_tokens, 0), ("--most-running", most_running, 0), ("--most-waiting", most_waiting, 1),
        ("--step-tokens", step_tokens, 1), ("--guess", guess, 0),
    ):  # fmt: skip
        if value < least:
            raise InputError(f"{value} is too small", where=flag, fix=f"give {least} or more")
    given = Plan.load(plan) if plan else None
    layout = given.layout if given else layout or "dp=1"
    together = most_running or (given.requests if given else 0) or Settings().most_running
    settings = Settings(
        most_running=together, most_waiting=most_waiting, step_tokens=step_tokens, reuse=not no_prefix_cache,
        guesses=guess,
    )  # fmt: skip
    served = service.Served.load(model, layout, dtype, cache_tokens, backend, quantize)
    keys = Path(api_keys) if api_keys else None
    name = name or Path(model).resolve().name
    others = [one.strip() for one in origins.split(",") if one.strip()]
    service.serve(served, settings, name=name, host=host, port=port, keys=keys, origins=others)


@command
def convert(
    source: Annotated[Positional[str], arg(metavar="SOURCE")],
    folder: Annotated[Positional[str], arg(metavar="DIR")],
    /,
    *,
    json: Flag = False,
) -> None:
    """Write a Hugging Face directory from a GGUF file, or from a checkpoint.

    fiveply convert model.gguf DIR

    fiveply convert runs/demo DIR

    Args:
        source: A .gguf file, a run's directory, or a checkpoint.
        folder: The new directory.
        json: Print the result as one JSON object on standard output.
    """
    from fiveply.checkpoint import gguf, huggingface, store

    if Path(source).is_dir():
        run = Path(source) / "checkpoints"
        huggingface.export(store.Checkpoint.open(run if run.is_dir() else source), Path(folder))
    else:
        gguf.convert(Path(source), Path(folder))
    finish({"folder": folder}, json, f"wrote {folder}")


@command
def report(
    run: Annotated[Positional[str], arg(metavar="RUN")],
    /,
    *,
    out: str = "",
    recalibrate: Flag = False,
    json: Flag = False,
) -> None:
    """Draw a run as one self-contained HTML file: curves, ranks, schedule, recorded steps, memory.

    fiveply report runs/demo

    Recorded steps are written for ui.perfetto.dev too, to runs/NAME/timeline.perfetto.json.

    Args:
        run: The run's directory.
        out: The file to write; runs/NAME/report.html by default.
        recalibrate: Change cluster.toml, which layout=auto plans with, such that the recorded step would have been predicted.
        json: Print the result as one JSON object on standard output.
    """
    from fiveply.report import page

    path = page.write_report(Path(run), Path(out) if out else None)
    changed = ""
    if recalibrate:
        from fiveply import probe as probing

        changed = probing.recalibrate(Path(run))
        print(changed, file=sys.stderr)
    finish({"report": str(path), "recalibrated": changed}, json, f"wrote {path}")


def main(args: list[str] | None = None) -> None:
    """Entry point of the `fiveply` command."""
    keep_freed_memory()
    args = sys.argv[1:] if args is None else args
    if args == ["--version"]:
        print(fiveply.__version__)
        return
    try:
        _parse(args)()
    except FiveplyError as error:
        print(f"fiveply: {error}", file=sys.stderr)
        raise SystemExit(error.exit_code) from None
    except KeyboardInterrupt:
        print("fiveply: interrupted", file=sys.stderr)
        raise SystemExit(1) from None
    except BrokenPipeError:
        raise SystemExit(1) from None


def _parse(args: list[str]) -> Callable[[], None]:
    """The verb bound to its flags; bad usage raises InputError with the parser's box folded into one line."""
    if args[:1] == ["train"] and any(arg.endswith(".py") for arg in args):
        from fiveply import script

        if (place := script.find(args[1:])) is not None:
            own = args[1:]
            return functools.partial(script.run, own.pop(place), own)
    box = io.StringIO()
    try:
        with contextlib.redirect_stderr(box):
            return app.cli(prog="fiveply", args=_spread_settings(args or ["--help"]), description=fiveply.__doc__)
    except SystemExit as stop:
        if stop.code in (0, None):
            raise
        lines = [line.strip("│╭╮╰╯ \n") for line in box.getvalue().splitlines()]
        problem = [line for line in lines[1:] if line]
        end = next((index for index, line in enumerate(problem) if set(line) == {"─"}), len(problem))
        text = re.sub(r"\s+", " ", " ".join(problem[:end])).rstrip(".")
        verb = f" {args[0]}" if args and args[0] in verbs() else ""
        raise InputError(text, fix=f"see fiveply{verb} --help") from None


def verbs() -> list[str]:
    return ["train", "plan", "verify", "generate", "serve", "convert", "probe", "report", "bench"]


def _spread_settings(args: list[str]) -> list[str]:
    """`--set a=1 b=2` as `--set a=1 --set b=2`."""
    spread: list[str] = []
    inside = False
    for value in args:
        if inside and (value.startswith("-") or "=" not in value):
            inside = False
        if inside and spread[-1] != "--set":
            spread.append("--set")
        inside = inside or value == "--set"
        spread.append(value)
    return spread


def _toml(value: Any) -> str:
    return str(value).lower() if isinstance(value, (int, float)) else f'"{value}"'


if __name__ == "__main__":
    main()
