"""Errors that a user can act on; each kind carries the exit code of the command that met it."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

EXIT_BAD_INPUT = 2
EXIT_NON_FINITE = 3
EXIT_TRY_AGAIN = 75
EXIT_INTERRUPTED = 130
EXIT_TERMINATED = 143


class ShikomiError(Exception):
    """Something the user can put right; the command prints `message` and leaves with `exit_code`."""

    exit_code: int = EXIT_BAD_INPUT

    def __init__(self, message: str) -> None:
        super().__init__(message)
        self.message = message


@dataclass(frozen=True)
class Problem:
    """One thing wrong with an input: where it is, what was found, what is allowed, how to fix it.

    `line` counts from 1. `str()` gives "file:line: what: found ..; allowed ..; fix: ..", leaving out what is not known.
    """

    what: str
    file: str | None = None
    line: int | None = None
    found: str | None = None
    allowed: str | None = None
    fix: str | None = None

    def __str__(self) -> str:
        place = self.file or ""
        if self.line is not None:
            place = f"{place}:{self.line}" if place else f"line {self.line}"
        details = []
        if self.found is not None:
            details.append(f"found {self.found}")
        if self.allowed is not None:
            details.append(f"allowed: {self.allowed}")
        if self.fix is not None:
            details.append(f"fix: {self.fix}")
        parts = [part for part in (place, self.what, "; ".join(details)) if part]
        return ": ".join(parts)


class BadInput(ShikomiError):
    """The recipe, the data, the model or the command line is wrong; nothing was written (exit code 2).

    Takes every problem at once, or one sentence. `problems` is always a list.
    """

    exit_code = EXIT_BAD_INPUT

    def __init__(self, problems: Sequence[Problem] | str) -> None:
        self.problems = [Problem(problems)] if isinstance(problems, str) else list(problems)
        super().__init__("\n".join(str(problem) for problem in self.problems))


class NonFinite(ShikomiError):
    """The loss or the gradient is not a finite number; stopped before the update (exit code 3)."""

    exit_code = EXIT_NON_FINITE


class TryAgain(ShikomiError):
    """The input is good but the machine was not ready: full disk, live writer, out of memory (exit code 75)."""

    exit_code = EXIT_TRY_AGAIN


class Stopped(ShikomiError):
    """A signal asked to stop; the step was finished and saved. `exit_code` is 143 (SIGTERM) or 130 (Ctrl-C)."""

    def __init__(self, message: str, exit_code: int = EXIT_TERMINATED) -> None:
        if exit_code not in (EXIT_INTERRUPTED, EXIT_TERMINATED):
            raise ValueError(f"exit_code of Stopped is {EXIT_INTERRUPTED} or {EXIT_TERMINATED}, not {exit_code}")
        super().__init__(message)
        self.exit_code = exit_code


def nearest(name: str, choices: Iterable[str]) -> str | None:
    """The choice that `name` was most likely meant to be, or None when nothing is close."""
    by_folded = {choice.lower().replace("-", "_"): choice for choice in choices}
    close = difflib.get_close_matches(name.lower().replace("-", "_"), by_folded, n=1, cutoff=0.6)
    return by_folded[close[0]] if close else None
