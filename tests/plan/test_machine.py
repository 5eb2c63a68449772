"""Hardware files: they load, say where figures are from, and price what they lack by what they have."""

import pytest

from fiveply.plan import machine
from fiveply.spec.errors import InputError

GPUS = [name for name in machine.names() if name != "cpu"]


@pytest.mark.parametrize("name", machine.names())
def test_a_file_is_whole_and_says_its_sources(name: str) -> None:
    found = machine.load(name)
    assert set(found.link) == {"all-reduce", "all-gather", "reduce-scatter", "all-to-all", "send"}
    assert 0 < found.stream <= 1
    assert 0 < found.clock <= 1
    assert found.devices_per_node >= 1
    assert all(0 < speed.efficiency < 1 for speed in found.products.values())
    assert {"peak", "products", "attention", "link"} <= set(found.sources)
    assert all("20" in text for text in found.sources.values()), "a source has a year"


def test_the_kinds_that_the_planner_promises() -> None:
    promised = {
        "a100-40",
        "a100-80",
        "h100",
        "h100-pcie",
        "h100-96",
        "h200",
        "b200",
        "b300",
        "gb200",
        "gb300",
        "mi300x",
        "mi355x",
        "cpu",
    }
    assert promised <= set(machine.names())


def test_like_changes_some_figures_and_keeps_the_others() -> None:
    small, large = machine.load("a100-40"), machine.load("a100-80")
    assert small.memory_bytes * 2 == large.memory_bytes
    assert small.products == large.products
    assert small.sources["peak"] == large.sources["peak"]
    slow, fast = machine.load("a800").link["all-reduce"], large.link["all-reduce"]
    assert slow.bandwidth < fast.bandwidth
    assert slow.hop == fast.hop, "tables within tables are changed key by key"


def test_a_precision_that_a_device_lacks_runs_in_the_next_wider() -> None:
    a100 = machine.load("a100-80")
    assert a100.flops("fp8") == a100.flops("bf16") == a100.flops("fp16")
    assert machine.load("h100").flops("fp8") > machine.load("h100").flops("bf16")
    assert a100.product("fp8") is a100.products["bf16"]


def test_racks_join_more_devices_than_a_host_has() -> None:
    rack = machine.load("gb200")
    assert rack.joined == 72
    assert rack.devices_per_node == 4
    assert machine.load("h100").joined == 8


def test_threads_scale_what_a_rank_computes_with() -> None:
    core = machine.load("cpu")
    assert core.with_threads(2).flops("fp32") == 2 * core.flops("fp32")


def test_an_unknown_device_is_named() -> None:
    with pytest.raises(InputError, match="no device 'abacus'"):
        machine.load("abacus")
