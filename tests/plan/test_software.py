"""Systems: their files load, and a vintage is the newest at or before the month asked for."""

import pytest

from fiveply.plan import software
from fiveply.spec.errors import InputError


@pytest.mark.parametrize("name", software.names())
def test_a_file_loads(name: str) -> None:
    found = software.load(name)
    assert found.name == name
    assert found.parameter_bytes > 0
    assert 0 <= found.overlap_gradients <= 1


def test_a_vintage_holds_until_the_next() -> None:
    early, later, newest = (software.load("megatron", month) for month in ("2021-09", "2022-12", ""))
    assert (early.vintage, later.vintage) == ("2021-04", "2022-05")
    assert not early.sequence_parallel
    assert later.sequence_parallel
    assert not later.flash
    assert newest.flash


def test_before_the_first_vintage_stands_the_first() -> None:
    assert software.load("megatron", "2019-01") == software.load("megatron", "2021-04")


def test_like_starts_from_another_system() -> None:
    assert software.load("primus").loss == software.load("nemo").loss


def test_an_unknown_system_is_named() -> None:
    with pytest.raises(InputError, match="no system 'abacus'"):
        software.load("abacus")
