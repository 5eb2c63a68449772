"""The planner beside its peers on the same published rows: step time, and how well layouts are ranked.

    pip install llm-analysis==0.2.2 fire transformers      # the one peer that package indexes carry
    python benchmarks/planner.py [TABLE.csv] [--json]

Peers get what the row says, and their own defaults for what it does not. Calculon (a package of that name on PyPI is another
program) and SimuMax are on no package index; docs/planner.md quotes what was measured of them. Rows that a peer can't
express (uneven layers, context parallelism, a device it has no file of) are left out on both sides.
"""

from __future__ import annotations

import contextlib
import importlib.util
import io
import json
import logging
import sys
from collections import defaultdict
from collections.abc import Callable

from fiveply.plan import score, table
from fiveply.plan.table import Row
from fiveply.spec.errors import InputError

DEVICES = {"a100-40": "a100-sxm-40gb", "a100-80": "a100-sxm-80gb", "h100": "h100-sxm-80gb"}


def llm_analysis(row: Row) -> float | None:
    """Seconds of a step as llm-analysis has them at its own default efficiency; None for what it can't express."""
    from llm_analysis import analysis
    from llm_analysis.config import ModelConfig, ParallelismConfig, get_gpu_config_by_name

    job, layout = row.job, row.layout
    spec, device = job.spec, job.machine.name
    if device not in DEVICES or spec.experts or layout.cp > 1 or spec.ffn % spec.hidden or spec.layers % layout.pp:
        return None
    recompute = {"none": "NONE", "selective": "ATTN_COMPUTE", "full": "FULL"}[layout.recompute]
    zero = ("NONE", "STAGE_1", "STAGE_2", "STAGE_3")[layout.zero]
    try:
        study = analysis.LLMAnalysis(
            ModelConfig("row", spec.layers, spec.heads, spec.hidden, spec.vocabulary, job.sequence, spec.kv_heads, ffn_embed_dim=spec.ffn),
            get_gpu_config_by_name(DEVICES[device]),
            parallelism_config=ParallelismConfig(
                tp_size=layout.tp, pp_size=layout.pp, dp_size=layout.dp, sp_size=layout.tp if layout.sequence_parallel else 1
            ),
        )  # fmt: skip
        found = study.training(
            batch_size_per_gpu=layout.micro_batch,
            global_batch_size=job.global_batch,
            seq_len=job.sequence,
            activation_recomputation=analysis.ActivationRecomputation[recompute],
            ds_zero=analysis.DSZeRO[zero],
            flash_attn=job.software.flash,
        )
    except (AssertionError, ZeroDivisionError, KeyError, ValueError, TypeError):
        return None
    return float(found["latency_per_iter"]) or None


PEERS: dict[str, tuple[str, Callable[[Row], float | None]]] = {"llm-analysis": ("llm_analysis", llm_analysis)}


def main(path: str, as_json: bool) -> None:
    rows = [row for row in table.read(path)[0] if row.stratum == "complete-16-bit" and row.seconds]
    result: dict[str, object] = {"rows": len(rows)}
    for name, (module, peer) in PEERS.items():
        if importlib.util.find_spec(module) is None:
            result[name] = "not installed"
            continue
        logging.disable(logging.CRITICAL)
        pairs: dict[str, list[tuple[float, float, float]]] = defaultdict(list)
        for row in rows:
            with contextlib.redirect_stdout(io.StringIO()):
                theirs = peer(row)
            with contextlib.suppress(InputError):
                if theirs and row.seconds:
                    pairs[row.source].append((row.seconds, score.predicted(row).seconds.p50, theirs))
        result[name] = {source: _compared(found) for source, found in pairs.items()} | {
            "all": _compared([pair for found in pairs.values() for pair in found])
        }
    if as_json:
        print(json.dumps(result))
        return
    for name, found in result.items():
        if isinstance(found, dict):
            print(f"{'rows':>5} {'fiveply':>9} {name:>14}   mean |predicted / measured - 1|")
            for source, one in found.items():
                print(f"{one['rows']:5} {one['fiveply']:9.1%} {one['peer']:14.1%}   {source[:90]}")
        else:
            print(f"{name}: {found}")


def _compared(pairs: list[tuple[float, float, float]]) -> dict[str, float]:
    return {
        "rows": len(pairs),
        "fiveply": sum(abs(ours / measured - 1) for measured, ours, _ in pairs) / len(pairs),
        "peer": sum(abs(theirs / measured - 1) for measured, _, theirs in pairs) / len(pairs),
    }


if __name__ == "__main__":
    given = [argument for argument in sys.argv[1:] if argument != "--json"]
    main(given[0] if given else score.published(), "--json" in sys.argv)
