"""What all tests share: the choice of what ranks talk through."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from fiveply.world.mesh import Transport


def pytest_addoption(parser: pytest.Parser) -> None:
    usual = "shm" if sys.platform == "linux" else "gloo"
    parser.addoption(
        "--backend", choices=("shm", "gloo"), default=usual, help="what carries the layouts of the equality matrix"
    )


@pytest.fixture(scope="session")
def transport(pytestconfig: pytest.Config) -> Transport:
    """`--backend`: what ranks of a test talk through, where it leaves that open."""
    return pytestconfig.getoption("--backend")
