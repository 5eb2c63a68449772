"""Make this process keep the memory that it frees, instead of giving it back to the system after every tensor.

Notable: glibc serves each large tensor by a mapping of its own and unmaps it when it dies, so the system clears every page
again at the next one: 36,000 page faults a step of a 15M-parameter model, 0.2 s of 1.4 (`docs/dev-log.md`).
"""

from __future__ import annotations

import ctypes

_TRIM_THRESHOLD, _TOP_PAD, _MMAP_MAX, _ARENA_MAX = -1, -2, -4, -8  # malloc.h


def keep_freed_memory() -> None:
    """One heap, grown by 64 MiB at a time, never trimmed. Does nothing where the C library is not glibc.

    For the rest of the process: so for ranks, and for programs that are fiveply's own, not for a user's that calls it.
    """
    if mallopt := getattr(ctypes.CDLL(None), "mallopt", None):
        for key, value in ((_ARENA_MAX, 1), (_MMAP_MAX, 0), (_TRIM_THRESHOLD, 2**31 - 4096), (_TOP_PAD, 64 << 20)):
            mallopt(key, value)
