"""One process on the `15m` preset: fiveply's training step beside `transformers` eager, alternating in one run.

    python benchmarks/one_process.py [--json FILE] [--dtype float32] [--steps 5]

Same shapes, same batch (16 rows of 256 tokens), AdamW in both, all cores. Prints tokens/s of each and the median ratio;
steps alternate, so that a machine that slows down slows both.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist

from fiveply.corpus.batches import Batches, TokenFile
from fiveply.parallel.data_parallel import Dtypes
from fiveply.spec.architecture import ModelSpec
from fiveply.spec.layout import Layout
from fiveply.spec.legality import resolve
from fiveply.spec.run import Optimizer, RunSpec, Train
from fiveply.train.job import Job
from fiveply.world import device
from fiveply.world.mesh import Mesh

ROWS, SEQUENCE = 16, 256


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, help="write the figures here")
    parser.add_argument("--dtype", default="float32", choices=("float32", "bfloat16"))
    parser.add_argument("--steps", type=int, default=5, help="counted steps of each")
    options = parser.parse_args()
    torch.set_num_threads(device.find().cores)
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    dtype = getattr(torch, options.dtype)
    spec = ModelSpec.load("15m")
    tokens = np.random.default_rng(0).integers(0, spec.vocabulary, 400_000).astype(np.uint16)
    batches = Batches(
        [TokenFile("random", tokens, np.array([0, len(tokens)]))], sequence=SEQUENCE, global_batch=ROWS, seed=0
    )
    steps = {"fiveply": our_step(spec, dtype, batches), "transformers eager": their_step(spec, dtype, batches)}

    seconds: dict[str, list[float]] = {name: [] for name in steps}
    for index in range(options.steps + 1):
        for name, step in steps.items():
            begun = time.perf_counter()
            step(index)
            if index:
                seconds[name].append(time.perf_counter() - begun)
    speeds = {name: ROWS * SEQUENCE / statistics.median(times) for name, times in seconds.items()}
    ours, theirs = seconds.values()
    ratios = [b / a for a, b in zip(ours, theirs, strict=True)]
    found = device.find()
    result = {
        "machine": f"{found.name}, {found.cores} cores, {options.dtype}",
        "tokens_per_second": speeds,
        "ratio": {"min": min(ratios), "median": statistics.median(ratios), "max": max(ratios)},
    }
    for name, speed in speeds.items():
        print(f"{name:20} {speed:8,.0f} tokens/s")
    print(
        f"fiveply / transformers: {result['ratio']['median']:.2f}x ({min(ratios):.2f} to {max(ratios):.2f}), {result['machine']}"
    )
    if options.json:
        options.json.write_text(json.dumps(result, indent=1))


def our_step(spec: ModelSpec, dtype: torch.dtype, batches: Batches) -> Callable[[int], object]:
    layout = resolve(Layout(), spec, sequence=SEQUENCE, global_batch=ROWS)
    run = RunSpec(name="benchmark", train=Train(global_batch=ROWS), optimizer=Optimizer(lr=1e-4))
    job = Job(run, spec, Mesh(layout, spec), Dtypes(dtype, torch.float32, torch.float32))
    return lambda index: job.step(batches, index)


def their_step(spec: ModelSpec, dtype: torch.dtype, batches: Batches) -> Callable[[int], object]:
    """As usually written; below float32, by autocast over float32 parameters."""
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    from transformers import AutoConfig, AutoModelForCausalLM

    config = dict(spec.config)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(config.pop("model_type"), **config)).float().train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, betas=(0.9, 0.95), weight_decay=0.1)

    def step(index: int) -> None:
        rows = batches.batch(index)
        tokens, targets = torch.from_numpy(rows.tokens), torch.from_numpy(rows.targets)
        optimizer.zero_grad()
        with torch.autocast("cpu", dtype, enabled=dtype != torch.float32):
            logits = model(tokens).logits
        loss = torch.nn.functional.cross_entropy(logits.float().flatten(0, 1), targets.flatten())
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()

    return step


if __name__ == "__main__":
    main()
