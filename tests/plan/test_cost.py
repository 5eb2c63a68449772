"""Prices obey what they must: no product beats the device's peak or bandwidth, more work takes longer, terms add up."""

import math

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fiveply.plan import cost, machine, software, workload
from fiveply.plan.operations import Operation, Work
from fiveply.plan.simulate import StageSeconds
from fiveply.plan.traffic import Collective
from fiveply.spec.architecture import ModelSpec
from fiveply.spec.cluster import ClusterSpec
from fiveply.spec.errors import InputError
from fiveply.spec.layout import Layout
from fiveply.spec.legality import resolve

H100, A100, RACK = (machine.load(name) for name in ("h100", "a100-80", "gb200"))
NEMO = software.load("nemo", "2025-02")
sizes = st.integers(1, 16384)


@given(sizes, sizes, sizes, st.sampled_from([H100, A100, RACK]))
def test_no_product_is_faster_than_peak_and_bandwidth_allow(m: int, n: int, k: int, device: machine.Machine) -> None:
    seconds = cost.product_seconds(m, n, k, device, "bf16")
    assert seconds >= 2 * m * n * k / device.flops("bf16")
    assert seconds >= 2 * (m * k + k * n + m * n) / device.bandwidth


@given(st.integers(1, 8192), st.integers(1, 8192), st.integers(1, 4096))
def test_a_deeper_product_takes_longer(m: int, n: int, k: int) -> None:
    aligned = 64 * -(-k // 64)
    assert cost.product_seconds(m, n, 2 * aligned, H100, "bf16") > cost.product_seconds(m, n, aligned, H100, "bf16")


def test_a_last_wave_that_is_almost_empty_costs() -> None:
    """108 tiles of 256 x 128 fill an A100 once; 109 need it twice, or smaller and slower ones."""
    full = cost.product_seconds(256 * 108, 128, 8192, A100, "bf16") / 108
    spilt = cost.product_seconds(256 * 109, 128, 8192, A100, "bf16") / 109
    assert spilt > 1.02 * full


def test_sizes_off_the_grid_fall_off_a_cliff() -> None:
    even, odd, worse = (cost.product_seconds(8192, n, 8192, H100, "bf16") / n for n in (50304, 50280, 50257))
    assert even < odd < worse


def test_groups_take_as_long_as_one_product_of_all_rows_or_longer() -> None:
    whole = cost.product_seconds(8 * 1024, 4096, 4096, H100, "bf16")
    assert cost.product_seconds(1024, 4096, 4096, H100, "bf16", groups=8) >= 0.99 * whole
    assert cost.product_seconds(100, 4096, 4096, H100, "bf16", groups=8) > 0.1 * whole


@given(
    st.sampled_from(["all-reduce", "all-gather", "reduce-scatter", "all-to-all"]),
    st.integers(0, 1 << 30),
    st.integers(2, 512),
)
def test_more_bytes_take_longer(operation: str, size: int, ranks: int) -> None:
    assert cost.call_seconds(operation, 2 * size + 1, ranks, H100, 1) > cost.call_seconds(
        operation, size, ranks, H100, 1
    )


def test_where_ranks_stand_decides_which_wires_they_use() -> None:
    size = 1 << 28
    inside = cost.call_seconds("all-gather", size, 8, H100, 1)
    across = cost.call_seconds("all-gather", size, 8, H100, 8)
    shared = cost.call_seconds("all-gather", size, 16, H100, 1)
    assert inside < shared < across, "eight cards of a host serve a group that fills it, one a group of one rank a host"
    assert cost.call_seconds("all-gather", size, 8, RACK, 8) < across, "72 devices of a rack share the fast link"
    assert cost.call_seconds("send", size, 2, H100, 1) < cost.call_seconds("send", size, 2, H100, 8)


@pytest.mark.parametrize(("hosts", "copies"), [(2, 8), (4, 8), (8, 4)])
def test_a_row_crosses_once_to_a_host_of_several_chosen_ranks(hosts: int, copies: int) -> None:
    size = 1 << 32
    plain = cost.call_seconds("all-to-all", size, 8 * hosts, H100, 1)
    once = cost.call_seconds("all-to-all", size, 8 * hosts, H100, 1, copies=copies)
    # Of `hosts` drawn `copies` times, so many are drawn at all.
    reached = hosts * (1 - (1 - 1 / hosts) ** copies)
    assert once / plain == pytest.approx(reached / copies, rel=0.05)
    inside = cost.call_seconds("all-to-all", size, 8, H100, 1, copies=copies)
    assert inside == cost.call_seconds("all-to-all", size, 8, H100, 1)


def test_large_calls_reach_the_bandwidth_that_was_measured() -> None:
    """aiconfigurator's tables: 8 H100s all-reduce at 445 GB/s of bus bandwidth, 8 A100s at 222."""
    for device, measured in ((H100, 445e9), (A100, 222e9)):
        size = 1 << 29
        assert 2 * 7 / 8 * size / cost.call_seconds("all-reduce", size, 8, device, 1) == pytest.approx(
            measured, rel=0.12
        )


def small() -> Work:
    spec = ModelSpec.load("1b")
    layout = resolve(
        Layout.parse("dp=1,tp=4,micro_batch=2"), spec, sequence=2048, global_batch=2, runtime=False
    )  # fmt: skip
    return workload.work(workload.Case(spec, 2048, NEMO), layout, "layers.0")


def priced(work: Work, calls: tuple[Collective, ...], system: software.Software) -> StageSeconds:
    seconds = [(one, cost.call_seconds(one.operation, one.bytes, one.size, H100, 1)) for one in calls]
    return cost.exchanged(cost.computed(work, H100, system, "bf16", {}), seconds, H100, system)


def test_terms_add_up_to_the_phases() -> None:
    work = small()
    calls = (
        Collective("tp", "all-gather", 1 << 24, 4, 2, "forward"),
        Collective("tp", "reduce-scatter", 1 << 24, 4, 2, "input"),
    )
    found = priced(work, calls, NEMO)
    assert sum(found.terms.values()) == pytest.approx(found.forward + found.input + found.weight)
    assert found.terms["tp"] > 0
    assert found.terms["products"] > found.terms["elementwise"] > 0


def test_overlap_hides_but_slows_what_it_hides_behind() -> None:
    work = small()
    call = (Collective("tp", "all-gather", 1 << 22, 4, 1, "forward"),)

    def exposed(share: float) -> float:
        system = msgspec.structs.replace(NEMO, overlap_tensor=share)
        return priced(work, call, system).terms["tp"]

    alone = cost.call_seconds("all-gather", 1 << 22, 4, H100, 1)
    assert exposed(0.0) == pytest.approx(alone)
    assert exposed(1.0) == pytest.approx(alone * (NEMO.contention - 1))
    assert exposed(1.0) < exposed(0.5) < exposed(0.0)


def test_a_slow_host_bounds_small_kernels_and_a_graph_frees_them() -> None:
    tiny = Work((Operation("norm", "memory", "forward", "norm", (), 0, 1024, count=10),), ())
    eager = priced(tiny, (), NEMO)
    graph = priced(tiny, (), msgspec.structs.replace(NEMO, graphs=True))
    assert eager.forward == pytest.approx(10 * NEMO.kernels * H100.host)
    assert graph.forward < eager.forward
    assert "launch" not in graph.terms


def test_fused_attention_counts_what_is_seen_and_plain_attention_the_square() -> None:
    shape = (1, 4096, 4096, 32, 32, 128, 128, 0)
    flops = 2 * 32 * 4096 * 4097 // 2 * 256
    one = Operation("attention", "attention", "forward", "core", shape, flops, 0)
    fused = cost.operation_seconds(one, A100, software.load("megatron"), "bf16")
    plain = cost.operation_seconds(one, A100, software.load("megatron", "2021-04"), "bf16")
    assert fused >= flops / A100.flops("bf16")
    assert plain > 3 * fused


def test_an_older_kernel_is_slower_on_a_newer_device() -> None:
    one = Operation("attention", "attention", "forward", "core", (1, 8192, 8192, 32, 32, 128, 128, 0), 10**12, 0)

    def seconds(device: machine.Machine, kernel: str) -> float:
        return cost.operation_seconds(one, device, msgspec.structs.replace(NEMO, kernel=kernel), "bf16")

    assert seconds(A100, "best") == seconds(A100, "flash2") < seconds(A100, "flash1")
    assert seconds(H100, "best") < seconds(H100, "flash2") < seconds(H100, "flash1")


def test_the_interval_widens_where_less_is_known() -> None:
    def width(*args: object) -> float:
        found = cost.interval(1.0, *args)  # pyright: ignore[reportArgumentType]
        assert found.p10 < found.p50 == 1.0 < found.p90
        assert math.isclose(found.p10 * found.p90, 1.0)
        return found.p90 / found.p10

    assert width(H100, NEMO) < width(H100, NEMO, "fp8") < width(H100, NEMO, "fp4")
    assert width(H100, NEMO) < width(machine.load("mi300x"), NEMO)
    assert width(H100, NEMO) < width(H100, NEMO, "bf16", True)


def test_a_cluster_is_a_kind_with_what_was_measured() -> None:
    found = cost.machine(ClusterSpec("h100", 64, 8, 0, measured={"bandwidth": 3e12}))
    assert (found.bandwidth, found.peak) == (3e12, H100.peak)
    with pytest.raises(InputError, match="no device"):
        cost.machine(ClusterSpec("abacus", 64, 8, 0))
    with pytest.raises(InputError, match="measured"):
        cost.machine(ClusterSpec("h100", 64, 8, 0, measured={"bandwidth": "fast"}))
