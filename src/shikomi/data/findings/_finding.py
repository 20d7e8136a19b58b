"""What a check found, with the places; bounded, so that a file with a million bad rows gives counts and examples."""

from __future__ import annotations

import re
from dataclasses import asdict, dataclass, field
from typing import Any

from shikomi.data.findings.codes import SEVERITIES, Code, Severity, codes

PLACES_KEPT = 1000
"""Places that are listed for each code."""

EXCERPT = 80
"""Characters of an excerpt."""

_SPACE = re.compile(r"\s+")


@dataclass(frozen=True)
class Place:
    """Where something was found; `note` says what is special here. file and line (from 1) are None for whole sets."""

    file: str | None
    line: int | None
    excerpt: str = ""
    note: str = ""


@dataclass
class Finding:
    """Everything of one code: how often, the first places, and sentences on the whole set."""

    code: str
    count: int = 0
    places: list[Place] = field(default_factory=list)
    details: list[str] = field(default_factory=list)

    @property
    def about(self) -> Code:
        """What the code means."""
        return codes()[self.code]

    @property
    def severity(self) -> Severity:
        return self.about.severity

    @property
    def title(self) -> str:
        return self.about.title

    @property
    def fix(self) -> str:
        return self.about.fix

    def as_dict(self) -> dict[str, Any]:
        """As JSON data."""
        return {
            "code": self.code,
            "severity": self.severity,
            "title": self.title,
            "count": self.count,
            "fix": self.fix,
            "details": self.details,
            "places": [asdict(place) for place in self.places],
        }


class Findings:
    """Collects what checks find. `lines` holds every (file, line) of the codes whose rows `--fix` drops."""

    def __init__(self) -> None:
        self._found: dict[str, Finding] = {}
        self.lines: dict[tuple[str, int], str] = {}

    def add(self, code: str, file: str | None, line: int | None, excerpt: str = "", note: str = "") -> None:
        """One place."""
        finding = self._of(code)
        finding.count += 1
        if len(finding.places) < PLACES_KEPT:
            finding.places.append(Place(file, line, excerpt, note))
        if codes()[code].repair == "drop" and file is not None and line is not None:
            self.lines.setdefault((file, line), code)

    def say(self, code: str, detail: str, count: int = 1) -> None:
        """Something about the whole set, which stands at no line."""
        finding = self._of(code)
        finding.count += count
        finding.details.append(detail)

    def explain(self, code: str, detail: str) -> None:
        """A sentence more on a code, where it was found."""
        if code in self._found:
            self._found[code].details.append(detail)

    def count(self, code: str) -> int:
        """How often a code was found."""
        return self._found[code].count if code in self._found else 0

    def all(self) -> list[Finding]:
        """The worst first, then by code; the places by file and line."""
        for finding in self._found.values():
            finding.places.sort(key=lambda place: (place.file or "", place.line or 0))
        return sorted(self._found.values(), key=lambda finding: (SEVERITIES.index(finding.severity), finding.code))

    def _of(self, code: str) -> Finding:
        if code not in self._found:
            self._found[codes()[code].code] = Finding(code)
        return self._found[code]


def excerpt(text: str, start: int = 0, end: int | None = None) -> str:
    """EXCERPT characters of a text on one line; with a match from `start` to `end` those around it.

    What cannot be seen is written as its escape.
    """
    end = start if end is None else end
    before = max(0, start - max(0, (EXCERPT - (end - start)) // 2))
    piece = text[before : before + 2 * EXCERPT]
    seen = "".join(c if c.isprintable() or c.isspace() and c < "\x7f" and c not in "\x0b\x0c\x1c\x1d\x1e\x1f" else
                   c.encode("unicode_escape").decode() for c in piece)  # fmt: skip
    short = _SPACE.sub(" ", seen).strip()
    cut = short[:EXCERPT].rstrip()
    return ("… " if before else "") + cut + (" …" if len(cut) < len(short) or before + len(piece) < len(text) else "")
