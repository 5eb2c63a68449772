"""How a page is made of the files beside this one: a template, with style, scripts and data put in whole."""

from __future__ import annotations

from importlib.resources import files
from typing import Any

import jinja2
import msgspec
from markupsafe import Markup


def beside(name: str) -> str:
    """The text of a file in this folder."""
    return files("fiveply.report").joinpath(name).read_text(encoding="utf-8")


def environment() -> jinja2.Environment:
    """Escapes what it is given, and refuses names that it is not."""
    return jinja2.Environment(autoescape=True, trim_blocks=True, lstrip_blocks=True, undefined=jinja2.StrictUndefined)


def embedded(value: Any) -> Markup:
    """JSON for a script element, which only "<" could end early."""
    return Markup(msgspec.json.encode(value).decode().replace("<", "\\u003c"))
