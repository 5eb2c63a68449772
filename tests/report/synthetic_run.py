"""Run directories as training leaves them, made up from a model, a layout and a number of steps."""

from __future__ import annotations

import json
import math
import random
from pathlib import Path
from typing import Any

from fiveply.spec.architecture import ModelSpec
from fiveply.spec.layout import Layout
from fiveply.spec.legality import resolve
from fiveply.spec.placement import place, stage_units
from fiveply.spec.run import RunSpec

SEQUENCE, GLOBAL_BATCH = 256, 32
TOKENS_PER_STEP = SEQUENCE * GLOBAL_BATCH


def rank_facts(spec: ModelSpec, layout: Layout, rank: int) -> dict[str, Any]:
    at = layout.coordinates(rank)
    chunks, parameters = [], 0
    for chunk in range(layout.chunks):
        stage = layout.stage_of(at.pp, chunk)
        units = stage_units(spec, layout.stages, stage)
        layers = [int(unit.removeprefix("layers.")) for unit in units if unit.startswith("layers.")]
        chunks.append({"stage": stage, "layers": [layers[0], layers[-1]] if layers else None, "units": units})
        parameters += sum(math.prod(placed.size) for placed in place(spec, layout, at.tp, stage))
    shards = layout.shard_ranks
    held = {
        "parameters": 4 * parameters // (shards if layout.zero == 3 else 1),
        "gradients": 4 * parameters // (shards if layout.zero >= 2 else 1),
        "optimizer": 8 * parameters // (shards if layout.zero >= 1 else 1),
    }
    coordinates = {key: getattr(at, key) for key in ("tp", "cp", "dp", "pp", "shard", "replica")}
    return {"rank": rank, **coordinates, "chunks": chunks, "parameters": parameters, "bytes": held}


def facts(
    layouts: list[str], starts: list[int], model: str = "2m", devices: int = 2, gpu: bool = False
) -> dict[str, Any]:
    spec = ModelSpec.load(model)
    resolved = [resolve(Layout.parse(text), spec, sequence=SEQUENCE, global_batch=GLOBAL_BATCH) for text in layouts]
    layout = resolved[-1]
    return {
        "version": "0.1.0",
        "started": "2026-11-02T09:30:00+00:00",
        "segments": [
            {"from_step": start, "layout": str(each), "world": each.world, "started": f"2026-11-02T{9 + index:02d}:30:00+00:00"}
            for index, (each, start) in enumerate(zip(resolved, starts, strict=True))
        ],
        "layout": str(layout),
        "world": layout.world,
        "oversubscribed": layout.world > devices,
        "model": {"family": spec.family, "layers": spec.layers, "hidden": spec.hidden, "heads": spec.heads,
                  "kv_heads": spec.kv_heads, "vocabulary": spec.vocabulary, "ffn": spec.ffn, "parameters": 2_312_345},
        "corpus": {"sources": ["shakespeare"], "train_tokens": 1_612_000, "held_out_tokens": 84_000,
                   "characters_per_token": 3.21, "vocabulary": spec.vocabulary},
        "machine": {"kind": "cuda", "name": "NVIDIA H100 80GB", "count": devices, "cores": 96, "memory_bytes": 85 * 10**9,
                    "fast_bf16": True, "peak_flops": 6.3e14 * devices}
        if gpu
        else {"kind": "cpu", "name": "AMD EPYC 7B13", "count": devices, "cores": devices, "memory_bytes": 24 * 2**30,
              "fast_bf16": False, "peak_flops": 9.3e10},
        "precision": {"parameters": "float32", "reduce": "float32", "optimizer": "float32"},
        "schedule": {"name": layout.schedule, "pp": layout.pp, "vp": layout.chunks,
                     "micro_batches": GLOBAL_BATCH // layout.dp // layout.micro_batch},
        "tokens_per_step": TOKENS_PER_STEP,
        "flops_per_token": 1.4e7,
        "ranks": [rank_facts(spec, layout, rank) for rank in range(layout.world)],
    }  # fmt: skip


def rows(steps: int, world: int, evaluate_every: int = 25, peak: int = 420 * 2**20) -> list[dict[str, Any]]:
    draw = random.Random(0)
    result = []
    for step in range(1, steps + 1):
        loss = 2.55 + 5.1 * math.exp(-step / 70) + 0.7 * math.exp(-step / 300) + draw.gauss(0, 0.05)
        speed = (9_000 if step > 1 else 2_500) * (1 + draw.gauss(0, 0.04))
        row = {
            "step": step, "loss": loss, "grad_norm": 0.6 + 3 * math.exp(-step / 25) + abs(draw.gauss(0, 0.12)),
            "lr": 1e-3 * min(step / 20, 0.55 + 0.45 * math.cos(math.pi * step / max(steps, 1))),
            "tokens_per_second": speed, "mfu": speed * 1.4e7 / 9.3e10 / 4, "seconds": TOKENS_PER_STEP / speed,
        }  # fmt: skip
        if step % 10 == 0 or step in (1, steps):
            row["memory_bytes"] = [int(peak * (1 + 0.04 * (rank % 3))) for rank in range(world)]
        if evaluate_every and (step % evaluate_every == 0 or step == steps):
            row["held_out_loss"] = loss + 0.12 + 0.1 * step / steps
            row["bits_per_character"] = row["held_out_loss"] / math.log(2) / 3.21
        result.append(row)
    return result


def write(
    folder: Path, facts_: dict[str, Any], rows_: list[dict[str, Any]], name: str = "demo", steps: int | None = None
) -> Path:
    """The run's directory."""
    run = folder / "runs" / "demo"
    (run / "logs").mkdir(parents=True)
    settings = [f"name={json.dumps(name)}", f"train.steps={steps or len(rows_)}", f"train.global_batch={GLOBAL_BATCH}"]
    (run / "run.toml").write_text(RunSpec.load(None, settings).toml())
    (run / "facts.json").write_text(json.dumps(facts_))
    (run / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows_))
    (run / "logs" / "rank-00000.log").write_text("4 ranks share 2 cores\n\x1b[1mstep 400\x1b[0m: loss <2.6>\n")
    return run
