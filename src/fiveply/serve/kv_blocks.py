"""The key-value cache's blocks: who holds which, and which hold what later prompts begin with.

Notable: a full block is known by a digest of its tokens and of all before them, so equal beginnings of two requests share
blocks. A shared block is full and never written again, hence nothing is ever copied. A block that nobody holds any more keeps
its content until its place is needed, the longest unused first.

It knows block numbers alone: which rank keeps what in a block is `engine/paged_attention.py`'s.
"""

from __future__ import annotations

import hashlib
from array import array
from collections.abc import Sequence

from fiveply.serve.messages import BLOCK


def extend_digests(digests: list[bytes], tokens: Sequence[int]) -> None:
    """Append the digest of each full block of `tokens` that `digests` lacks."""
    for index in range(len(digests), len(tokens) // BLOCK):
        before = digests[-1] if digests else b""
        block = array("q", tokens[index * BLOCK : (index + 1) * BLOCK]).tobytes()
        digests.append(hashlib.blake2b(before + block, digest_size=16).digest())


class BlockPool:
    """Blocks 0 to `total` - 1. `reuse=False`: no block is found again."""

    def __init__(self, total: int, *, reuse: bool = True) -> None:
        self.total, self.reuse = total, reuse
        self._holders = [0] * total
        self._blank = list(range(total - 1, -1, -1))
        self._idle: dict[int, None] = {}  # held by nobody, known by digest; in order of release
        self._digest_of: dict[int, bytes] = {}
        self._block_of: dict[bytes, int] = {}

    @property
    def free(self) -> int:
        """Blocks that `allocate` could give."""
        return len(self._blank) + len(self._idle)

    def find(self, digests: Sequence[bytes]) -> list[int]:
        """The blocks of the longest known beginning; nothing is held yet."""
        found: list[int] = []
        for digest in digests:
            block = self._block_of.get(digest)
            if block is None:
                break
            found.append(block)
        return found

    def idle(self, blocks: Sequence[int]) -> int:
        """How many of `blocks` nobody holds."""
        return sum(self._holders[block] == 0 for block in blocks)

    def hold(self, blocks: Sequence[int]) -> None:
        """One more holder for blocks that `find` gave."""
        for block in blocks:
            self._idle.pop(block, None)
            self._holders[block] += 1

    def allocate(self, count: int) -> list[int] | None:
        """New blocks with one holder, or None where there are not so many."""
        if count > self.free:
            return None
        blocks: list[int] = []
        for _ in range(count):
            if self._blank:
                block = self._blank.pop()
            else:
                block = next(iter(self._idle))
                del self._idle[block]
                del self._block_of[self._digest_of.pop(block)]
            self._holders[block] = 1
            blocks.append(block)
        return blocks

    def know(self, block: int, digest: bytes) -> None:
        """A held block is full now. Where another block is known by this digest, that one stays the one to be found."""
        if self.reuse and digest not in self._block_of and block not in self._digest_of:
            self._digest_of[block], self._block_of[digest] = digest, block

    def release(self, blocks: Sequence[int]) -> None:
        """One holder less; the last blocks of a sequence give way first."""
        for block in reversed(blocks):
            self._holders[block] -= 1
            if self._holders[block]:
                continue
            if block in self._digest_of:
                self._idle[block] = None
            else:
                self._blank.append(block)
