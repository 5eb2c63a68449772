from __future__ import annotations
def render(found, model, reasons): return ""
