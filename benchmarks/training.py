"""fiveply's training step beside its peers' at the same split: one process, and data, tensor and pipeline parallel on two ranks.

    python benchmarks/training.py [--dtype float32] [--rounds 3] [--json FILE] [--only tp=2]
    python benchmarks/training.py --growth              how fiveply's cost grows with sequence, layers and micro-batches

The `15m` preset, 16 rows of 256 tokens, AdamW, clipping, the same batches, in float32 and, where the processor is fast at it,
in bfloat16. All contenders of one world stand in one set of processes and step in turn, so that a machine that slows down
slows all; ranks x threads = cores. Each is also set beside the bound that the matrix products of its linear layers and head
alone give, at its ranks' own shapes, measured in the same rounds. One more step of fiveply's is recorded, and its shares are
printed by rank. Peak memory is of each alone in fresh processes, of the rank that needs most. In bfloat16, peers use
autocast over float32 parameters (fully_shard and DeepSpeed their own mixed precision). A peer that is not installed is left
out, and said so.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from plain_llama import Llama, loss_of
from torch import Tensor, nn

from fiveply import timeline
from fiveply.corpus.batches import Batches, TokenFile
from fiveply.parallel.data_parallel import Dtypes
from fiveply.parallel.parallelize import products_on
from fiveply.spec.architecture import ModelSpec
from fiveply.spec.layout import Layout
from fiveply.spec.legality import resolve
from fiveply.spec.run import Optimizer, RunSpec, Train
from fiveply.train.job import Job
from fiveply.train.observe import Observer
from fiveply.world import device
from fiveply.world.allocator import keep_freed_memory
from fiveply.world.launch import launch
from fiveply.world.mesh import Groups, Mesh

ROWS, SEQUENCE = 16, 256
Step = Callable[[int], object]


@dataclass(frozen=True)
class Bench:
    """What all contenders share on this rank."""

    spec: ModelSpec
    dtype: torch.dtype
    sequence: int
    batches: Batches
    groups: Groups

    @property
    def rank(self) -> int:
        return dist.get_rank()

    def rows(self, index: int, parts: int = 1, part: int = 0) -> tuple[Tensor, Tensor]:
        """Tokens and targets of one part of the global batch."""
        rows, size = self.batches.batch(index), ROWS // parts
        own = slice(part * size, (part + 1) * size)
        return torch.from_numpy(rows.tokens[own]), torch.from_numpy(rows.targets[own])

    def autocast(self) -> Any:
        return torch.autocast("cpu", self.dtype, enabled=self.dtype != torch.float32)


class Ours:
    """fiveply's step."""

    def __init__(self, job: Job, batches: Batches) -> None:
        self.job, self.batches = job, batches

    def __call__(self, index: int) -> None:
        self.job.step(self.batches, index)

    def shares(self, index: int) -> dict[int, dict[str, float]]:
        """Where a recorded step's seconds go, by rank; known on rank 0."""
        with TemporaryDirectory() as folder:
            observer = Observer(Path(folder), self.job.model, print, recorded=1)
            with observer.step(1, self.job.executor.schedule):
                self(index)
            return {rank: shares for path in timeline.recorded_steps(Path(folder))
                    for rank, shares in timeline.shares(timeline.read(path)).items()}  # fmt: skip


def ours(layout: str, *, compile: bool = False) -> Callable[[Bench], Step]:
    def make(bench: Bench) -> Step:
        resolved = resolve(Layout.parse(layout), bench.spec, sequence=bench.sequence, global_batch=ROWS)
        run = RunSpec(name="benchmark", train=Train(global_batch=ROWS, compile=compile), optimizer=Optimizer(lr=1e-4))
        mesh = Mesh(resolved, bench.spec, bench.groups)
        return Ours(Job(run, bench.spec, mesh, Dtypes(bench.dtype, torch.float32, torch.float32)), bench.batches)

    return make


def adamw(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.AdamW(model.parameters(), lr=1e-4, betas=(0.9, 0.95), weight_decay=0.1)


def usual_step(
    bench: Bench,
    model: nn.Module,
    parts: int = 1,
    optimizer: torch.optim.Optimizer | None = None,
    around: Callable[[], AbstractContextManager[object]] = nullcontext,
) -> Step:
    """Zero, forward, loss, backward, clip, step: the loop that most people write. `around`: loss and backward run in it."""
    optimizer = optimizer or adamw(model)

    def step(index: int) -> None:
        tokens, targets = bench.rows(index, parts, bench.rank if parts > 1 else 0)
        optimizer.zero_grad()
        with around():
            with bench.autocast():
                output = model(tokens)
            loss_of(getattr(output, "logits", output), targets).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()

    return step


def plain(bench: Bench) -> Step:
    return usual_step(bench, Llama(bench.spec, bench.sequence))


def compiled(bench: Bench) -> Step:
    return usual_step(bench, torch.compile(Llama(bench.spec, bench.sequence)))  # type: ignore[arg-type]


def transformers(bench: Bench) -> Step:
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    from transformers import AutoConfig, AutoModelForCausalLM

    config = dict(bench.spec.config)
    made = AutoModelForCausalLM.from_config(AutoConfig.for_model(config.pop("model_type"), **config))
    return usual_step(bench, made.float().train())


def ddp(bench: Bench) -> Step:
    return usual_step(bench, nn.parallel.DistributedDataParallel(Llama(bench.spec, bench.sequence)), parts=2)


def fully_sharded(bench: Bench) -> Step:
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

    model = Llama(bench.spec, bench.sequence)
    mixed = bench.dtype != torch.float32
    policy = MixedPrecisionPolicy(bench.dtype, torch.float32) if mixed else MixedPrecisionPolicy()
    mesh = dist.device_mesh.init_device_mesh("cpu", (2,))
    for block in model.layers.values():
        fully_shard(block, mesh=mesh, mp_policy=policy)
    fully_shard(model, mesh=mesh, mp_policy=policy)
    return usual_step(replace(bench, dtype=torch.float32), model, parts=2)  # its own mixed precision, not autocast


def zero_optimizer(bench: Bench) -> Step:
    """DDP with torch's ZeroRedundancyOptimizer: stage 1."""
    from torch.distributed.optim import ZeroRedundancyOptimizer

    model = nn.parallel.DistributedDataParallel(Llama(bench.spec, bench.sequence))
    optimizer = ZeroRedundancyOptimizer(
        model.parameters(), torch.optim.AdamW, lr=1e-4, betas=(0.9, 0.95), weight_decay=0.1
    )
    return usual_step(bench, model, parts=2, optimizer=optimizer)


def accelerated(bench: Bench) -> Step:
    from accelerate import Accelerator

    accelerator = Accelerator(cpu=True, mixed_precision="bf16" if bench.dtype == torch.bfloat16 else "no")
    model = Llama(bench.spec, bench.sequence)
    model, optimizer = accelerator.prepare(model, adamw(model))

    def step(index: int) -> None:
        tokens, targets = bench.rows(index, 2, bench.rank)
        optimizer.zero_grad()
        loss = loss_of(model(tokens), targets)
        accelerator.backward(loss)
        accelerator.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()

    return step


def deepspeed(stage: int) -> Callable[[Bench], Step]:
    def make(bench: Bench) -> Step:
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
        import deepspeed as library

        model = Llama(bench.spec, bench.sequence)
        config = {
            "train_micro_batch_size_per_gpu": ROWS // 2,
            "zero_optimization": {"stage": stage},
            "gradient_clipping": 1.0,
            "bf16": {"enabled": bench.dtype == torch.bfloat16},
            "zero_allow_untested_optimizer": True,
        }
        engine, *_ = library.initialize(model=model, optimizer=adamw(model), config=config, dist_init_required=False)  # type: ignore[misc]

        def step(index: int) -> None:
            tokens, targets = bench.rows(index, 2, bench.rank)
            engine.backward(loss_of(engine(tokens), targets))
            engine.step()

        return step

    return make


def dtensor(bench: Bench) -> Step:
    """Tensor parallel with sequence parallel and a vocabulary-parallel loss, as torch's tutorial and torchtitan plan it."""
    from torch.distributed.tensor import Replicate, Shard
    from torch.distributed.tensor.parallel import (
        ColwiseParallel,
        PrepareModuleInput,
        RowwiseParallel,
        SequenceParallel,
        loss_parallel,
        parallelize_module,
    )

    mesh = dist.device_mesh.init_device_mesh("cpu", (2,))
    model = Llama(bench.spec, bench.sequence)
    enter = PrepareModuleInput(input_layouts=(Shard(1),), desired_input_layouts=(Replicate(),))
    enter3 = PrepareModuleInput(input_layouts=(Shard(1), None, None), desired_input_layouts=(Replicate(), None, None))
    for block in model.layers.values():
        plan = {
            "attention_norm": SequenceParallel(),
            "attention": enter3,
            **{f"attention.w{name}": ColwiseParallel() for name in "qkv"},
            "attention.wo": RowwiseParallel(output_layouts=Shard(1)),
            "ffn_norm": SequenceParallel(),
            "feed_forward": enter,
            "feed_forward.w1": ColwiseParallel(),
            "feed_forward.w3": ColwiseParallel(),
            "feed_forward.w2": RowwiseParallel(output_layouts=Shard(1)),
        }
        parallelize_module(block, mesh, plan)
    parallelize_module(
        model,
        mesh,
        {
            "embed": RowwiseParallel(input_layouts=Replicate(), output_layouts=Shard(1)),
            "norm": SequenceParallel(),
            "output": ColwiseParallel(input_layouts=Shard(1), output_layouts=Shard(-1), use_local_output=False),
        },
    )
    return usual_step(bench, model, around=loss_parallel)


def pipelined(bench: Bench) -> Step:
    from torch.distributed.pipelining import PipelineStage, Schedule1F1B

    half = bench.spec.layers // 2
    own = range(half) if bench.rank == 0 else range(half, bench.spec.layers)
    model = Llama(bench.spec, bench.sequence, own)
    schedule = Schedule1F1B(PipelineStage(model, bench.rank, 2, torch.device("cpu")), 4, loss_fn=loss_of)
    optimizer = adamw(model)

    def step(index: int) -> None:
        tokens, targets = bench.rows(index)
        optimizer.zero_grad()
        with bench.autocast():
            if bench.rank == 0:
                schedule.step(tokens)
            else:
                schedule.step(target=targets, losses=[])
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()

    return step


# (ranks, layout) -> contenders, fiveply first.
FIELD: dict[tuple[int, str], dict[str, Callable[[Bench], Step]]] = {
    (1, "dp=1"): {
        "fiveply": ours("dp=1"),
        "fiveply compiled": ours("dp=1", compile=True),
        "PyTorch": plain,
        "PyTorch compiled": compiled,
        "transformers": transformers,
    },
    (2, "dp=2"): {"fiveply": ours("dp=2"), "DistributedDataParallel": ddp, "accelerate": accelerated,
                  "DeepSpeed": deepspeed(0)},
    (2, "dp=2,zero=1"): {"fiveply": ours("dp=2,zero=1"), "ZeroRedundancyOptimizer": zero_optimizer,
                         "DeepSpeed": deepspeed(1)},
    (2, "dp=2,zero=3"): {"fiveply": ours("dp=2,zero=3"), "fully_shard": fully_sharded, "DeepSpeed": deepspeed(3)},
    (2, "tp=2"): {"fiveply": ours("tp=2"), "DTensor": dtensor},
    (2, "pp=2"): {"fiveply": ours("pp=2"), "torch pipelining": pipelined},
}  # fmt: skip


def products_alone(bench: Bench, layout: str) -> Step:
    """The products of this rank's linear layers and head, forward and both gradients, at the shapes of the layout."""
    spec, tp = bench.spec, 2 if layout == "tp=2" else 1
    tokens = ROWS * bench.sequence // (2 if layout.startswith("dp=2") else 1)
    layers = spec.layers // 2 if layout == "pp=2" else spec.layers
    shapes = [(spec.hidden, spec.q_size // tp), (spec.hidden, spec.kv_size // tp), (spec.hidden, spec.kv_size // tp),
              (spec.q_size // tp, spec.hidden), (spec.hidden, spec.ffn // tp), (spec.hidden, spec.ffn // tp),
              (spec.ffn // tp, spec.hidden)] * layers  # fmt: skip
    chunks = [(tokens, shape) for shape in shapes]
    if layout != "pp=2" or bench.rank == 1:
        chunks += [(512, (spec.hidden, spec.vocabulary // tp))] * (tokens // 512)
    products = products_on(torch.device("cpu"), bench.dtype)
    made = {
        key: (
            torch.ones(key[0], key[1][0], dtype=bench.dtype),
            torch.ones(key[1][1], key[1][0], dtype=bench.dtype),
            torch.ones(key[0], key[1][1], dtype=bench.dtype),
        )
        for key in set(chunks)
    }

    def step(_index: int) -> None:
        for key in chunks:
            x, weight, grad = made[key]
            products.forward(x, weight)
            products.grad_input([grad], [weight])
            products.grad_weights([grad], x)

    return step


def run_field(layout: str, names: list[str], dtype: str, rounds: int, spec: ModelSpec, sequence: int) -> dict[str, Any]:
    """On every rank: seconds of each contender's counted steps by round, and the bound's; what could not be built, and why."""
    tokens = np.random.default_rng(0).integers(0, spec.vocabulary, 400_000).astype(np.uint16)
    file = TokenFile("random", tokens, np.array([0, len(tokens)]))
    batches = Batches([file], sequence=sequence, global_batch=ROWS, seed=0)
    bench = Bench(spec, getattr(torch, dtype), sequence, batches, Groups())
    ranks = dist.get_world_size()
    steps: dict[str, Step] = {}
    missing: dict[str, str] = {}
    for name in names:
        try:
            made = FIELD.get((ranks, layout), {}).get(name) or ours(layout)
            steps[name] = made(bench)
        except ImportError as error:
            missing[name] = f"not installed ({error.name})"
    if len(names) > 1:
        steps["products alone"] = products_alone(bench, layout)
    seconds: dict[str, list[float]] = {name: [] for name in steps}
    for index in range(rounds + 1):
        for name, step in steps.items():
            dist.barrier()
            begun = time.perf_counter()
            step(index)
            dist.barrier()
            if index:
                seconds[name].append(time.perf_counter() - begun)
    shares = {name: step.shares(rounds + 1) for name, step in steps.items() if isinstance(step, Ours)}
    peaks: list[int] = [0] * ranks
    dist.all_gather_object(peaks, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)
    return {"seconds": seconds, "missing": missing, "peak_mib": max(peaks) / 1024, "shares": shares}


def in_fresh_process(ranks: int, *args: Any) -> dict[str, Any]:
    """`run_field` on ranks of a process of its own: one that compiled may not fork ranks, and peaks are a process's."""
    code = f"import sys, json; sys.path.insert(0, {str(Path(__file__).parent)!r}); import training; training.child()"
    spec = args[4]
    payload = json.dumps([ranks, *args[:4], spec.config, args[5]])
    done = subprocess.run(
        [sys.executable, "-c", code], input=payload, text=True, capture_output=True, timeout=900, check=False
    )
    if done.returncode:
        raise SystemExit(f"{args[:2]} failed:\n{done.stderr[-3000:]}")
    return json.loads(done.stdout.splitlines()[-1])


def child() -> None:
    keep_freed_memory()  # ranks do so; a single one is this process
    ranks, layout, names, dtype, rounds, config, sequence = json.loads(sys.stdin.read())
    spec = ModelSpec.from_config(config)
    print(json.dumps(launch(run_field, ranks, layout, names, dtype, rounds, spec, sequence, backend="gloo")))


def race(layout: str, ranks: int, dtype: str, options: argparse.Namespace) -> list[dict[str, Any]]:
    spec = ModelSpec.load("15m")
    result = in_fresh_process(ranks, layout, list(FIELD[ranks, layout]), dtype, options.rounds, spec, SEQUENCE)
    seconds = result["seconds"]
    rows: list[dict[str, Any]] = []
    for name, times in seconds.items():
        ratios = [mine / theirs for mine, theirs in zip(times, seconds["fiveply"], strict=True)]
        row = {
            "dtype": dtype,
            "layout": layout,
            "who": name,
            "tokens_per_second": ROWS * SEQUENCE / statistics.median(times),
            "fiveply_is_faster_by": [min(ratios), statistics.median(ratios), max(ratios)],
            "of_bound": statistics.median(seconds["products alone"]) / statistics.median(times),
        }
        if name in result["shares"]:
            row["shares"] = result["shares"][name]
        if not options.no_memory and name != "products alone":
            row["peak_mib"] = in_fresh_process(ranks, layout, [name], dtype, 1, spec, SEQUENCE)["peak_mib"]
        rows.append(row)
    missing = [
        {"dtype": dtype, "layout": layout, "who": name, "missing": why} for name, why in result["missing"].items()
    ]
    return rows + missing


def growth(dtype: str, options: argparse.Namespace) -> list[dict[str, Any]]:
    """fiveply alone, one process: tokens/s and peak memory against sequence length, layers and micro-batches of 16 rows."""
    base = ModelSpec.load("15m")
    layers = base.layers
    cases = [(SEQUENCE, layers, 1), *((n, layers, 1) for n in (128, 512, 1024)), *((SEQUENCE, n, 1) for n in (3, 12)),
             *((SEQUENCE, layers, n) for n in (2, 4, 8, 16))]  # fmt: skip
    rows: list[dict[str, Any]] = []
    for sequence, layers, micro_batches in cases:
        changes = {"max_position_embeddings": 2048, "num_hidden_layers": layers}
        spec = ModelSpec.from_config({**base.config, **changes})
        layout = f"dp=1,micro_batch={ROWS // micro_batches}"
        result = in_fresh_process(1, layout, ["fiveply"], dtype, options.rounds, spec, sequence)
        speed = ROWS * sequence / statistics.median(result["seconds"]["fiveply"])
        rows.append({"dtype": dtype, "sequence": sequence, "layers": layers, "micro_batches": micro_batches,
                     "tokens_per_second": speed, "peak_mib": result["peak_mib"]})  # fmt: skip
        print(
            f"| {dtype} | {sequence:,} | {layers} | {micro_batches} | {speed:,.0f} | {result['peak_mib']:,.0f} |",
            flush=True,
        )
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, help="write the figures here")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), help="one of them alone")
    parser.add_argument("--rounds", type=int, default=3, help="counted steps of each")
    parser.add_argument("--only", help="one layout, as tp=2")
    parser.add_argument("--no-memory", action="store_true", help="leave out the peaks, which take a process each")
    parser.add_argument("--growth", action="store_true", help="how fiveply's own cost grows, instead")
    options = parser.parse_args()
    found = device.find()
    dtypes = [options.dtype] if options.dtype else ["float32", *["bfloat16"] * found.fast_bf16]
    print(f"{found.name}, {found.cores} cores, torch {torch.__version__}\n")
    rows: list[dict[str, Any]] = []
    if options.growth:
        print("| | sequence | layers | micro-batches | tokens/s | peak MiB |")
        print("| --- | ---: | ---: | ---: | ---: | ---: |")
        for dtype in dtypes:
            rows += growth(dtype, options)
    else:
        print("| | layout | | tokens/s | fiveply is faster by | of the products' bound | peak MiB a rank |")
        print("| --- | --- | --- | ---: | ---: | ---: | ---: |")
        for dtype in dtypes:
            for ranks, layout in FIELD:
                if options.only in (None, layout):
                    for row in race(layout, ranks, dtype, options):
                        rows.append(row)
                        print(_line(row), flush=True)
        print("\nWhere fiveply's step goes, of a step recorded after those:\n")
        print(f"| | layout | | rank | ms | {' | '.join(timeline.SHARES)} |")
        print(f"| --- | --- | --- {'| ---: ' * (2 + len(timeline.SHARES))}|")
        for row in rows:
            for rank, shares in row.get("shares", {}).items():
                total = sum(shares.values())
                parts = " | ".join(f"{shares[kind] / total:.0%}" for kind in timeline.SHARES)
                print(f"| {row['dtype']} | {row['layout']} | {row['who']} | {rank} | {total * 1000:,.0f} | {parts} |")
    if options.json:
        machine = {"name": found.name, "cores": found.cores, "torch": torch.__version__}
        options.json.write_text(json.dumps({"machine": machine, "rows": rows}, indent=1))


def _line(row: dict[str, Any]) -> str:
    head = f"| {row['dtype']} | {row['layout']} | {row['who']} |"
    if "missing" in row:
        return f"{head} {row['missing']} | | | |"
    low, middle, high = row["fiveply_is_faster_by"]
    ratio = "" if row["who"] == "fiveply" else f"{middle:.2f} ({low:.2f} to {high:.2f})"
    peak = f"{row['peak_mib']:,.0f}" if "peak_mib" in row else ""
    return f"{head} {row['tokens_per_second']:,.0f} | {ratio} | {row['of_bound']:.0%} | {peak} |"


if __name__ == "__main__":
    main()
