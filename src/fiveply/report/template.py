"""How a page is made of the files beside this one: a template, with style, scripts and data put in whole."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from importlib.resources import files
from typing import Any

import jinja2
import msgspec
from markupsafe import Markup


def beside(name: str) -> str:
    """The text of a file in this folder."""
    return files("fiveply.report").joinpath(name).read_text(encoding="utf-8")


def filled(template: str, filters: Mapping[str, Callable[..., Any]], /, **values: Any) -> str:
    """The file `template` with these values: escaped, and refused where one is missing."""
    environment = jinja2.Environment(
        autoescape=True, trim_blocks=True, lstrip_blocks=True, undefined=jinja2.StrictUndefined
    )
    environment.filters |= filters
    return environment.from_string(beside(template)).render(values)


def embedded(value: Any) -> Markup:
    """JSON for a script element, which only "<" could end early."""
    return Markup(msgspec.json.encode(value).decode().replace("<", "\\u003c"))
