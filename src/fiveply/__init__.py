"""fiveply: data, tensor, pipeline, context and expert parallelism for language models, in one object, the Layout."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from fiveply.own_equality import verify
    from fiveply.own_module import join
    from fiveply.spec.layout import Layout

__version__ = "0.1.0"
__all__ = ["Layout", "join", "verify"]

_HOMES = {"join": "fiveply.own_module", "verify": "fiveply.own_equality", "Layout": "fiveply.spec.layout"}


def __getattr__(name: str) -> Any:
    """The public names are loaded when they are used: `import fiveply.spec` must not import torch."""
    if name not in _HOMES:
        raise AttributeError(f"module 'fiveply' has no attribute '{name}'")
    return getattr(import_module(_HOMES[name]), name)
