"""What tables of dialects speak of: a layout, a batch and a model as named plain values."""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import groupby
from typing import Any

import msgspec

from fiveply.spec.architecture import Experts, Latent, ModelSpec
from fiveply.spec.layout import Layout


def facts_of(
    layout: Layout, spec: ModelSpec, *, sequence: int, global_batch: int, precision: str, devices_per_node: int = 8,
    model: str = "", order: str = "",
) -> dict[str, Any]:  # fmt: skip
    """All facts of a resolved layout. `order` is that of ranks, fastest axis first; by default the runtime's."""
    rows, stages = global_batch // layout.dp, layout.stages
    per_node = min(devices_per_node, layout.world)
    micro_batches = rows // layout.micro_batch
    return {
        **{key: getattr(layout, key) for key in ("dp", "tp", "pp", "cp", "ep", "zero", "schedule", "micro_batch", "recompute",
                                                 "offload", "cp_kind")},
        "sp": layout.sequence_parallel,
        "etp": layout.expert_tensor,
        "etp_given": spec.experts is not None and layout.expert_tensor != layout.tp,
        "all_experts_split": layout.ep > 1 and layout.expert_tensor == layout.expert_data == 1,
        "some_experts_split": layout.ep > 1 and not layout.expert_tensor == layout.expert_data == 1,
        "shards": layout.shard_ranks,
        "replicas": layout.dp // layout.shard_ranks if layout.zero else 1,
        "copies": layout.dp // layout.shard_ranks,
        "hybrid": layout.zero > 0 and layout.shard_ranks < layout.dp,
        "vp": layout.chunks,
        "even": len(set(stages)) == 1,
        "partition": ",".join(map(str, stages)),
        "stage_layout": stage_layout(stages, spec.predicted - 1),
        "rows": rows,
        "micro_batches": micro_batches,
        "fills": micro_batches >= layout.pp,
        "global_batch": global_batch,
        "sequence": sequence,
        "even_pieces": layout.cp == 1 or sequence % (2 * layout.cp) == 0,
        "precision": precision,
        "world": layout.world,
        "per_node": per_node,
        "nodes": math.ceil(layout.world / per_node),
        "model": model or "MODEL",
        "order": order or "tp,cp,dp,pp",
        "ranks_a_replica": layout.world // layout.dp,
        "many_nodes": layout.world // layout.dp > per_node,
        "ep_in_shards": layout.shard_ranks * layout.cp * layout.tp % layout.ep == 0,
        **_ends(stages),
        **_model_facts(spec),
    }  # fmt: skip


def _ends(stages: Sequence[int]) -> dict[str, Any]:
    """Torchtitan's division: layers, and weights of both ends, spread evenly with what is left over on the first stages; the
    weights then stand for layers that the first and the last stage lack. The least weights that give `stages`."""
    layers, count = sum(stages), len(stages)
    for weights in range(2 * max(stages) + 1):
        each, more = divmod(layers + weights, count)
        for less_first in range(min(weights, each) + 1):
            less_last = weights - less_first
            ends = [less_first, *[0] * (count - 2), less_last] if count > 1 else [weights]
            if less_last <= each and [each + (i < more) - ends[i] for i in range(count)] == list(stages):
                return {
                    "ends_found": True,
                    "less_first": less_first,
                    "less_last": less_last,
                    "layers_a_stage": each + (more > 0),
                }
    return {"ends_found": False, "less_first": 0, "less_last": 0, "layers_a_stage": 0}


def stage_layout(stages: Sequence[int], predicted_more: int) -> str:
    """Megatron-LM's notation: E embedding, t layer, m further prediction, L loss, | between stages."""
    texts = ["t" * layers if layers < 2 else f"t*{layers}" for layers in stages]
    texts[0] = "E" + texts[0]
    texts[-1] += "m" * predicted_more + "L"
    return "|".join(texts)


def pattern(bits: Sequence[int]) -> str:
    """A list of zeros and ones as a short list expression: `[1,0]*18`, `[0]*3+[1]*58`."""
    period = next(p for p in range(1, len(bits) + 1) if list(bits[:p]) * (len(bits) // p) == list(bits))
    if period <= 8:
        return f"([{','.join(map(str, bits[:period]))}]*{len(bits) // period})"
    return f"({'+'.join(f'[{bit}]*{len(list(run))}' for bit, run in groupby(bits))})"


def _model_facts(spec: ModelSpec) -> dict[str, Any]:
    rope, experts = spec.rope, spec.experts or Experts(count=0, per_token=2, ffn=0, layers=())
    latent = spec.latent or Latent(q_rank=0, kv_rank=32, nope_dim=128, rope_dim=64, value_dim=128)
    has_bias = (spec.qkv_bias, spec.out_bias, spec.mlp_bias or experts.bias)
    kinds = {(True, True, True): "all", (False, False, False): "none", (True, False, False): "qkv"}
    return {
        **{key: getattr(spec, key) for key in ("family", "layers", "hidden", "ffn", "heads", "head_dim", "positions", "vocabulary",
                                               "norm_eps", "qk_norm", "activation", "tied", "dropout", "attention_dropout", "sinks")},
        "gated": spec.gated_mlp,
        "kv_heads": spec.kv_heads,
        "grouped": spec.kv_heads < spec.heads,
        "odd_heads": spec.latent is None and spec.head_dim * spec.heads != spec.hidden,
        "norm": {"rms": "RMSNorm", "layer": "LayerNorm"}[spec.norm],
        "position_kind": "rope" if rope else "learned_absolute",
        "rope_theta": int(rope.theta) if rope else 10000,
        "rope_scaling": rope.kind if rope else "default",
        "rope_factor": rope.factor if rope else 1.0,
        "biases": kinds.get(has_bias, "attention"),
        "experts": experts.count,
        "experts_per_token": experts.per_token,
        "expert_ffn": experts.ffn,
        "expert_layers": _layers(experts.layers, spec.layers, absent="1"),
        "shared_ffn": experts.shared_ffn,
        "shared_gate": experts.shared_gate,
        "latent": spec.latent is not None,
        **msgspec.structs.asdict(latent),
        "predicted_more": spec.predicted - 1,
        "window": f"{spec.window - 1},0" if spec.window else "",
        "window_layers": _layers(spec.window_layers, spec.layers, absent=""),
    }  # fmt: skip


def _layers(chosen: Sequence[int], layers: int, absent: str) -> str:
    """Which layers have something; `absent` where all or none have."""
    if not chosen or len(chosen) == layers:
        return absent
    return pattern([int(layer in chosen) for layer in range(layers)])
