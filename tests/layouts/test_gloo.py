"""Over gloo what the other files prove over shared memory: a layout for each pair of key values, and what else moves other data.

What carries tensors sees groups, operations, types and order, never a model or a batch: so not every layout is run again. `--backend
gloo` runs all files so.
"""

from __future__ import annotations

from typing import Any

import pytest
import test_keys
import test_matrix
from prover import Case, assert_equal, pairs, prove_each, prove_near_float32

from fiveply.spec.layout import Layout

pytestmark = pytest.mark.slow

KEYS = (
    "recompute selective zb", "recompute full zbv", "recompute full tp=2", "recompute full dp=2,zero=3",
    "one micro-batch zbv", "tied ends interleaved", "tied ends sharded zb", "documents gpipe", "documents zero=2,micro_batch=1",
    "tied ends, three chunks", "uneven stages of chunks", "embedding and head apart from layers", "three chunks, empty ends",
    "key-value heads held twice,sp=0", "key-value heads held three times", "tokens fewer than tensor ranks",
    "float32 dp=2,pp=2,schedule=zbv,zero=3", "float32 tp=4", "float32 dropout",
)  # fmt: skip
OTHERS = [
    Case("few-kv", "dp=2,pp=3"), Case("few-kv", "pp=6"), Case("few-kv", "tp=2,pp=3"),  # tied ends at several depths
    Case("few-kv", "dp=2,tp=2", sync_every=1), Case("few-kv", "dp=2,pp=2", sync_every=1),
    Case("few-kv", "dp=2,tp=2,pp=2,zero=3,schedule=interleaved"), Case("gpt2", "dp=4,tp=2,zero=2,dp_shard=2"),
]  # fmt: skip


def meets(case: Case) -> set[tuple[Any, ...]]:
    return pairs(Layout.parse(case.layout))


def covering() -> list[Case]:
    """Of the matrix, as few as meet every pair of key values: always the one that meets most new ones."""
    cases = [case for world in (2, 3, 4) for case in test_matrix.CASES[world]]
    missing, chosen = set().union(*map(meets, cases)), list[Case]()
    while missing:
        chosen.append(max(cases, key=lambda case: len(meets(case) & missing)))
        missing -= meets(chosen[-1])
    return chosen


def test_layouts_over_gloo_compute_what_one_process_does() -> None:
    cases = [*covering(), *(test_keys.CASES[what] for what in KEYS), *OTHERS]
    for case, result in prove_each(dict.fromkeys(cases), "gloo").items():
        assert_equal(case, result)


@pytest.mark.parametrize("layout", ["dp=2,zero=3,micro_batch=2", "tp=2", "pp=2,schedule=zbv"])
def test_bf16_over_gloo_stays_near_float32(layout: str) -> None:
    prove_near_float32(Case("few-kv", layout, dtype="float32"), "gloo")
