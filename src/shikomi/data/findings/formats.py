"""Which code a problem of the format has, by what it says."""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import replace

from shikomi.data.findings._finding import Findings, excerpt
from shikomi.data.problems import Problems
from shikomi.errors import Problem

_CODES: tuple[tuple[str, str], ...] = (
    ("D103", r"of no known format|this objective learns from|row of preferences|given, and this row"),
    ("D104", r"mixes row formats"),
    ("D110", r"answer different prompts|not in the turns|not the beginning|no common beginning"),
    ("D111", r"in all rows|^all answers are"),
    (
        "D112",
        r"refuses|chat template|tokenizer|prefix-stable|renders|writes the prompt|does not write|"
        r"are too long|no row has",
    ),
    ("D108", r"NUL character|surrogate|noncharacter"),
    ("D109", r"not in the label set"),
    ("D105", r"\bempty$|is empty|no turns"),
    ("D106", r"turn|tool_calls|tool call|conversation|role|train: false|no trained token"),
    (
        "D102",
        r"JSON|NUL byte|UTF-8|byte order mark|not an object|number of cells|CSV|column name occurs twice|nested",
    ),
)
"""Codes by what is said of a problem at a line; the first that fits. Anything else there is D107."""

_WHOLE_FILE = re.compile(r"no such file|no folder|no files|no data files|kind of file|no rows|UTF-16|Parquet|hub|read:")


def code_of(problem: Problem) -> str:
    """The code of a problem that reading or parsing met."""
    if _WHOLE_FILE.search(problem.what) or (problem.line is None and "compressed" in problem.what):
        return "D101"
    return next((code for code, said in _CODES if re.search(said, problem.what)), "D107")


class FormatProblems(Problems):
    """Takes the problems of passes over rows and hands them on as findings."""

    def __init__(self, findings: Findings) -> None:
        super().__init__()
        self._findings = findings

    def add(self, problems: Problem | Iterable[Problem]) -> None:
        """Take one problem or several."""
        for problem in [problems] if isinstance(problems, Problem) else problems:
            super().add(problem)
            said = str(replace(problem, file=None, line=None))
            self._findings.add(code_of(problem), problem.file, problem.line, excerpt(problem.found or ""), said)
