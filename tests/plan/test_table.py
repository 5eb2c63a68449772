"""Tables of measurements: what a row says and what its source implies; what is broken is named by row, column and reason."""

import csv
import math
from pathlib import Path
from typing import Any

import pytest
from plan.tables import LLAMA, write

from fiveply.plan import score, table
from fiveply.spec.errors import InputError
from fiveply.spec.placement import declare


def read(path: Path, **changes: Any) -> table.Row:
    rows, skipped = table.read(write(path, LLAMA | changes))
    assert not skipped, skipped
    return rows[0]


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "table.csv"


def test_a_row_becomes_a_job_a_layout_and_a_system(path: Path) -> None:
    row = read(path)
    assert (row.layout.dp, row.layout.tp, row.layout.pp, row.layout.schedule, row.layout.vp) == (
        8,
        4,
        2,
        "interleaved",
        2,
    )
    assert row.layout.stages == (8, 8, 8, 8)
    assert row.job.software.name == "torchtitan"
    assert row.job.machine.name == "h100"
    assert row.job.precision == "bf16"
    assert row.job.spec.gated_mlp
    assert row.job.spec.norm == "rms"
    assert not row.job.spec.tied
    assert (row.stratum, row.seconds, row.bytes) == ("complete-16-bit", 1.5, None)


@pytest.mark.parametrize(
    ("column", "texts", "expected"),
    [
        ("recompute", ("full", "yes", "Full (block)"), "full"),
        ("recompute", ("none", "no", "off"), "none"),
        ("zero", ("3", "fsdp", "FSDP2", "ZeRO-3"), 3),
        ("zero", ("0", ""), 0),
    ],
)
def test_columns_are_read_as_tables_write_them(
    path: Path, column: str, texts: tuple[str, ...], expected: object
) -> None:
    assert {getattr(read(path, **{column: text, "pp": 1}).layout, column) for text in texts} == {expected}


def test_time_follows_from_a_rate(path: Path) -> None:
    assert read(path, step_time_s="", tokens_per_s_per_gpu=4096).seconds == pytest.approx(64 * 8192 / (4096 * 64))


@pytest.mark.parametrize(
    ("changes", "stratum"),
    [
        ({"precision": "mxfp8"}, "float8"),
        ({"recompute": ""}, "recompute-unknown"),
        ({"micro_batch": ""}, "micro-batch-unknown"),
        ({"model": "mixtral-8x7b", "experts": 8, "topk": 2}, "experts-16-bit"),
    ],
)
def test_strata(path: Path, changes: dict[str, Any], stratum: str) -> None:
    assert read(path, **changes).stratum == stratum


@pytest.mark.parametrize(
    ("source", "notes", "system", "vintage"),
    [
        ("Megatron-LM SC21 Table 1", "", "megatron", "2021-04"),
        ("Korthikanti 2022 (arXiv:2205.05198)", "", "megatron", "2022-05"),
        ("NVIDIA/dgxc-benchmarking@v25.02 llama3.1", "", "nemo", "2024-03"),
        ("NVIDIA-NeMo/Megatron-Bridge@067f", "26.02.01 NeMo Container", "nemo", "2026-02-01"),
        ("mosaicml/llm-foundry@8c8d", "", "llm-foundry", ""),
        ("VIA-Research/vTrain@f8dda84", "Megatron-DeepSpeed", "megatron-deepspeed", ""),
    ],
)
def test_a_source_names_its_system_and_vintage(path: Path, source: str, notes: str, system: str, vintage: str) -> None:
    found = read(path, source=source, notes=notes).job.software
    assert (found.name, found.vintage) == (system, vintage)


def test_columns_change_what_the_system_overlaps(path: Path) -> None:
    nemo = "NVIDIA/dgxc-benchmarking@v25.02"
    assert read(path, source=nemo, tp_comm_overlap=0).job.software.overlap_tensor == 0
    assert read(path, source=nemo, tp_comm_overlap=1).job.software.overlap_tensor > 0
    assert read(path, cuda_graph="full_iteration").job.software.graphs
    assert read(path, recompute="selective:moe_act+layernorm").job.software.selective == ("activation", "norm")
    assert read(path, notes="800 Gb/s per node IB").job.machine.network.bandwidth == 12.5e9


def test_parameters_of_known_models_come_out_as_printed() -> None:
    """Sizes in the table and what the rules add give the count that the source prints, on models of up to 40 layers."""
    rows, _ = table.read(score.published())
    with open(score.published(), newline="") as file:
        printed = [float(record["params_b"] or 0) for record in csv.DictReader(file)]
    checked = 0
    sized = {(s.layers, s.hidden, s.ffn, s.vocabulary): (row.number, s) for row in rows for s in [row.job.spec]}
    for number, spec in sized.values():
        if printed[number - 1] and not spec.experts and spec.layers <= 40:
            count = sum(math.prod(parameter.shape) for parameter in declare(spec))
            proxy = abs(count / 1e9 / printed[number - 1] - 1) > 0.5  # fewer layers than the model's name says
            assert proxy or count / 1e9 == pytest.approx(printed[number - 1], rel=0.05), number
            checked += not proxy
    assert checked > 8


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"layers": ""}, "layers is not given"),
        ({"layers": "many"}, "layers: 'many' is not a number"),
        ({"num_gpus": -8}, "num_gpus: -8 is not a size"),
        ({"hidden": 4096.5}, "hidden: 4096.5 is not a whole number"),
        ({"num_gpus": 60, "tp": 7}, "does not divide 60 devices"),
        ({"gpu": "abacus"}, "gpu: 'abacus' is unknown"),
        ({"precision": "int3"}, "precision: 'int3' is unknown"),
        ({"recompute": "some"}, "recompute: 'some' is unknown"),
        ({"zero": "infinity"}, "zero: 'infinity' is unknown"),
        ({"step_time_s": ""}, "measures neither time nor memory"),
        ({"notes": "SFT, packed SQuAD"}, "not a pretraining step"),
        ({"kv_heads": 5}, "5 key-value heads do not divide 32 heads"),
    ],
)
def test_a_broken_row_is_named_and_the_others_are_read(path: Path, changes: dict[str, Any], reason: str) -> None:
    rows, skipped = table.read(write(path, LLAMA | {"notes": ""} | changes, LLAMA | {"notes": ""}))
    assert [row.number for row in rows] == [2]
    assert skipped[0].row == 1
    assert reason in skipped[0].reason


def test_what_is_no_table_is_refused(path: Path) -> None:
    with pytest.raises(InputError, match="cannot be read"):
        table.read(path)
    path.write_text("source,model\na,b\n")
    with pytest.raises(InputError, match=r"gpu: a column is missing"):
        table.read(path)
    path.write_bytes(b"\xff\xfe\x00")
    with pytest.raises(InputError, match="not a CSV table"):
        table.read(path)
    path.write_text(",".join(LLAMA) + "\n")
    with pytest.raises(InputError, match="has no row"):
        table.read(path)
