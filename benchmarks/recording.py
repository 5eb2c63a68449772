"""What recording a step costs: recorded and other steps in turn, in the same processes.

    python benchmarks/recording.py [--layout dp=2] [--model 2m] [--pairs 20] [--json FILE]

Every other step is recorded on all ranks, as `fiveply train` records one; which of a pair comes first changes from pair to
pair. A step's time is that of the rank that took longest, from a barrier on. What follows a recorded step, reading the clocks'
marks as events and gathering them, is timed by itself. Printed: the median ratio of the pairs, and its quartiles.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch

from fiveply.corpus.batches import Batches, TokenFile
from fiveply.parallel.data_parallel import Dtypes
from fiveply.spec.architecture import ModelSpec
from fiveply.spec.layout import Layout
from fiveply.spec.legality import resolve
from fiveply.spec.run import RunSpec, Train
from fiveply.train.job import Job
from fiveply.world import device
from fiveply.world.launch import launch
from fiveply.world.mesh import Mesh

ROWS, SEQUENCE, WARM_UP = 16, 128, 2


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layout", default="dp=2")
    parser.add_argument("--model", default="2m")
    parser.add_argument("--pairs", type=int, default=20)
    parser.add_argument("--json", type=Path, help="write the figures here")
    options = parser.parse_args()
    spec, found = ModelSpec.load(options.model), device.find()
    layout = resolve(Layout.parse(options.layout), spec, sequence=SEQUENCE, global_batch=ROWS)
    times = launch(measure, layout.world, layout, spec, options.pairs)
    ratios = [recorded / other for recorded, other in zip(times["recorded"], times["other"], strict=True)]
    low, middle, high = statistics.quantiles(ratios, n=4)
    seconds = {name: statistics.median(times[name]) for name in ("recorded", "other", "gathered")}
    result = {"machine": f"{found.name}, {found.cores} cores", "layout": str(layout), "model": options.model,
              "pairs": options.pairs, "ratio": middle, "quartiles": [low, high], "seconds": seconds,
              "events": times["events"]}  # fmt: skip
    print(
        f"{result['machine']}, {options.model}, {layout}, {ROWS} rows of {SEQUENCE} tokens, {options.pairs} pairs of steps"
    )
    print(f"recorded / other     {middle:.3f} (quartiles {low:.3f} to {high:.3f})")
    print(f"a step               {seconds['recorded'] * 1e3:.1f} ms recorded, {seconds['other'] * 1e3:.1f} ms not")
    print(f"events               {times['events']} on all ranks, gathered in {seconds['gathered'] * 1e3:.1f} ms")
    if options.json:
        options.json.write_text(json.dumps(result, indent=1))


def measure(layout: Layout, spec: ModelSpec, pairs: int) -> dict[str, Any]:
    """On every rank: seconds of each pair's recorded and other step, and of gathering; the number of events of a step."""
    tokens = np.random.default_rng(0).integers(0, spec.vocabulary, 200_000).astype(np.uint16)
    file = TokenFile("random", tokens, np.array([0, len(tokens)]))
    batches = Batches([file], sequence=SEQUENCE, global_batch=ROWS, seed=0)
    mesh = Mesh(layout, spec)
    run = RunSpec(name="recording", train=Train(global_batch=ROWS))
    job = Job(run, spec, mesh, Dtypes(torch.float32, torch.float32, torch.float32))
    times: dict[str, Any] = {"recorded": [], "other": [], "gathered": [], "events": 0}
    step = 0
    for pair in range(-WARM_UP, pairs):
        for recorded in (True, False) if pair % 2 else (False, True):
            mesh.gather_objects(None)  # a barrier
            begun = time.perf_counter()
            if recorded:
                mesh.recorder.start(job.device)
            with mesh.recorder.span("step"):
                job.step(batches, step)
            ended = time.perf_counter()
            step += 1
            if recorded:
                times["events"] = sum(map(len, mesh.gather_objects(mesh.recorder.stop())))
            gathered = time.perf_counter() - ended
            slowest = max(mesh.gather_objects(ended - begun))
            if pair >= 0:
                times["recorded" if recorded else "other"].append(slowest)
                times["gathered"] += [gathered] * recorded
    return times


if __name__ == "__main__":
    main()
