"""Training rows with what can be repaired repaired, as a new file; the old one stays as it is."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from shikomi.data.checkup import Checkup
from shikomi.data.columns import column_templates
from shikomi.data.findings import characters, private
from shikomi.data.findings.codes import codes
from shikomi.data.problems import Problems
from shikomi.data.sources import Row, rows
from shikomi.data.writers import check_suffix, replaced, write_rows
from shikomi.errors import BadInput, Problem

if TYPE_CHECKING:
    from shikomi.recipe import DataSpec

ANSWER_KEYS = ("completion", "output")


@dataclass
class Repairs:
    """What a new file holds: `rows` were written, `dropped` rows left out by code, `rewritten` rows by what changed.

    left: what was found and is still there, by code.
    """

    path: Path
    rows: int = 0
    dropped: Counter[str] = field(default_factory=Counter)
    rewritten: Counter[str] = field(default_factory=Counter)
    left: dict[str, int] = field(default_factory=dict)

    def as_dict(self) -> dict[str, Any]:
        """As JSON data."""
        return {
            "path": str(self.path),
            "rows": self.rows,
            "dropped": dict(self.dropped),
            "rewritten": dict(self.rewritten),
            "left": self.left,
        }

    def lines(self) -> list[str]:
        """One sentence for each thing that was changed, and one for what was not."""
        out = [f"{self.path}: {self.rows:,} rows"]
        out += [f"  left out {n:,}: {codes()[code].title} ({code})" for code, n in sorted(self.dropped.items())]
        out += [f"  rewrote {n:,}: {what}" for what, n in sorted(self.rewritten.items())]
        if len(out) == 1:
            out.append("  nothing was changed")
        if self.left:
            out.append("  still there: " + ", ".join(f"{code} ({n:,})" for code, n in sorted(self.left.items())))
        return out


def check_output(path: Path, spec: DataSpec) -> None:
    """Raises BadInput where `repair` could not write: the file is there, or there are several sources."""
    check_suffix(path)
    if path.exists():
        fix = "name another file; nothing is written over"
        raise BadInput([Problem("the file to write is there already", str(path), fix=fix)])
    if len(spec.train) != 1:
        found = ", ".join(source.path for source in spec.train)
        raise BadInput(
            [Problem("--fix repairs one source at a time", found=found, fix="give the file, not the recipe")]
        )


def repair(spec: DataSpec, found: Checkup, path: Path) -> Repairs:
    """Write the training rows of `spec` to `path`, repaired as `found` says. Raises BadInput as `check_output` does."""
    check_output(path, spec)
    made = Repairs(path)
    template = column_templates(spec).get("completion")
    column = template.columns[0] if template is not None and template.parts[0] == ("", template.columns[0]) else None
    answers = (column,) if column is not None else ANSWER_KEYS

    def repaired() -> Iterator[dict[str, Any]]:
        made.dropped.clear()
        made.rewritten.clear()
        unread = Problems()  # what cannot be read was counted by the check
        for row in rows(spec.train[0], unread):
            code = found.dropped.get((row.file, row.line))
            if code is not None:
                made.dropped[code] += 1
            else:
                yield _rewritten(row, answers, found.spelling, made.rewritten)

    with replaced(path) as temporary:
        made.rows = write_rows(temporary, repaired)
    for finding in found.findings:
        if finding.code == "D102":
            made.dropped["D102"] = finding.count
        elif codes()[finding.code].repair is None:
            made.left[finding.code] = finding.count
    return made


def _rewritten(row: Row, answers: tuple[str, ...], spelling: dict[str, str], counts: Counter[str]) -> dict[str, Any]:
    """The row's columns with clean text; `counts` says in how many rows what was changed."""
    changed: set[str] = set()
    data = {key: _clean(value, changed) for key, value in row.data.items()}
    for key in answers:
        if isinstance(data.get(key), str) and data[key] in spelling:
            data[key] = spelling[data[key]]
            changed.add("label spelt as in the other rows (D603)")
    counts.update(changed)
    return data


def _clean(value: Any, changed: set[str]) -> Any:
    if isinstance(value, str):
        clean = characters.clean(value)
        if clean != value:
            changed.add("characters removed or decoded again (D108, D501, D502, D503)")
        masked = private.mask(clean)
        if masked != clean:
            changed.add("secrets and personal data masked (D901 to D905)")
        return masked
    if isinstance(value, dict):
        return {key: _clean(item, changed) for key, item in value.items()}
    if isinstance(value, list):
        return [_clean(item, changed) for item in value]
    return None if isinstance(value, float) and math.isnan(value) else value
