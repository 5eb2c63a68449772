"""Advice on Megatron-LM arguments, in the terminal."""

from __future__ import annotations

from fiveply.plan.advice import Advice
from fiveply.plan.explain import TERMS, Ranked, interval_text
from fiveply.report.plan_text import layout_text
from fiveply.report.text import bytes_text, count_text


def shown(advice: Advice) -> str:
    """What was understood, what it leads to, and what to change."""
    given, now, best = advice.given, advice.now, advice.best
    lines = [
        f"Understood: {layout_text(now)}, {given.global_batch:,} rows of {given.sequence:,} tokens, {given.precision}",
        *(f"Note: {note}" for note in given.notes),
        *_figures(now),
        "Lost to: " + ", ".join(f"{TERMS.get(name, name)} {seconds:.2f} s" for name, seconds in now.waterfall[1:6]),
    ]
    if best is None:
        fits = now.worst <= now.capacity
        return "\n".join(
            [*lines, "Nothing that Megatron-LM runs is faster." if fits else "No layout of these devices fits."]
        )
    gain = now.prediction.seconds.p50 / best.prediction.seconds.p50 - 1
    lines += [
        "",
        f"Better: {layout_text(best)}" + (f" ({gain:.1%} more tokens a second)" if gain > 0 else ""),
        *_figures(best),
        "Change:",
        *(f"  {change}" for change in advice.changes),
    ]
    return "\n".join(lines)


def _figures(one: Ranked) -> list[str]:
    over = "" if one.worst <= one.capacity else ", more than there is"
    return [
        f"Step: {interval_text(one.prediction.seconds)}, {count_text(one.tokens_per_second_per_device)} tokens/s a device, "
        f"MFU {one.mfu:.1%}",
        f"Memory of the worst rank: {bytes_text(one.worst)} of {bytes_text(one.capacity)}{over} "
        f"(out of memory: {one.prediction.p_oom:.0%})",
    ]
