"""A plan file stands wherever a layout does, and says what is wrong with it."""

from __future__ import annotations

from pathlib import Path

import pytest

from fiveply.spec.cluster import ClusterSpec
from fiveply.spec.errors import InputError
from fiveply.spec.plan import Plan, layout_text

PLAN = Plan("dp=2,tp=4", "1b", ClusterSpec("h100", 8, 8, 80 * 2**30), 4096, 512)


def test_a_plan_is_read_back_as_it_was_saved(tmp_path: Path) -> None:
    PLAN.save(tmp_path / "run.plan")
    assert Plan.load(tmp_path / "run.plan") == PLAN
    assert layout_text(str(tmp_path / "run.plan")) == "dp=2,tp=4"
    assert layout_text("pp=2") == "pp=2"


@pytest.mark.parametrize("text", ["", "{}", '{"layout": "dp=2"}', "\xff"])
def test_a_damaged_plan_is_named(tmp_path: Path, text: str) -> None:
    file = tmp_path / "run.plan"
    file.write_bytes(text.encode("latin-1"))
    with pytest.raises(InputError, match=r"run\.plan: not a plan"):
        Plan.load(file)


def test_a_missing_plan_and_a_wrong_layout_are_named(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="no such plan"):
        layout_text(str(tmp_path / "none.plan"))
    file = tmp_path / "run.plan"
    Plan("dp=zero", "1b", PLAN.cluster, 1, 1).save(file)
    with pytest.raises(InputError, match=r"run\.plan: layout: dp"):
        Plan.load(file)
