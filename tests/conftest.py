"""What all tests share: the choice of what ranks talk through, and a browser."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from typing import TYPE_CHECKING

import chromium
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


@pytest.fixture(scope="session")
def browser() -> Iterator[chromium.Browser]:
    """One for all tests of pages; they are skipped where there is none."""
    if chromium.PROGRAM is None:
        pytest.skip("no chromium, chromium-browser or google-chrome in PATH")
    with chromium.Browser() as browser:
        yield browser
