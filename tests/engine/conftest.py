"""One thread everywhere: small products wait for a second one longer than they take, the more so where other tests run."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from fiveply.world.device import Devices


@pytest.fixture(autouse=True)
def one_thread(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(Devices, "threads_for", lambda self, ranks: 1)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)
