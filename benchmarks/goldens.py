"""Megatron-LM's functional-test goldens as a table of published measurements, for `fiveply bench plan --table`.

    python benchmarks/goldens.py megatron_golden.csv goldens.csv

The input holds one golden file a row: the arguments of the test's model_config.yaml, and the peak of allocated memory that
the last rank logged. Times are left out: most tests run toy depths in deterministic mode. Only decoders are taken.
"""

from __future__ import annotations

import csv
import re
import sys

COLUMNS = (
    "source", "evidence", "model", "layers", "hidden", "heads", "kv_heads", "ffn", "vocab", "seq", "experts", "topk", "gpu", "num_gpus",
    "gpus_per_node", "tp", "pp", "vp", "cp", "ep", "etp", "dp", "zero", "seq_parallel", "micro_batch", "global_batch", "recompute",
    "precision", "mem_gib", "mem_rank", "mem_kind", "notes",
)  # fmt: skip
GPUS = {"a100": "A100-80GB-SXM", "h100": "H100-80GB-SXM", "gb200": "GB200"}
DECODERS = {"gpt", "moe", "mixtral", "nemotron"}
LEFT_OUT = re.compile("grpo|distill|uneven|muon|fp8|tp2_pp2_ep4_etp1_|nightly|nemotron3|cudagraph|defer_embedding")
"""Reinforcement learning, a teacher beside, splits and optimisers and layer kinds that the columns can't say; pools of graphs; a head's
gradients put off to the step's end."""
GPT2_VOCABULARY = 50257
"""The Pile by GPT-2's byte pairs, as every test's --vocab-file says; Megatron-LM pads it to a multiple of 128 x tp."""


def convert(row: dict[str, str]) -> dict[str, object] | None:
    """None for what is no decoder, or lacks a peak or a depth."""
    if (
        row["fam"] not in DECODERS
        or LEFT_OUT.search(row["case"])
        or row["file"].endswith("_2nd.json")  # a test's second run: its peak is that of loading a checkpoint
        or not row["mem_max"]
        or not row["layers"]
        or not row["gbs"]
    ):
        return None
    layers, tp, pp, cp = (int(float(row[key] or 1)) for key in ("layers", "tp", "pp", "cp"))
    hidden, heads = int(float(row["hidden"])), int(float(row["heads"]))
    devices = max(int(float(row["gpus"] or 8)), tp * pp * cp)
    each = float(row["lpvs"] or 0)
    vp = int(float(row["vp"])) if row["vp"] else int(layers / pp / each) if each and pp > 1 else 1
    vocabulary = int(float(row["vocab"] or GPT2_VOCABULARY))
    multiple = 128 * tp
    # Tests that don't resume set --attention-backend unfused, and those of --transformer-impl local have no other.
    local = row["fam"] == "gpt" and "_te_" not in row["case"]
    deterministic = row["det"] == "True"
    chosen = deterministic and cp == 1
    if chosen and "resume" in row["case"] and not local and row["env"] == "lts":
        return None  # its container's Transformer Engine chose, which changed between goldens
    unfused = chosen and ("resume" not in row["case"] or local)
    notes = [
        f"{row['case']} on {row['plat']}, {row['env']}",
        "unfused attention" if unfused else "",
        "local transformer" if local else "",
        "deterministic" if deterministic else "",
        "2 optimizer instances" if "multi_dist_optimizer" in row["case"] else "",
        "SwiGLU" if row["swiglu"] else "GELU",
        "untied" if row["untie"] else "tied",
        "fused cross-entropy" if "cross_entropy_loss_fusion" in row["case"] else "",
    ]
    return {
        "source": f"NVIDIA/Megatron-LM functional tests ({row['fam']})",
        "evidence": row["file"],
        "model": f"{'moe-' if row['nexp'] else ''}gpt-h{hidden}-l{layers}",
        "layers": layers,
        "hidden": hidden,
        "heads": heads,
        "kv_heads": int(float(row["kv"] or heads)),
        "ffn": int(float(row["moeffn"] or row["ffn"] or 4 * hidden)),
        "vocab": -(-vocabulary // multiple) * multiple,
        "seq": int(float(row["seq"] or 0)) or "",
        "experts": int(float(row["nexp"])) if row["nexp"] else "",
        "topk": int(float(row["topk"] or 2)) if row["nexp"] else "",
        "gpu": GPUS[row["plat"]],
        "num_gpus": devices,
        "gpus_per_node": 4 if row["plat"] == "gb200" else 8,
        "tp": tp,
        "pp": pp,
        "vp": vp,
        "cp": cp,
        "ep": int(float(row["ep"] or 1)),
        "etp": int(float(row["etp"])) if row["etp"] else "",
        "dp": devices // (tp * pp * cp),
        "zero": 3 if row["fsdp"] == "True" else 1 if row["distopt"] == "True" else 0,
        "seq_parallel": int(row["sp"] == "True"),
        "micro_batch": int(float(row["mbs"])),
        "global_batch": int(float(row["gbs"])),
        "recompute": re.sub(r"\s.*", "", row["recompute"].strip()) or "none",
        "precision": "fp8" if row["fp8"] else "bf16" if row["bf16"] == "True" else "fp16",
        "mem_gib": round(float(row["mem_max"]), 4),
        "mem_rank": "last",
        "mem_kind": "allocated",
        "notes": "; ".join(filter(None, notes)),
    }


def main(source: str, target: str) -> None:
    with open(source, newline="") as read, open(target, "w", newline="") as write:
        rows = [done for row in csv.DictReader(read) if (done := convert(row))]
        writer = csv.DictWriter(write, COLUMNS)
        writer.writeheader()
        writer.writerows(rows)
    print(f"{len(rows)} rows -> {target}")


if __name__ == "__main__":
    main(*sys.argv[1:])
