"""Numbers of the host on their way to the device, which nobody waits for.

Notable: a copy from ordinary memory makes the host wait until the device has done all that it was given before; one from pinned
memory does not, and torch keeps that memory until the copy is done. On a CPU nothing is copied.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor


def sent(
    values: Sequence[Any] | np.ndarray[Any, Any], device: torch.device, dtype: torch.dtype | None = None
) -> Tensor:
    """As a tensor on the device; an array's memory is shared there, if that is the CPU."""
    tensor = torch.as_tensor(values, dtype=dtype)
    if device.type == "cuda":
        tensor = tensor.pin_memory()
    return tensor.to(device, non_blocking=True)
