"""Answers that return: a label set and what is wrong with it, or one answer of free text that many rows have."""

from __future__ import annotations

import statistics
from array import array
from collections import Counter, defaultdict
from collections.abc import Sequence

import numpy as np

from shikomi.data.findings._finding import Findings
from shikomi.data.findings._index import Index
from shikomi.data.findings._texts import Texts
from shikomi.data.findings.answers import is_placeholder
from shikomi.errors import nearest

LONGEST = 200
"""Characters of an answer that is compared with others."""

MOST_LABELS = 200
ROWS_PER_LABEL = 5
LONGEST_LABEL = 60
DISTINCT_KEPT = 300_000

IMBALANCE, DOMINANT = 20, 0.9
FEW_ROWS = 5
RETURNS, RETURNS_ROWS = 0.01, 10
"""Share and number of rows from which on one answer of free text returns often."""

RARE_LABEL = 2
"""Rows up to which a label may be a misspelt one; the right one has ten times as many."""


class Labels:
    """Collects the only answer of each row."""

    def __init__(self, given: Sequence[str] | None) -> None:
        self._given = given
        self._ids: dict[str, int] = {}
        self._answers = array("i")  # -1: no answer that is compared
        self._spelling: dict[str, str] = {}

    def add(self, texts: Texts) -> None:
        """The next row."""
        answer = texts.answer if texts.kind == "conversations" and texts.prompt else None
        if answer is None or len(answer) > LONGEST or (answer not in self._ids and len(self._ids) >= DISTINCT_KEPT):
            self._answers.append(-1)
        else:
            self._answers.append(self._ids.setdefault(answer, len(self._ids)))

    def spelling(self) -> dict[str, str]:
        """After `finish`: the label for each of its other spellings."""
        return self._spelling

    def finish(self, index: Index, findings: Findings) -> dict[str, int] | None:
        """Findings of all answers together. Returns the rows of each training label, None where there are no labels."""
        train = np.asarray(index.roles) == 0
        answers = np.asarray(self._answers)
        names = list(self._ids)
        numbers = np.bincount(answers[train & (answers >= 0)], minlength=len(names)).tolist() if names else []
        counts = Counter({name: n for name, n in zip(names, numbers, strict=True) if n})
        if not self._are_labels(counts, int(train.sum())):
            self._free_text(names, numbers, answers, train, index, findings)
            return None
        self._balance(counts, findings)
        self._spellings(counts, answers, index, findings)
        self._unknown(counts, answers, train, index, findings)
        return dict(counts.most_common())

    def _are_labels(self, counts: Counter[str], rows: int) -> bool:
        if self._given is not None:
            return bool(counts)
        few = 2 <= len(counts) <= MOST_LABELS and len(counts) * ROWS_PER_LABEL <= rows
        answered = sum(counts.values()) > 0.9 * rows
        return few and answered and max(map(len, counts)) <= LONGEST_LABEL

    def _balance(self, counts: Counter[str], findings: Findings) -> None:
        label, most = counts.most_common(1)[0]
        median, total = statistics.median(counts.values()), sum(counts.values())
        if len(counts) > 1 and (most > IMBALANCE * median or most > DOMINANT * total):
            findings.say(
                "D601",
                f"{label!r} has {most:,} of {total:,} rows ({most / total:.0%}); the median label has {median:,.0f}",
            )
        rare = [name for name, n in counts.items() if n < FEW_ROWS]
        if rare and total >= 20 * len(counts):
            shown = ", ".join(f"{name!r} ({counts[name]})" for name in sorted(rare, key=lambda name: counts[name])[:20])
            findings.say("D602", shown, len(rare))

    def _spellings(self, counts: Counter[str], answers: np.ndarray, index: Index, findings: Findings) -> None:
        groups: defaultdict[str, list[str]] = defaultdict(list)
        for name in self._ids:
            groups[" ".join(name.split()).casefold().rstrip(".")].append(name)
        right = {key: max(group, key=lambda name: (counts[name], name)) for key, group in groups.items()}
        for key, group in groups.items():
            for name in group:
                if name != right[key]:
                    self._spelling[name] = right[key]
                    self._name_rows("D603", name, f"elsewhere {right[key]!r}", answers, index, findings)
        frequent = [name for name in right.values() if counts[name] >= 10 * RARE_LABEL]
        for name in right.values():
            close = nearest(name, frequent) if 0 < counts[name] <= RARE_LABEL and len(name) > 3 else None
            if close is not None and close != name and _letters_apart(name.casefold(), close.casefold()) <= 2:
                note = f"did you mean {close!r}, which has {counts[close]:,} rows?"
                self._name_rows("D604", name, note, answers, index, findings)

    def _unknown(
        self, counts: Counter[str], answers: np.ndarray, train: np.ndarray, index: Index, findings: Findings
    ) -> None:
        names = list(self._ids)
        for row in np.flatnonzero(~train & (answers >= 0)).tolist():
            name = names[answers[row]]
            if counts[name] == 0 and name not in self._spelling:
                findings.add("D303", *index.place(row), index.answer(row), f"label of a {index.role(row)} row")

    def _free_text(
        self,
        names: list[str],
        numbers: list[int],
        answers: np.ndarray,
        train: np.ndarray,
        index: Index,
        findings: Findings,
    ) -> None:
        for number in [number for number, name in enumerate(names) if is_placeholder(name)]:
            for row in np.flatnonzero(answers == number).tolist():
                findings.add("D805", *index.place(row), index.answer(row))
        often = max(RETURNS_ROWS, RETURNS * int(train.sum()))
        for name, count in sorted(zip(names, numbers, strict=True), key=lambda pair: -pair[1]):
            if count < often:
                return
            if not is_placeholder(name):
                findings.say("D204", f"{name[:60]!r} in {count:,} rows", count)

    def _name_rows(
        self, code: str, name: str, note: str, answers: np.ndarray, index: Index, findings: Findings
    ) -> None:
        for row in np.flatnonzero(answers == self._ids[name]).tolist():
            findings.add(code, *index.place(row), index.answer(row), note)


def _letters_apart(a: str, b: str) -> int:
    """Levenshtein distance."""
    before = list(range(len(b) + 1))
    for i, x in enumerate(a, start=1):
        now = [i]
        for j, y in enumerate(b, start=1):
            now.append(min(before[j] + 1, now[-1] + 1, before[j - 1] + (x != y)))
        before = now
    return before[-1]
