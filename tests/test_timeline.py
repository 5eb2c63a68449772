"""A recorded step as data: pieces of nested spans, where the time went, transfers at both ends, the file."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fiveply import timeline
from fiveply.spec.errors import InputError
from fiveply.timeline import Event, Lane, RecordedStep, innermost, matched, shares


def span(rank: int, kind: str, start: float, end: float, **more: object) -> Event:
    return Event(rank, kind, -1, -1, start, end, **more)  # type: ignore[arg-type]


def step(*events: Event, pp: int = 2, ends: tuple[float, ...] = (10, 10)) -> RecordedStep:
    lanes = [Lane(rank, pp=rank, start=0, end=end) for rank, end in enumerate(ends)]
    return RecordedStep(7, f"pp={pp}", "1f1b", pp, 1, 2, lanes, list(events))


def test_shares_of_a_pipeline_of_two() -> None:
    recorded = step(
        span(0, "step", 0, 10),
        span(0, "data", 0, 1),
        span(0, "forward", 1, 4),
        span(0, "wait", 2, 2.5, operation="all-reduce", axis="tp"),
        span(0, "receive_backward", 4, 6),
        span(0, "wait", 4, 5.5, operation="receive", axis="pp"),
        span(0, "backward", 6, 8),
        span(0, "optimizer", 8, 9),
        span(1, "step", 0, 10),
        span(1, "forward", 1, 3),
        span(1, "backward", 3, 5),
        span(1, "wait", 5, 9.5, operation="all-reduce", axis="world"),
    )
    found = shares(recorded)
    assert found[0] == pytest.approx(
        {"compute": 4.5, "communication": 0.5, "bubble": 1.5, "data": 1, "optimizer": 1, "rest": 1.5}
    )
    # Until rank 0 computes no more, at 8, rank 1's wait is the schedule's drain; from there on it is communication.
    assert found[1] == pytest.approx(
        {"compute": 4, "communication": 1.5, "bubble": 3, "data": 0, "optimizer": 0, "rest": 1.5}
    )


@given(st.data())
def test_shares_sum_to_the_step(data: st.DataObject) -> None:
    kinds = ("forward", "backward", "wait", "issue", "data", "optimizer", "finish", "receive_forward")

    def nested(rank: int, low: float, high: float, depth: int) -> list[Event]:
        cuts = sorted(data.draw(st.lists(st.floats(low, high), max_size=4)))
        found: list[Event] = []
        for start, end in zip(cuts[::2], cuts[1::2], strict=False):
            kind, operation = data.draw(st.sampled_from(kinds)), data.draw(st.sampled_from(("receive", "all-reduce")))
            found += [span(rank, kind, start, end, operation=operation)]
            found += nested(rank, start, end, depth - 1) if depth else []
        return found

    recorded = step(*nested(0, 0, 10, 2), *nested(1, 0, 8, 2), ends=(10, 8))
    for rank, end in enumerate((10, 8)):
        assert sum(shares(recorded)[rank].values()) == pytest.approx(end)
        assert all(value >= -1e-9 for value in shares(recorded)[rank].values())


def test_nested_spans_are_cut_into_pieces() -> None:
    outer, a, b, inner = span(0, "step", 0, 9), span(0, "a", 1, 4), span(0, "b", 4, 6), span(0, "c", 2, 3)
    pieces = [(event.kind, low, high) for event, low, high in innermost([outer, a, inner, b])]
    assert pieces == [("step", 0, 1), ("a", 1, 2), ("c", 2, 3), ("a", 3, 4), ("b", 4, 6), ("step", 6, 9)]


def test_a_transfer_lasts_from_its_send_to_its_being_taken() -> None:
    def transfer(rank: int, operation: str, peer: int, start: float, end: float, number: int) -> Event:
        return span(rank, "transfer", start, end, lane="communication", operation=operation, peer=peer, number=number)

    events = matched([
        transfer(1, "receive", 0, 0.0, 3.0, 1), transfer(0, "send", 1, 2.0, 9.0, 1),
        transfer(1, "receive", 0, 3.1, 5.0, 2), transfer(0, "send", 1, 4.0, 9.0, 2),
        transfer(0, "receive", 1, 0.0, 8.0, 3), transfer(1, "send", 0, 6.0, 9.0, 3),
        span(0, "collective", 1.0, 2.0, lane="communication", operation="all-reduce"),
    ])  # fmt: skip
    times = [(event.rank, event.operation, event.start, event.end) for event in events]
    assert times == [
        (1, "receive", 2.0, 3.0), (0, "send", 2.0, 3.0), (1, "receive", 4.0, 5.0), (0, "send", 4.0, 5.0),
        (0, "receive", 6.0, 8.0), (1, "send", 6.0, 8.0), (0, "all-reduce", 1.0, 2.0),
    ]  # fmt: skip


def test_a_file_gives_back_what_was_written_and_a_damaged_one_is_named(tmp_path: Path) -> None:
    recorded = step(span(0, "forward", 0, 1), span(1, "wait", 0, 1, axis="dp", operation="all-reduce", bytes=8))
    path = timeline.write(recorded, tmp_path)
    assert path == tmp_path / "timeline" / "step-00000007.json"
    assert timeline.recorded_steps(tmp_path) == [path]
    assert timeline.read(path) == recorded
    path.write_bytes(path.read_bytes()[:-10])
    with pytest.raises(InputError, match=r"step-00000007\.json: damaged .*; remove it"):
        timeline.read(path)
