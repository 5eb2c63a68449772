"""What can go wrong because of the user or the run: one line that names the file, the key and the fix.

`fiveply.cli` turns these into exit codes: `InputError` is 2 (bad usage or input, known before anything ran), `RunError`
is 1 (a check or a run failed). Every other exception is a defect of fiveply and keeps its traceback.
"""

from __future__ import annotations


class FiveplyError(Exception):
    """Base of the errors that are shown as one line, without a traceback."""

    exit_code = 1


class InputError(FiveplyError):
    """Bad input: `where` (a file, a flag), `key` inside it, what is wrong, and how to mend it."""

    exit_code = 2

    def __init__(self, problem: str, *, where: str = "", key: str = "", fix: str = "") -> None:
        self.problem, self.where, self.key, self.fix = problem, where, key, fix
        super().__init__(problem)

    def __str__(self) -> str:
        place = ": ".join(part for part in (self.where, self.key) if part)
        text = f"{place}: {self.problem}" if place else self.problem
        return f"{text}; {self.fix}" if self.fix else text


class RunError(FiveplyError):
    """A run or a check failed for a reason that can be named (a dead rank, a full disk, a non-finite loss)."""
