"""One browser for all tests of the report; they are skipped where there is none."""

from __future__ import annotations

from collections.abc import Iterator

import chromium
import pytest


@pytest.fixture(scope="session")
def browser() -> Iterator[chromium.Browser]:
    if chromium.PROGRAM is None:
        pytest.skip("no chromium, chromium-browser or google-chrome in PATH")
    with chromium.Browser() as browser:
        yield browser
