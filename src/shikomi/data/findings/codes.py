"""The codes of all findings about data: how bad each is, what it means, what is healthy, and what to do.

They are written in codes.yaml beside this file. A code never changes its meaning. The first digit after D is the
family: 1 format, 2 copies, 3 splits, 4 languages, 5 characters, 6 labels, 7 lengths, 8 answers, 9 secrets and personal
data; P is for preferences.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Literal

import yaml

Severity = Literal["error", "warning", "note"]
Repair = Literal["rewrite", "drop"]

SEVERITIES: tuple[Severity, ...] = ("error", "warning", "note")
"""The worst first."""


@dataclass(frozen=True)
class Code:
    """What a code means. `repair` says what `--fix` does: rewrite the text, drop the row, or nothing (None)."""

    code: str
    severity: Severity
    title: str
    meaning: str
    healthy: str
    fix: str
    repair: Repair | None = None


@cache
def codes() -> dict[str, Code]:
    """Every code by its name, in the order of the file."""
    text = Path(__file__).with_name("codes.yaml").read_text(encoding="utf-8")
    return {code: Code(code, **fields) for code, fields in yaml.safe_load(text).items()}
